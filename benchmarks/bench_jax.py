# SPDX-License-Identifier: Apache-2.0
"""A training step of a chain of blocks under JAX: time, temporary memory, time to compile.

The measuring code is ``revkernels/bench/jax_chain.py``.
``python -m benchmarks.bench_jax --save`` is ``revkernels bench jax --save``.
"""

import sys

from revkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "jax", *sys.argv[1:]]))
