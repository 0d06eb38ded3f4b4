# SPDX-License-Identifier: Apache-2.0
"""What the functions with a norm promise beside their values: memory, versions and graphs."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bad_operands import ones  # noqa: E402

import revkernels as rk  # noqa: E402
from revkernels import Norm, Statistics, ops  # noqa: E402


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request, available):
    return available(request.param)


def given(norm=None, x=None, **dtypes):
    """Statistics to be given to a norm of x."""
    x = ones(2, 3) if x is None else x
    shape = (norm or Norm("batch")).statistics_shape(tuple(x.shape))
    return Statistics(torch.zeros(shape, **dtypes), torch.ones(shape, **dtypes))


# ---- results


def test_results_are_new_memory_in_x_s_order(backend):
    """Dense, channels last where x is; nothing shares memory with x; half of an array becomes dense."""
    x = torch.randn(2, 6, 3, 4).to(memory_format=torch.channels_last)[:, :4]
    h, _ = ops.norm_act(x, Norm("batch"), backend=backend)
    y, coupled, _ = ops.couple_norm_act(x, x, Norm("batch"), backend=backend)
    for result in (h, y, coupled):
        assert result.is_contiguous(memory_format=torch.channels_last)
        result.zero_()
    assert x.abs().min() > 0


def test_the_dtype_of_h(backend):
    """x's own unless one is named; the statistics stay of the compute type."""
    x = torch.randn(4, 3).bfloat16()
    assert ops.norm_act(x, Norm("layer"), backend=backend)[0].dtype == torch.bfloat16
    h, statistics = ops.norm_act(x, Norm("layer"), dtype=torch.float32, backend=backend)
    assert (h.dtype, statistics.mean.dtype) == (torch.float32, torch.float32)
    y, h, _ = ops.couple_norm_act(x, x, Norm("layer"), dtype=torch.float16, backend=backend)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float16)
    y, h, _ = ops.uncouple_norm_act_(x, x.float() * 0, Norm("layer"), dtype=torch.float64, backend=backend)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float64)


def test_an_rms_norm_has_no_mean(backend):
    """None goes in and comes out."""
    x = torch.randn(4, 3)
    h, statistics = ops.norm_act(x, Norm("rms"), backend=backend)
    assert statistics.mean is None
    again, _ = ops.norm_act(x, Norm("rms"), statistics=statistics, backend=backend)
    assert torch.equal(h, again)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_numpy_arrays(name, available):
    """All four functions; results are NumPy arrays with torch's values."""
    x, f, dh = np.random.default_rng(0).standard_normal((3, 4, 6, 5)).astype(np.float32)
    tensors = [torch.from_numpy(a.copy()) for a in (x, f, dh)]
    weight = np.linspace(0.5, 1.5, 6, dtype=np.float32)
    norm, same = Norm("batch", weight, activation="silu"), Norm("batch", torch.from_numpy(weight), activation="silu")
    backend = available(name)
    y, h, statistics = ops.couple_norm_act(x, f, norm, backend=backend)
    dx, dweight, dbias = ops.norm_act_backward_(np.zeros_like(y), dh, y, norm, statistics, backend=backend)
    back, h2, _ = ops.uncouple_norm_act_(y.copy(), f, norm, statistics=statistics, dtype=np.float64, backend=backend)
    alone, _ = ops.norm_act(x, norm, backend=backend)
    theirs = ops.couple_norm_act(*tensors[:2], same, backend=backend)
    gradients = ops.norm_act_backward_(torch.zeros(y.shape), tensors[2], theirs[0], same, theirs[2], backend=backend)
    for mine, other in zip((y, h, *statistics, dx, dweight, dbias), (*theirs[:2], *theirs[2], *gradients), strict=True):
        assert type(mine) is np.ndarray
        np.testing.assert_array_equal(mine, other.numpy())
    assert h2.dtype == np.float64
    np.testing.assert_allclose(back, x, atol=1e-6)
    np.testing.assert_array_equal(alone, ops.norm_act(tensors[0], same, backend=backend)[0].numpy())


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("kind", ["batch", "group"])
def test_samples_that_overlap(kind, step, backend):
    """Windows of a signal, which are only read."""
    x, dh = (torch.randn(200).unfold(0, 30, step)[:20].unflatten(1, (5, 6)) for _ in range(2))
    norm = Norm(kind, torch.randn(5), torch.randn(5), groups=5 if kind == "group" else 1)
    (h, statistics), (dense, theirs) = (ops.norm_act(a, norm, backend=backend) for a in (x, x.contiguous()))
    results = ops.norm_act_backward_(torch.zeros(x.shape), dh, x, norm, statistics, backend=backend)
    copies = dh.contiguous(), x.contiguous()
    expected = ops.norm_act_backward_(torch.zeros(x.shape), *copies, norm, theirs, backend=backend)
    for got, same in zip((h, *statistics, *results), (dense, *theirs, *expected), strict=True):
        torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-5)


# ---- autograd


def test_versions(backend):
    """What is written counts one up: y, dx, and running statistics where they move. Nothing else does."""
    y, f, dh, dx = (torch.randn(4, 3) for _ in range(4))
    running = [torch.zeros(3), torch.ones(3)]
    norm = Norm("batch", torch.ones(3), running_mean=running[0], running_var=running[1])
    tensors = [y, f, dh, dx, *running, norm.weight]

    def written(call):
        before = [t._version for t in tensors]
        result = call()
        return [t._version > version for t, version in zip(tensors, before, strict=True)], result

    moved = [True, True]
    seen, (_, statistics) = written(lambda: ops.norm_act(y, norm, backend=backend))
    assert seen == [False] * 4 + moved + [False]
    seen, _ = written(lambda: ops.uncouple_norm_act_(y, f, norm, backend=backend))
    assert seen == [True] + [False] * 3 + moved + [False]
    seen, _ = written(lambda: ops.uncouple_norm_act_(y, f, norm, statistics=statistics, backend=backend))
    assert seen == [True] + [False] * 6
    seen, _ = written(lambda: ops.norm_act_backward_(dx, dh, y, norm, statistics, backend=backend))
    assert seen == [False] * 3 + [True] + [False] * 3
    seen, _ = written(lambda: ops.norm_act_backward_(None, dh, y, norm, statistics, backend=backend))
    assert seen == [False] * 7


@pytest.mark.parametrize("which", ["y", "f", "weight", "bias"])
def test_uncoupling_in_place_refuses_what_requires_grad(which, backend):
    """By name; under no_grad it is done."""
    operands = {"y": ones(), "f": ones(), "weight": ones(3), "bias": ones(3)}
    operands[which].requires_grad_()
    norm = Norm("layer", operands["weight"], operands["bias"])
    with pytest.raises(ValueError, match=f"^{which} requires grad.*no_grad"):
        ops.uncouple_norm_act_(operands["y"], operands["f"], norm, backend=backend)
    assert torch.equal(operands["y"], ones())
    with torch.no_grad():
        ops.uncouple_norm_act_(operands["y"], operands["f"], norm, backend=backend)
    assert torch.equal(operands["y"], torch.zeros(2, 3))


@pytest.mark.parametrize("which", ["dx", "dh", "x", "weight", "bias"])
def test_the_backward_refuses_what_requires_grad(which, backend):
    """Its result is written in place, and not differentiated."""
    operands = {"dx": ones(), "dh": ones(), "x": ones(), "weight": ones(3), "bias": ones(3)}
    operands[which].requires_grad_()
    norm = Norm("batch", operands["weight"], operands["bias"])
    arguments = [operands[name] for name in ("dx", "dh", "x")]
    with pytest.raises(ValueError, match=f"^{which} requires grad.*no_grad"):
        ops.norm_act_backward_(*arguments, norm, given(), backend=backend)
    assert torch.equal(operands["dx"], ones())
    with torch.no_grad():
        ops.norm_act_backward_(*arguments, norm, given(), backend=backend)


@pytest.mark.parametrize("which", ["x", "f", "weight", "bias"])
def test_one_operand_that_requires_grad_is_enough(which, backend):
    """Whichever it is, it gets its gradient, and no other does; the statistics have none."""
    operands = {"x": torch.randn(4, 3), "f": torch.randn(4, 3), "weight": ones(3), "bias": ones(3)}
    operands[which].requires_grad_()
    norm = Norm("batch", operands["weight"], operands["bias"], activation="silu")
    y, h, statistics = ops.couple_norm_act(operands["x"], operands["f"], norm, backend=backend)
    assert not any(s.requires_grad for s in statistics)
    (y.sum() + h.sum()).backward()
    assert [name for name, t in operands.items() if t.grad is not None] == [which]


def test_without_gradients_there_is_no_graph(backend):
    """Under no_grad, and where nothing requires grad."""
    assert not ops.norm_act(ones(), Norm("layer", ones(3)), backend=backend)[0].requires_grad
    with torch.no_grad():
        weight = ones(3).requires_grad_()
        results = ops.couple_norm_act(ones(), ones(), Norm("layer", weight), backend=backend)
    assert not any(r.requires_grad for r in results[:2])


def test_running_statistics_of_a_node_move_once(backend):
    """In the forward, not in the backward."""
    x, running = torch.randn(4, 3, requires_grad=True), [torch.zeros(3), torch.ones(3)]
    norm = Norm("batch", running_mean=running[0], running_var=running[1], momentum=1.0)
    version = running[0]._version
    h, statistics = ops.norm_act(x, norm, backend=backend)
    assert running[0]._version > version
    h.sum().backward()
    torch.testing.assert_close(running[0], statistics.mean)
    torch.testing.assert_close(running[1], x.detach().var(0))


def test_norm_is_a_value():
    """Options cannot change under a graph; another norm is made of one with `dataclasses.replace`."""
    norm = Norm("batch", eps=1e-3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        norm.eps = 1.0
    assert dataclasses.replace(norm, kind="rms").eps == 1e-3
    assert rk.Norm is Norm
    assert rk.Statistics is Statistics
