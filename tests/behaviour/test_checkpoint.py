# SPDX-License-Identifier: Apache-2.0
"""`revkernels.nn.checkpoint`: what is run again from its inputs comes out as if it had been kept."""

import copy

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import old_torch, torch
from revkernels.measure import peak_bytes
from revkernels.nn import FusedSequential, ReversibleBlock, ReversibleSequential, checkpoint, is_recomputing


def layers(kind=nn.Sequential, drop=0.0):
    return kind(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(drop), nn.Conv2d(8, 4, 3, stride=2)
    )


def images(**options):
    return torch.randn(4, 3, 9, 9, **options)


def step(call, module, x, seed=3):
    """Outputs, gradients and buffers of one training step."""
    torch.manual_seed(seed)
    y = call(module, x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]
    return [None if t is None else t.clone() for t in found], torch.get_rng_state()


def plainly(module, *args):
    return module(*args)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("kind", [nn.Sequential, FusedSequential])
def test_bit_for_bit_as_kept(kind, backend, available):
    """Dropout masks too, and running statistics and num_batches_tracked updated once."""
    module = layers(kind, drop=0.3)
    twin, x = copy.deepcopy(module), images(requires_grad=True)
    z = x.detach().clone().requires_grad_()
    with rk.use_backend(available(backend)):
        found, state = step(checkpoint, module, x)
        expected, after = step(plainly, twin, z)
    assert_same(found, expected)
    assert torch.equal(state, after)  # the generator is where the forward left it
    assert module[1].num_batches_tracked == 1


def test_it_runs_twice_and_holds_the_input_alone():
    calls = []

    class Counts(nn.Module):
        def forward(self, x):
            calls.append(is_recomputing())
            return x

    wide = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.Tanh())), Counts())
    x = torch.randn(256, 64, requires_grad=True)
    held = peak_bytes(lambda: wide(x))
    assert peak_bytes(lambda: checkpoint(wide, x)) < held / 4
    calls.clear()
    checkpoint(wide, x).sum().backward()
    assert calls == [False, True]


def test_many_in_one_graph_hold_one_at_a_time():
    """Each lets go of its tensors when the one in front of it begins."""

    def peak(depth):
        parts = [nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())))] * depth

        def train():
            h = torch.ones(256, 64, requires_grad=True)
            for part in parts:
                h = checkpoint(part, h)
            h.sum().backward()

        train()
        return peak_bytes(train)

    one = 256 * 64 * 4  # a tensor
    assert peak(6) - peak(3) <= 3 * one + one / 2  # the inputs, which are kept, and nothing else


def test_nested_arguments_and_results():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def forward(self, pair, *, more, scale=1):
            a, b = pair
            return {"y": (a @ self.weight).tanh() * more["c"][0].sigmoid(), "z": [b.exp() * scale, scale]}

    module = Mixes()
    a, b, c = (torch.randn(5, 5, requires_grad=wanted) for wanted in (True, False, True))
    gradients = []
    for run in (checkpoint, plainly):
        out = run(module, (a, b), more={"c": [c, None]}, scale=3) if run is checkpoint else None
        out = module((a, b), more={"c": [c, None]}, scale=3) if out is None else out
        assert out["z"][1] == 3
        loss = out["y"].sum() + out["z"][0].sum()
        gradients.append(torch.autograd.grad(loss, [a, c, module.weight]))
    assert_same(*gradients)


def test_inputs_without_gradient_and_frozen_parameters():
    module = layers()
    module[0].requires_grad_(False)
    twin, x = copy.deepcopy(module), images()
    assert_same(step(checkpoint, module, x)[0], step(plainly, twin, x)[0])


def test_autocast():
    """The recompute runs under the autocast of the forward, the backward being outside."""
    module = layers(FusedSequential)
    twin, x = copy.deepcopy(module), images()

    def under(run):
        def call(module, x):
            with torch.autocast("cpu", torch.bfloat16):
                return run(module, x)

        return call

    assert_same(step(under(checkpoint), module, x)[0], step(under(plainly), twin, x)[0])


def test_backward_twice_and_second_order():
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), torch.randn(3, 4).double()
    x.requires_grad_()
    y = checkpoint(module, x).square().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (again,) = torch.autograd.grad(y, x)
    assert torch.equal(first, again)
    assert torch.autograd.gradgradcheck(lambda x: checkpoint(module, x), x)


def test_without_grad_it_is_the_plain_call():
    module, x = layers(), images()
    with torch.no_grad():
        assert torch.equal(checkpoint(module.eval(), x), module(x))


def test_inside_a_branch_and_around_a_chain():
    """Row 27. Inside a branch its inputs are the chain's to rebuild, so that memory stays flat in depth."""

    class Inner(nn.Module):
        def __init__(self, drop):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Dropout(drop))

        def forward(self, x):
            return checkpoint(self.body, x)

    def chain(depth, drop):
        blocks = [ReversibleBlock(Inner(drop), Inner(drop)) for _ in range(depth)]
        return ReversibleSequential(blocks, split_dim=-1)

    def gradients(net, run):
        torch.manual_seed(5)
        x = torch.linspace(-1, 1, 8 * 64).reshape(8, 64).requires_grad_()
        run(net, x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in net.parameters())]

    net = chain(3, 0.2)
    stored = copy.deepcopy(net)
    stored.activations = "store"
    rebuilt, around, kept = (
        gradients(net, plainly),
        gradients(copy.deepcopy(stored), checkpoint),
        gradients(stored, plainly),
    )
    assert_same(around, kept)
    for a, b in zip(rebuilt, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def peak(depth):
        net = chain(depth, 0.0)  # a drawn generator's state is 5 KB

        def train():
            net(torch.ones(256, 64)).sum().backward()

        train()
        return peak_bytes(train)

    assert peak(12) - peak(3) < 256 * 32 * 4


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda module, x: x.mul_(2), "an input of a checkpointed call was changed in place"),
        (lambda module, x: module[0].weight.data_ptr() and module[0].weight.mul_(2), "parameter 0.weight was changed"),
    ],
    ids=["input", "parameter"],
)
def test_what_has_changed_is_named(change, words):
    module, x = layers(), images()
    y = checkpoint(module, x)
    with torch.no_grad():
        change(module, x)
    with pytest.raises(rk.ReconstructionError, match=words):
        y.sum().backward()


def test_what_does_not_do_the_same_twice_is_named():
    class Turns(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x.exp() if self.calls == 1 else x.exp().exp()

    with pytest.raises(rk.ReconstructionError, match="the checkpointed Turns: the recompute saved 2 tensors"):
        checkpoint(Turns(), torch.ones(3, requires_grad=True)).sum().backward()


def test_bad_calls():
    with pytest.raises(TypeError, match="function is a int; it must be"):
        checkpoint(3)
    with pytest.raises(rk.ReconstructionError, match="the checkpointed function differentiates while it runs"):
        checkpoint(
            lambda x: torch.autograd.grad(x.exp().sum(), x, create_graph=True), torch.ones(3, requires_grad=True)
        )
    with pytest.raises(rk.ReconstructionError, match=r"torch\.func"):
        torch.func.grad(lambda x: checkpoint(torch.sin, x).sum())(torch.ones(3))


def test_an_error_in_the_function_leaves_nothing_behind():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        checkpoint(module, torch.ones(2, 3))
    assert not is_recomputing()


@old_torch("under torch.compile its checkpoint updates running statistics twice, as it does without")
def test_traced_by_the_compiler():
    module, x = layers().double(), images(dtype=torch.float64)
    twin, compiled = copy.deepcopy(module), torch.compile(lambda x: checkpoint(module, x), backend="aot_eager")
    for found, expected in zip(step(lambda _, x: compiled(x), module, x)[0], step(plainly, twin, x)[0], strict=True):
        if found is not None:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("where", ["alone", "in a branch"])
def test_a_break_in_compiled_code(where):
    """Row 29: where the compiler gives up on the call, each batch is counted once and the masks are the same."""
    module, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.3)), images(requires_grad=True)
    twin, z = copy.deepcopy(module), x.detach().clone().requires_grad_()

    def breaks(x):
        h = module(x)
        torch._dynamo.graph_break()
        return h.tanh()

    def network(f):
        chain = ReversibleSequential([ReversibleBlock(F=f, G=nn.Identity())], backend="eager")
        return f if where == "alone" else lambda x: chain(torch.cat((x, x), 1))

    torch._dynamo.reset()
    compiled = torch.compile(network(lambda x: checkpoint(breaks, x)), backend="aot_eager")
    found, state = step(lambda _, x: compiled(x), module, x)
    expected, after = step(lambda _, z: network(lambda z: twin(z).tanh())(z), twin, z)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(state, after)
