# SPDX-License-Identifier: Apache-2.0
"""Which modules have hooks: these are called as modules, the others are not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules import module as _torch_module

_KINDS_OF_HOOK = ("forward_pre", "forward", "backward_pre", "backward")


def have_hooks(blocks: Sequence[nn.Module]) -> list[bool]:
    """Which of the modules have hooks that a call would fire, their own or global ones."""
    everywhere = any(getattr(_torch_module, f"_global_{kind}_hooks") for kind in _KINDS_OF_HOOK)
    return [
        bool(
            everywhere
            or block._forward_hooks
            or block._forward_pre_hooks
            or block._backward_hooks
            or block._backward_pre_hooks
        )
        for block in blocks
    ]
