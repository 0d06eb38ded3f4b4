# SPDX-License-Identifier: Apache-2.0
"""coupling="exact": what the backward rebuilds are the forward's bits, and so are the gradients those of storing."""

import copy
import dataclasses
import io
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn

import revkernels as rk
from behaviour.common import assert_raises, assert_same, rows, step, tensors_in, torch
from behaviour.random_cases import SCENARIOS, cases
from behaviour.random_networks import networks_of
from behaviour.random_scenarios import outcome_of
from revkernels.models import revnet38, revvit_small
from revkernels.nn import AttentionBranch, MLPBranch, ReversibleBlock, ReversibleSequential
from revkernels.nn.chain import HalfStep, run, run_inverse
from revkernels.nn.conv_branches import BasicBranch
from revkernels.nn.exact import KeepsGrid


class Cast(nn.Module):
    """A branch that computes in a half type, whatever autocast says."""

    def __init__(self, dtype, width=8):
        super().__init__()
        self.layer, self.dtype = nn.Linear(width, width), dtype

    def forward(self, x):
        return torch.tanh(nn.functional.linear(x.to(self.dtype), self.layer.weight.to(self.dtype)))


class Unfused(nn.Module):
    """Batch norm with its own forward, which the chain cannot take apart: its statistics are computed twice."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.conv, self.drop = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.conv(torch.relu(self.norm(x))))


def conv():
    return nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.1))


KINDS = {
    "conv, batch norm, dropout": (conv, (2, 16, 5, 6), 1),
    "basic": (lambda: BasicBranch(8, 8), (2, 16, 5, 6), 1),
    "unfused batch norm": (Unfused, (2, 16, 5, 6), 1),
    "layer norm, GELU, dropout": (lambda: MLPBranch(8, 16, 0.1), (2, 5, 16), -1),
    "attention, dropout": (lambda: AttentionBranch(8, 2, 0.1), (2, 5, 16), -1),
    "bfloat16 inside": (lambda: Cast(torch.bfloat16), (5, 16), 1),
    "float16 inside": (lambda: Cast(torch.float16), (5, 16), 1),
}


DEPTHS = [(depth, autocast) for depth in (1, 8) for autocast in (None, torch.bfloat16, torch.float16)]

#: Streams of both kinds.
STORED = {"float32": "exact", "int16": rk.Exact(storage="int16")}


@pytest.fixture(params=STORED)
def coupling(request):
    return STORED[request.param]


def pair_of(make, depth, split_dim=1, coupling="exact", backend=None):
    """The same network rebuilding and storing."""
    torch.manual_seed(depth)
    blocks = [ReversibleBlock(make(), make()) for _ in range(depth)]
    net = ReversibleSequential(blocks, split_dim=split_dim, coupling=coupling, backend=backend)
    stored = copy.deepcopy(net)
    stored.activations = "store"
    return net, stored


def assert_same_bits(got, expected):
    """The same values everywhere, and NaN at the same places."""
    got, expected = flat(vars(got)), flat(vars(expected))
    assert got.keys() == expected.keys()
    for name, a in got.items():
        b = expected[name]
        if a is None or b is None:
            assert a is b, name
        else:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            same = (a == b) | ((a != a) & (b != b))
            assert same.all(), f"{name}: {(~same).sum()} of {a.numel()} elements differ"


def flat(value, name=""):
    """The tensors (and Nones) in nested dicts and lists, by their paths."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in flat(item, f"{name}.{key}").items()}
    return {name: value}


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


@pytest.mark.parametrize(("depth", "autocast"), [*DEPTHS, (64, None), (64, torch.bfloat16)], ids=str)
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
NARROW = (torch.float32, torch.float32, torch.bfloat16)  # torch refuses float16 norms behind bfloat16 layers
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
    """150 cases of every scenario, the same ones every time; nearly all of them run to their end."""
    ended = []
    always = settings(max_examples=150, phases=[Phase.generate], **QUIET)
    seed(20264)(always(given(any_case)(lambda case: ended.append(check_case(case)))))()
    assert sum(ended) > 0.9 * len(ended)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("compiled")
@settings(max_examples=3000, **QUIET)
@given(any_case)
def test_many_random_chains(case):
    check_case(case)


# ---- what cannot be rebuilt is told, and where


class Noisy(nn.Module):
    """A branch that is not the same twice: it adds noise from a generator that torch does not know."""

    def __init__(self, width=4):
        super().__init__()
        self.layer, self.random = nn.Linear(width, width), np.random.default_rng(0)

    def forward(self, x):
        return self.layer(x) + float(self.random.standard_normal()) * 0.1


def linear():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


@pytest.mark.parametrize("place", range(6))
def test_a_branch_that_is_not_the_same_twice(place, coupling, backend):
    branches = [linear() for _ in range(6)]
    branches[place] = Noisy()
    net = ReversibleSequential(*map(ReversibleBlock, branches[::2], branches[1::2]), coupling=coupling, backend=backend)
    y = net(rows(3, 8, dtype=torch.float32))
    where = f"block {place // 2}, branch {'FG'[place % 2]} (Noisy)"
    assert_raises(rk.ReconstructionError, [where, "bit for bit", "not return the same twice"], y.sum().backward)
    net.activations = "store"  # nobody asks for it twice
    net(rows(3, 8, dtype=torch.float32)).sum().backward()


@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_weight_changed_behind_autograds_back(place, backend):
    branches = [linear() for _ in range(6)]
    net = ReversibleSequential(
        *map(ReversibleBlock, branches[::2], branches[1::2]), coupling=rk.Exact(k=16), backend=backend
    )
    x = rows(3, 8, dtype=torch.float32)
    y = net(x)
    branches[place][0].weight.data.mul_(1.01)
    where = f"block {place // 2}, branch {'FG'[place % 2]}"
    assert_raises(rk.ReconstructionError, [where, "changed between forward and backward"], y.sum().backward)
    y = net(x)
    with torch.no_grad():
        branches[place][0].weight.mul_(1.01)
    assert_raises(rk.ReconstructionError, [where, "parameter 0.weight"], y.sum().backward)
    net(x).sum().backward()  # and nothing is left of it


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


@pytest.mark.parametrize("activations", ["reconstruct", "store"])
@pytest.mark.parametrize("storage", ["float32", "int16"])
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (3e38, "infinite")])
def test_not_finite(value, word, storage, activations, backend):
    net = ReversibleSequential(
        ReversibleBlock(linear(), linear()),
        ReversibleBlock(linear(), Constant(value)),
        coupling=rk.Exact(storage, k=10),
        activations=activations,
        backend=backend,
    )
    x = rows(3, 8, dtype=torch.float32)
    for forward in (lambda: net(x), torch.no_grad()(lambda: net(x))):
        assert_raises(rk.ReconstructionError, ["block 1, branch G (Constant)", word], forward)
    bad = x.detach().clone()
    bad[1, 2] = value if word == "NaN" else float("inf")
    assert_raises(rk.ReconstructionError, ["the input", word], lambda: net(bad))
    net.coupling = rk.Exact(storage)
    assert_raises(rk.ReconstructionError, ["the input", word], lambda: net(bad))


@pytest.mark.parametrize("k", [-3, 0, 7, 14, 20])
@pytest.mark.parametrize("storage", ["float32", "int16"])
def test_the_range(k, storage, backend):
    """|s| < 2^(24 - k) (int16: 2^(15 - k)) passes, and comes back; the edge is told, with an exponent that works."""
    edge = 2.0 ** ({"float32": 24, "int16": 15}[storage] - k)
    exact = rk.Exact(storage, k)
    net = ReversibleSequential(ReversibleBlock(Constant(edge / 2), Constant(0.0)), coupling=exact, backend=backend)
    below = torch.full((1, 2), edge / 2 - 2.0**-k)
    assert torch.equal(net.inverse(net(below)), below)
    at = torch.full((1, 2), edge / 2)
    error = assert_raises(rk.ReconstructionError, ["block 0, branch F", f"{edge:g}", f"k={k}"], lambda: net(at))
    net.coupling = rk.Exact(storage, k - 2)
    assert f"Exact(k={k - 2})" in str(error)
    assert torch.equal(net.inverse(net(at)), at)


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


# ---- the exponent


def test_the_exponent_is_chosen_and_settles(compiled):
    """From the first batches, with room above them; then it stays until streams come close to the range."""
    net = ReversibleSequential(*[ReversibleBlock(linear(), linear()) for _ in range(4)], coupling="exact")
    assert net.grid.tolist()[0] < -(2**30)
    seen = []
    for number in range(40):
        x = rows(16, 8, dtype=torch.float32) * (2 if number == 7 else 1)
        with torch.no_grad():
            largest = max(float(t.abs().max()) for t in tensors_in([x, net[0:4](x)]))
        net(x).sum().backward()
        k = net.grid[0].item()
        seen.append(k)
        assert 2.0 ** (24 - k) > 4 * largest
    assert len(set(seen[17:])) == 1 and 14 <= seen[-1] <= 20
    assert net.grid[1] == 16
    x = torch.full((16, 8), 2.0 ** (24 - seen[-1]) / 3)
    net(x)  # in range still: the next call has room again
    assert net.grid[0] == seen[-1]
    net(x)
    assert net.grid[0] == seen[-1] - 3
    net.eval()
    before = net.grid.tolist()
    net(rows(16, 8, dtype=torch.float32))
    assert net.grid.tolist() == before


def test_beyond_the_range_of_what_was_chosen(compiled):
    """The call is refused, and the next one has an exponent that is small enough."""
    net = ReversibleSequential(ReversibleBlock(linear(), linear()), coupling="exact")
    net(rows(3, 8, dtype=torch.float32))
    x = torch.full((3, 8), 2.0**17)
    assert_raises(rk.ReconstructionError, ["the input", "from the next call on"], lambda: net(x))
    assert torch.equal(net.inverse(net(x)), x)


def test_state_dict(compiled):
    """The exponent travels with it, and checkpoints go both ways between exact and other chains."""
    exact = ReversibleSequential(ReversibleBlock(linear(), linear()), coupling="exact")
    other = ReversibleSequential(ReversibleBlock(linear(), linear()), coupling="exact")
    plain = ReversibleSequential(ReversibleBlock(linear(), linear()))
    fixed = ReversibleSequential(ReversibleBlock(linear(), linear()), coupling=rk.Exact(k=12))
    x = rows(3, 8, dtype=torch.float32)
    for _ in range(20):
        exact(x * 64)
    assert set(exact.state_dict()) - set(plain.state_dict()) == {"grid"}
    assert set(fixed.state_dict()) == set(plain.state_dict())
    other.load_state_dict(exact.state_dict())
    assert other.grid.tolist() == exact.grid.tolist()
    assert torch.equal(other(x), exact(x))
    for net in (plain, fixed, nn.Sequential(plain)):
        prefix = "0." if isinstance(net, nn.Sequential) else ""
        net.load_state_dict({prefix + name: value for name, value in exact.state_dict().items()})
    other.load_state_dict(plain.state_dict())
    assert_raises(RuntimeError, ["bogus"], lambda: plain.load_state_dict(plain.state_dict() | {"bogus": x}))
    stream = io.BytesIO()
    torch.save(exact, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(exact), torch.load(stream, weights_only=False)):
        assert torch.equal(copied(x), exact(x)) and copied.grid.tolist() == exact.grid.tolist()


def test_a_copy_goes_on_as_the_original(compiled):
    """In the middle of the choice: what was read of the original's exponent is not taken for the copy's."""
    net = ReversibleSequential(ReversibleBlock(linear(), linear()), coupling="exact")
    x = rows(3, 8, dtype=torch.float32)
    net(x)
    copied = copy.deepcopy(net)
    assert copied.grid.tolist() == net.grid.tolist() and net.grid[0] != net.grid[2]
    for _ in range(3):
        assert torch.equal(copied(x), net(x)) and copied.grid.tolist() == net.grid.tolist()


def test_inverse_before_any_forward(compiled):
    net = ReversibleSequential(ReversibleBlock(linear(), linear()), coupling="exact")
    x = rows(3, 8, dtype=torch.float32)
    assert_raises(rk.ReconstructionError, ["not known yet", "Exact(k=...)"], lambda: net.inverse(x))
    seen = net.to_grid(x)  # chooses it
    assert torch.equal(net.inverse(net(x)), seen)


def test_a_block_alone_and_options_changed_later(compiled):
    block = ReversibleBlock(linear(), linear())
    x = rows(3, 8, dtype=torch.float32)
    assert block.to_grid(x) is x
    block.coupling = "exact"
    assert torch.equal(block.inverse(block(x)), block.to_grid(x))
    block.coupling = "float"
    block(x)


# ---- bad input

BAD_OPTIONS = {
    "no such storage": (ValueError, "float64", lambda: rk.Exact(storage="float64")),
    "k is no whole number": (TypeError, "k is a float", lambda: rk.Exact(k=14.0)),
    "k is a bool": (TypeError, "k is a bool", lambda: rk.Exact(k=True)),
    "k too large": (ValueError, "from -102 to 126", lambda: rk.Exact(k=127)),
    "k too small": (ValueError, "from -102 to 126", lambda: rk.Exact(k=-103)),
    "no such coupling": (ValueError, "'float', 'exact' or", lambda: ReversibleSequential(coupling="precise")),
    "another object": (ValueError, "'float', 'exact' or", lambda: ReversibleSequential(coupling=3)),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name):
    error, part, make = BAD_OPTIONS[name]
    assert_raises(error, [part], make)


def test_bad_streams(backend):
    net = ReversibleSequential(ReversibleBlock(linear(), linear()), coupling="exact", backend=backend)
    assert_raises(TypeError, ["torch.float64", "x.float()"], lambda: net(rows(3, 8)))
    assert_raises(TypeError, ["torch.float64"], lambda: net.to_grid(rows(3, 8)))
    assert_raises(TypeError, ["torch.int64"], lambda: net(torch.ones(3, 8, dtype=torch.int64)))
    x = rows(3, 8, dtype=torch.float32, requires_grad=False)
    assert_raises(rk.ReconstructionError, ["coupling='float'"], lambda: torch.func.vmap(net)(x[None]))


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
