# SPDX-License-Identifier: Apache-2.0
"""A training step of whole networks: stored, compiled, checkpointed, reconstructed, and in other libraries.

The measuring code is ``revkernels/bench/network.py``.
``python -m benchmarks.bench_network --save`` is ``revkernels bench network --save``.
"""

import sys

from revkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "network", *sys.argv[1:]]))
