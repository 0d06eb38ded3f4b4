# SPDX-License-Identifier: Apache-2.0
"""Operands that every op refuses, and what its message has to say. Each case is a call on fresh tensors."""

import numpy as np
import pytest

from revkernels import ops

torch = pytest.importorskip("torch")


def ones(*shape, **options):
    return torch.ones(*(shape or (2, 3)), **options)


BAD = {
    "f of another shape": (ValueError, ["f has shape (3, 2)", "x has (2, 3)", "equal"], lambda o: o(f=ones(3, 2))),
    "f that would broadcast": (ValueError, ["f has shape (3,)", "(2, 3)"], lambda o: o(f=ones(3))),
    "f of integers": (
        TypeError,
        ["f is ", "int64", "must be", "float64, float32"],
        lambda o: o(f=ones(dtype=torch.int64)),
    ),
    "x of integers": (
        TypeError,
        ["x is ", "int32", "must be", "float64, float32"],
        lambda o: o(x=ones(dtype=torch.int32)),
    ),
    "x of bool": (TypeError, ["x is ", "bool", "must be"], lambda o: o(x=ones(dtype=torch.bool))),
    "f complex": (TypeError, ["f is ", "complex64", "must be"], lambda o: o(f=ones(dtype=torch.complex64))),
    "x of float8": (TypeError, ["x is ", "float8_e4m3fn", "must be"], lambda o: o(x=ones().to(torch.float8_e4m3fn))),
    "f a list": (TypeError, ["f is a list", "torch.Tensor"], lambda o: o(f=[1.0])),
    "f None": (TypeError, ["f is a NoneType"], lambda o: o(f=None)),
    "x a float": (TypeError, ["x is a float"], lambda o: o(x=1.0)),
    "f sparse": (TypeError, ["f has layout torch.sparse_coo", "must be"], lambda o: o(f=ones().to_sparse())),
    "x sparse": (TypeError, ["x has layout torch.sparse_coo", "must be"], lambda o: o(x=ones().to_sparse())),
    "f from NumPy": (TypeError, ["f ", "numpy", "torch", "one library"], lambda o: o(f=np.ones((2, 3), np.float32))),
    "f on another device": (ValueError, ["f is on meta", "must"], lambda o: o(f=ones(device="meta"))),
}


def check_refused(operation, names, case, backend, instead=(), **options):
    """The message names the argument as the function does, what it got and what it needs; nothing is written.

    ``options``: what the operation takes beside its operands."""
    error, parts, call = BAD[case]
    x, f = torch.full((2, 3), 5.0), ones()
    kept = x.clone()

    def given(**changed):
        return getattr(ops, operation)(changed.get("x", x), changed.get("f", f), backend=backend, **options)

    with pytest.raises(error) as raised:
        call(given)
    assert_says(raised, instead or [renamed(part, names) for part in parts])
    assert torch.equal(x, kept)


def assert_says(raised, parts):
    for part in parts:
        assert part.lower() in str(raised.value).lower(), f"the message does not say {part!r}: {raised.value}"


def renamed(part, names):
    for old, new in zip(("x", "f"), names, strict=True):
        if part == old or part.startswith(f"{old} "):
            return new + part[1:]
    return part
