# SPDX-License-Identifier: Apache-2.0
"""The demo's picture. Lines differ in dash and marker as well as in colour (Okabe and Ito's colour-blind-safe set)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from revkernels.cli.training import Epoch

__all__ = ["demo"]

# Thick below thin: curves that coincide stay visible, all three.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": "#E69F00", "linewidth": 4.5, "marker": "o", "markersize": 7},
    {"color": "#0072B2", "linewidth": 2.5, "linestyle": "--", "marker": "s", "markersize": 5},
    {"color": "#000000", "linewidth": 1.2, "linestyle": ":", "marker": "^", "markersize": 4},
)


def demo(path: Path, curves: Mapping[str, Sequence[Epoch]], depths: Sequence[Mapping[str, Any]]) -> None:
    """Write three panels to ``path``: training loss by epoch, activation memory and gradient angle by depth.

    Args:
        path: of the PNG.
        curves: mode to its epochs.
        depths: rows with "blocks", "bytes" (mode to bytes) and "degrees" (dtype to angle).
    """
    figure = Figure(figsize=(13, 4), dpi=110, layout="constrained")
    training, memory, angles = figure.subplots(1, 3)
    _training(training, curves)
    blocks = [row["blocks"] for row in depths]
    for mode, line in zip(curves, _LINES, strict=True):
        memory.plot(blocks, [row["bytes"][mode] / 2**20 for row in depths], label=mode, **line)
    peaks = list(depths[-1]["bytes"].values())
    for peak, offset in ((peaks[0], (-12, -4)), (peaks[-1], (0, 9))):
        _label(memory, f"{peak / 2**20:.1f} MiB", blocks[-1], peak / 2**20, offset)
    memory.set(title="Activation memory of a chain", ylabel="peak live activations, MiB")
    memory.set_ylim(bottom=0)
    for dtype, line in zip(depths[0]["degrees"], _LINES[:2], strict=True):
        degrees = [row["degrees"][dtype] for row in depths]
        angles.plot(blocks, degrees, **line)
        _label(angles, f"{dtype}: {degrees[-1]:.2g}°", blocks[-1], degrees[-1], (0, -30))
    angles.set(title="Gradient angle, reconstructed to stored", ylabel="angle, degrees", yscale="log")
    for axes in (memory, angles):
        axes.set_xlabel("depth of the chain, reversible blocks")
        axes.set_xticks(blocks)
        axes.set_xlim(left=0)
    for axes in (training, memory, angles):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    training.legend(loc="upper right", frameon=False, fontsize=9)
    memory.legend(loc="upper left", frameon=False, fontsize=9)
    figure.savefig(path)


def _training(axes: Axes, curves: Mapping[str, Sequence[Epoch]]) -> None:
    for (mode, epochs), line in zip(curves.items(), _LINES, strict=True):
        label = f"{mode}: {100 * epochs[-1].test_accuracy:.1f} % test accuracy"
        axes.plot(range(1, len(epochs) + 1), [epoch.loss for epoch in epochs], label=label, **line)
    axes.set(title="RevNet-38 learns 8 x 8 digits", xlabel="epoch", ylabel="training loss", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _label(axes: Axes, text: str, x: float, y: float, offset: tuple[int, int]) -> None:
    axes.annotate(text, (x, y), offset, textcoords="offset points", ha="right", fontsize=9)
