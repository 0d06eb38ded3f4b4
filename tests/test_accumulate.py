# SPDX-License-Identifier: Apache-2.0
"""accumulate: every backend against the oracle, bit for bit; autograd; bad input."""

import pytest

torch = pytest.importorskip("torch")

from bad_operands import BAD, check_refused, ones  # noqa: E402
from operands import (  # noqa: E402
    LAYOUTS,
    MIXED_LAYOUTS,
    MIXED_PAIRS,
    NUMPY_PAIRS,
    PAIRS,
    Operand,
    assert_same_bits,
    check,
    pairs_for,
)

from revkernels import ops, reference  # noqa: E402


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request, available):
    return available(request.param)


@pytest.fixture(params=["cpu", "reference"])
def numpy_backend(request, available):
    return available(request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch(layout, backend):
    """Every pair of dtypes, on this layout."""
    for pair in pairs_for(backend):
        check("accumulate_", "torch", [layout] * 2, pair, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numpy(layout, numpy_backend):
    """The same with NumPy arrays."""
    for pair in NUMPY_PAIRS:
        check("accumulate_", "numpy", [layout] * 2, pair, numpy_backend)


@pytest.mark.parametrize("layouts", MIXED_LAYOUTS, ids=" and ".join)
def test_operands_of_different_strides(layouts, backend):
    """Each operand has strides of its own."""
    for pair in MIXED_PAIRS:
        check("accumulate_", "torch", layouts, pair, backend)


def test_lists(backend):
    """Arrays of any shapes and dtypes, in one call."""
    layouts = ["image", "prime", "half of rows", "empty", "scalar"]
    totals, parts = [], []
    for number, (layout, pair) in enumerate(zip(layouts, PAIRS[1:6], strict=True)):
        totals.append(Operand("torch", layout, pair[0], number))
        parts.append(Operand("torch", layout, pair[1], number + 50))
    expected = [reference.accumulate(t.values, p.values, t.dtype, p.dtype) for t, p in zip(totals, parts, strict=True)]
    given = [t.array for t in totals]
    assert ops.accumulate_(given, [p.array for p in parts], backend=backend) is given
    for total, right in zip(totals, expected, strict=True):
        assert_same_bits(total.values, right, "total")
        assert_same_bits(*total.outside(), "memory beside the view")


def test_the_empty_list(backend):
    """Nothing to do is done."""
    assert ops.accumulate_([], [], backend=backend) == []


def test_lists_that_make_their_items(backend):
    """Of a list that is asked for an item, nobody else may hold that; the kernel's are those that were checked."""

    class Making(list):
        def __getitem__(self, place):
            return torch.full((2**18,), -1.0)

    totals = [torch.zeros(2**18) for _ in range(3)]
    ops.accumulate_(totals, Making(torch.full((2**18,), n + 1.0) for n in range(3)), backend=backend)
    assert [float(total.sum()) / 2**18 for total in totals] == [1, 2, 3]


def test_many_arrays(backend):
    """More arrays than any launch takes at once; one part given twice."""
    totals, part = [torch.full((n % 7,), float(n)) for n in range(300)], torch.ones(6)
    ops.accumulate_(totals, [part[: n % 7] for n in range(300)], backend=backend)
    assert all(torch.equal(total, torch.full((n % 7,), n + 1.0)) for n, total in enumerate(totals))


# ---- autograd. Each call writes a, and the second one c; b and d are read.

CALLS = {
    "an array": lambda a, b, c, d, **k: ops.accumulate_(a, b, **k),
    "lists": lambda a, b, c, d, **k: ops.accumulate_([a, c], [b, d], **k),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_raise_the_version(name, backend):
    """Of what is written, never of what is read; so autograd notices."""
    arrays = [ones() for _ in range(4)]
    before = [t._version for t in arrays]
    CALLS[name](*arrays, backend=backend)
    changed = [t._version > version for t, version in zip(arrays, before, strict=True)]
    assert changed == [True, False, name == "lists", False]


@pytest.mark.parametrize("name", CALLS)
def test_autograd_notices(name, backend):
    """A tensor that a backward has saved and the kernel has written since: torch's own error."""
    w, a = ones(requires_grad=True), ones()
    loss = (w * a).sum()
    CALLS[name](a, ones(), ones(), ones(), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", CALLS)
def test_a_total_that_requires_grad_is_refused(name, backend):
    """With the argument's name; under no_grad it is done."""
    a, c = ones(requires_grad=True), ones()
    with pytest.raises(
        ValueError, match="^total requires grad.*no_grad" if name != "lists" else r"^total\[0\] requires"
    ):
        CALLS[name](a, ones(), c, ones(), backend=backend)
    assert torch.equal(a, ones())
    assert torch.equal(c, ones())
    with torch.no_grad():
        CALLS[name](a, ones(), c, ones(), backend=backend)
    assert torch.equal(a, 2 * ones())


# ---- bad input


@pytest.mark.parametrize("case", BAD)
def test_bad_operands(case, backend):
    """Named before anything is written."""
    # A list is right beside a list of totals, so the message speaks of both.
    instead = ["total and part must both be arrays, or both lists of arrays"] if case == "f a list" else ()
    check_refused("accumulate_", ("total", "part"), case, backend, instead)


base = torch.ones(4, 3)
OVERLAPS = {
    "neighbours": lambda b: ops.accumulate_(base[:2], base[1:3], backend=b),
    "lists, two totals": lambda b: ops.accumulate_([base[:2], base[1:3]], [ones(), ones()], backend=b),
    "lists, total and part": lambda b: ops.accumulate_([base[:2]], [base[1:3]], backend=b),
    "lists, one's total and another's part": lambda b: ops.accumulate_(
        [base[:2], ones()], [ones(), base[1:3]], backend=b
    ),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_overlapping_memory(case, backend):
    """What is written shares no element with anything else."""
    names = {
        "neighbours": "total and part",
        "lists, two totals": r"total\[0\] and total\[1\]",
        "lists, total and part": r"total(\[0\])? and part(\[0\])?",
        "lists, one's total and another's part": r"total\[0\] and part\[1\]",
    }
    with pytest.raises(ValueError, match=f"^{names[case]} overlap in memory"):
        OVERLAPS[case](backend)
    assert torch.equal(base, torch.ones(4, 3))


def test_bad_lists(backend):
    """Unequal lengths, an array and a list, and a bad pair at the end: nothing is written."""
    totals = [ones(), ones()]
    with pytest.raises(ValueError, match="part has 1 arrays, total has 2"):
        ops.accumulate_(totals, [ones()], backend=backend)
    with pytest.raises(TypeError, match="both be arrays, or both lists"):
        ops.accumulate_(totals, ones(), backend=backend)
    with pytest.raises(TypeError, match=r"^total\[1\] is a str"):
        ops.accumulate_([ones(), "text"], [ones(), ones()], backend=backend)
    for bad, error in ((ones(5), ValueError), (ones(dtype=torch.int64), TypeError), (None, TypeError)):
        with pytest.raises(error, match="part"):
            ops.accumulate_(totals, [ones(), bad], backend=backend)
    assert all(torch.equal(t, ones()) for t in totals)
