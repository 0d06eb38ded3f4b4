# SPDX-License-Identifier: Apache-2.0
"""Other reversible libraries, each with an adapter that makes a chain of given branches run on it.

An adapter defines ``chain(pairs) -> nn.Module`` from [(F, G), ...], a module that maps (x1, x2) to (y1, y2), and
``NOTE``, what its library does differently. It imports its library inside ``chain``: a library that is not installed
becomes a row that says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PEERS", "Joined", "Pairs", "Peer"]

Pairs = Sequence[tuple[nn.Module, nn.Module]]


@dataclass(frozen=True)
class Peer:
    """A library.

    Attributes:
        name: of the contender, and of the distribution on PyPI.
        adapter: the module here.
    """

    name: str
    adapter: str

    def version(self) -> str | None:
        """Return the installed version, or None."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def note(self) -> str:
        """Return what the library does differently."""
        return str(self._module().NOTE)

    def chain(self, pairs: Pairs) -> nn.Module:
        """Return the branches' chain as the library runs it; errors of its import propagate."""
        made: nn.Module = self._module().chain(pairs)
        return made

    def _module(self) -> Any:
        return importlib.import_module(f"{__name__}.{self.adapter}")


PEERS = (
    Peer("memcnn", "memcnn"),
    Peer("revlib", "revlib"),
    Peer("revtorch", "revtorch"),
    Peer("reformer-pytorch", "reformer"),
)


class Joined(nn.Module):
    """A chain of one tensor, wrapped for a pair of streams: they are joined before it and split after it."""

    def __init__(self, inner: nn.Module, dim: int = 1) -> None:
        super().__init__()
        self.inner = inner
        self.dim = dim

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y1, y2 = self.inner(torch.cat(pair, self.dim)).chunk(2, self.dim)
        return y1, y2
