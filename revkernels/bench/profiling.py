# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step goes: products, what this package can fuse, and the rest.

Operators are distinguished by name. Times are an operator's own, without what it called; on a GPU those of its kernels.
They include the profiler's overhead per operator, so only shares should be trusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

__all__ = ["FUSIBLE", "PRODUCTS", "breakdown"]

#: Convolutions, matrix products and attention, which no fusion here makes cheaper.
PRODUCTS = re.compile(
    r"conv(?!ert)|mkldnn|mm\b|mm_|linear|dot_product|attention|gemm|xmma|cutlass|nvjet|flash|sdpa|wgrad|dgrad|fprop",
    re.I,
)
#: Norms, activations, couplings and sums, in torch's names and in this package's.
FUSIBLE = re.compile(
    r"norm|relu|threshold|clamp|gelu|silu|couple|NormAct|revk|aten::(add|sub|mul)_?$|functor_?add|batchnorm", re.I
)


def breakdown(step: Callable[[], Any], steps: int = 2, device: str = "cpu") -> dict[str, float]:
    """Return seconds per step: ``{"products", "fusible", "rest", "total"}``, ``total`` being their sum.

    Args:
        step: a training step, run once before the profiler starts and then ``steps`` times.
        steps: at least 1.
        device: where its operators run, "cpu" or "cuda[:n]".
    """
    step()
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as session:
        for _ in range(steps):
            step()
    found = {"products": 0.0, "fusible": 0.0, "rest": 0.0}
    for event in session.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = "products" if PRODUCTS.search(event.key) else "fusible" if FUSIBLE.search(event.key) else "rest"
        found[kind] += microseconds * 1e-6 / steps
    return found | {"total": sum(found.values())}
