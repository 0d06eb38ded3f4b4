# SPDX-License-Identifier: Apache-2.0
"""Measuring code for ``revkernels bench`` and the scripts in benchmarks/: one module per subject, one harness."""
