# SPDX-License-Identifier: Apache-2.0
"""Which modules have hooks: these are called as modules, the others are not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from revkernels.autograd.fused.known_layers import has_global_hooks, has_hooks


def have_hooks(blocks: Sequence[nn.Module]) -> list[bool]:
    """Which of the modules have hooks that a call would fire, their own or global ones."""
    everywhere = has_global_hooks()
    return [everywhere or has_hooks(block) for block in blocks]
