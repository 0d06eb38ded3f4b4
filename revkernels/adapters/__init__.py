# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1 for array libraries without autograd, or with one of their own: a file each, imported by name."""
