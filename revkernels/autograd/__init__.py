# SPDX-License-Identifier: Apache-2.0
"""Thin torch autograd over the kernels: the coupling's nodes, and the driver that recomputes saved tensors.

Start with `driver_forward`. The folders: `fused` (which layers are one kernel), `state` (what is restored for a
branch's recompute), `planning` (memory budgets). CONTRIBUTING.md lists every file.
"""
