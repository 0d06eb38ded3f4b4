# SPDX-License-Identifier: Apache-2.0
"""Triton kernels. `backend` has the functions and imports without Triton; kernels are compiled at the first call."""
