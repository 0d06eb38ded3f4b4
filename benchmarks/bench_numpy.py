# SPDX-License-Identifier: Apache-2.0
"""The kernels on NumPy arrays against the NumPy expressions they replace.

The measuring code is ``revkernels/bench/numpy.py``.
``python -m benchmarks.bench_numpy --save`` is ``revkernels bench numpy --save``.
"""

import sys

from revkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "numpy", *sys.argv[1:]]))
