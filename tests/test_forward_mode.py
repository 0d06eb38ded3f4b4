# SPDX-License-Identifier: Apache-2.0
"""Forward-mode derivatives: kernels have none and say so; chains that rebuild nothing have plain torch's."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

import revkernels as rk  # noqa: E402
from revkernels import ops  # noqa: E402
from revkernels.errors import ReconstructionError  # noqa: E402
from revkernels.nn import NormAct, ReversibleBlock, ReversibleSequential  # noqa: E402


def ones():
    return torch.ones(2, 3)


LAYER = rk.Norm("layer")
STATISTICS = rk.Statistics(torch.zeros(2), torch.ones(2))
CALLS = {
    "couple": (2, lambda *a, **k: ops.couple(*a, **k)),
    "couple of a scale": (1, lambda s, **k: ops.couple(ones(), ones(), coupling=rk.Coupling(channel_scale=s[0]), **k)),
    "uncouple": (2, lambda *a, **k: ops.uncouple(*a, **k)),
    "couple_": (2, lambda *a, **k: ops.couple_(*a, **k)),
    "uncouple_": (2, lambda *a, **k: ops.uncouple_(*a, **k)),
    "reverse_step_": (4, lambda *a, **k: ops.reverse_step_(*a, **k)),
    "accumulate_": (2, lambda *a, **k: ops.accumulate_(*a, **k)),
    "accumulate_ of lists": (2, lambda a, b, **k: ops.accumulate_([a], [b], **k)),
    "norm_act": (1, lambda x, **k: ops.norm_act(x, LAYER, **k)),
    "norm_act of a weight": (1, lambda w, **k: ops.norm_act(ones(), rk.Norm("layer", w[0].contiguous()), **k)),
    "couple_norm_act": (2, lambda *a, **k: ops.couple_norm_act(*a, LAYER, **k)),
    "uncouple_norm_act_": (2, lambda *a, **k: ops.uncouple_norm_act_(*a, LAYER, **k)),
    "norm_act_backward_": (3, lambda *a, **k: ops.norm_act_backward_(*a, LAYER, STATISTICS, **k)),
}


def test_every_function_has_a_row():
    assert {name.split()[0] for name in CALLS} == {name for name in ops.__all__ if name.islower()}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad mode", "no_grad"])
def test_a_tangent_is_refused(name, backend, grad, available):
    """In any argument, by name; nothing is written. Without one, a call under dual_level is a call."""
    count, call = CALLS[name]
    backend = available(backend)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        for place in range(count):
            operands = [ones() for _ in range(count)]
            operands[place] = forward_ad.make_dual(operands[place], ones())
            with pytest.raises(NotImplementedError, match="has a tangent, and the kernels have no forward-mode"):
                call(*operands, backend=backend)
            assert all(torch.equal(forward_ad.unpack_dual(operand).primal, ones()) for operand in operands)
        call(*(ones() for _ in range(count)), backend=backend)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_of_torch_func_are_refused(name, backend, transform, available):
    count, call = CALLS[name]
    backend = available(backend)

    def run(x):
        operands = [x.reshape(2, 3), *(ones() for _ in range(count - 1))]
        return torch.as_tensor(call(*operands, backend=backend)).sum()

    with pytest.raises(NotImplementedError, match=r"know no transform of torch\.func"):
        if transform == "jvp":
            torch.func.jvp(run, (ones(),), (ones(),))
        else:
            getattr(torch.func, transform)(run)(torch.ones(2, 6) if transform == "vmap" else ones())


def branch():
    return nn.Sequential(nn.LayerNorm(3), nn.GELU(), nn.Linear(3, 3))


def chain(**options):
    torch.manual_seed(0)
    return ReversibleSequential([ReversibleBlock(branch(), branch()) for _ in range(2)], **options).double()


class InPlainTorch(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        for block in self.blocks:
            x1 = x1 + block.F(x2)
            x2 = x2 + block.G(x1)
        return torch.cat([x1, x2], 1)


def tangents(net, where):
    """Values and tangents of the output and, in grad mode, of the gradient: forward over reverse."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6).requires_grad_(torch.is_grad_enabled())
    with forward_ad.dual_level():
        if where == "input":
            y = net(forward_ad.make_dual(x, x.detach().cos()))
        else:
            duals = {name: forward_ad.make_dual(p, p.detach().cos()) for name, p in net.named_parameters()}
            y = torch.func.functional_call(net, duals, x)
        found = [forward_ad.unpack_dual(y)]
        if torch.is_grad_enabled():
            found.append(forward_ad.unpack_dual(torch.autograd.grad(y.square().sum(), x)[0]))
        return [part.detach() for pair in found for part in pair]


@pytest.mark.parametrize("where", ["input", "parameters"])
@pytest.mark.parametrize("options", [{}, {"backend": "eager"}], ids=["default", "eager"])
@pytest.mark.parametrize("grad", [True, False], ids=["stored", "no_grad"])
def test_a_chain_has_plain_torchs_tangents(where, options, grad):
    net = chain(activations="store" if grad else "reconstruct", **options)
    with torch.set_grad_enabled(grad):
        got, expected = tangents(net, where), tangents(InPlainTorch(net), where)
    assert len(got) == (4 if grad else 2)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("where", ["input", "parameters"])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ReconstructionError, "set activations='store'"),
        ({"backend": "eager"}, ReconstructionError, "set activations='store'"),
        ({"activations": "store", "coupling": "exact"}, ReconstructionError, "set coupling='float'"),
        ({"activations": "store", "backend": "cpu"}, NotImplementedError, "backend 'cpu' has no forward-mode"),
    ],
)
def test_a_chain_that_has_none_says_so(where, options, error, words, available):
    net = chain(**options)
    available(options.get("backend", "eager"))
    with pytest.raises(error, match=words):
        tangents(net, where)


def test_a_chain_without_tangents_under_dual_level():
    net, x = chain(), torch.randn(2, 6, dtype=torch.float64)
    with forward_ad.dual_level():
        net(x).sum().backward()
    again = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    net(x).sum().backward()
    torch.testing.assert_close(again, [parameter.grad for parameter in net.parameters()])


def test_a_norm_alone_is_torchs():
    """`NormAct` steps aside: the tangent is plain torch's."""
    norm, x, dx = nn.LayerNorm(6), torch.randn(2, 6), torch.randn(2, 6)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, dx)
        got, expected = NormAct(norm, nn.ReLU())(dual), torch.relu(norm(dual))
        assert torch.equal(forward_ad.unpack_dual(got).tangent, forward_ad.unpack_dual(expected).tangent)
