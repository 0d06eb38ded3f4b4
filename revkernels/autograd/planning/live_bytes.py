# SPDX-License-Identifier: Apache-2.0
"""Reads how many bytes are allocated now, from the allocators: torch's on CUDA, glibc's on the host."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from revkernels.autograd.ownership import PLAIN


def live_bytes(device: torch.device) -> int | None:
    """Bytes allocated now; None where they cannot be read (a host without glibc 2.33)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    read = _glibc()
    return None if read is None else read()


class _Info(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks"),
            "keepcost",
        )
    ]


@functools.cache
def _glibc() -> Callable[[], int] | None:
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    mallinfo.restype = _Info

    def read() -> int:
        info = mallinfo()
        return int(info.uordblks + info.hblkhd)  # in arenas, and in separate mappings

    return read


def bytes_of(tensor: torch.Tensor) -> int:
    """The tensor's bytes; for a sharded tensor, those on this process."""
    here: torch.Tensor = tensor if type(tensor) in PLAIN else getattr(tensor, "to_local", lambda: tensor)()
    return here.numel() * here.element_size()
