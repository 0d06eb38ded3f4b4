# SPDX-License-Identifier: Apache-2.0
"""How norms run in Triton's interpreter: with tiles of two sizes, and rounded as on every GPU.

The interpreter of Triton 3.9 cuts float32 off to bfloat16 where every GPU rounds to nearest; here it is made to round,
so that the oracle needs no second mode.
"""

import numpy as np
import pytest
import triton.language as tl

TILES = {"as they are": {}, "many": {"_PROGRAMS": 2, "_ROW_TILE": 16, "_ROW_GRADIENT_TILE": 16}}


def to_nearest(convert):
    """The interpreter's conversion of floats, with float32 -> bfloat16 to nearest even."""

    def converted(values, source, target, rounding):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(values, source, target, rounding)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        near = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, near).astype(np.uint16)

    return converted


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_convert_float", to_nearest(interpreter._convert_float))
