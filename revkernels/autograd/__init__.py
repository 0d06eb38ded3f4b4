# SPDX-License-Identifier: Apache-2.0
"""Thin torch autograd over the kernels: the coupling's nodes, and the driver that rebuilds saved tensors."""
