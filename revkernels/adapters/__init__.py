# SPDX-License-Identifier: Apache-2.0
"""The kernels for other array libraries."""
