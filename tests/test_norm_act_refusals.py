# SPDX-License-Identifier: Apache-2.0
"""Bad input of the functions with a norm.

Every message names the argument, what it got and what it needs, and nothing is written.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bad_operands import assert_says, ones  # noqa: E402

from revkernels import Norm, Statistics, ops  # noqa: E402


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request, available):
    return available(request.param)


def given(norm=None, x=None, **dtypes):
    """Statistics to be given to a norm of x."""
    x = ones(2, 3) if x is None else x
    shape = (norm or Norm("batch")).statistics_shape(tuple(x.shape))
    return Statistics(torch.zeros(shape, **dtypes), torch.ones(shape, **dtypes))


def elsewhere():
    return torch.ones(3, device="meta")


BAD_NORMS = {
    "no norm": (TypeError, ["norm is a dict", "Norm"], {}),
    "kind": (ValueError, ["kind is 'instance'", "batch, layer, rms, group"], Norm("instance")),
    "activation": (ValueError, ["activation is 'tanh'", "gelu_tanh"], Norm("layer", activation="tanh")),
    "kind and more": (ValueError, ["kind is 'batch", "must be one of"], Norm("batch\0x")),
    "activation and more": (ValueError, ["activation is 'relu", "must be one of"], Norm("batch", activation="relu\0")),
    "eps negative and huge": (ValueError, ["eps is -1", "not negative"], Norm("layer", eps=-(10**400))),
    "eps huge": (ValueError, ["eps is 1", "finite"], Norm("layer", eps=10**400)),
    "groups beyond any": (ValueError, ["groups is 1000000"], Norm("batch", groups=10**30)),
    "groups of a group norm beyond any": (ValueError, ["groups is 1000000", "3 channels"], Norm("group", groups=10**9)),
    "channel_dim beyond any": (ValueError, ["channel_dim is -1000000"], Norm("layer", channel_dim=-(10**30))),
    "eps negative": (ValueError, ["eps is -1", "not negative"], Norm("layer", eps=-1.0)),
    "eps NaN": (ValueError, ["eps is nan"], Norm("layer", eps=float("nan"))),
    "eps a string": (TypeError, ["eps is a str", "float"], Norm("layer", eps="1e-5")),
    "momentum None": (TypeError, ["momentum is a NoneType"], Norm("batch", momentum=None)),
    "channel_dim": (ValueError, ["channel_dim is 2", "STREAM has 2 dimensions"], Norm("layer", channel_dim=2)),
    "channel_dim a bool": (TypeError, ["channel_dim is a bool", "int"], Norm("layer", channel_dim=True)),
    "groups": (ValueError, ["groups is 2", "divide", "3 channels"], Norm("group", groups=2)),
    "groups of none": (ValueError, ["groups is 0"], Norm("group", groups=0)),
    "groups of a layer norm": (ValueError, ["groups is 3", "layer"], Norm("layer", groups=3)),
    "groups a float": (TypeError, ["groups is a float", "int"], Norm("group", groups=3.0)),
    "group norm along samples": (ValueError, ["channel_dim is 0", "sample"], Norm("group", channel_dim=0)),
    "weight too long": (ValueError, ["weight has shape (4,)", "(3,)"], Norm("layer", ones(4))),
    "weight of two dimensions": (ValueError, ["weight has shape (3, 1)"], Norm("layer", ones(3, 1))),
    "weight with gaps": (ValueError, ["weight has stride", "dense"], Norm("layer", ones(6)[::2])),
    "weight of integers": (TypeError, ["weight is ", "int64", "float"], Norm("layer", ones(3, dtype=torch.int64))),
    "weight a list": (TypeError, ["weight is a list"], Norm("layer", [1.0, 1.0, 1.0])),
    "weight from NumPy": (TypeError, ["weight ", "numpy"], Norm("layer", np.ones(3, np.float32))),
    "weight elsewhere": (ValueError, ["weight is on meta"], Norm("layer", elsewhere())),
    "bias of another type": (TypeError, ["bias is ", "float64", "float32"], Norm("layer", ones(3), ones(3).double())),
    "bias too short": (ValueError, ["bias has shape (2,)", "(3,)"], Norm("layer", None, ones(2))),
    "one running statistic": (ValueError, ["running_mean and running_var"], Norm("batch", running_mean=ones(3))),
    "running statistics of rows": (
        *(ValueError, ["running_mean", "layer"]),
        Norm("layer", running_mean=ones(3), running_var=ones(3)),
    ),
    "running_var too long": (
        *(ValueError, ["running_var has shape (4,)", "(3,)"]),
        Norm("batch", running_mean=ones(3), running_var=ones(4)),
    ),
    "running_var of another type": (
        *(TypeError, ["running_var is ", "float64", "float32"]),
        Norm("batch", running_mean=ones(3), running_var=ones(3).double()),
    ),
    "running_mean expanded": (
        *(ValueError, ["running_mean has "]),
        Norm("batch", running_mean=ones(1).expand(3), running_var=ones(3)),
    ),
}

CALLS = {
    "norm_act": lambda o, n, **k: ops.norm_act(o["x"], n, **k),
    "couple_norm_act": lambda o, n, **k: ops.couple_norm_act(o["x"], o["f"], n, **k),
    "uncouple_norm_act_": lambda o, n, **k: ops.uncouple_norm_act_(o["y"], o["f"], n, **k),
    "norm_act_backward_": lambda o, n, statistics=None, **k: ops.norm_act_backward_(
        o["dx"], o["dh"], o["x"], n, given() if statistics is None else statistics, **k
    ),
}
READS = {
    "norm_act": ["x"],
    "couple_norm_act": ["x", "f"],
    "uncouple_norm_act_": ["y", "f"],
    "norm_act_backward_": ["x", "dx", "dh"],
}


def five(**instead):
    return {name: torch.full((2, 3), 5.0) for name in ("x", "y", "f", "dx", "dh")} | instead


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_NORMS)
def test_bad_norms(case, call, backend):
    error, parts, norm = BAD_NORMS[case]
    operands = five()
    stream = "y" if call.startswith("uncouple") else "x"
    kind = "layer" if getattr(norm, "kind", "") == "layer" else "batch"
    options = {"statistics": given(Norm(kind))} if call == "norm_act_backward_" else {}
    with pytest.raises(error) as raised:
        CALLS[call](operands, norm, **options, backend=backend)
    assert_says(raised, [part.replace("STREAM", stream) for part in parts])
    assert all((t == 5).all() for t in operands.values())


BAD_ARRAYS = {
    "of another shape": (ValueError, ["shape", "(3, 2)", "(2, 3)"], lambda: ones(3, 2)),
    "of integers": (TypeError, ["int64", "float"], lambda: ones(2, 3, dtype=torch.int64)),
    "a list": (TypeError, ["a list"], lambda: [[1.0] * 3] * 2),
    "None": (TypeError, ["a NoneType"], lambda: None),
    "from NumPy": (TypeError, ["numpy"], lambda: np.ones((2, 3), np.float32)),
    "on another device": (ValueError, ["meta"], lambda: ones(2, 3, device="meta")),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_operands(case, call, backend):
    """Each operand but the first, which chooses the backend."""
    error, parts, make = BAD_ARRAYS[case]
    for name in READS[call][1:]:
        if (name, case) == ("dx", "None"):
            continue  # which asks for the sums alone
        operands = five(**{name: make()})
        with pytest.raises(error) as raised:
            CALLS[call](operands, Norm("batch"), backend=backend)
        assert_says(raised, [name, *parts])
        assert all((t == 5).all() for key, t in operands.items() if key != name)


@pytest.mark.parametrize("call", CALLS)
def test_a_bad_first_operand(call, backend):
    """Whatever it is, its name is in the message."""
    name = READS[call][0]
    for bad, error in (([1.0], TypeError), (None, TypeError), (ones(2, 3, dtype=torch.int32), TypeError)):
        with pytest.raises(error, match=rf"^{name} is "):
            CALLS[call](five(**{name: bad}), Norm("batch"), backend=backend)
    with pytest.raises(ValueError, match=rf"^{name} has shape \(\)"):
        CALLS[call]({key: ones(2, 3)[0, 0] for key in five()}, Norm("batch"), backend=backend)


BAD_STATISTICS = {
    "not a pair": (TypeError, ["statistics is a Tensor", "Statistics"], lambda: ones(2, 3)),
    "of three": (TypeError, ["statistics", "Statistics"], lambda: (ones(3), ones(3), ones(3))),
    "too short": (ValueError, ["rstd has shape (2,)", "(3,)"], lambda: Statistics(ones(3), ones(2))),
    "of another type": (TypeError, ["mean is ", "float64", "float32"], lambda: Statistics(ones(3).double(), ones(3))),
    "without a mean": (TypeError, ["mean is a NoneType", "array"], lambda: Statistics(None, ones(3))),
    "without rstd": (TypeError, ["rstd is a NoneType"], lambda: Statistics(ones(3), None)),
    "with gaps": (ValueError, ["mean has stride", "dense"], lambda: Statistics(ones(6)[::2], ones(3))),
    "elsewhere": (ValueError, ["rstd is on meta"], lambda: Statistics(ones(3), elsewhere())),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_STATISTICS)
def test_bad_statistics(case, call, backend):
    error, parts, make = BAD_STATISTICS[case]
    operands = five()
    with pytest.raises(error) as raised:
        CALLS[call](operands, Norm("batch"), statistics=make(), backend=backend)
    assert_says(raised, parts)
    assert all((t == 5).all() for t in operands.values())


def test_statistics_in_any_tuple(backend):
    """Also where autograd records the call."""
    x, pair = ones(2, 3).requires_grad_(), (ones(3), ones(3))
    h, statistics = ops.norm_act(x, Norm("batch"), statistics=pair, backend=backend)
    h.sum().backward()
    assert h.eq(0).all() and x.grad.eq(1).all() and statistics.rstd is pair[1]


def test_a_mean_for_an_rms_norm(backend):
    """It has none."""
    with pytest.raises(TypeError, match=r"^mean is a Tensor.*None"):
        ops.norm_act(ones(2, 3), Norm("rms"), statistics=Statistics(ones(2), ones(2)), backend=backend)


def test_a_bad_dtype(backend):
    """Of h: a torch.dtype, and a float."""
    for dtype in ("float16", np.float16, 3):
        with pytest.raises(TypeError, match=r"^dtype is .*torch\.dtype"):
            ops.norm_act(ones(2, 3), Norm("layer"), dtype=dtype, backend=backend)
    with pytest.raises(TypeError, match=r"^h is .*int32"):
        ops.norm_act(ones(2, 3), Norm("layer"), dtype=torch.int32, backend=backend)


def pair():
    return ones(3), ones(3)


BAD_SUMS = {
    "no dx for a layer norm": (ValueError, ["dx is None", "batch", "layer"], "layer", {"dx": None}),
    "sums for a layer norm": (ValueError, ["sums", "batch", "layer"], "layer", {"sums": pair()}),
    "constant for a layer norm": (ValueError, ["constant", "batch", "layer"], "layer", {"constant": True}),
    "neither dx nor sums wanted": (ValueError, ["dx is None", "sums"], "batch", {"dx": None, "sums": pair()}),
    "one sum": (TypeError, ["sums is a Tensor", "dweight, dbias"], "batch", {"sums": ones(3)}),
    "sums too long": (ValueError, ["dweight has shape (4,)", "(3,)"], "batch", {"sums": (ones(4), ones(4))}),
    "sums of another type": (TypeError, ["dbias is ", "float64"], "batch", {"sums": (ones(3), ones(3).double())}),
    "sums that lack one": (TypeError, ["dbias is a NoneType"], "batch", {"sums": (ones(3), None)}),
    "a negative count": (ValueError, ["count is -1"], "batch", {"sums": pair(), "count": -1}),
    "a count without sums": (ValueError, ["count is 5", "sums"], "batch", {"count": 5}),
    "a count of floats": (TypeError, ["count is a float", "int"], "batch", {"sums": pair(), "count": 5.0}),
}


@pytest.mark.parametrize("case", BAD_SUMS)
def test_bad_sums(case, backend):
    error, parts, kind, options = BAD_SUMS[case]
    operands, norm = five(), Norm(kind)
    dx = options.get("dx", operands["dx"])
    told = {name: value for name, value in options.items() if name != "dx"}
    with pytest.raises(error) as raised:
        ops.norm_act_backward_(dx, operands["dh"], operands["x"], norm, given(norm), **told, backend=backend)
    assert_says(raised, parts)
    assert (operands["dx"] == 5).all()


def test_dimensions_that_do_not_merge(backend):
    """A crop of rows and columns has three runs beside the channels; a half along one dimension is fine."""
    x = torch.randn(2, 3, 4, 5)
    for kind in ("batch", "layer", "rms"):
        norm = Norm(kind, channel_dim=1)
        with pytest.raises(ValueError, match=r"^x has shape \(2, 3, 4, 4\).*merge into two"):
            ops.norm_act(x[..., :4], norm, backend=backend)
        ops.norm_act(x[:, :, :3], norm, backend=backend)
    norm = Norm("group", groups=3)
    with pytest.raises(ValueError, match=r"^x has shape .*merge into one"):
        ops.norm_act(x[..., :4], norm, backend=backend)
    ops.norm_act(x[:, :, :3], norm, backend=backend)
    crop, dense = torch.randn(2, 3, 4, 5)[..., :4], torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="merge"):
        ops.couple_norm_act(dense, crop, Norm("batch"), backend=backend)
    kept = dense.clone()
    with pytest.raises(ValueError, match="merge"):
        ops.uncouple_norm_act_(dense, crop, Norm("batch"), backend=backend)
    with pytest.raises(ValueError, match="merge"):
        ops.norm_act_backward_(dense, crop, dense.clone(), Norm("batch"), given(x=dense), backend=backend)
    assert torch.equal(dense, kept)


def test_overlapping_memory(backend):
    """What is written shares no element with anything else."""
    memory = torch.ones(4, 3)
    y, f = memory[:2], memory[1:3]
    norm = Norm("batch")
    overlaps = {
        "y and f": lambda: ops.uncouple_norm_act_(y, f, norm, backend=backend),
        "y and weight": lambda: ops.uncouple_norm_act_(y, ones(), Norm("batch", y[0]), backend=backend),
        "y and bias": lambda: ops.uncouple_norm_act_(y, ones(), Norm("batch", None, y[1]), backend=backend),
        "y and mean": lambda: ops.uncouple_norm_act_(
            y, ones(), norm, statistics=Statistics(y[0], ones(3)), backend=backend
        ),
        "x and running_mean": lambda: ops.norm_act(
            y, Norm("batch", running_mean=y[0], running_var=ones(3)), backend=backend
        ),
        "running_mean and running_var": lambda: ops.norm_act(
            ones(), Norm("batch", running_mean=memory[0], running_var=memory[0]), backend=backend
        ),
        "dx and dh": lambda: ops.norm_act_backward_(y, f, ones(), norm, given(), backend=backend),
        "dx and x": lambda: ops.norm_act_backward_(y, ones(), y, norm, given(), backend=backend),
        "dx and rstd": lambda: ops.norm_act_backward_(
            y, ones(), ones(), norm, Statistics(ones(3), y[0]), backend=backend
        ),
        "dx and dweight": lambda: ops.norm_act_backward_(
            y, ones(), ones(), norm, given(), sums=(y[0], ones(3)), backend=backend
        ),
    }
    for case, call in overlaps.items():
        with pytest.raises(ValueError, match="overlap") as raised:
            call()
        assert_says(raised, case.split(" and "))
        assert torch.equal(memory, torch.ones(4, 3)), case


def test_memory_that_cannot_be_written(backend):
    """An expanded view, as y and as dx; reading one is fine."""
    expanded = torch.ones(1, 3).expand(2, 3)
    with pytest.raises(ValueError, match=r"^y .*own memory"):
        ops.uncouple_norm_act_(expanded, ones(), Norm("batch"), backend=backend)
    with pytest.raises(ValueError, match=r"^dx .*own memory"):
        ops.norm_act_backward_(expanded, ones(), ones(), Norm("batch"), given(), backend=backend)
    h, _ = ops.norm_act(expanded, Norm("layer"), backend=backend)
    assert torch.equal(h, torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_numpy_arrays_that_cannot_be_used(name, available):
    """Read-only where it is written, byte-swapped anywhere."""
    backend, fixed = available(name), np.ones((2, 3))
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match=r"^y is read-only"):
        ops.uncouple_norm_act_(fixed, np.ones((2, 3)), Norm("batch"), backend=backend)
    ops.norm_act(fixed, Norm("batch", fixed[0]), backend=backend)
    running = {"running_mean": fixed[0], "running_var": np.ones(3)}
    with pytest.raises(ValueError, match=r"^running_mean is read-only"):
        ops.norm_act(np.ones((2, 3)), Norm("batch", **running), backend=backend)
    with pytest.raises(TypeError, match=r"^weight is byte-swapped"):
        ops.norm_act(np.ones((2, 3)), Norm("batch", np.ones(3, ">f8")), backend=backend)
