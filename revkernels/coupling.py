# SPDX-License-Identifier: Apache-2.0
"""Options of an additive coupling: what it does to the branch output, and what it reports of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GRID_EXPONENTS = range(-126, 127)


@dataclass(frozen=True, slots=True, eq=False)
class Coupling:
    """Options of `couple`, `uncouple` and `reverse_step_`; the default is the plain coupling.

        f'     = rint(channel_scale[c] * sample_scale[n] * f * 2^k) * 2^-k
        result = x + f'    or    y - f'

    Every array must be of a library that goes with the operands' (`revkernels.ops`) and on their device. Scales are
    dense, and float64 if either operand is float64, else float32. Written arrays (the result, ``checksum``, ``amax``,
    ``value``) share no memory with any other array. Options that do not fit raise before anything is written.

    With a ``grid_exponent`` the stream may be int16, in fixed point: a stored q stands for q * 2^-k. Then x (or y) and
    the result are both int16; f, and a reverse step's dy and df, stay floating-point. With A = float64 if f is float64,
    else float32:

        n      = rint(channel_scale[c] * sample_scale[n] * f * 2^k)       in A
        m      = n, but 0 if n is NaN, and -2^23 or 2^23 beyond these     an integer
        result = q + m    or    q - m                                     wrapped into -32768..32767

    so uncoupling restores every bit of what was coupled, even if it wrapped. An int16 stream carries no gradient.

    Attributes:
        channel_scale: ``[channels]``, layer scale along ``channel_dim``; None is 1.
        sample_scale: ``[samples]``, stochastic depth along dimension 0; None is 1.
        channel_dim: the dimension of ``channel_scale``; may be negative; not 0 with a ``sample_scale``.
        grid_exponent: k; f is rounded to multiples of 2^-k, half to even. None leaves f as it is.
        checksum: one 64-bit integer, to which the sum of ``bits(result[i]) * (2*i + 1)`` modulo 2^64 is added; i counts
            the result's elements in memory order. The caller zeroes it. The compiled kernels walk at most three
            dimensions and reject a checksum of a layout that does not merge into three.
        amax: one float32, raised to the largest ``|result|``; NaN if a result is NaN. The caller zeroes it. Of an int16
            stream it is the result before wrapping, with n instead of m: ``|q + n| * 2^-k``, or ``|q - n| * 2^-k``,
            each operation rounded in A, the product then to float32. A stream that wraps has an amax of more than
            32767 * 2^-k (one that does not wrap, only if it reaches -32768), and infinity or NaN in f shows in it.
        value: for int16 streams only, an array of the result's shape and of a float type, with any strides; receives
            ``result * 2^-k``, rounded once to its dtype, in the same pass.
    """

    channel_scale: Any = None
    sample_scale: Any = None
    channel_dim: int = 1
    grid_exponent: int | None = None
    checksum: Any = None
    amax: Any = None
    value: Any = None
