# SPDX-License-Identifier: Apache-2.0
"""Norms with activations on random shapes, layouts, dtypes and values: within the bounds of `norm_act_cases`."""

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from norm_act_cases import (  # noqa: E402
    ACTIVATIONS,
    WIDE,
    Case,
    Oracle,
    cases,
    compute_dtype,
    rounds_twice,
    same_bits,
    within,
)

from revkernels import Statistics, ops  # noqa: E402

QUIET = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request, available):
    return available(request.param)


@settings(max_examples=150, **QUIET)
@given(case=cases())
def test_forward_is_within_its_bounds(backend, case):
    norm, x = case.norm(), case.operand(0)
    h, statistics = ops.norm_act(x.array, norm, dtype=case.h_dtype, backend=backend)
    assert h.dtype == (case.h_dtype or x.array.dtype)
    oracle = Oracle(case, norm, x.array, compute_dtype(x.array))
    oracle.check_forward(h, statistics)
    if norm.running_mean is not None:
        n = x.array.numel() // case.channels
        start = case.norm()
        unit = torch.finfo(case.running).eps
        for got, old, batch, bound in (
            (norm.running_mean, start.running_mean, oracle.center, oracle.mean_bound),
            (
                norm.running_var,
                start.running_var,
                oracle.variance * n / max(n - 1, 1),
                # of the variance as of rstd, twice as much for the square root
                3 * oracle.rstd_bound / oracle.rstd * (oracle.variance + case.eps),
            ),
        ):
            expected = 0.75 * old.double() + 0.25 * batch.flatten()
            within(got.double(), expected, bound.flatten() + unit * expected.abs() + unit, "running statistics")


@settings(max_examples=150, **QUIET)
@given(case=cases())
def test_backward_is_within_its_bounds(backend, case):
    norm, (x, _, dh, dx) = replace(case, running=None).norm(), map(case.operand, range(4))
    _, statistics = ops.norm_act(x.array, norm, backend=backend)
    oracle = Oracle(case, norm, x.array, compute_dtype(x.array))
    dh.array[oracle.unsee(oracle.unclear())] = 0.0
    base = dx.array.clone()
    returned, dweight, dbias = ops.norm_act_backward_(dx.array, dh.array, x.array, norm, statistics, backend=backend)
    assert returned is dx.array
    assert dx.rest_is_untouched()
    oracle.check_backward(dh.array, base, dx.array, dweight, dbias)


@settings(max_examples=60, **QUIET)
@given(case=cases(kinds=("batch",)))
def test_constant_statistics_and_sums_in_two_calls(backend, case):
    norm, (x, _, dh, dx) = replace(case, running=None).norm(), map(case.operand, range(4))
    wide = compute_dtype(x.array)
    statistics = Statistics(*(torch.rand(case.channels, generator=case.generator(i)).to(wide) + 0.5 for i in (5, 6)))
    oracle = Oracle(case, norm, x.array, wide, statistics)
    dh.array[oracle.unsee(oracle.unclear())] = 0.0
    base = dx.array.clone()
    _, *sums = ops.norm_act_backward_(dx.array, dh.array, x.array, norm, statistics, constant=True, backend=backend)
    oracle.check_backward(dh.array, base, dx.array, *sums, constant=True)

    dx.array.copy_(base)
    _, *sums = ops.norm_act_backward_(dx.array, dh.array, x.array, norm, statistics, backend=backend)
    nothing, *alone = ops.norm_act_backward_(None, dh.array, x.array, norm, statistics, backend=backend)
    assert nothing is None
    at_once = dx.array.clone()
    for a, b in zip(alone, sums, strict=True):
        same_bits(a, b, "sums of their own")
    for count in (0, x.array.numel() // case.channels):
        dx.array.copy_(base)
        ops.norm_act_backward_(
            dx.array, dh.array, x.array, norm, statistics, sums=tuple(sums), count=count, backend=backend
        )
        same_bits(dx.array, at_once, "dx from given sums")


@settings(max_examples=100, **QUIET)
@given(case=cases())
def test_coupled_norms_are_the_coupling_and_the_norm(backend, case):
    norm, (x, f, *_) = case.norm(), map(case.operand, range(4))
    wider = f.array.dtype == WIDE != x.array.dtype  # then the statistics are float64, which x alone would not have
    y, h, statistics = ops.couple_norm_act(x.array, f.array, norm, dtype=case.h_dtype, backend=backend)
    same_bits(y, ops.couple(x.array, f.array, backend=backend), "y")
    assert y.stride() == ops.couple(x.array, f.array, backend=backend).stride()
    again = case.norm()
    if wider:
        Oracle(case, norm, y, WIDE).check_forward(h, statistics)
    else:
        h2, statistics2 = ops.norm_act(y, again, dtype=case.h_dtype, backend=backend)
        same_bits(h, h2, "h")
        for a, b in zip(statistics, statistics2, strict=True):
            assert a is b is None or torch.equal(a, b)
        if norm.running_mean is not None:
            assert torch.equal(norm.running_mean, again.running_mean)
            assert torch.equal(norm.running_var, again.running_var)

    expected = ops.uncouple(x.array, f.array, backend=backend)
    before = None if norm.running_mean is None else norm.running_mean.clone()
    returned, h, given_back = ops.uncouple_norm_act_(
        x.array, f.array, norm, statistics=statistics, dtype=case.h_dtype, backend=backend
    )
    assert returned is x.array and x.rest_is_untouched()
    assert all(a is b for a, b in zip(given_back, statistics, strict=True))
    assert before is None or torch.equal(before, norm.running_mean)
    same_bits(x.array, expected, "y - f")
    if not wider:
        same_bits(h, ops.norm_act(expected, norm, statistics=statistics, dtype=h.dtype, backend=backend)[0], "h")


@settings(max_examples=100, **QUIET)
@given(case=cases(sizes=(1, 2, 3, 5, 0)), activation=st.sampled_from(["none", "relu"]))
def test_bits_are_those_of_the_reference(backend, case, activation):
    """Whatever the values: given statistics, and for the gradient given sums, every rounding is the contract's."""
    case = replace(case, activation=activation)
    norm, (x, _, dh, dx) = replace(case, running=None).norm(), map(case.operand, range(4))
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-41, 3e38], dtype=WIDE)
    for operand in (x, dh):
        where = torch.rand(case.shape, generator=case.generator(7)) < 0.1
        picked = torch.randint(len(special), case.shape, generator=case.generator(8))
        operand.array.copy_(torch.where(where, special[picked], operand.array.double()))
    wide = compute_dtype(x.array)
    shape = norm.statistics_shape(case.shape)
    mean, rstd = (torch.rand(shape, generator=case.generator(i)).to(wide) + 0.5 for i in (5, 6))
    statistics = Statistics(None if case.kind == "rms" else mean, rstd)
    h_dtype = case.h_dtype or x.array.dtype
    if not rounds_twice(backend, wide, h_dtype):
        ours, theirs = (
            ops.norm_act(x.array, norm, statistics=statistics, dtype=h_dtype, backend=name)[0]
            for name in (backend, "reference")
        )
        same_bits(ours, theirs, "h")
    if case.kind == "batch" and not rounds_twice(backend, wide, dx.array.dtype):
        sums = tuple(torch.rand(case.channels, generator=case.generator(i)).to(wide) for i in (5, 6))
        base = dx.array.clone()
        results = []
        for name in (backend, "reference"):
            dx.array.copy_(base)
            ops.norm_act_backward_(dx.array, dh.array, x.array, norm, statistics, sums=sums, count=9, backend=name)
            results.append(dx.array.clone())
        same_bits(*results, "dx")


@settings(max_examples=60, **QUIET)
@given(case=cases(floats=[torch.float64]), coupled=st.booleans())
def test_autograd_of_the_public_functions(backend, case, coupled):
    norm, (x, f, dh, dy) = replace(case, running=None).norm(), map(case.operand, range(4))
    if case.parameters != WIDE:
        norm = replace(norm, weight=norm.weight if norm.weight is None else norm.weight.double())
        norm = replace(norm, bias=norm.bias if norm.bias is None else norm.bias.double())
    leaves = [t.requires_grad_() for t in (x.array.detach(), f.array.detach(), norm.weight, norm.bias) if t is not None]
    if coupled:
        y, h, _ = ops.couple_norm_act(leaves[0], leaves[1], norm, backend=backend)
    else:
        h, _ = ops.norm_act(leaves[0], norm, backend=backend)
        y = leaves[0] + leaves[1]
    oracle = Oracle(case, norm, (leaves[0] + leaves[1] if coupled else leaves[0]).detach(), WIDE)
    dh.array[oracle.unsee(oracle.unclear())] = 0.0
    wanted = [leaf for leaf in leaves if leaf is not leaves[1] or coupled]
    grads = torch.autograd.grad([h, y], wanted, [dh.array, dy.array], allow_unused=False)
    dweight, dbias = (torch.zeros(case.channels, dtype=WIDE) for _ in range(2))
    named = {id(leaf): grad for leaf, grad in zip(wanted, grads, strict=True)}
    exact = [oracle.total(t) for t in _parameter_gradients(oracle, oracle.see(dh.array))]
    dweight = exact[0] if norm.weight is None else named[id(norm.weight)]
    dbias = exact[1] if norm.bias is None else named[id(norm.bias)]
    oracle.check_backward(dh.array, dy.array, grads[0], dweight, dbias)
    if coupled:
        same_bits(grads[1], grads[0], "df")


def _parameter_gradients(oracle, dh):
    z = oracle.z.clone().requires_grad_()
    (dz,) = torch.autograd.grad(ACTIVATIONS[oracle.case.activation](z), z, dh)
    return dz * oracle.xhat.detach(), dz


@settings(max_examples=25, **QUIET)
@given(case=cases(sizes=(7, 16, 31)))
def test_threads_change_no_bit(available, case):
    available("cpu")
    # Enough for every thread to have some, and no more: five dimensions of 31 would take gigabytes.
    sizes = [96 if i == case.axis else size for i, size in enumerate(case.shape)]
    for i, size in enumerate(sizes):
        if i != case.axis and math.prod(sizes) > 2**18:
            sizes[i] = max(1, size // 5)
    case = replace(case, shape=tuple(sizes), groups=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            norm, (x, _, dh, dx) = case.norm(), map(case.operand, range(4))
            h, statistics = ops.norm_act(x.array, norm, backend="cpu")
            sums = ops.norm_act_backward_(dx.array, dh.array, x.array, norm, statistics, backend="cpu")
            kept = [h, *statistics, *sums, norm.running_mean, norm.running_var]
            results.append([t.clone() for t in kept if t is not None])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            same_bits(a, b, "a result")


def test_the_bounds_notice_a_sum_of_squares():
    """Variance as the mean of squares less the square of the mean: what these bounds are there to refuse."""
    case = Case(
        *("layer", "none", (5, 64), 1, 1, ("dense",) * 4, (torch.float32,) * 4, None, torch.float32, (False, False)),
        *(None, 1e-5, 0.0, 1.0, False, 1),
    )
    x = case.operand(0).array + 1e4
    norm = case.norm()
    mean = x.mean(1)
    statistics = Statistics(mean, ((x * x).mean(1) - mean * mean + 1e-5).clamp_min(1e-5).rsqrt())
    h, _ = ops.norm_act(x, norm, statistics=statistics, backend="reference")
    with pytest.raises(AssertionError, match="rstd"):
        Oracle(case, norm, x, torch.float32).check_forward(h, statistics)
    Oracle(case, norm, x, torch.float32).check_forward(*ops.norm_act(x, norm, backend="reference"))
