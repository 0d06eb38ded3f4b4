# SPDX-License-Identifier: Apache-2.0
"""A training step of a chain of blocks, stored, checkpointed and reconstructed.

The measuring code is ``revkernels/bench/block.py``.
``python -m benchmarks.bench_block --save`` is ``revkernels bench block --save``.
"""

import sys

from revkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "block", *sys.argv[1:]]))
