# SPDX-License-Identifier: Apache-2.0
"""What the driver itself costs a half-step, on branches that do next to nothing.

The measuring code is ``revkernels/bench/overhead.py``.
``python -m benchmarks.bench_overhead --save`` is ``revkernels bench overhead --save``.
"""

import sys

from revkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "overhead", *sys.argv[1:]]))
