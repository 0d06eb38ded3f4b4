# SPDX-License-Identifier: Apache-2.0
"""Parametrized weights that torch computes once for many uses, inside ``torch.nn.utils.parametrize.cached()``.

The use that computes a weight saves other tensors than those that find it, in the recompute as in the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from revkernels.autograd.ownership import PLAIN
from revkernels.autograd.state.rewinding import Undo, without_graph

Cached = dict[tuple[int, str], torch.Tensor]


def cached_weights(modules: Sequence[nn.Module]) -> Cached | None:
    """Those of these modules that are computed already, without their graphs, which hold the chain; None if torch
    caches none."""
    if not parametrize._cache_enabled:
        return None
    found: Cached = {}
    cache = parametrize._cache
    for module in modules:
        if "parametrizations" not in module._modules:
            continue
        layers: Any = module._modules["parametrizations"]
        for name in layers:
            value = cache.get((id(module), name))
            if type(value) in PLAIN:
                found[id(module), name] = without_graph(value)
    return found


def hang_cached_weights(cached: Cached | None, undo: Undo) -> None:
    """Before a recompute: let torch find what it found in the forward, and nothing else."""
    if cached is None and not parametrize._cache_enabled:
        return
    table = vars(parametrize)
    undo += [(table, name, table[name]) for name in ("_cache", "_cache_enabled")]
    table["_cache"], table["_cache_enabled"] = dict(cached or {}), int(cached is not None)
