# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1 for array libraries without autograd, or with their own: one file each, imported by name."""
