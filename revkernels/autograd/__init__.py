# SPDX-License-Identifier: Apache-2.0
"""Thin torch autograd over the kernels: the coupling's nodes, and the driver that rebuilds saved tensors.

Start with `reversal` (a chain's forward) and `rebuilding` (its backward). What they ask is in the three folders:
`fused` (which layers are one kernel), `state` (what a branch must find again), `planning` (memory budgets).
"""
