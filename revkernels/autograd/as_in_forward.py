# SPDX-License-Identifier: Apache-2.0
"""Runs a branch's recompute under the conditions of its forward, and restores everything behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from revkernels.autograd.fused.norm_context import ambient
from revkernels.autograd.recomputing import recomputes, set_recomputing
from revkernels.autograd.state.attributes import attributes_of, put_attributes_back
from revkernels.autograd.state.parametrized import hang_cached_weights
from revkernels.autograd.state.rewinding import Undo, put_back
from revkernels.autograd.state.rng_and_autocast import Drawn, Surroundings
from revkernels.autograd.state.snapshot import Snapshot

set_grad_enabled = torch._C._set_grad_enabled  # the C function below torch.set_grad_enabled: every half-step calls it


def run_as_in_forward(
    snapshot: Snapshot, surroundings: Surroundings, drawn: Drawn, run: Callable[[], Any], higher_order: bool
) -> Any:
    """What ``run`` returns, called with the modes, tensors, random numbers and autocast that the snapshot's branch saw.

    Inside ``with snapshot.turn``. ``higher_order``: whether gradients are enabled now, as they are again afterwards.
    """
    around: list[Callable[[], Any]] = []
    undo: Undo = []
    outer, kernels, is_same = recomputes(), (ambient.kernels, ambient.tape), snapshot.is_same()
    attributes = attributes_of(snapshot.looked_at(is_same))

    def put_all_back() -> None:
        set_recomputing(outer)
        set_grad_enabled(higher_order)
        ambient.kernels, ambient.tape = kernels
        put_back(undo)
        put_attributes_back(attributes)
        while around:
            around[-1]()
            around.pop()  # only now: it may have been interrupted

    try:  # any of these may run out of memory
        set_recomputing(True)
        surroundings.restore(drawn, around)
        snapshot.restore(undo, is_same)
        hang_cached_weights(snapshot.cached, undo)  # not in an inverse, whose gradient goes through torch's
        set_grad_enabled(True)
        return run()
    finally:
        try:
            put_all_back()
        except BaseException:  # an interrupt has cut it short
            put_all_back()
            raise
