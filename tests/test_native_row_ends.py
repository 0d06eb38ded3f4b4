# SPDX-License-Identifier: Apache-2.0
"""The last elements of a row, too few for a vector: the bits of one at a time, and nothing behind them is written."""

import numpy as np
import pytest

from revkernels import native
from revkernels.norm import Norm
from tests.native_oracle import BFLOAT16, each_isa  # noqa: F401

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)

BEHIND = 40  # elements: more than two vectors


def everything(rng, norm, shape, dtype):
    """The outputs of a coupled norm, its backward and a coupling, each in front of elements that stay as they are."""
    x, f, dh = ((2 * rng.standard_normal(shape)).astype(dtype) for _ in range(3))
    size, wide = x.size, "f8" if dtype == "f8" else "f4"
    owners = [np.full(size + BEHIND, 7, dtype) for _ in range(4)]
    h, y, dx, coupled = (owner[:size].reshape(shape) for owner in owners)
    channels = shape[norm.channel_dim]
    sums = [np.full(channels + BEHIND, 7, wide) for _ in range(2)]
    mean, rstd = (np.empty(norm.statistics_shape(shape), wide) for _ in range(2))
    native.couple(coupled, x, f)
    native.couple_norm_act(h, y, x, f, norm, mean, rstd, False)
    native.norm_act_backward(dx, f, dh, y, norm, mean, rstd, *(s[:channels] for s in sums), 0, 0, False)
    assert all((a[-BEHIND:] == 7).all() for a in owners + sums)
    assert coupled.tobytes() == y.tobytes()
    return {name: a.tobytes() for name, a in zip(("h", "y", "dx"), owners, strict=False)} | {
        "mean": mean.tobytes(),
        "rstd": rstd.tobytes(),
        "dweight": sums[0].tobytes(),
        "dbias": sums[1].tobytes(),
    }


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", ["f4", BFLOAT16, "f2", "f8"], ids=str)
def test_rows_of_every_length(dtype, activation, each_isa):  # noqa: F811
    """Tokens, and planes of a channel, of which those that are short are lanes beside each other."""
    from revkernels import _native

    if dtype == "f8" and activation in ("gelu", "silu"):
        pytest.skip("the C library's functions, of one element at a time everywhere")
    wide = "f8" if dtype == "f8" else "f4"
    for length in (*range(1, 71), 1023, 1025):
        for kind, shape in (("layer", (3, length)), ("batch", (2, 3, length))):
            channels = length if len(shape) == 2 else 3
            parameters = (np.linspace(0.5, 1.5, channels).astype(wide) for _ in range(2))
            norm = Norm(kind, *parameters, activation=activation, channel_dim=1)
            own = everything(np.random.default_rng(length), norm, shape, dtype)
            _native.set_isa("baseline")
            one_by_one = everything(np.random.default_rng(length), norm, shape, dtype)
            _native.set_isa(each_isa)
            assert own == one_by_one, f"{kind}, rows of {length}"
