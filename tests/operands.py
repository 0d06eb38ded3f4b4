# SPDX-License-Identifier: Apache-2.0
"""Arrays of every dtype and layout, and a call of an op on them held against the oracle, bit for bit."""

import itertools

import numpy as np
import pytest

from revkernels import ops, reference

torch = pytest.importorskip("torch")

FLOATS = ["float64", "float32", "bfloat16", "float16"]
PAIRS = list(itertools.product(FLOATS, repeat=2))
NUMPY_PAIRS = list(itertools.product(["float64", "float32", "float16"], repeat=2))

# A layout is (shape of the memory, how to view it); it serves torch and NumPy alike.
LAYOUTS = {
    "scalar": ((), lambda a: a),
    "empty": ((3, 0, 4), lambda a: a),
    "one": ((1,), lambda a: a),
    "prime": ((1009,), lambda a: a),
    "image": ((2, 6, 5, 7), lambda a: a),
    "channels last": ((2, 5, 7, 6), lambda a: a.transpose(2, 3).transpose(1, 2)),
    "half of an image": ((2, 12, 5, 7), lambda a: a[:, 6:]),
    "half of channels last": ((2, 5, 7, 12), lambda a: a.transpose(2, 3).transpose(1, 2)[:, :6]),
    "half of rows": ((9, 34), lambda a: a[:, 17:]),
    "transposed": ((13, 17), lambda a: a.transpose(0, 1)),
    "every third": ((33, 21), lambda a: a[::3, ::3]),
    "misaligned": ((1030,), lambda a: a[3:]),
    "five dimensions": ((2, 3, 4, 5, 3), lambda a: a.transpose(1, 3)[:, :, ::2]),
}


def values_for(shape, dtype, number):
    """Float64 values that ``dtype`` holds exactly; some of them zeros of both signs, tiny, huge, infinite or NaN."""
    random = np.random.default_rng(number)
    if dtype == "int16":
        return np.where(
            random.random(shape) < 0.1, random.choice([-32768, 32767], shape), random.integers(-32768, 32768, shape)
        ).astype(np.float64)
    values = random.standard_normal(shape) * np.exp2(random.integers(-12, 12, shape))
    special = random.random(shape)
    for share, value in (
        (0.02, 0.0),
        (0.04, -0.0),
        (0.05, np.inf),
        (0.06, -np.inf),
        (0.07, np.nan),
        (0.09, 6e-8),
        (0.11, 6e4),
    ):
        values = np.where(special < share, value, values)
        special = np.where(special < share, 2.0, special)
    return reference.round_to(values, dtype)


class Operand:
    """One array of one library, laid out in a larger memory whose rest must not change."""

    def __init__(self, library, layout, dtype, number, requires_grad=False):
        shape, view = LAYOUTS[layout]
        memory = values_for(shape, dtype, number)
        self.dtype, self.view = dtype, view
        if library == "torch":
            self.memory = torch.from_numpy(memory).to(getattr(torch, dtype))
            self.array = view(self.memory)
        else:
            self.memory = memory.astype(dtype)
            self.array = view(Transposable(self.memory)).array
        self.before = as_float64(self.memory)

    @property
    def values(self):
        return as_float64(self.array)

    def outside(self):
        """The memory as it is now and as it was, where the view does not reach."""
        marked = np.zeros(self.before.shape, bool)
        Transposable(marked).apply(self.view)[...] = True
        return as_float64(self.memory)[~marked], self.before[~marked]


class Transposable:
    """NumPy with torch's ``transpose(i, j)``, so that one function describes a layout in both."""

    def __init__(self, array):
        self.array = array

    def transpose(self, i, j):
        return Transposable(self.array.swapaxes(i, j))

    def __getitem__(self, key):
        return Transposable(self.array[key])

    def apply(self, view):
        return view(self).array


def as_float64(array):
    if isinstance(array, torch.Tensor):
        return array.detach().double().numpy().copy()
    return array.astype(np.float64)


def assert_same_bits(got, expected, what):
    assert got.shape == expected.shape
    same = (np.isnan(got) & np.isnan(expected)) | ((got == expected) & (np.signbit(got) == np.signbit(expected)))
    assert same.all(), f"{what}: {(~same).sum()} of {same.size} differ, {got[~same][0]!r} for {expected[~same][0]!r}"


def operands(library, layouts, dtypes):
    return [Operand(library, layout, d, number) for number, (layout, d) in enumerate(zip(layouts, dtypes, strict=True))]


def run(operation, arrays, backend, **options):
    """Call the operation; return the arrays that hold its results."""
    x, f, *more = arrays
    function = getattr(ops, operation)
    if operation == "reverse_step_":
        returned = function(x, f, *more, backend=backend, **options)
        assert returned[0] is x and returned[1] is more[0]
        return list(returned)
    returned = function(x, f, backend=backend, **options)
    assert (returned is x) is operation.endswith("_")
    return [returned]


def rounds_twice(backend, pair):
    """Torch converts float64 to a half type by way of float32; so does "eager", which is torch's own calls."""
    return backend == "eager" and pair[0] in ("bfloat16", "float16") and pair[1] == "float64"


def pairs_for(backend):
    return [pair for pair in PAIRS if not rounds_twice(backend, pair)]


def oracle(operation, values, dtypes, **options):
    if operation == "reverse_step_":
        return list(reference.reverse_step(*values, dtypes=dtypes, **options))
    function = getattr(reference, operation.rstrip("_"))
    return [function(*values[:2], *dtypes[:2], **options)]


def check(operation, library, layouts, dtypes, backend, **options):
    """Call the operation on random operands, and compare with the oracle, which takes the same ``options``."""
    given = operands(library, layouts, dtypes)
    expected = oracle(operation, [o.values for o in given], dtypes, **options)
    read = given[1::2] if operation.endswith("_") else given
    results = run(operation, [o.array for o in given], backend, **options)
    for number, (result, right) in enumerate(zip(results, expected, strict=True)):
        assert str(result.dtype).removeprefix("torch.") == dtypes[2 * number]
        assert_same_bits(as_float64(result), right, f"{operation} {dtypes} result {number}")
    for operand in read:
        assert_same_bits(as_float64(operand.memory), operand.before, "an operand that is only read")
    for operand in given:
        assert_same_bits(*operand.outside(), "memory beside the view")


def dtypes_of(operation, pair):
    x, f = pair
    return (x, f, x, f) if operation == "reverse_step_" else (x, f)


MIXED_LAYOUTS = [("image", "channels last"), ("channels last", "half of an image"), ("half of channels last", "image")]
MIXED_PAIRS = (("float32", "float32"), ("float32", "bfloat16"), ("float16", "float32"))
