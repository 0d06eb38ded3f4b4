# SPDX-License-Identifier: Apache-2.0
"""What the tests of torch.compile share: a fresh compiler for each, what it made, and branches with a forward."""

import warnings

import pytest
from torch import nn

from behaviour.common import mlp, torch

counters = pytest.importorskip("torch._dynamo.utils").counters


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path, monkeypatch):
    """No compilation is left from another test, nothing is left on disk, and dynamo has nothing to complain about."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?is).*(dynamo|recompil)")
        yield
    torch._dynamo.reset()


def compiled(network, activations, backend="aot_eager", **options):
    """Compile ``network`` in place: in one graph where nothing is rebuilt."""
    network.compile(backend=backend, fullgraph=activations == "store", **options)
    return network


def graphs():
    return counters["stats"]["unique_graphs"]


def reasons():
    """Why graphs broke."""
    return list(counters["graph_break"])


class Within(nn.Module):
    """A module with a forward of its own: torch does not compile a bare nn.Sequential in place."""

    keywords = ()

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


class Masked(nn.Module):
    keywords = ("mask",)

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, *, mask=None):
        return self.body(x) if mask is None else self.body(x) * mask
