# SPDX-License-Identifier: Apache-2.0
"""What the tests of the integrations share."""

from __future__ import annotations

import copy
import pickle

import pytest
from behaviour.common import assert_same, loss_of, step, torch

from revkernels.integrations import restore
from revkernels.measure import peak_bytes


def package(name, pip=None):
    """The package, or every test of the file is skipped."""
    return pytest.importorskip(name, reason=f"needs {pip or name}: pip install {pip or name} (make test-all does)")


def original(network):
    """A copy of a changed network whose modules have their own classes again: with the package's own code."""
    twin = copy.deepcopy(network)
    restore(twin)
    return twin


def check_copies(network, x, *args, can_pickle=True, **kwargs):
    """Deep copies and pickles are changed networks as well, and step as it does."""
    copies = [copy.deepcopy(network)]
    if can_pickle:
        copies.append(pickle.loads(pickle.dumps(network)))
    kinds = [type(module) for module in network.modules()]
    expected = step(network, x, *args, **kwargs)
    for again in copies:
        assert [type(module) for module in again.modules()] == kinds
        assert_same(step(again, x, *args, **kwargs), expected, 1e-13)


def check_untouched(change, model):
    """Parameters and buffers are the same objects under the same names in the same order: before, after, restored."""

    def everything():
        named = [*model.named_parameters(), *model.named_buffers()]
        return [(name, id(t)) for name, t in named], list(model.state_dict()), list(dict(model.named_modules()))

    before, classes = everything(), [type(module) for module in model.modules()]
    replaced = change(model)
    assert everything() == before
    changed = {name for name, module in model.named_modules() if type(module) is not classes[_place(model, name)]}
    assert changed == set(replaced.modules)
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
    assert replaced.restore() == [name for name, _ in model.named_modules() if name in changed]
    assert everything() == before
    assert [type(module) for module in model.modules()] == classes
    return replaced


def _place(model, name):
    return list(dict(model.named_modules())).index(name)


def peaks_by_depth(make, change, x, depths, **kwargs):
    """Peak bytes of a training step at each depth, when the gradients are there already: {depth: (as it was, changed)}.

    Depth adds a few numbers for each module: versions, and states of generators.
    """
    found = {}
    for depth in depths:
        network = make(depth)

        def train(network=network):
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            loss_of(network(x, **kwargs)).backward()

        peaks = []
        for changing in (lambda network: None, change):
            changing(network)
            train()
            peaks.append(peak_bytes(train))
        found[depth] = tuple(peaks)
    return found


def check_compiled(network, plain, x, *args):
    """The whole network under torch.compile, which has a break at each chain, steps as it does in plain torch."""
    torch._dynamo.reset()
    got = step(torch.compile(network, backend="aot_eager"), x, *args)
    for what in ("parameters", "buffers"):
        setattr(got, what, {name.removeprefix("_orig_mod."): t for name, t in getattr(got, what).items()})
    assert_same(got, step(plain, x, *args))
    torch._dynamo.reset()


def generator_state():
    """Bytes of the state of torch's generator, which a half-step that draws from it keeps."""
    return torch.get_rng_state().numel()
