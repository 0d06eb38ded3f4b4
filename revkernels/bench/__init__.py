# SPDX-License-Identifier: Apache-2.0
"""Measuring code behind ``revkernels bench`` and the scripts in benchmarks/: one module a subject, one harness."""
