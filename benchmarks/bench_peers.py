# SPDX-License-Identifier: Apache-2.0
"""A stage of reversible blocks, in this package and in other reversible libraries.

The measuring code is ``revkernels/bench/network.py``, the libraries' adapters are in ``revkernels/bench/peers/``.
``python -m benchmarks.bench_peers --save`` is ``revkernels bench peers --save``.
"""

import sys

from revkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "peers", *sys.argv[1:]]))
