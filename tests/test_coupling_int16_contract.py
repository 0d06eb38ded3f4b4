# SPDX-License-Identifier: Apache-2.0
"""Couplings of int16 streams: what is refused, named and before anything is written; gradients, versions, compilers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bad_operands import assert_says  # noqa: E402

import revkernels as rk  # noqa: E402
from revkernels import ops  # noqa: E402
from revkernels.autograd import torch_ops  # noqa: F401, E402 (registers the operators)

OPERATIONS = ["couple", "couple_", "uncouple", "uncouple_", "reverse_step_"]


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request, available):
    return available(request.param)


def grid(**options):
    return rk.Coupling(grid_exponent=3, **options)


def ones(*shape, **options):
    return torch.ones(*(shape or (2, 3)), **options)


def stream(*shape):
    return ones(*shape, dtype=torch.int16)


def arguments(operation):
    return [stream(), ones(), *([ones(), ones()] if operation == "reverse_step_" else [])]


def name_of(operation):
    return "x" if operation.startswith("couple") else "y"


def refused(error, parts, operation, backend, arrays, **options):
    """The error says all that, and neither the operands nor the options are touched."""
    watched = [*arrays, *(getattr(options.get("coupling"), name, None) for name in ("value", "checksum", "amax"))]
    watched = [a for a in watched if isinstance(a, torch.Tensor | np.ndarray) and not getattr(a, "is_meta", False)]
    before = [a.clone() if isinstance(a, torch.Tensor) else a.copy() for a in watched]
    with pytest.raises(error) as raised:
        getattr(ops, operation)(*arrays, backend=backend, **options)
    assert_says(raised, [part.replace("STREAM", name_of(operation)) for part in parts])
    assert all((a == b).all() for a, b in zip(watched, before, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("coupling", [None, rk.Coupling(), rk.Coupling(amax=torch.zeros(1))], ids=["none", "", "amax"])
def test_needs_a_grid(coupling, operation, backend):
    refused(
        TypeError,
        ["STREAM is ", "int16", "float64, float32", "grid_exponent"],
        operation,
        backend,
        arguments(operation),
        coupling=coupling,
    )


@pytest.mark.parametrize("k", [-127, 127])
def test_range_of_the_grid(k, backend):
    refused(
        ValueError, ["-126 to 126"], "couple_", backend, arguments("couple_"), coupling=rk.Coupling(grid_exponent=k)
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_rest_stays_floating_point(operation, backend):
    """f, dy and df: today's error. So other integers, in the stream's place."""
    names = [name_of(operation), "f", "dy", "df"]
    for at in range(1, len(arguments(operation))):
        arrays = arguments(operation)
        arrays[at] = stream()
        refused(TypeError, [f"{names[at]} is ", "int16", "must be"], operation, backend, arrays, coupling=grid())
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool):
        arrays = arguments(operation)
        arrays[0] = arrays[0].to(dtype)
        refused(TypeError, [f"{names[0]} is ", "must be"], operation, backend, arrays, coupling=grid())


def test_other_kernels_do_not_take_it(backend):
    for total, part in ((stream(), ones()), (ones(), stream()), (stream(), stream())):
        with pytest.raises(TypeError, match=r"(total|part) is .*int16.*must be"):
            ops.accumulate_(total, part, backend=backend)
        with pytest.raises(TypeError, match=r"(total|part)\[1\] is .*int16.*must be"):
            ops.accumulate_([ones(), total], [ones(), part], backend=backend)
        assert (total == 1).all()
    norm = rk.ops.Norm("layer")
    for call in (
        lambda: ops.norm_act(stream(), norm, backend=backend),
        lambda: ops.couple_norm_act(stream(), ones(), norm, backend=backend),
        lambda: ops.uncouple_norm_act_(stream(), ones(), norm, backend=backend),
    ):
        with pytest.raises(TypeError, match=r"[xy] is .*int16.*must be"):
            call()


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
def test_stream_and_result_are_of_one_kind(backend, available):
    """Only the kernels themselves can be called with an `out`."""
    from revkernels import backends, checks, native

    if available(backend) == "cpu":
        for out, x in ((ones(), stream()), (stream(), ones())):
            with pytest.raises(TypeError, match=r"out is \w+, x is \w+: they must both be int16, or neither"):
                native.couple(out, x, ones(), grid())
            assert (out == 1).all()
    else:
        assert not backends.BACKENDS[backend].load().CHECKS_OPERANDS
        with pytest.raises(TypeError, match="out is float32, x is int16: they must both be int16, or neither"):
            checks.check_operands({"out": ones()}, {"x": stream(), "f": ones()}, grid(), coupled=True)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_value_that_does_not_fit(operation, backend):
    bad = {
        "shape": (ValueError, ["value has shape (3,)", "STREAM has (2, 3)", "equal"], ones(3)),
        "rank": (ValueError, ["value has shape (2, 3, 1)"], ones(2, 3, 1)),
        "integers": (TypeError, ["value is ", "int16", "must be"], stream()),
        "int64": (TypeError, ["value is ", "int64"], ones(dtype=torch.int64)),
        "a number": (TypeError, ["value is a float"], 1.0),
        "another library": (TypeError, ["value", "numpy", "one library"], np.ones((2, 3), np.float32)),
        "elsewhere": (ValueError, ["value is on meta"], ones(device="meta")),
        "expanded": (ValueError, ["value has several elements in one place"], ones(1, 3).expand(2, 3)),
        "gradient": (ValueError, ["value requires grad"], ones().requires_grad_()),
    }
    for error, parts, value in bad.values():
        refused(error, parts, operation, backend, arguments(operation), coupling=grid(value=value))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_value_of_a_float_stream(operation, dtype, backend):
    arrays = [a.to(dtype) for a in arguments(operation)]
    parts = ["value is given", f"STREAM is {str(dtype).removeprefix('torch.')}", "int16"]
    refused(ValueError, parts, operation, backend, arrays, coupling=grid(value=ones()))
    refused(ValueError, parts, operation, backend, arrays, coupling=rk.Coupling(value=ones()))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_value_shares_no_memory(operation, backend):
    """With nothing else of the call, whether that is read or written."""
    for at in range(len(arguments(operation))):
        memory = torch.zeros(64, dtype=torch.uint8)
        arrays = arguments(operation)
        size = arrays[at].element_size()
        arrays[at] = memory[: 6 * size].view(arrays[at].dtype).view(2, 3).fill_(1)
        for begin, dtype in ((0, torch.float16), (6 * size - 4, torch.float32), (8, torch.bfloat16)):
            end = begin + 6 * torch.empty((), dtype=dtype).element_size()
            value = memory[begin:end].view(dtype).view(2, 3)
            refused(ValueError, ["value", "overlap"], operation, backend, arrays, coupling=grid(value=value))
        value = memory[6 * size : 6 * size + 12].view(torch.float16).view(2, 3)
        getattr(ops, operation)(*arrays, coupling=grid(value=value), backend=backend)
        assert (value != 0).all()
    memory = torch.zeros(8)
    shared = {
        "channel_scale": memory[:3],
        "sample_scale": memory[4:6],
        "amax": memory[5:6],
        "checksum": memory[:2].view(torch.int64),
    }
    for name, option in shared.items():
        coupling = grid(value=memory[:6].view(2, 3), **{name: option})
        refused(ValueError, ["value", name, "overlap"], operation, backend, arguments(operation), coupling=coupling)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_numpy_arrays(backend, available):
    available(backend)
    value = np.ones((2, 3), np.float32)
    value.flags.writeable = False
    x, f = np.ones((2, 3), np.int16), np.ones((2, 3), np.float32)
    refused(ValueError, ["value is read-only"], "couple", backend, [x, f], coupling=grid(value=value))
    refused(
        TypeError, ["value is byte-swapped"], "couple", backend, [x, f], coupling=grid(value=np.ones((2, 3), ">f4"))
    )
    refused(TypeError, ["x is byte-swapped"], "couple", backend, [x.astype(">i2"), f], coupling=grid())
    refused(TypeError, ["x is uint16"], "couple", backend, [x.astype(np.uint16), f], coupling=grid())
    refused(TypeError, ["x is int16", "grid_exponent"], "couple_", backend, [x, f])
    refused(TypeError, ["f is int16"], "couple_", backend, [x, x.copy()], coupling=grid())
    frozen = x.copy()
    frozen.flags.writeable = False
    refused(ValueError, ["x is read-only"], "couple_", backend, [frozen, f], coupling=grid())
    y = ops.couple(frozen, f, coupling=grid(), backend=backend)
    assert y.dtype == np.int16
    assert (y == 9).all()


def test_empty_arrays(backend):
    """Nothing to do, and what is wrong is wrong all the same."""
    q, f, value, amax = stream(0, 3), ones(0, 3), ones(0, 3), torch.full((1,), 2.0)
    checksum = torch.full((1,), 7)
    y = ops.couple(q, f, coupling=grid(value=value, amax=amax, checksum=checksum), backend=backend)
    assert (y.dtype, y.shape, amax.item(), checksum.item()) == (torch.int16, (0, 3), 2.0, 7)
    refused(TypeError, ["grid_exponent"], "couple_", backend, [q, f])
    refused(ValueError, ["value has shape"], "couple_", backend, [q, f], coupling=grid(value=ones(0, 2)))


def test_meta_tensors():
    """The default backend computes shapes."""
    q, f = torch.empty(2, 3, device="meta", dtype=torch.int16), torch.empty(2, 3, device="meta")
    y = ops.couple(q, f, coupling=grid(value=torch.empty(2, 3, device="meta")))
    assert (y.is_meta, y.dtype) == (True, torch.int16)
    assert ops.uncouple_(q, f, coupling=grid()) is q


# ---- autograd


@pytest.mark.parametrize("operation", ["couple", "uncouple"])
def test_carries_no_gradient(operation, backend):
    """Refused rather than detached; under no_grad it is done."""
    for which in ("f", "channel_scale", "sample_scale"):
        f, scales = ones(), {"channel_scale": ones(3), "sample_scale": ones(2)}
        {"f": f, **scales}[which].requires_grad_()
        coupling = grid(**scales)
        parts = [f"{which} requires grad", "an int16 stream carries no gradient", "no_grad"]
        refused(ValueError, parts, operation, backend, [stream(), f], coupling=coupling)
        with torch.no_grad():
            y = getattr(ops, operation)(stream(), f, coupling=coupling, backend=backend)
        assert y.tolist() == [[9 if operation == "couple" else -7] * 3] * 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_versions(operation, backend):
    """Raised of what is written, the value among it, so that autograd notices."""
    arrays, value = arguments(operation), ones()
    before = [t._version for t in (*arrays, value)]
    getattr(ops, operation)(*arrays, coupling=grid(value=value), backend=backend)
    raised = [t._version > b for t, b in zip((*arrays, value), before, strict=True)]
    in_place = operation.endswith("_")
    assert raised == [in_place, False, *([True, False] if operation == "reverse_step_" else []), True]


def test_autograd_notices_a_value_that_is_overwritten(backend):
    w, value = ones().requires_grad_(), ones()
    loss = (w * value).sum()
    ops.couple_(stream(), ones(), coupling=grid(value=value), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- operators and torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def written():
    return {"checksum": torch.zeros(1, dtype=torch.int64), "amax": torch.zeros(1), "value": torch.zeros(2, 3)}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation):
    options = {"grid_exponent": 3} | (written() if operation.endswith("_") else {})
    torch.library.opcheck(getattr(torch.ops.revkernels, operation).default, arguments(operation), options)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad mode", "no grad"])
def test_compiled(operation, grad, fresh_compiler):
    def call(*arrays):
        report = written()
        result = getattr(ops, operation)(*arrays, coupling=grid(**report))
        return result, *report.values()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        ours, theirs = call(*arguments(operation)), compiled(*arguments(operation))
    flat = [[*(r[0] if isinstance(r[0], tuple) else r[:1]), *r[1:]] for r in (ours, theirs)]
    for a, b in zip(*flat, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_operators_and_compiled_calls_refuse_gradients(fresh_compiler):
    f = ones().requires_grad_()
    with pytest.raises(ValueError, match="f requires grad, and an int16 stream carries no gradient"):
        torch.ops.revkernels.couple(stream(), f, grid_exponent=3)
    with pytest.raises(TypeError, match="grid_exponent"):
        torch.ops.revkernels.couple_(stream(), ones())
    for options in ({}, {"amax": torch.zeros(1)}):
        compiled = torch.compile(lambda x, f, o=options: ops.couple(x, f, coupling=grid(**o)), backend="aot_eager")
        with pytest.raises(ValueError, match="f requires grad, and an int16 stream carries no gradient"):
            compiled(stream(), f)
        torch._dynamo.reset()
