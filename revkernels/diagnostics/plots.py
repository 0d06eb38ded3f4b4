# SPDX-License-Identifier: Apache-2.0
"""The plots of `revkernels.diagnostics`: drift by depth, drift by step, and the paper's figure of a training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise
    raise ModuleNotFoundError(
        "plots need matplotlib, which is not installed: pip install 'revkernels[demo]'", name="matplotlib"
    ) from None

if TYPE_CHECKING:
    from revkernels.diagnostics.by_depth import DriftRow
    from revkernels.diagnostics.monitor import AngleRecord, DriftRecord

__all__ = ["by_depth", "by_step", "plot_training"]

# Okabe and Ito's colours, with dashes and markers for colour-blind readers.
_COLOURS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Curve = Sequence[tuple[float, float]]


def by_depth(path: Path, rows: Sequence[DriftRow], cut: str) -> None:
    """Two panels: rms error and gradient angle against depth, one line per coupling and precision."""
    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    errors, angles = figure.subplots(1, 2)
    lines = list(dict.fromkeys((row.coupling, row.precision) for row in rows))
    for index, (coupling, precision) in enumerate(lines):
        own = [row for row in rows if (row.coupling, row.precision) == (coupling, precision)]
        label = precision if len({coupling for coupling, _ in lines}) == 1 else f"{coupling}: {precision}"
        _line(errors, [(row.depth, row.rms_error) for row in own], index, label)
        _line(angles, [(row.depth, row.angle_degrees) for row in own], index, label)
    errors.set(title="Reconstructed input against the true one", ylabel="relative error (rms)")
    angles.set(title="Gradient, reconstructed against stored", ylabel="angle, degrees")
    depths = sorted({row.depth for row in rows})
    for axes in (errors, angles):
        axes.set_xlabel(f"depth, the chain's {cut} blocks")
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        _log_if_positive(axes)
        _clean(axes)
    handles, labels = errors.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=min(3, len(labels)), frameon=False, fontsize=9)
    chain = rows[0].chain
    if chain:
        figure.suptitle(chain, fontsize=10, color="#555555")
    figure.savefig(path)


def by_step(path: Path, history: Sequence[DriftRecord], angles: Sequence[AngleRecord]) -> None:
    """The rms error of each chain against the step, and a panel of angles if there are any."""
    panels = bool(history) + bool(angles)
    figure = Figure(figsize=(6.2 * panels, 4.2), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if history:
        chains = list(dict.fromkeys(record.chain for record in history))
        for index, chain in enumerate(chains):
            own = [(record.step, record.rms_error) for record in history if record.chain == chain]
            _line(axes[0], own, index, chain or "the chain", marked=len(own) <= 50)
        axes[0].set(title="Reconstructed input against the true one", ylabel="relative error (rms)", xlabel="step")
        if len(chains) > 1:
            axes[0].legend(frameon=False, fontsize=9)
    if angles:
        _line(axes[-1], [(record.step, record.degrees) for record in angles], 0, "", marked=len(angles) <= 50)
        axes[-1].set(title="Gradient, reconstructed against stored", ylabel="angle, degrees", xlabel="step")
    for panel in axes:
        _log_if_positive(panel)
        _clean(panel)
    figure.savefig(path)


def plot_training(
    path: str | Path,
    *,
    stored: Mapping[str, Curve],
    reconstructed: Mapping[str, Curve],
    angles: Iterable[Any] = (),
    title: str = "",
    unit: str = "step",
) -> None:
    """Draw the paper's figure of a training: the gradient angle over time, and curves of two runs.

    One panel for the angle, and one per curve name, with the stored run as a thick line below the reconstructed one: if
    rounding does no harm they coincide. (Gomez et al. 2017, figure 4: angle, training loss, error rate.)

    Args:
        path: of the picture; PNG, SVG or PDF by its extension.
        stored, reconstructed: maps a curve's name ("training loss", "test error, %") to its (step, value) pairs, for
            the runs with ``activations="store"`` and ``"reconstruct"``. The same names in both.
        angles: `AngleRecord`s (``monitor.angles``), or (step, degrees) pairs.
        title: above all panels.
        unit: of the horizontal axis.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the runs have different curves, or there is nothing to draw.
    """
    if set(stored) != set(reconstructed):
        raise ValueError(
            f"reconstructed has the curves {sorted(reconstructed)}, stored {sorted(stored)}: they must be equal"
        )
    points = [(a.step, a.degrees) if hasattr(a, "degrees") else tuple(a) for a in angles]
    panels = bool(points) + len(stored)
    if not panels:
        raise ValueError("there is nothing to draw: no angles, and no curves")
    figure = Figure(figsize=(4.6 * panels, 3.9), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if points:
        _line(axes[0], points, 0, "", marked=len(points) <= 50)
        axes[0].set(title="Gradient, reconstructed against stored", ylabel="angle, degrees", xlabel=unit)
        _log_if_positive(axes[0])
    for panel, name in zip(axes[bool(points) :], stored, strict=True):
        for label, curve, style in (
            ("stored", stored[name], {"color": _COLOURS[1], "linewidth": 4.0}),
            ("reconstructed", reconstructed[name], {"color": _COLOURS[0], "linewidth": 1.5, "linestyle": "--"}),
        ):
            panel.plot([step for step, _ in curve], [value for _, value in curve], label=label, **style)
        panel.set(title=name[:1].upper() + name[1:], ylabel=name, xlabel=unit)
        panel.legend(frameon=False, fontsize=9)
    for panel in axes:
        _clean(panel)
    if title:
        figure.suptitle(title)
    figure.savefig(path)


def _line(axes: Axes, points: Iterable[tuple[Any, Any]], index: int, label: str, marked: bool = True) -> None:
    known = [(x, y) for x, y in points if y is not None]
    axes.plot(
        [x for x, _ in known],
        [y for _, y in known],
        label=label,
        color=_COLOURS[index % len(_COLOURS)],
        linestyle=_DASHES[index % len(_DASHES)],
        marker=_MARKERS[index % len(_MARKERS)] if marked else None,
        markersize=5,
    )


def _log_if_positive(axes: Axes) -> None:
    """A logarithmic axis; if a value is 0, as with an exact coupling, with a linear section around 0."""
    values: list[float] = [value for line in axes.get_lines() for value in np.asarray(line.get_ydata()).tolist()]
    positive = [value for value in values if value > 0]
    if positive and len(positive) == len(values):
        axes.set_yscale("log")
    elif positive:
        axes.set_yscale("symlog", linthresh=min(positive))
        axes.set_ylim(0, 3 * max(positive))


def _clean(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
