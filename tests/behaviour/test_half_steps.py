# SPDX-License-Identifier: Apache-2.0
"""Half-steps of any order and number: the recurrence under every reversible module here."""

import pytest
from torch import nn

from behaviour.common import (
    WIDE,
    assert_close,
    assert_raises,
    assert_same,
    dropout_mlp,
    mlp,
    norm_mlp,
    rows,
    step,
    torch,
)
from revkernels import ReconstructionError
from revkernels.nn import ReversibleSequential
from revkernels.nn.chain import HalfStep, run, run_inverse

#: (target, sources) of each half-step.
ORDERS = {
    "one": (2, [(0, (1,))]),
    "odd": (2, [(0, (1,)), (1, (0,)), (0, (1,))]),
    "the same target twice": (2, [(1, (0,)), (1, (0,)), (0, (1,))]),
    "three in turn": (3, [(0, (1,)), (1, (2,)), (2, (0,)), (0, (1,))]),
    "sums": (4, [(0, (1, 2, 3)), (3, (0, 2)), (1, (3,)), (2, (1, 0, 3))]),
    "a stream nobody touches": (3, [(0, (1,)), (1, (0,))]),
}


class Steps(nn.Module):
    """A module of branches and an order to run them in."""

    def __init__(self, order, make, **options):
        super().__init__()
        self.groups, self.places = ORDERS[order]
        self.branches = nn.ModuleList(make() for _ in self.places)
        self.options = options

    def half_steps(self, *args):
        return [HalfStep(b, *place, args) for b, place in zip(self.branches, self.places, strict=True)]

    def forward(self, x, *args):
        return run(self.half_steps(*args), x, self.groups, **self.options)


class PlainSteps(Steps):
    def forward(self, x, *args):
        streams = list(x) if isinstance(x, tuple) else list(x.chunk(self.groups, 1))
        for branch, (target, sources) in zip(self.branches, self.places, strict=True):
            h = sum((streams[s] for s in sources[1:]), streams[sources[0]])
            streams[target] = streams[target] + branch(h, *args)
        return tuple(streams) if isinstance(x, tuple) else torch.cat(streams, 1)


def pair(order, make, options):
    net, plain = Steps(order, make, **options), PlainSteps(order, make)
    plain.load_state_dict(net.state_dict())
    return net, plain


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", [mlp, norm_mlp, dropout_mlp])
def test_as_plain_pytorch(order, make, options):
    """Joined and as a tuple; gradients, statistics and random numbers."""
    net, plain = pair(order, make, options)
    joined = rows(5, 4 * net.groups)
    assert_same(step(net, joined), step(plain, joined))
    streams = tuple(rows(5, 4) for _ in range(net.groups))
    assert_same(step(net, streams), step(plain, streams))


@pytest.mark.parametrize("order", ORDERS)
def test_inverse(order, options):
    net, _ = pair(order, mlp, options)
    x = rows(5, 4 * net.groups)
    assert_close(run_inverse(net.half_steps(), net(x), net.groups, **options), x, 1e-12)


def test_no_half_step_is_the_identity(options):
    x = rows()
    assert run([], x, **options) is x
    assert run_inverse([], x, **options) is x


def test_no_block_takes_any_number_of_streams(options):
    net = ReversibleSequential(**options)
    streams = tuple(rows(5, 4) for _ in range(4))
    assert net(streams) is streams
    assert net.inverse(streams) is streams
    assert_raises(TypeError, ["x is a tuple of 1", "pair"], lambda: net(streams[:1]))


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x, shift):
        return self.inner(x) + shift


@pytest.mark.parametrize("same", [True, False], ids=["one for all", "one each"])
def test_a_side_input_changed_in_place_is_named(same, backend):
    net = Steps("odd", Shifted, backend=backend)
    shifts = [torch.ones(4, dtype=WIDE)] * 3 if same else [torch.ones(4, dtype=WIDE) for _ in range(3)]
    half_steps = [
        HalfStep(b, *place, (shift,)) for b, place, shift in zip(net.branches, net.places, shifts, strict=True)
    ]
    y = run(half_steps, rows(), backend=backend)
    shifts[1].add_(1)
    named = "the side input argument 0" if same else "the side input argument 0[1]"
    assert_raises(ReconstructionError, [named, "changed in place"], y.sum().backward)


def test_errors_have_the_caller_s_words():
    half_steps = [HalfStep(nn.Linear(4, 5), 0, (1,))]
    assert_raises(ValueError, ["half-step 0"], lambda: run(half_steps, rows(dtype=torch.float32)))
    assert_raises(
        ValueError, ["the lion"], lambda: run(half_steps, rows(dtype=torch.float32), name=lambda k: "the lion")
    )


BAD = {
    "not a half-step": (TypeError, ["half_steps[1]", "tuple", "HalfStep"], (nn.Tanh(), 0, (1,))),
    "not callable": (TypeError, ["half_steps[1].branch", "int", "callable"], HalfStep(3, 0, (1,))),
    "no tuple": (TypeError, ["half_steps[1].sources", "int", "tuple"], HalfStep(nn.Tanh(), 0, 1)),
    "no source": (ValueError, ["half_steps[1]", "()", "0 to 1"], HalfStep(nn.Tanh(), 0, ())),
    "reads its target": (ValueError, ["half_steps[1]", "(0,)", "stream 0"], HalfStep(nn.Tanh(), 0, (0,))),
    "no such source": (ValueError, ["half_steps[1]", "(2,)", "0 to 1"], HalfStep(nn.Tanh(), 0, (2,))),
    "no such target": (ValueError, ["half_steps[1]", "stream -1", "0 to 1"], HalfStep(nn.Tanh(), -1, (1,))),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("function", [run, run_inverse])
def test_bad_half_steps(case, function):
    error, parts, bad = BAD[case]
    ran = []
    good = HalfStep(lambda x: ran.append(1) or x, 0, (1,))
    assert_raises(error, parts, lambda: function([good, bad], rows()))
    assert not ran


@pytest.mark.parametrize("function", [run, run_inverse])
def test_bad_options(function):
    good = [HalfStep(nn.Tanh(), 0, (1,))]
    assert_raises(ValueError, ["activations", "keep"], lambda: function(good, rows(), activations="keep"))
    assert_raises(TypeError, ["unknown"], lambda: function(good, rows(), unknown=1))
    assert_raises(ValueError, ["dimension 1", "8", "3 streams"], lambda: function(good, rows(), 3))
    assert_raises(ValueError, ["groups is 0", "at least 1"], lambda: function(good, rows(), 0))
    assert_raises(TypeError, ["groups", "float", "int"], lambda: function(good, rows(), 2.0))
    assert_raises(TypeError, ["half_steps", "NoneType", "list"], lambda: function(None, rows()))
