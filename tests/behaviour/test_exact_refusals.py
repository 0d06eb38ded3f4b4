# SPDX-License-Identifier: Apache-2.0
"""coupling="exact": how its exponent is chosen, and what it refuses, naming the half-step."""

import copy
import io

import pytest
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import revkernels as rk
from behaviour.common import assert_raises, rows, tensors_in, torch
from behaviour.exact_chains import STORED, linear
from revkernels.nn import ReversibleBlock, ReversibleSequential


@pytest.fixture(params=STORED)
def coupling(request):
    return STORED[request.param]


# ---- what cannot be rebuilt is told, and where


class Counting(nn.Module):
    """A branch that is not the same twice: what it adds depends on how often it was called."""

    def __init__(self, width=4):
        super().__init__()
        self.layer, self.calls = nn.Linear(width, width), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + self.calls * 0.1


@pytest.mark.parametrize("place", range(6))
def test_a_branch_that_is_not_the_same_twice(place, coupling, backend):
    branches = [linear() for _ in range(6)]
    branches[place] = Counting()
    net = ReversibleSequential(*map(ReversibleBlock, branches[::2], branches[1::2]), coupling=coupling, backend=backend)
    y = net(rows(3, 8, dtype=torch.float32))
    where = f"block {place // 2}, branch {'FG'[place % 2]} (Counting)"
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
    assert_raises(rk.ReconstructionError, ["the input", "for the next call"], lambda: net(x))
    assert torch.equal(net.inverse(net(x)), x)


def test_one_batch_beyond_the_range(compiled):
    """Whoever goes on without it has the grid back, as fine as before; in evaluation nothing changes at all."""
    net = ReversibleSequential(ReversibleBlock(linear(), linear()), coupling="exact")
    x = rows(3, 8, dtype=torch.float32)
    for _ in range(20):
        net(x)
    before, bad = net.grid.tolist(), torch.full((3, 8), 2.0**23)
    net.eval()
    assert_raises(rk.ReconstructionError, ["the input", "stays as it is in evaluation"], lambda: net(bad))
    net.train()
    with torch.no_grad():
        assert_raises(rk.ReconstructionError, ["the input", "without grad mode"], lambda: net(bad))
    assert net.grid.tolist() == before
    assert_raises(rk.ReconstructionError, ["the input", "for the next call"], lambda: net(bad))
    assert net.grid[0] < 0
    for _ in range(3):
        net(x)
    assert net.grid[0] == before[0]


def test_what_no_grid_holds(compiled):
    """Advice that helps, or none."""
    net = ReversibleSequential(ReversibleBlock(linear(), linear()), coupling=rk.Exact(k=-102))
    x = torch.full((3, 8), 3e38)
    assert_raises(rk.ReconstructionError, ["the input", "no grid of float32 streams"], lambda: net(x))
    net.coupling = rk.Exact(k=10)
    assert_raises(rk.ReconstructionError, ["infinite, or too large for k=10"], lambda: net(x))


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
    net.eval()(rows(3, 8, dtype=torch.float32))  # chooses the grid
    assert_raises(TypeError, ["y is torch.float64", "y.float()"], lambda: net.inverse(rows(3, 8)))
    assert_raises(TypeError, ["torch.int64"], lambda: net(torch.ones(3, 8, dtype=torch.int64)))
    x = rows(3, 8, dtype=torch.float32, requires_grad=False)
    assert_raises(rk.ReconstructionError, ["coupling='float'"], lambda: torch.func.vmap(net)(x[None]))
    net.backend = None
    x = torch.ones(3, 8, device="meta")
    assert_raises(TypeError, ["x is on meta", "coupling='float'"], lambda: net(x))
    assert_raises(TypeError, ["x is on meta"], lambda: net.to_grid(x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert_raises(TypeError, ["x is a FakeTensor", "coupling='float'"], lambda: net(torch.ones(3, 8)))
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)
    assert_raises(TypeError, ["x is a NestedTensor", "coupling='float'"], lambda: net((nested, 2 * nested)))
