# SPDX-License-Identifier: Apache-2.0
"""What is known of a branch of plain layers from one half-step to the next, and what it takes not to believe it."""

import copy
import gc
import pickle
import weakref

import pytest
from torch import nn

from behaviour.common import rows, torch
from revkernels import native
from revkernels.autograd import plain_branch as module
from revkernels.autograd.plain_branch import plain_branch
from revkernels.nn import ReversibleBlock, ReversibleSequential

pytestmark = pytest.mark.usefixtures("compiled")


def branch():
    tied = nn.Linear(4, 4)
    return nn.Sequential(
        nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), tied, nn.Sequential(nn.Dropout(0.1), tied), nn.Linear(4, 4, False)
    )


def known(layers):
    found = plain_branch(layers)
    assert found is not None
    return found


def test_it_is_looked_through_once():
    layers = branch()
    first, tree = known(layers)
    assert set(tree[0]) == set(layers.modules()) and tree[0][0] is layers and len(tree[0]) == 8
    for _ in range(3):
        second, again = known(layers)
        assert second is first and again == tree
    layers[1].weight = nn.Parameter(torch.randn(4, 4))  # read from where it hangs
    assert known(layers)[0] is first


def rewired(layers):
    """The same modules, and each found in the same order."""
    layers[2][1] = layers[0][0]


CHANGES = {
    "a layer": lambda layers: layers.__setitem__(3, nn.Linear(4, 4, False)),
    "a layer more": lambda layers: layers.append(nn.ReLU()),
    "a layer less": lambda layers: layers.__delitem__(3),
    "none of it": lambda layers: layers._modules.__setitem__("3", None),
    "its name": lambda layers: layers._modules.__setitem__("last", layers._modules.pop("3")),
    "the mode": lambda layers: layers[2].eval(),
    "an option": lambda layers: setattr(layers[2][0], "p", 0.2),
    "an option of another type": lambda layers: setattr(layers[0][0], "eps", torch.tensor(1e-5)),
    "a parameter's name": lambda layers: layers[1]._parameters.__setitem__("w", layers[1]._parameters.pop("weight")),
    "a parameter more": lambda layers: layers[0][1].register_parameter("more", nn.Parameter(torch.ones(1))),
    "a buffer more": lambda layers: layers[0][1].register_buffer("more", torch.ones(1)),
    "an attribute": lambda layers: setattr(layers[0][1], "mask", torch.ones(1)),
    "a forward of its own": lambda layers: setattr(layers[1], "forward", lambda x: x),
    "a class": lambda layers: setattr(layers[0][1], "__class__", nn.Tanh),
    "a hook": lambda layers: layers[0][1].register_forward_hook(lambda *_: None),
    "a hook in front": lambda layers: layers.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda layers: layers[1].register_full_backward_hook(lambda *_: None),
    "an attribute of another class": lambda layers: setattr(layers[1], "_state_dict_hooks", [1]),
    "a hook's dictionary": lambda layers: setattr(layers[1], "_forward_hooks", {0: lambda *_: None}),
    "wires": rewired,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_is_another_one(change):
    layers = branch()
    first, tree = known(layers)
    change(layers)
    assert first.tree(layers) != tree
    found = plain_branch(layers)
    assert found is None or found[1] != tree or found[0] is not first


@pytest.mark.parametrize("everywhere", ["hooks", "forward", "call"])
def test_what_is_done_to_all_modules(everywhere, monkeypatch):
    layers = branch()
    first, _ = known(layers)
    if everywhere == "hooks":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    else:
        kind, name = (nn.Linear, "forward") if everywhere == "forward" else (nn.Module, "_call_impl")
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, *args, **kwargs: original(self, *args, **kwargs))
    try:
        assert first.tree(layers) is None and plain_branch(layers) is None
    finally:
        if everywhere == "hooks":
            handle.remove()
        monkeypatch.undo()
    assert known(layers)[0] is first


def test_nothing_is_kept_alive():
    layers = branch()
    net = ReversibleSequential(ReversibleBlock(layers, nn.Tanh()))
    net(rows().float()).sum().backward()
    refs = [weakref.ref(thing) for thing in (layers[3], layers[3].weight, layers[1].bias, layers)]
    layers[3] = nn.Identity()
    layers[1].bias = None
    gc.collect()
    assert [ref() is None for ref in refs] == [True, True, True, False]
    count = len(module._known)
    del layers, net
    gc.collect()
    assert refs[-1]() is None and len(module._known) < count


REFERENCES = {
    "a hook": lambda layer, net: layer.register_forward_hook(lambda *_: setattr(net, "seen", True)),
    "a hook on its state": lambda layer, net: layer.register_state_dict_pre_hook(lambda *_: net),
    "an attribute": lambda layer, net: layer.__dict__.__setitem__("parent", net),
    "a list": lambda layer, net: setattr(layer, "parents", [net]),
    "a tuple": lambda layer, net: setattr(layer, "parents", (1, (net,))),
    "an item": lambda layer, net: layer.notes.setdefault("parent", net),
}


@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("refer", REFERENCES.values(), ids=REFERENCES)
def test_a_layer_may_refer_to_the_network(refer, when):
    """What is known of a branch is there for as long as the branch, and must not be what keeps it."""
    net = ReversibleSequential(ReversibleBlock(branch(), nn.Tanh()))
    layer = next(module for module in net.modules() if isinstance(module, nn.ReLU))
    layer.notes = {}
    for step in ("before", "between"):
        if step == when:
            refer(layer, net)
        net(rows().float()).sum().backward()
    if when == "after":
        refer(layer, net)
    ref = weakref.ref(net)
    del net, layer
    gc.collect()
    assert ref() is None


def test_parameters_that_a_recurrent_layer_lists():
    layers = nn.Sequential(nn.GRU(4, 4))
    known(layers)
    ref = weakref.ref(layers[0].weight_hh_l0)
    layers[0] = nn.GRU(4, 4)
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layers: pickle.loads(pickle.dumps(layers))])
def test_copies_are_known_too(again):
    layers = branch()
    first, _ = known(layers)
    other = again(layers)
    second, tree = known(other)
    assert second is not first and known(other)[0] is second and set(tree[0]) == set(other.modules())
    other[2][0].register_forward_hook(lambda *_: None)
    assert second.tree(other) is None and known(layers)[0] is first


def test_without_the_extension(monkeypatch):
    """Nothing is known of any branch: each is searched in every half-step, and comes out the same."""
    layers, x = branch(), rows().float()
    net = ReversibleSequential(ReversibleBlock(layers, nn.Tanh()), backend="eager")
    found = []
    for there in (True, False):
        if not there:
            monkeypatch.setattr(native, "module_tree", lambda *_: None)
        torch.manual_seed(0)
        net.zero_grad()
        net(x).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert plain_branch(layers) is None
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_what_is_no_module_is_refused():
    """By the extension itself, of which nothing else is asked."""
    assert native.module_tree(nn.Identity(), []) is None
    with pytest.raises(AttributeError):
        native.module_tree(3, [(int, (), b"")])
    for rows_ in ([3], [(nn.Identity,)], [(nn.Identity, [], b"")], [(nn.Identity, (), "")]):
        with pytest.raises(TypeError):
            native.module_tree(nn.Identity(), rows_)
    assert native.module_tree(nn.Identity(), [(nn.Identity, (), b"")]) is None
