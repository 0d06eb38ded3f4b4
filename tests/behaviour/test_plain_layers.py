# SPDX-License-Identifier: Apache-2.0
"""Branches of layers that are not searched for what they hold: what somebody hangs on them, or does to their class, is
found all the same."""

import functools

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import WIDE, assert_all_close, fresh, loss_of, rows, torch, twins
from revkernels.autograd.state import plain_layers
from revkernels.nn import FusedSequential, ReversibleBlock, ReversibleSequential
from revkernels.nn.branches import DropPath


def layers():
    """Layers of torch's and of ours alone: nothing is looked for on them that they are known not to read."""
    torch.manual_seed(0)
    return FusedSequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()).to(WIDE)


@pytest.mark.parametrize("trained", [False, True])
def test_a_tensor_in_a_weights_place(trained):
    """As a hypernetwork sets it: an attribute, which torch's own layers read like any parameter."""
    branch = layers()
    generated = [torch.randn(4, 4, dtype=WIDE, requires_grad=trained) for _ in range(2)]
    del branch[0].weight
    found = []
    for activations in ("store", "reconstruct"):
        net = ReversibleSequential(ReversibleBlock(branch, nn.Tanh()), activations=activations)
        x = torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8).requires_grad_()
        total = 0
        for weight in generated[: 1 if trained else 2]:  # the second hangs there when the first's branch runs again
            branch[0].weight = weight * 1 if trained else weight
            total = total + net(x).sin().sum()
        total.backward()
        found.append([x.grad, *(weight.grad for weight in generated if weight.grad is not None)])
        for weight in generated:
            weight.grad = None
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)

    branch[0].weight = generated[0].detach().clone()
    y = net(x)
    branch[0].weight.mul_(2)
    with pytest.raises(rk.ReconstructionError, match="the tensor weight, which is no parameter or buffer"):
        y.sum().backward()


@pytest.mark.parametrize("way", ["layer", "late", "everywhere"])
def test_what_a_hook_keeps_on_a_layer_is_the_forwards(way):
    """With its graph, to be added to a loss; of a hook of the layer's, one that came after the forward, and one on all
    modules."""
    branch = layers()
    layer = branch[0]

    def hook(module, _inputs, output):
        if module is layer:
            module.seen = output

    net = ReversibleSequential(ReversibleBlock(branch, nn.Tanh()))
    handle = None if way == "late" else layer.register_forward_hook(hook) if way == "layer" else hook_on_all(hook)
    y = net(rows())
    if way == "late":
        layer.seen = "nothing"
        handle = layer.register_forward_hook(hook)
    seen = layer.seen
    try:
        y.sum().backward()
        assert layer.seen is seen
    finally:
        handle.remove()


hook_on_all = nn.modules.module.register_module_forward_hook


def test_the_layers_are_not_searched():
    """Else nothing here would say anything."""
    assert all(map(plain_layers.is_plain, layers().modules()))


@pytest.fixture(params=[nn.Linear, DropPath], ids=lambda kind: kind.__name__)
def branch_with(request):
    """A class of layers, and a branch with one of them."""
    drop = DropPath(0.5) if request.param is DropPath else nn.Identity()
    return request.param, nn.Sequential(nn.Linear(4, 4), drop).to(WIDE)


def test_a_forward_that_was_replaced_draws(branch_with, monkeypatch):
    """From a generator that its module knows nothing of; the wrapper calls itself torch's."""
    kind, branch = branch_with
    original = kind.forward

    @functools.wraps(original)
    def forward(self, x):
        return original(self, x) * torch.rand(x.shape, dtype=x.dtype, generator=GENERATOR)

    monkeypatch.setattr(kind, "forward", forward)
    GENERATOR.manual_seed(1)
    state = GENERATOR.get_state()
    found = []
    for activations in ("store", "reconstruct"):
        torch.manual_seed(3)
        GENERATOR.set_state(state)
        net = ReversibleSequential(ReversibleBlock(branch, nn.Tanh()), activations=activations)
        x = torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8).requires_grad_()
        net(x).sin().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


GENERATOR = torch.Generator()


def test_a_forward_that_was_replaced_reads(branch_with, monkeypatch):
    """A list on its module, of a tensor that is written to before the backward."""
    kind, branch = branch_with
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: original(self, x) * vars(self).get("masks", [1.0])[0])
    layer = next(module for module in branch.modules() if type(module) is kind)
    layer.masks = [torch.full((4,), 0.5, dtype=WIDE)]
    y = ReversibleSequential(ReversibleBlock(branch, nn.Tanh()))(rows())
    layer.masks[0].mul_(3)
    with pytest.raises(rk.ReconstructionError, match="the tensor masks, which is no parameter or buffer"):
        y.sum().backward()


@pytest.mark.parametrize("way", ["forward", "__call__", "_call_impl", "the layer's own"])
def test_what_a_replaced_call_keeps_is_the_forwards(way, monkeypatch):
    """With its graph, differentiated once more behind the step."""
    branch = layers()
    layer, name = branch[0], "_call_impl" if way == "the layer's own" else way
    original = getattr(nn.Linear if way == "forward" else nn.Module, name)

    def keeping(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if self is layer:
            self.seen = result
        return result

    if way == "the layer's own":
        monkeypatch.setattr(layer, name, functools.partial(keeping, layer), raising=False)
    else:
        monkeypatch.setattr(nn.Linear if way == "forward" else nn.Module, name, keeping)
    y = ReversibleSequential(ReversibleBlock(branch, nn.Tanh()))(rows())
    seen = layer.seen
    y.sum().backward(retain_graph=True)
    assert layer.seen is seen
    layer.seen.sum().backward()


class Helped(nn.Module):
    """Holds a norm that it has not registered, and says that it is torch's."""

    def __init__(self):
        super().__init__()
        self.linear, self.held = nn.Linear(4, 4), [nn.BatchNorm1d(4)]

    def forward(self, x):
        return self.held[0](self.linear(x))


@pytest.mark.parametrize("says", ["torch.nn.modules.linear", None])
def test_what_a_class_says_of_its_file_counts_for_nothing(says, monkeypatch):
    monkeypatch.setattr(Helped, "__module__", says)
    branch = Helped().to(WIDE)
    branch.held[0].to(WIDE)
    ReversibleSequential(ReversibleBlock(branch, nn.Tanh()))(rows()).sum().backward()
    assert branch.held[0].num_batches_tracked == 1


# ---- layers and options that are others by the time of the recompute


class Holds(nn.Module):
    """A module of somebody's, with layers of torch's in it."""

    def __init__(self):
        super().__init__()
        self.body = made_of_layers()
        self.body.append(nn.Identity())

    def forward(self, x):
        return self.body(x)


def made_of_layers():
    return nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout(0.2), nn.Tanh()).to(WIDE)


def with_tensors():
    """Layers that are no longer plain, for each has a tensor on it."""
    layers = made_of_layers()
    for layer in layers:
        layer.mark = torch.zeros(1)
    return layers


def other_options(layers):
    layers[0].eps, layers[0].momentum, layers[3].p = 0.5, 0.7, 0.6


def other_layers(layers):
    layers[2], layers[4] = nn.Linear(4, 4, dtype=WIDE), nn.Sigmoid()


def a_layer_more(layers):
    layers.append(nn.Sigmoid())


def a_layer_less(layers):
    del layers[1]


def renamed(layers):
    """Others in another order, as a Sequential of an OrderedDict may have them."""
    held = list(layers._modules.values())
    layers._modules.clear()
    layers._modules.update(zip("edcba", reversed(held[:5]), strict=True))


@pytest.mark.parametrize("change", [other_options, other_layers, a_layer_more, a_layer_less, renamed])
@pytest.mark.parametrize("make", [made_of_layers, with_tensors, Holds, lambda: FusedSequential(*made_of_layers())])
def test_run_again_on_the_layers_of_the_forward(make, change, options):
    """Two forwards before the backward: each is differentiated through the layers, and with the options, that it ran
    with; and what is there then stays."""
    net, plain = twins([(make(), make()) for _ in range(2)], **options)
    outcomes = []
    for network in (net, plain):
        torch.manual_seed(0)
        leaves, x = fresh(rows(5, 8))
        first, learnt = network(x), list(network.parameters())
        made = []
        for block in network.children():
            for branch in (block.F, block.G):
                layers = branch if isinstance(branch, nn.Sequential) else branch.body
                change(layers)
                made.append((layers, dict(layers._modules), [dict(layer.__dict__) for layer in layers]))
        second = network(x)
        learnt += [p for p in network.parameters() if all(p is not other for other in learnt)]
        gradients = torch.autograd.grad(loss_of([first, second]), [*leaves, *learnt], allow_unused=True)
        outcomes.append([first, second, *gradients, *network.buffers()])
        for layers, children, tables in made:
            assert list(layers._modules.items()) == list(children.items())
            assert [dict(layer.__dict__) for layer in layers] == tables
    assert_all_close(*outcomes)


def test_options_of_layers_with_attributes_of_somebody_s(monkeypatch, options):
    """The first of a class that is met has one, others have none."""
    monkeypatch.setattr(plain_layers, "_options", {})
    marked = made_of_layers()
    for layer in marked:
        layer.mark = "first"
    ReversibleSequential(ReversibleBlock(marked, nn.Tanh()), **options)(rows(5, 8))
    test_run_again_on_the_layers_of_the_forward(made_of_layers, other_options, options)


@pytest.mark.parametrize("way", ["removed", "added", "once"])
@pytest.mark.parametrize("make", [made_of_layers, Holds, lambda: FusedSequential(*made_of_layers())])
def test_run_again_under_the_hooks_of_the_forward(make, way, options):
    """Hooks that change what a layer reads and returns, as they are put on for a forward alone, or put on behind it."""

    def register(network):
        handles = {}

        def double(layer, inputs, output):
            if way == "once":
                handles[layer, "behind"].remove()
            return 2 * output

        def negate(layer, args, kwargs):
            return (-args[0],), kwargs

        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.BatchNorm1d):
                handles[layer, "behind"] = layer.register_forward_hook(double)
                handles[layer, "before"] = layer.register_forward_pre_hook(negate, with_kwargs=True)
        return handles.values()

    outcomes = []
    for network in twins([(make(), make()) for _ in range(2)], **options):
        torch.manual_seed(0)
        leaves, x = fresh(rows(5, 8))
        handles = () if way == "added" else register(network)
        y = network(x)
        for handle in handles:
            handle.remove()
        if way == "added":
            register(network)
        before = [dict(m._forward_hooks) for m in network.modules()]
        outcomes.append([y, *torch.autograd.grad(loss_of(y), [*leaves, *network.parameters()]), *network.buffers()])
        assert [dict(m._forward_hooks) for m in network.modules()] == before
    assert_all_close(*outcomes)


@pytest.mark.parametrize("kind", ["full_backward", "full_backward_pre"])
def test_a_backward_hook_that_comes_in_front_of_a_layer_in_place(kind, options):
    """Torch refuses a forward under it, and the forward was not."""
    given, outcomes = rows(5, 8), []
    for network in twins([[nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).to(WIDE)] * 2], **options):
        leaves, x = fresh(given)
        y = network(x)
        for module in network.modules():
            if isinstance(module, nn.Linear):
                getattr(module, f"register_{kind}_hook")(lambda *seen: None)
        outcomes.append([y, *torch.autograd.grad(loss_of(y), [*leaves, *network.parameters()])])
    assert_all_close(*outcomes)


def test_layers_that_a_forward_makes_are_run_again(options):
    """As some are made of the first input's shape."""

    class Lazy(nn.Module):
        def forward(self, x):
            if not hasattr(self, "layer"):
                self.layer = nn.Linear(x.shape[1], x.shape[1], dtype=x.dtype)
            return self.layer(x).tanh()

    outcomes = []
    for network in twins([(Lazy(), Lazy()) for _ in range(2)], **options):
        torch.manual_seed(0)
        leaves, x = fresh(rows(5, 8))
        loss = loss_of(network(x))
        outcomes.append(torch.autograd.grad(loss, [*leaves, *network.parameters()]))
    assert_all_close(*outcomes)


# ---- what may be kept on a layer


class OfSomebody(torch.Tensor):
    pass


MAY_KEEP = {
    "a tensor": torch.zeros(1),
    "one of another class": torch.zeros(1).as_subclass(OfSomebody),
    "a list": [],
    "numbers": [0.0],
    "a dictionary": {0: 0},
    "a set": {1},
    "a tuple": (),
    "two states": (None, None),
    "a generator": torch.Generator(),
    "one in tuples": (1, (torch.Generator(),)),
    "a module": nn.Tanh(),
    "a callable": len,
}


@pytest.mark.parametrize("value", MAY_KEEP.values(), ids=MAY_KEEP)
def test_a_layer_on_which_something_may_be_kept(value):
    layer = nn.Conv2d(4, 4, 3)
    assert plain_layers.is_plain(layer)
    layer.__dict__["more"] = value
    assert not plain_layers.is_plain(layer)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(4, 4, 3, padding="same"), nn.LSTM(4, 4), nn.AdaptiveAvgPool2d((None, 7)), nn.Flatten()],
)
def test_layers_that_are_plain(layer):
    assert plain_layers.is_plain(layer)
    layer.more = (1, ("a", 0.5, None))
    assert plain_layers.is_plain(layer)
