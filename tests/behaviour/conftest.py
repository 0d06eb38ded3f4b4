# SPDX-License-Identifier: Apache-2.0
"""Every situation is tried on the unfused and on the compiled backend, rebuilding and storing activations."""

import weakref

import pytest
from one_thread import one_thread  # noqa: F401


@pytest.fixture(params=["eager", "cpu"])
def backend(request, available):
    return available(request.param)


@pytest.fixture
def compiled(available):
    """The compiled backend alone."""
    return available("cpu")


@pytest.fixture(params=["reconstruct", "store"])
def activations(request):
    return request.param


@pytest.fixture
def options(backend, activations):
    return {"backend": backend, "activations": activations}


def pytest_collection_modifyitems(config, items):
    """Leave out what tries plain torch against plain torch: stored and unfused, but for the first kind of branches."""
    left_out = {"backend": "eager", "activations": "store"}

    def has_nothing_of_ours(item):
        params = getattr(getattr(item, "callspec", None), "params", {})
        return left_out.items() <= params.items() and not {"basic", "bottleneck"}.isdisjoint(map(str, params.values()))

    kept = [item for item in items if not has_nothing_of_ours(item)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if has_nothing_of_ours(item)])
        items[:] = kept


@pytest.fixture(params=["mlp", "basic", "bottleneck"])
def kind(request):
    """Branches of somebody's own, and the library's. Others of `KINDS` by indirect parametrisation."""
    from behaviour.common import KINDS

    return KINDS[request.param]


@pytest.fixture
def made(monkeypatch):
    """Outputs of norms and activations that are made again, by weak references."""
    from revkernels.autograd.planning import rematerialize

    seen, make = [], rematerialize.MadeAgain.make

    def noting(self):
        out = make(self)
        seen.append(weakref.ref(out))
        return out

    monkeypatch.setattr(rematerialize.MadeAgain, "make", noting)
    return seen
