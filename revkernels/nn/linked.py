# SPDX-License-Identifier: Apache-2.0
"""Reversible modules that a network calls one by one, but that form one chain.

    for layer in layers:            # each layer's forward is linked.run([HalfStep(...), ...], x, ...)
        x = layer(x)

`revkernels.nn.chain.run` would keep one output per call. Here a call whose input is exactly the output of the last
linked call continues that call, and its output replaces the earlier one: memory does not grow with the number of
layers. Anything in between starts a new chain, which keeps one more output: an operation, a hook that replaces the
output, a change in place, other options, the begin or end of a checkpoint or of other saved-tensor hooks; and if torch
cannot tell which saved-tensor hooks are on (2.6), every call under any such hooks. Results are the same either way. As
in one chain, the backward of an early output needs the parameters of the later calls unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from revkernels.autograd.driver_forward import Reversal
from revkernels.autograd.half_step import HalfStep
from revkernels.autograd.linked_calls import ending_in, mark
from revkernels.autograd.step_record import Rearrangement
from revkernels.nn.chain import Name, Options, forward
from revkernels.nn.streams import check_options
from revkernels.options import Activations

__all__ = ["MASKED", "HalfStep", "rearrange", "run"]

#: The form of a single stream; see `run`.
MASKED = (False, 1, 1)


def run(
    half_steps: Sequence[HalfStep],
    x: Any,
    groups: int,
    name: Name,
    *,
    split_dim: int = 1,
    activations: Activations = "reconstruct",
    backend: str | None = None,
) -> Any:
    """Run the half-steps, continuing the linked call that returned x.

    Args:
        half_steps, x, groups, name, split_dim, backend: see `revkernels.nn.chain.run`. With ``groups=1`` x is a tuple
            of one tensor, and a half-step adds to the stream that it reads: its branch must be zero wherever it reads
            its input, as in a coupling under a mask.
        activations: "reconstruct", or "store", which links nothing.

    Returns:
        y, or (y, [aux, ...]).
    """
    owner = Options(split_dim, activations, "float", backend)
    check_options(*owner)
    return forward(owner, x, groups, half_steps, name, linked=True)


def rearrange(
    x: torch.Tensor, there: Callable[[torch.Tensor], torch.Tensor], back: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return ``there(x)``: the same elements in other places, such as a permutation of features or a reshape.

    If a linked call of a single stream returned x, that call continues with the result, and ``back`` will restore x
    from it. Neither function may save more than a fixed index for its gradient.
    """
    reversal = _reversal_behind(x)
    if reversal is None:
        return there(x)
    reversal.reopen((x,), {}, lambda k: "a rearrangement")
    try:
        reversal.rearrange(Rearrangement(lambda x: (there(x),), lambda y: (back(y),)))
        y = reversal.show()
        reversal.finish(y, lambda *streams: streams)
    except BaseException:
        reversal.shut()
        raise
    mark(reversal, y, MASKED)
    return y[0]


def _reversal_behind(x: torch.Tensor) -> Reversal | None:
    if not torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return None
    return ending_in(x, MASKED, (x,), None)
