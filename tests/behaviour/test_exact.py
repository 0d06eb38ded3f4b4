# SPDX-License-Identifier: Apache-2.0
"""coupling="exact": what the backward rebuilds are the forward's bits, and so are the gradients those of storing."""

import copy
import dataclasses
import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn

import revkernels as rk
from behaviour.common import assert_raises, assert_same, relative_error, rows, step, tensors_in, torch
from behaviour.exact_chains import KINDS, NARROW, STORED, assert_same_bits, conv, linear, pair_of
from behaviour.random_cases import SCENARIOS, cases
from behaviour.random_networks import networks_of
from behaviour.random_scenarios import outcome_of
from revkernels.models import revnet38, revvit_small
from revkernels.nn import ReversibleBlock, ReversibleSequential
from revkernels.nn.chain import HalfStep, run, run_inverse
from revkernels.nn.exact import KeepsGrid

DEPTHS = [(depth, autocast) for depth in (1, 8) for autocast in (None, torch.bfloat16, torch.float16)]


@pytest.fixture(params=STORED)
def coupling(request):
    return STORED[request.param]


def check_bits(kind, depth, autocast, backend, coupling):
    make, shape, split_dim = KINDS[kind]
    net, stored = pair_of(make, depth, split_dim, coupling, backend)
    rebuilt = []
    net.witness = lambda streams: lambda again: rebuilt.append(list(map(torch.equal, streams, again)))
    for number in range(2):
        x = rows(*shape, dtype=torch.float32)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            assert_same_bits(step(net, x, seed=number), step(stored, x, seed=number))
    assert rebuilt == [[True, True]] * 2


@pytest.mark.parametrize(
    ("depth", "autocast"), [*DEPTHS, (64, None), pytest.param(64, torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit(kind, depth, autocast, backend):
    check_bits(kind, depth, autocast, backend, "exact")


@pytest.mark.parametrize(("depth", "autocast"), [*DEPTHS, pytest.param(64, None, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit_in_16_bits(kind, depth, autocast, backend):
    check_bits(kind, depth, autocast, backend, STORED["int16"])


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit_at_depth_256(kind, autocast, coupling, compiled):
    check_bits(kind, 256, autocast, compiled, coupling)


def test_float_is_not(compiled):
    """Which shows that the test above can fail: a float chain of this depth comes back changed."""
    net, stored = pair_of(conv, 8, coupling="float")
    x = rows(2, 16, 5, 6, dtype=torch.float32)
    with pytest.raises(AssertionError):
        assert_same_bits(step(net, x), step(stored, x))


def test_zeros_on_a_kink(backend):
    """Zeros come back as zeros, so that a ReLU right behind them has the gradient that it had when storing.

    Those of a float chain come back as what rounding leaves, on either side of the kink: only what lies between the
    stream and the ReLU gets another gradient, here the bias of the first norm."""

    def norm_first():
        return nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))

    x = rows(64, 16, dtype=torch.float32, requires_grad=False).relu()
    found = {}
    for coupling in ("exact", "float"):
        net, stored = pair_of(norm_first, 3, 1, coupling, backend)
        got, expected = step(net.eval(), x), step(stored.eval(), x)  # a norm with fresh statistics: it maps 0 to 0
        errors = {name: relative_error(got.parameters[name], g) for name, g in expected.parameters.items()}
        found[coupling] = {name for name, error in errors.items() if error > 1e-3}
        if coupling == "exact":
            assert_same_bits(got, expected)
    assert found == {"exact": set(), "float": {"0.F.0.bias"}}


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["conv, batch norm, dropout", "layer norm, GELU, dropout"])
def test_inverse(kind, dtype, pair, coupling, backend):
    """Row 28: `inverse` gives the input on the grid, bit for bit; the output has the streams' dtype."""
    make, shape, split_dim = KINDS[kind]
    net, _ = pair_of(make, 8, split_dim, coupling, backend)
    net.eval()
    x = rows(*shape, dtype=torch.float32).to(dtype)
    x = x.chunk(2, split_dim) if pair else x
    with torch.no_grad():
        y, seen = net(x), net.to_grid(x)
        for ours, back, given_x in zip(*map(tensors_in, (seen, net.inverse(y), x)), strict=True):
            assert torch.equal(ours, back) and ours.dtype == torch.float32
            assert ours.float().sub(given_x.float()).abs().max() <= 2.0 ** -(net.grid[0].item() + 1)
        for t in tensors_in(y):
            assert t.dtype == torch.float32 and not torch.signbit(t[t == 0]).any()


def test_inverse_in_training(coupling, compiled):
    """Batch statistics are those of the batch."""
    net, _ = pair_of(conv, 4, coupling=coupling)
    x = rows(2, 16, 5, 6, dtype=torch.float32, requires_grad=False)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(net.inverse(net(x)), net.to_grid(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_network_of_a_half_type(dtype, coupling, backend):
    """Branches whose parameters are narrow are handed their own type; streams stay wide, gradients have the input's."""
    net, stored = pair_of(lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()), 8, 1, coupling, backend)
    net.to(dtype), stored.to(dtype)
    x = rows(4, 16, dtype=torch.float32).to(dtype).detach().requires_grad_()
    got = step(net, x)
    assert_same_bits(got, step(stored, x))
    assert got.outputs[0].dtype == torch.float32 and got.inputs[0].dtype == dtype
    assert {g.dtype for g in got.parameters.values()} == {dtype}
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x)), net.to_grid(x))


@pytest.mark.parametrize("groups", [3, 4])
def test_more_streams(groups, coupling, backend):
    torch.manual_seed(0)
    blocks = [ReversibleBlock(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(groups)]) for _ in range(5)]
    net = ReversibleSequential(blocks, coupling=coupling, backend=backend)
    stored = copy.deepcopy(net)
    stored.activations = "store"
    x = rows(3, 4 * groups, dtype=torch.float32)
    assert_same_bits(step(net, x), step(stored, x))
    assert torch.equal(net.inverse(net(x)), net.to_grid(x))


def test_functions(backend):
    """`chain.run` takes the option too; what it chooses it cannot remember for the inverse."""
    steps = [HalfStep(nn.Linear(4, 4), k % 2, (1 - k % 2,)) for k in range(5)]
    x = rows(3, 8, dtype=torch.float32)
    fixed = {"coupling": rk.Exact(k=15), "backend": backend}
    y = run(steps, x, **fixed)
    assert torch.equal(run_inverse(steps, y, **fixed), (x * 2.0**15).round() * 2.0**-15)
    run(steps, x, coupling="exact", backend=backend).sum().backward()
    assert_raises(rk.ReconstructionError, ["Exact(k=...)"], lambda: run_inverse(steps, y, coupling="exact"))


# ---- whatever was not thought of

QUIET = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
any_case = cases(dtypes=NARROW, scenarios=[*SCENARIOS, "one step"], depths=(0, 6), rank=4)


def exact_twins(case):
    """The case's reversible network twice, exact: rebuilding and storing. Streams are float32, or int16."""
    coupling = STORED["int16" if case.number % 2 else "float32"]
    case = dataclasses.replace(case, activations="reconstruct")
    nets = networks_of(case)[0], networks_of(case)[0]
    for net, activations in zip(nets, ("reconstruct", "store"), strict=True):
        for module in net.modules():
            if isinstance(module, KeepsGrid):
                module.coupling, module.activations = coupling, activations
    return nets


def check_case(case):
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for net in exact_twins(case):
            try:
                outcomes.append(outcome_of(net, case))
            except (RuntimeError, TypeError) as error:  # a stream beyond bounds, or what torch itself refuses
                outcomes.append((type(error), str(error)))
    got, expected = outcomes
    if isinstance(got, tuple) or isinstance(expected, tuple):
        assert isinstance(got, tuple) and isinstance(expected, tuple), (got, expected)
        assert got[0] is expected[0]
    else:
        assert_same_bits(got, expected)
    return not isinstance(got, tuple)


def test_random_chains(compiled):
    """80 cases of every scenario, the same ones every time; nearly all of them run to their end."""
    ended = []
    always = settings(max_examples=80, phases=[Phase.generate], **QUIET)
    seed(20264)(always(given(any_case)(lambda case: ended.append(check_case(case)))))()
    assert sum(ended) > 0.9 * len(ended)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("compiled")
@settings(max_examples=3000, **QUIET)
@given(any_case)
def test_many_random_chains(case):
    check_case(case)


def test_hooks_of_blocks_see_values(coupling, compiled):
    """And what they return of them goes on; a tensor in its place is refused, as it is in a float chain."""
    net, stored = pair_of(linear, 3, coupling=coupling)
    seen = []
    for network in (net, stored):
        network[1].register_forward_pre_hook(lambda module, streams: seen.append([s.detach().clone() for s in streams]))
        network[2].register_full_backward_hook(lambda module, given, taken: None)
    x = rows(3, 8, dtype=torch.float32)
    assert_same_bits(step(net, x), step(stored, x))
    assert len(seen) == 2 and all(map(torch.equal, *seen)) and seen[0][0].abs().max() > 0
    net[1].register_forward_pre_hook(lambda module, streams: tuple(s * 2 for s in streams))
    assert_raises(rk.ReconstructionError, ["replaced the streams"], lambda: net(x))


# ---- among the rest


@pytest.mark.parametrize(
    ("make", "shape"),
    [(revnet38, (2, 3, 32, 32)), (lambda **o: revvit_small(10, image_size=32, patch_size=8, **o), (2, 3, 32, 32))],
    ids=["RevNet-38", "Rev-ViT-S"],
)
def test_models(make, shape, compiled):
    torch.manual_seed(0)
    net = make(coupling="exact")
    stored = copy.deepcopy(net)
    for module in stored.modules():
        if isinstance(module, KeepsGrid):
            module.activations = "store"
    x = rows(*shape, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(step(net, x), step(stored, x))


def test_inside_torch_compile(compiled):
    """The chain breaks the graph; the bits are those of the uncompiled network."""
    net, stored = pair_of(linear, 3, coupling=rk.Exact(k=14))
    head = nn.Linear(8, 2)
    x = rows(3, 8, dtype=torch.float32)
    for network in (net, stored):
        model = nn.Sequential(network, copy.deepcopy(head))
        expected = step(copy.deepcopy(model), x)
        assert_same(step(torch.compile(model, backend="aot_eager"), x), _renamed(expected), tolerance=1e-6)
        torch._dynamo.reset()


def _renamed(outcome):
    prefixed = {f"_orig_mod.{name}": gradient for name, gradient in outcome.parameters.items()}
    return dataclasses.replace(
        outcome, parameters=prefixed, buffers={f"_orig_mod.{n}": b for n, b in outcome.buffers.items()}
    )
