# SPDX-License-Identifier: Apache-2.0
"""The reversible chains of a network."""

from __future__ import annotations

from typing import Any

from torch import nn

from revkernels.nn import ReversibleBlock, ReversibleSequential

__all__ = ["chains_of"]


def chains_of(net: Any) -> dict[str, ReversibleSequential | ReversibleBlock]:
    """Maps dotted names ("" for ``net`` itself) to chains; chains inside a chain are not listed.

    Raises:
        TypeError: ``net`` is not a module.
        ValueError: it has no chain.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is a {type(net).__name__}; it must be an nn.Module")
    found: dict[str, ReversibleSequential | ReversibleBlock] = {}
    for name, module in net.named_modules():
        if isinstance(module, ReversibleSequential) and not len(module):
            continue
        if isinstance(module, ReversibleSequential | ReversibleBlock) and not any(_inside(name, of) for of in found):
            found[name] = module
    if not found:
        raise ValueError("net has no reversible chain: no ReversibleSequential or ReversibleBlock with blocks inside")
    return found


def _inside(name: str, of: str) -> bool:
    return not of or name.startswith(f"{of}.")
