# SPDX-License-Identifier: Apache-2.0
"""Benchmark scripts, run from the repository's root: ``python -m benchmarks.bench_coupling``. See README.md."""
