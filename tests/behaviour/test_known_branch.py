# SPDX-License-Identifier: Apache-2.0
"""What is known of a branch from one half-step to the next, and what it takes not to believe it."""

import copy
import gc
import pickle
import weakref

import pytest
from torch import nn

from behaviour.common import rows, torch
from revkernels import native
from revkernels.autograd.state import known_branch as module
from revkernels.autograd.state import plain_layers
from revkernels.autograd.state.known_branch import known_branch
from revkernels.autograd.state.snapshot import Snapshot
from revkernels.nn import FusedSequential, NormAct, ReversibleBlock, ReversibleSequential

pytestmark = pytest.mark.usefixtures("compiled")


def branch():
    tied = nn.Linear(4, 4)
    return nn.Sequential(
        nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), tied, nn.Sequential(nn.Dropout(0.1), tied), nn.Linear(4, 4, False)
    )


class Code(nn.Module):
    """The same with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.layers = branch()

    def forward(self, x):
        return self.layers(x)


def with_code():
    return nn.Sequential(Code(), nn.Tanh())


def known(layers):
    found = known_branch(layers)
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
@pytest.mark.parametrize("make, inside", [(branch, lambda top: top), (with_code, lambda top: top[0].layers)])
def test_it_is_another_one(change, make, inside):
    layers = make()
    first, tree = known(layers)
    assert first.is_tree(layers, tree)
    change(inside(layers))
    assert first.tree(layers) != tree and not first.is_tree(layers, tree)
    found = known_branch(layers)
    assert found is None or found[1] != tree or found[0] is not first


OF_CODE = {
    "a layer": lambda code: setattr(code, "layers", nn.Linear(4, 4)),
    "a layer more": lambda code: setattr(code, "last", nn.ReLU()),
    "the mode": lambda code: setattr(code, "training", False),
    "a parameter more": lambda code: setattr(code, "w", nn.Parameter(torch.ones(1))),
    "a buffer more": lambda code: code.register_buffer("more", torch.ones(1)),
    "a class": lambda code: setattr(code, "__class__", type("Other", (Code,), {})),
    "a hook": lambda code: code.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", OF_CODE.values(), ids=OF_CODE)
def test_code_is_another_one(change):
    layers = with_code()
    first, tree = known(layers)
    assert [type(tree[0][number]) for number in first.others] == [Code]
    layers[0].calls = 1  # its own affair
    assert first.is_tree(layers, tree) and known(layers)[0] is first
    change(layers[0])
    assert not first.is_tree(layers, tree)


def test_a_module_that_equals_another():
    class Alike(nn.Module):
        __hash__ = nn.Module.__hash__

        def __eq__(self, other):
            return True

    layers = nn.Sequential(Alike(), nn.Tanh())
    first, tree = known(layers)
    layers[0] = Alike()
    layers[0].__class__ = type(tree[0][1])
    assert not first.is_tree(layers, tree)


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
        found = known_branch(layers)
        assert first.tree(layers) is None
        if everywhere == "forward":
            others = [type(found[1][0][number]) for number in found[0].others]
            assert others == [nn.Linear, nn.Linear] and not first.others
        else:
            assert found is None
    finally:
        if everywhere == "hooks":
            handle.remove()
        monkeypatch.undo()
    assert first.tree(layers) is not None


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


@pytest.mark.parametrize("make, place", [(branch, "0"), (with_code, "0.layers.0")])
def test_the_turn_is_that_of_the_layers_of_now(make, place):
    """Of another norm in the place of one like it, which another branch has too."""
    first, second = make(), make()
    for layers in (first, second, first):
        Snapshot(layers)
    first.set_submodule(place + ".0", second.get_submodule(place + ".0"))
    turns = [Snapshot(layers).turn.locks for layers in (first, second)]
    assert turns[0] == turns[1] and len(turns[0]) == 1


def test_an_option_may_refer_to_the_network(monkeypatch):
    """What the first layer of a class has on it is taken for an option of all."""
    monkeypatch.setattr(plain_layers, "_options", {})
    code = Code()
    code.layers[0][1].parents = (code,)
    ReversibleSequential(ReversibleBlock(code, nn.Tanh()))(rows().float()).sum().backward()
    assert "parents" in plain_layers._options[nn.ReLU].names
    ref = weakref.ref(code)
    del code
    gc.collect()
    assert ref() is None


def test_a_class_may_refer_to_the_network():
    def made():
        net = nn.ModuleList()

        class Knows(Code):
            def forward(self, x, scale=1.0):
                return super().forward(x) * len(net) * scale

        net.append(ReversibleSequential(ReversibleBlock(FusedSequential(Knows(), nn.ReLU()), nn.Tanh())))
        net[0](rows().float(), scale=2.0).sum().backward()
        return weakref.ref(net)

    ref = made()
    gc.collect()
    assert ref() is None


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
            monkeypatch.setattr(native, "is_module_tree", lambda *_: False)
        torch.manual_seed(0)
        net.zero_grad()
        net(x).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert known_branch(layers) is None
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("what", ["a hook", "a function", "a module beside"])
def test_an_inverse_of_a_branch_of_which_nothing_is_known(what):
    code, x = Code().eval(), rows().float()
    if what == "a hook":
        code.layers[1].register_forward_hook(lambda *_: None)
    elif what == "a module beside":
        code.beside = [nn.Linear(4, 4)]
    net = ReversibleSequential(ReversibleBlock(code if what != "a function" else lambda h: code(h), nn.Tanh()))
    torch.testing.assert_close(net.inverse(net(x)), x)


class Through(nn.Module):
    """Runs what one of its layers has on it, and has not registered."""

    def __init__(self, held, layer):
        super().__init__()
        self.layers = nn.Sequential(NormAct(nn.BatchNorm1d(4)), nn.Linear(4, 4))
        self.layers[layer].__dict__["held"] = held
        self.layer = layer

    def forward(self, x):
        x, held = self.layers(x), self.layers[self.layer].held
        if isinstance(held, torch.Generator):
            return x * torch.rand(x.shape, generator=held)
        return (held[0] if isinstance(held, list | tuple) else held)(x)


class Calls:
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


HELD = {
    "itself": lambda inner: inner,
    "in a list": lambda inner: [inner],
    "in a tuple": lambda inner: (inner,),
    "behind a callable": Calls,
    "a generator": lambda inner: torch.Generator().manual_seed(1),
}


@pytest.mark.parametrize("layer", [0, 1], ids=["one of ours", "one of torch's"])
@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_what_a_layer_has_on_it_is_reached(held, layer):
    found = []
    for activations in ("store", "reconstruct"):
        torch.manual_seed(0)
        inner, x = nn.BatchNorm1d(4), rows().float().detach().requires_grad_()
        code = Through(held(inner), layer)
        net = ReversibleSequential(ReversibleBlock(code, nn.Tanh()), activations=activations)
        for _ in range(2):
            inner.train()
            y = net(x)
            inner.eval()
            y.square().sum().backward()
        found.append([y, x.grad, *inner.buffers()])
    torch.testing.assert_close(*found)


def test_what_is_no_module_is_refused():
    """By the extension itself, of which nothing else is asked."""
    one = nn.Identity()
    assert native.module_tree(one, []) is None and not native.is_module_tree(one, [], [], [])
    with pytest.raises(AttributeError):
        native.module_tree(3, [(int, None, (), b"")])
    for row in (
        3,
        (nn.Identity,),
        (nn.Identity, None, [], b""),
        (nn.Identity, None, (), ""),
        (nn.Identity, 3, (), b""),
    ):
        with pytest.raises(TypeError):
            native.module_tree(one, [row])
    for row in ((nn.Identity, None, (1,), b""), (nn.Identity, ("training",), (), b""), (nn.Identity, (), (1,), b"a")):
        with pytest.raises(ValueError, match="ask"):
            native.module_tree(one, [row])
    assert native.module_tree(one, [(nn.Identity, None, (), b"")]) is None  # more hangs on it
    assert native.module_tree(one, [(nn.Identity, ("nothing",), (1,), b"\0")]) is None
    assert native.module_tree(one, [(nn.Identity, (), (), b"")]) == ([one], [])
    for rest in (([one], []), ([one], [None]), ([one, one], []), ([nn.Identity()], [])):
        assert native.is_module_tree(one, [(nn.Identity, (), (), b"")], *rest) == (rest == ([one], []))
    with pytest.raises(TypeError):
        native.is_module_tree(one, [(nn.Identity, (), (), b"")], (one,), [])
