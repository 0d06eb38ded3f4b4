# SPDX-License-Identifier: Apache-2.0
"""Operators whose outputs are kept: which count, how they are numbered, which are kept, and that they do not run."""

import time

import pytest

torch = pytest.importorskip("torch")
from behaviour.common import old_torch  # noqa: E402
from one_thread import one_thread_here  # noqa: E402, F401
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from revkernels.autograd.planning.kept_ops import Looking, Measuring, Noting, Replaying  # noqa: E402


class NoLevel:
    """Of a host where nobody tells how much is allocated."""

    cheap = True

    def raw(self):
        return None

    def learn(self, before, now, made):
        assert before is None
        return 0

    def since(self):
        return 0.0, 0.0

    def aside(self, since, start, end):
        pass


class Ran(TorchDispatchMode):
    """The operators that really run: what the mode inside this one lets through."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).removeprefix("aten.").partition(".")[0])
        return func(*args, **(kwargs or {}))


def measured(function, *args):
    """The operators as the planner sees them: in a recompute."""
    mode = Measuring(time.perf_counter, NoLevel())
    with mode:
        out = function(*args)
    mode.settle()
    del out  # what is gone by now cannot be looked at
    return mode.costs(lambda start, end: end - start)


def wanted(ops, *names):
    """The keepable ones, or those of some names."""
    chosen = [op for op in ops if op.keepable and (not names or name_of(op) in names)]
    return {op.number: op.print for op in chosen}


def name_of(op):
    return op.name.removeprefix("aten.").partition(".")[0]


def names(ops):
    return [name_of(op) for op in ops if op.number >= 0]


def keep(function, choice, *args):
    mode = Noting(choice)
    with mode:
        out = function(*args)
    return out, mode.settle()


def replay(function, kept, *args):
    with Ran() as ran, Replaying(kept):
        out = function(*args)
    return out, ran.names


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def check(function, *args, random=()):
    """Everything that may be kept is, is not run again, and changes neither results nor gradients."""
    ops = measured(function, *args)
    state = torch.get_rng_state()
    first, kept = keep(function, wanted(ops), *args)
    assert set(kept) == set(wanted(ops))
    torch.set_rng_state(state)
    again, ran = replay(function, kept, *args)
    for name in random:
        assert name in ran, f"{name} was not run again"
    assert not {name_of(op) for op in ops if op.number in kept} & set(ran)
    torch.set_rng_state(state)
    plain = function(*args)
    leaves = [t for t in args if t.requires_grad]
    for out in (first, again):
        assert torch.equal(out, plain)
        for got, expected in zip(
            torch.autograd.grad(out.square().sum(), leaves, retain_graph=True),
            torch.autograd.grad(plain.square().sum(), leaves, retain_graph=True),
            strict=True,
        ):
            assert torch.equal(got, expected)
    return ops


def test_a_linear_layer():
    layer, x = nn.Linear(4, 3), leaf(5, 4)
    ops = check(lambda x: functional.gelu(layer(x)), x)
    assert names(ops) == ["addmm", "gelu"]
    assert [(op.number, op.bytes) for op in ops] == [(0, 60), (1, 60)]
    assert len({op.print for op in ops}) == 2


def test_numbers_are_those_of_the_recompute():
    """Views, memory and what works in place have none; the grad mode makes no difference."""
    layer = nn.Linear(4, 4)

    def branch(x):
        y = layer(x).view(-1, 2, 2).transpose(0, 1)
        y = torch.zeros_like(y).add_(y).relu_()
        buffer = torch.empty(3, 4)
        buffer.copy_(x[:3])
        return y.exp().sum() + buffer.sum()

    ops = measured(branch, leaf(5, 4))
    assert names(ops) == ["addmm", "exp", "sum", "sum", "add"]
    with torch.no_grad():
        assert [op.print for op in measured(branch, torch.randn(5, 4))] == [op.print for op in ops]


def test_several_outputs():
    norm = nn.LayerNorm(8)
    ops = check(lambda x: norm(x) * 2, leaf(5, 8))
    assert names(ops)[0] == "native_layer_norm" and ops[0].bytes == 4 * (40 + 5 + 5)


def test_attention():
    """It is marked as random, and without dropout is not."""
    q, k, v = (leaf(2, 2, 5, 4) for _ in range(3))
    ops = check(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v) * 2, q, k, v)
    assert "_scaled_dot_product_flash_attention_for_cpu" in names(ops)


RANDOM = {
    "dropout": lambda x: functional.dropout(x.exp(), 0.5) * 2,
    "rrelu": lambda x: functional.rrelu(x.exp() - 1, training=True) * 2,
    "rand_like": lambda x: x.exp() + torch.rand_like(x),
    "normal": lambda x: torch.normal(x.exp(), 1.0) + x,
    "attention with dropout": lambda x: functional.scaled_dot_product_attention(x, x.exp(), x, dropout_p=0.5) * 2,
    "gumbel_softmax": lambda x: functional.gumbel_softmax(x.exp()) * 2,
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_operators_run_again(name):
    """Kept, they would draw nothing, and the generator would not be where it was."""
    function, x = RANDOM[name], leaf(2, 2, 4, 4)
    ops = check(function, x)
    assert "exp" in names(ops)
    state = torch.get_rng_state()
    _, kept = keep(function, wanted(ops), x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    replay(function, kept, x)
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(state, after)


def test_random_in_training_alone():
    x = leaf(2, 3)
    check(lambda x: functional.rrelu(x, training=False).exp(), x)
    assert names(measured(lambda x: functional.dropout(x, 0.5, training=False).exp(), x)) == ["exp"]


def test_written_over_afterwards():
    """In place, by itself or through a view, at once or later: not kept, by either measure."""
    functions = [
        lambda x: x.exp().neg_(),
        lambda x: functional.gelu(x.exp() - 1).add_(1),
        lambda x: functional.relu(x.exp() - 1, inplace=True),
        lambda x: x.exp()[1:].mul_(2),
        lambda x: x.exp().t().add_(1),
    ]
    for function in functions:
        x = leaf(4, 4)
        ops = measured(function, x)
        out, kept = keep(function, {op.number: op.print for op in ops}, x)
        assert set(kept) == {op.number for op in ops[:-1]} and not ops[-1].keepable
        again, _ = replay(function, kept, x)
        assert torch.equal(out, again)


def test_written_over_behind_the_branch():
    """By somebody who was given it: it is run again."""
    x = leaf(4, 4)
    ops = measured(torch.exp, x)
    out, kept = keep(torch.exp, wanted(ops), x)
    expected = out.detach().clone()
    with torch.no_grad():
        out.mul_(2)
    again, ran = replay(torch.exp, kept, x)
    assert torch.equal(again, expected) and "exp" in ran


def test_a_replayed_output_may_be_written_over():
    """By what was not in place in the forward: the kept one is an alias, so autograd tells."""
    x = leaf(3, 3)
    _, kept = keep(lambda x: x.exp(), wanted(measured(torch.exp, x)), x)
    y, _ = replay(lambda x: x.exp(), kept, x)
    assert y.grad_fn is not None and not kept[0][1].requires_grad
    y.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_autocast_casts_are_not_numbered():
    """A leaf is cast once, any other tensor each time, and a stream is a leaf in the recompute alone."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)

    def branch(x):
        with torch.autocast("cpu", torch.bfloat16):
            return first(x) + second(x).relu()

    x = torch.randn(3, 4)
    ops = measured(branch, x.clone().requires_grad_())
    assert names(ops) == ["addmm", "addmm", "relu", "add"]
    entered = x.clone().requires_grad_() * 1.0  # no leaf
    out, kept = keep(branch, wanted(ops), entered)
    assert set(kept) == {0, 1, 2, 3}
    again, ran = replay(branch, kept, x.clone().requires_grad_())
    assert torch.equal(out, again) and "addmm" not in ran
    casts = [op for op in ops if op.number < 0]
    assert {name_of(op) for op in casts} == {"_to_copy"} and not any(op.keepable for op in casts)


def test_weights_that_autocast_has_cast_already():
    """A layer of two branches is cast for the first: the second one's operators have the same numbers all the same."""
    layer = nn.Linear(4, 4)
    ops = None
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(3, 4))

        def branch(x):
            return layer(x).exp()

        x = leaf(3, 4)
        _, kept = keep(branch, {0: 0, 1: 0}, x)
        assert kept == {}  # not their prints
    with torch.autocast("cpu", torch.bfloat16):
        ops = measured(branch, x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        out, kept = keep(branch, wanted(ops), x)
    with torch.autocast("cpu", torch.bfloat16):
        again, ran = replay(branch, kept, x)
    assert set(kept) == {0, 1} and torch.equal(out, again) and "addmm" not in ran


def test_what_is_not_the_same_twice_is_run():
    """An operator more in the forward, or in the recompute: from there on everything runs, and is right."""
    layer, x = nn.Linear(4, 4), leaf(3, 4)

    def branch(x, more=False, before=False):
        if more and before:
            x.abs().mean()
        y = layer(x)
        if more:
            y.abs().mean()
        return layer(y).exp()

    ops = measured(branch, x)
    plain = branch(x)
    for before in (False, True):
        out, kept = keep(lambda x, b=before: branch(x, True, b), wanted(ops), x)
        assert set(kept) == (set() if before else {0}) and torch.equal(out, plain)
        _, kept = keep(branch, wanted(ops), x)
        again, ran = replay(lambda x, b=before: branch(x, True, b), kept, x)
        assert torch.equal(again, plain) and ran.count("addmm") == (2 if before else 1)
        torch.autograd.grad(again.sum(), x)


def test_custom_operators():
    """Called once in the forward, and not again."""
    calls = []
    with torch.library._scoped_library("revkernels_tests", "FRAGMENT"):

        @torch.library.custom_op("revkernels_tests::count_and_double", mutates_args=())
        def double(x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return x * 2

        @torch.library.custom_op("revkernels_tests::count_and_write", mutates_args={"x"})
        def write(x: torch.Tensor) -> None:
            calls.append(2)
            x.mul_(2)

        x = torch.randn(3)
        ops = measured(double, x)
        out, kept = keep(double, wanted(ops), x)
        assert calls == [1, 1] and len(kept) == 1
        again, _ = replay(double, kept, x)
        assert calls == [1, 1] and torch.equal(again, out)
        assert measured(write, x) == []
        replay(write, kept, x)
        assert calls == [1, 1, 2, 2]


@old_torch("an operator of higher order refuses to run under any TorchDispatchMode")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_operators_of_higher_order_run():
    """Which have no schema to be judged by."""
    from torch.nn.attention.flex_attention import flex_attention

    x = torch.randn(1, 1, 16, 16)

    def branch(x):
        return flex_attention(x.exp(), x, x)  # and compiles itself

    ops = measured(branch, x)
    out, kept = keep(branch, wanted(ops, "exp"), x)
    with Replaying(kept):
        again = branch(x)
    assert len(kept) == 1 and torch.equal(out, again)


def test_tensors_of_other_kinds_are_not_kept():
    class Other(torch.Tensor):
        pass

    x = torch.randn(3).as_subclass(Other)
    mode = Noting({op.number: op.print for op in measured(torch.exp, torch.randn(3))})
    with mode:
        y = torch.exp(x)
    assert type(y) is Other
    assert all(type(t) is torch.Tensor for _, t, _ in mode.settle().values())


def test_what_is_kept_is_no_copy_and_holds_no_graph():
    x = leaf(3)
    mode = Noting(wanted(measured(torch.exp, x)))
    with mode:
        y = x.exp()
    _, kept, _ = mode.settle()[0]
    assert kept.data_ptr() == y.data_ptr() and kept.grad_fn is None


def test_looking_looks_behind_whatever_makes_something():
    looks = []
    layer, x = nn.Linear(4, 4), leaf(3, 4)
    with torch.autocast("cpu", torch.bfloat16), Looking(NoLevel(), lambda *_: looks.append(1), lambda: None):
        functional.dropout(layer(x).view(-1), 0.5)
    assert len(looks) >= 5  # three casts, the product, and the mask or the dropout


def test_measuring_tells_times_and_sizes():
    ops = measured(lambda x: (x @ x).exp(), torch.randn(256, 256))
    assert [op.bytes for op in ops] == [4 * 256 * 256] * 2 and all(op.seconds > 0 for op in ops)
