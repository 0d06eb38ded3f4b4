# SPDX-License-Identifier: Apache-2.0
"""Peak activation memory of a training step against depth.

The measuring code is ``revkernels/bench/memory.py``.
``python -m benchmarks.bench_memory --save`` is ``revkernels bench memory --save``.
"""

import sys

from revkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "memory", *sys.argv[1:]]))
