# SPDX-License-Identifier: Apache-2.0
"""The kernels against the torch calls they replace.

The measuring code is ``revkernels/bench/coupling.py``.
``python -m benchmarks.bench_coupling --save`` is ``revkernels bench coupling --save``.
"""

import sys

from revkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "coupling", *sys.argv[1:]]))
