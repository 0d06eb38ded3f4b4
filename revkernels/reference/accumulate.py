# SPDX-License-Identifier: Apache-2.0
"""The gradient accumulation of Algorithm 1. Values and dtypes are passed as in `revkernels.reference.coupling`."""

from __future__ import annotations

import numpy as np

from revkernels.reference.rounding import round_to, wide_type


def accumulate(
    total: np.ndarray, part: np.ndarray, total_dtype: str = "float64", part_dtype: str = "float64"
) -> np.ndarray:
    """total + part   (Algorithm 1, lines 5 and 6: a derivative's second contribution)"""
    wide = wide_type(total_dtype, part_dtype)
    with np.errstate(all="ignore"):
        return round_to(total.astype(wide) + part.astype(wide), total_dtype)
