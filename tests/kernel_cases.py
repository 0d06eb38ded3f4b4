# SPDX-License-Identifier: Apache-2.0
"""Layouts, dtypes and coupling options that the Triton kernels meet, in the interpreter and on a GPU."""

from dataclasses import replace

import torch

from revkernels import ops
from revkernels.coupling import Coupling

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
PAIRS = [(F64, F64), (F32, F32), (BF16, BF16), (F16, F16), (F32, BF16)]
PAIR_IDS = ["float64", "float32", "bfloat16", "float16", "float32+bfloat16"]


def dense(*shape):
    return lambda make: make(*shape)


LAYOUTS = {
    "scalar": dense(),
    "empty": dense(0),
    "empty inside": dense(3, 0, 2),
    "one": dense(1),
    "prime": dense(1009),
    "prime 3-D": dense(7, 11, 13),
    "whole tiles": dense(2, 1024),
    "second half of NCHW": lambda make: make(3, 10, 5, 7)[:, 5:],
    "channels-last": lambda make: make(2, 6, 5, 3).contiguous(memory_format=torch.channels_last),
    "half of channels-last": lambda make: make(2, 12, 5, 3).contiguous(memory_format=torch.channels_last)[:, :6],
    "half of wide rows": lambda make: make(2, 2600)[:, 1300:],
    "5-D": dense(2, 3, 2, 3, 5),
    "transposed": lambda make: make(37, 45).t(),
    "every second": lambda make: make(301)[::2],
    "crop of NCDHW": lambda make: make(3, 4, 5, 4, 6)[:, :3, 1:4, 1:3, 1:5],
}


def make(dtype, scale=1.0, device="cpu"):
    """A maker of random tensors, for the layouts above."""
    return lambda *shape: (torch.randn(shape, dtype=F64) * scale).to(device, dtype)


def make_int16(device="cpu"):
    """The same of an int16 stream, up to both ends."""
    return lambda *shape: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).to(device)


def with_value(coupling, x, dtype, dense, **options):
    """The coupling with other options and a value of that dtype, or none: dense, or laid out in x's strides."""
    value = None
    if dtype is not None:
        value = torch.zeros(x.shape, dtype=dtype, device=x.device)
        if not dense:
            value = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device).zero_()
    return replace(coupling, value=value, **options)


def int16_cases(branch, layout, device):
    """y, f, dy, df and options: half of all results wrap; every type of value, with the stream's strides and dense."""
    for k, number in enumerate((None, *DTYPES), start=11):
        y, f = layout(make_int16(device)), layout(make(branch, 4, device))
        dy, df = layout(make(F32, device=device)), layout(make(branch, device=device))
        for is_dense, which in ((False, "grid amax"), (True, "grid")):
            yield y, f, dy, df, with_value(some_coupling(y, f, which), y, number, is_dense, grid_exponent=k)


def check_int16_streams(check, branch, layout, device):
    """``check(function, *operands, coupling=...)`` each of the cases, there and back."""
    for y, f, dy, df, coupling in int16_cases(branch, layout, device):
        start = y.clone()
        check(ops.couple_, y, f, coupling=coupling)
        check(ops.uncouple_, y, f.contiguous(), coupling=coupling)
        assert torch.equal(y, start)
        check(ops.reverse_step_, y, f, dy, df, coupling=coupling)


def some_coupling(x, f, which, channel_dim=1):
    """The options named in ``which``."""
    wide = F64 if F64 in (x.dtype, f.dtype) else F32
    options = {}
    if "channel" in which:
        options |= {"channel_scale": torch.randn(x.shape[channel_dim], dtype=wide), "channel_dim": channel_dim}
    if "sample" in which:
        options["sample_scale"] = (torch.rand(x.shape[0], dtype=wide) < 0.5).to(wide) / 0.7
    if "grid" in which:
        options["grid_exponent"] = 4
    if "checksum" in which:
        options["checksum"] = torch.tensor([7])
    if "amax" in which:
        options["amax"] = torch.tensor([0.25])
    return Coupling(**{name: o.to(x.device) if isinstance(o, torch.Tensor) else o for name, o in options.items()})
