# SPDX-License-Identifier: Apache-2.0
"""A training step of a network under growing memory budgets, from reconstructing to storing.

The measuring code is ``revkernels/bench/budget.py``.
``python -m benchmarks.bench_budget --save`` is ``revkernels bench budget --save``.
"""

import sys

from revkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "budget", *sys.argv[1:]]))
