# SPDX-License-Identifier: Apache-2.0
"""Thin torch autograd over the kernels: the coupling's nodes, and the driver that rebuilds saved tensors.

Start with `driver_forward`. The folders: `fused` (which layers are one kernel), `state` (what a branch must find again
when it is run once more), `planning` (memory budgets). CONTRIBUTING.md lists every file.
"""
