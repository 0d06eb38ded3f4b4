# SPDX-License-Identifier: Apache-2.0
"""The fused norm kernels against the torch calls they replace: past the cache and in it.

The measuring code is ``revkernels/bench/passes.py``.
``python -m benchmarks.bench_passes --save`` is ``revkernels bench passes --save``.
"""

import sys

from revkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "passes", *sys.argv[1:]]))
