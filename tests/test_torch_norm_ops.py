# SPDX-License-Identifier: Apache-2.0
"""The operators of torch.library with a norm in them: torch's own checks, and `revkernels.ops` in compiled code."""

import pytest

torch = pytest.importorskip("torch")

from torch.library import opcheck  # noqa: E402

from revkernels import Norm, Statistics, eager, ops, use_backend  # noqa: E402
from revkernels.autograd import torch_norm_ops  # noqa: F401, E402 (registers them)
from revkernels.checks_norm import merges  # noqa: E402

OPERATORS = torch.ops.revkernels
KINDS = {"batch": 1, "layer": 1, "rms": 2, "group": 1}
# Every kind, and every dtype; each opcheck traces several times.
CASES = [(kind, torch.float32) for kind in KINDS]
CASES += [("batch", dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def half_of_channels_last(dtype=torch.float32, requires_grad=False):
    made = torch.randn(2, 8, 3, 5).to(dtype, memory_format=torch.channels_last)[:, :4]
    return made.requires_grad_(requires_grad)


def operands(kind, dtype=torch.float32, count=2, requires_grad=False):
    if kind == "rms":
        return [torch.randn(2, 3, 4, dtype=dtype, requires_grad=requires_grad) for _ in range(count)]
    return [half_of_channels_last(dtype, requires_grad) for _ in range(count)]


def parameters(requires_grad=False):
    return [torch.linspace(0.5, 1.5, 4).requires_grad_(requires_grad), torch.ones(4).requires_grad_(requires_grad)]


def statistics_for(kind, x):
    return ops.norm_act(x.detach(), norm_of(kind))[1]


def norm_of(kind, weight=None, bias=None, **options):
    groups = 2 if kind == "group" else 1
    return Norm(kind, weight, bias, groups=groups, channel_dim=KINDS[kind], **options)


def options_of(kind, **more):
    return {"kind": kind, "groups": 2 if kind == "group" else 1, "channel_dim": KINDS[kind]} | more


# ---- torch's checks: schema, fake tensors, autograd registration, AOTAutograd with dynamic shapes


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
def test_opcheck_of_the_differentiable_ones(kind, dtype):
    x, f = operands(kind, dtype, requires_grad=True)
    options = options_of(kind, activation="silu")
    opcheck(OPERATORS.norm_act.default, (x, *parameters(True), None, None), options)
    opcheck(OPERATORS.couple_norm_act.default, (x, f, *parameters(True), None, None), options)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_with_given_statistics(kind):
    x, f = operands(kind, requires_grad=True)
    statistics = statistics_for(kind, x)
    for constant in (False, True):
        options = options_of(kind, constant=constant, dtype=torch.float16)
        opcheck(OPERATORS.norm_act.default, (x, None, None, *statistics), options)
        opcheck(OPERATORS.couple_norm_act.default, (x, f, *parameters(True), *statistics), options)


@pytest.mark.parametrize("backend", ["", "eager", "reference"])
def test_opcheck_of_every_backend(backend):
    (x,) = operands("batch", count=1, requires_grad=True)
    opcheck(OPERATORS.norm_act.default, (x, *parameters(True), None, None), options_of("batch", backend=backend))


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
def test_opcheck_of_the_others(kind, dtype):
    y, f = operands(kind, dtype)
    statistics, options = statistics_for(kind, y), options_of(kind, activation="relu")
    norm = (*parameters(), *statistics)
    opcheck(OPERATORS.uncouple_norm_act_.default, (y, f, *norm), options | {"dtype": torch.float32})
    opcheck(OPERATORS.uncouple_norm_act_.default, (y, f, *parameters(), None, None), options)
    opcheck(OPERATORS.norm_act_backward_.default, (y.clone(), f, y, *norm, None, None), options)
    for base in (None, y.clone()):
        opcheck(OPERATORS.norm_act_backward.default, (base, f, y, *norm), options | {"constant": False})


def test_opcheck_of_a_batch_s_own():
    """Running statistics, sums alone, given sums."""
    y, f = operands("batch")
    running = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    opcheck(OPERATORS.norm_statistics_.default, (y, None), {"channel_dim": 1, **running})
    opcheck(OPERATORS.norm_statistics_.default, (y, f), {"channel_dim": 1, "momentum": 0.5, **running})
    opcheck(OPERATORS.uncouple_norm_act_.default, (y, f, None, None, None, None), options_of("batch", **running))
    given = (*parameters(), *statistics_for("batch", y))
    opcheck(OPERATORS.norm_act_backward_.default, (None, f, y, *given, None, None), options_of("batch"))
    sums = torch.ones(4), torch.zeros(4)
    opcheck(OPERATORS.norm_act_backward_.default, (y.clone(), f, y, *given, *sums), options_of("batch", count=77))


def test_second_derivatives():
    """With computed statistics and with constant ones."""
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, rstd = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    for statistics in ((None, None), (mean, rstd)):

        def call(x, weight, bias, statistics=statistics):
            return OPERATORS.norm_act.default(
                x, weight, bias, *statistics, kind="batch", eps=0.1, activation="silu", backend="eager"
            )[0]

        assert torch.autograd.gradcheck(call, (x, weight, bias))
        assert torch.autograd.gradgradcheck(call, (x, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_laid_out_as_x_is_not(kind):
    """In a layout that the kernel cannot walk beside x."""
    dh = torch.randn(2, 4, 5, 3).to(memory_format=torch.channels_last)
    for order in ((0, 1, 2, 3), (0, 1, 3, 2), (0, 3, 1, 2)):
        x = torch.randn([(2, 4, 5, 3)[dim] for dim in order]).permute([order.index(dim) for dim in range(4)])
        norm, x = Norm(kind, groups=2 if kind == "group" else 1), x.requires_grad_()
        if not merges(norm, [x]):
            continue
        h, _ = ops.norm_act(x, norm)
        expected = torch.autograd.grad(h, x, torch.empty_like(x).copy_(dh), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(h, x, dh), expected)


def test_in_place_operators_count_versions():
    y, f, dh, dx = operands("batch", count=4)
    running_mean, running_var = torch.zeros(4), torch.ones(4)
    tensors = [y, f, dh, dx, running_mean, running_var]
    before = [t._version for t in tensors]
    running = {"running_mean": running_mean, "running_var": running_var}
    _, mean, rstd = OPERATORS.uncouple_norm_act_(y, f, None, None, None, None, **options_of("batch", **running))
    OPERATORS.norm_act_backward_(dx, dh, y, None, None, mean, rstd, None, None, **options_of("batch"))
    assert [t._version > version for t, version in zip(tensors, before, strict=True)] == [
        *(True, False, False, True, True, True)
    ]


def test_errors_are_those_of_the_functions():
    x, f = operands("batch")
    with pytest.raises(ValueError, match="f has shape"):
        OPERATORS.couple_norm_act(x, f[:1], None, None, None, None, kind="batch")
    with pytest.raises(ValueError, match="kind is 'instance'"):
        OPERATORS.norm_act(x, None, None, None, None, kind="instance")
    with pytest.raises(ValueError, match="y requires grad"):
        OPERATORS.uncouple_norm_act_(x.requires_grad_() * 2, f, None, None, None, None, kind="batch")


# ---- the functions inside compiled code


def moving(x, f, function):
    """A batch norm that keeps running statistics."""
    running = [torch.zeros(4), torch.ones(4)]
    norm = norm_of("batch", *parameters(), running_mean=running[0], running_var=running[1], activation="relu")
    return [*function(x, f, norm), *running]


def backward(x, f, kind="batch", **options):
    norm = norm_of(kind, *parameters(), activation="gelu")
    _, statistics = ops.norm_act(x, norm)
    return ops.norm_act_backward_(x * 2, f, x, norm, statistics, **options)


def given(x, f, function, kind):
    norm = norm_of(kind, activation="silu")
    _, statistics = ops.norm_act(f, norm)
    return function(x, f, norm, statistics=statistics, dtype=torch.float64)


CALLS = {
    **{f"norm_act {kind}": lambda x, f, kind=kind: ops.norm_act(x, norm_of(kind, *parameters())) for kind in KINDS},
    **{f"couple_norm_act {kind}": lambda x, f, kind=kind: ops.couple_norm_act(x, f, norm_of(kind)) for kind in KINDS},
    **{f"uncouple_norm_act_ {k}": lambda x, f, k=k: (ops.uncouple_norm_act_(x, f, norm_of(k)), x) for k in KINDS},
    **{f"norm_act_backward_ {kind}": lambda x, f, kind=kind: backward(x, f, kind) for kind in KINDS},
    **{f"couple_norm_act, given {k}": lambda x, f, k=k: given(x, f, ops.couple_norm_act, k) for k in KINDS},
    **{f"uncouple_norm_act_, given {k}": lambda x, f, k=k: given(x, f, ops.uncouple_norm_act_, k) for k in KINDS},
    "norm_act, running": lambda x, f: moving(x, f, lambda x, f, norm: ops.norm_act(x, norm)),
    "couple_norm_act, running": lambda x, f: moving(x, f, ops.couple_norm_act),
    "uncouple_norm_act_, running": lambda x, f: moving(x, f, ops.uncouple_norm_act_),
    "norm_act eager": lambda x, f: ops.norm_act(x, norm_of("batch"), backend="eager"),
    "norm_act_backward_, constant": lambda x, f: backward(x, f, constant=True),
    "norm_act_backward_, given sums": lambda x, f: backward(x, f, sums=tuple(parameters()), count=99),
    "norm_act_backward_, sums alone": lambda x, f: ops.norm_act_backward_(
        None, f, x, norm_of("batch"), Statistics(torch.zeros(4), torch.ones(4))
    )[1:],
}


@pytest.mark.parametrize("call", CALLS)
def test_compiled_call(call):
    """The whole graph compiles, and every result has the bits and strides of the uncompiled call."""
    given, again = (operands("rms" if "rms" in call else "batch") for _ in range(2))
    for a, b in zip(again, given, strict=True):
        a.copy_(b)
    expected = CALLS[call](*given)
    got = torch.compile(lambda x, f: CALLS[call](x, f), backend="aot_eager", fullgraph=True)(*again)
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    for a, b in zip(again, given, strict=True):
        assert torch.equal(a, b), "an operand is not as the uncompiled call left it"


def flat(value):
    if value is None:
        return []
    return [value] if isinstance(value, torch.Tensor) else [t for item in value for t in flat(item)]


@pytest.mark.parametrize(("kind", "running"), [*((kind, False) for kind in KINDS), ("batch", True)])
@pytest.mark.parametrize("coupled", [False, True], ids=["norm_act", "couple_norm_act"])
def test_gradients_of_compiled_calls(kind, running, coupled):
    """Those of the uncompiled call; statistics that a second operator computed are still functions of x."""
    kept = {"running_mean": torch.zeros(4).double(), "running_var": torch.ones(4).double()} if running else {}

    def loss(x, f, weight, bias):
        norm = norm_of(kind, weight, bias, activation="silu", **kept)
        if not coupled:
            return ops.norm_act(x * f, norm)[0].square().sum()
        y, h, _ = ops.couple_norm_act(x, f, norm)
        return (y * h).sum()

    given = operands(kind, torch.float64, requires_grad=True)
    given += [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, got = (torch.autograd.grad(function(*given), given) for function in (loss, compiled))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_float64_branch_in_compiled_code():
    """The statistics are float64 then, the gradient's arithmetic float32, as y is."""
    x = torch.randn(4, 3, requires_grad=True)
    f = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def loss(x, f):
        y, h, _ = ops.couple_norm_act(x, f, Norm("layer", activation="silu"))
        return (y * h).sum()

    dx, df = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x, f), (x, f))
    assert (dx.dtype, df.dtype) == (torch.float32, torch.float64)
    wide = x.detach().double().requires_grad_()
    expected, _ = torch.autograd.grad(loss(wide, f), (wide, f))
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=1e-5)


def test_compiled_calls_run_the_backend_that_is_chosen(monkeypatch):
    calls = []
    plain = eager.norm_act
    monkeypatch.setattr(eager, "norm_act", lambda *args: (calls.append("eager"), plain(*args))[1])
    compiled = torch.compile(lambda x: ops.norm_act(x, norm_of("batch"))[0], backend="aot_eager", fullgraph=True)
    (x,) = operands("batch", count=1)
    compiled(x)
    assert not calls
    with use_backend("eager"):
        compiled(x)
    assert calls == ["eager"]


def test_compiled_calls_raise_the_same_errors():
    x, f = operands("batch")
    in_place = torch.compile(lambda x, f: ops.uncouple_norm_act_(x * 2, f, norm_of("batch")), backend="aot_eager")
    with pytest.raises(ValueError, match="y requires grad"):
        in_place(x.requires_grad_(), f)
    functional = torch.compile(lambda x, f: ops.couple_norm_act(x, f, norm_of("batch")), backend="aot_eager")
    with pytest.raises(ValueError, match="f has shape"):
        functional(x.detach(), f[:1])


def test_one_graph_for_every_batch_size():
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda x, f: ops.couple_norm_act(x, f, Norm("layer", activation="gelu"))[1] * 2,
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    for size in (3, 5, 8):
        x, f = torch.randn(2, size, 4)
        assert torch.equal(compiled(x, f), ops.couple_norm_act(x, f, Norm("layer", activation="gelu"))[1] * 2)
    assert counter.frame_count == 1
