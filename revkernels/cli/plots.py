# SPDX-License-Identifier: Apache-2.0
"""The pictures of the demo, of ``exact``, and of ``bench network`` and ``bench budget``.

Lines and points differ in dash and marker as well as in colour (Okabe and Ito's colour-blind-safe set).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    from revkernels.cli.exact import Trained
    from revkernels.cli.training import Epoch
    from revkernels.diagnostics import DriftRow

__all__ = ["budgets", "demo", "exact", "trade_off"]

# Thick lines below thin ones: three coinciding curves all stay visible.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": "#E69F00", "linewidth": 4.5, "marker": "o", "markersize": 7},
    {"color": "#0072B2", "linewidth": 2.5, "linestyle": "--", "marker": "s", "markersize": 5},
    {"color": "#000000", "linewidth": 1.2, "linestyle": ":", "marker": "^", "markersize": 4},
)

#: For drift by depth: float in two precisions, then exact, which coincide.
_DRIFTS: tuple[dict[str, Any], ...] = (
    {"color": "#E69F00", "linewidth": 2, "marker": "o", "markersize": 6},
    {"color": "#D55E00", "linewidth": 2, "linestyle": "--", "marker": "s", "markersize": 5},
    {"color": "#56B4E9", "linewidth": 4.5, "marker": "D", "markersize": 7},
    {"color": "#0072B2", "linewidth": 1.5, "linestyle": ":", "marker": "^", "markersize": 4},
)

_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#7A7A7A"
#: By a contender's kind; this package's kernels stand out.
_POINTS: dict[str, dict[str, Any]] = {
    "fused": {"color": _BLUE, "marker": "o", "s": 130},
    "ours": {"color": _BLUE, "marker": "o", "s": 80, "facecolors": "white", "linewidths": 1.8},
    "torch": {"color": "#000000", "marker": "s", "s": 55},
    "peer": {"color": _GREY, "marker": "D", "s": 50},
}
_LEGEND = {
    "fused": "revkernels, fused",
    "ours": "revkernels' driver, plain torch calls",
    "torch": "torch",
    "peer": "other libraries",
}
#: Around a point: right, left, above, below, then the corners.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_WIDE = 4.0  # from the least to the most memory: from there on the axis is logarithmic


def trade_off(cases: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], where: str) -> Figure:
    """Draw one panel per case and one point per contender: time relative to the baseline against peak memory.

    Args:
        cases: titles, and the rows of `bench.network.run`; a row with an error is listed below its panel.
        where: device, threads and versions.
    """
    figure = Figure(figsize=(8.6, 5.0 * len(cases)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for axes, (title, rows) in zip(panels, cases, strict=True):
        _trade_off(axes, title, rows, where)
    canvas.draw()  # fixes the layout, which determines where labels fit
    figure.set_layout_engine("none")
    for axes, (_, rows) in zip(panels, cases, strict=True):
        _label_points(axes, rows, canvas.get_renderer())
    return figure


def _trade_off(axes: Axes, title: str, rows: Sequence[Mapping[str, Any]], where: str) -> None:
    measured = [row for row in rows if row["error"] is None]
    kinds = {row["variant"]: _kind(row) for row in measured}
    for kind, style in _POINTS.items():
        own = [row for row in measured if kinds[row["variant"]] == kind]
        if own:
            x, y = [_mib(row) for row in own], [row["ratio"] for row in own]
            axes.scatter(x, y, label=_LEGEND[kind], zorder=3, **style)
    sizes, ratios = [_mib(row) for row in measured], [row["ratio"] for row in measured]
    axes.axhline(1.0, color="#BBBBBB", linewidth=1, zorder=1)
    if max(sizes) > _WIDE * min(sizes):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.7)
    else:
        axes.set_xlim(0, max(sizes) * 1.25)
    room = 0.12 * max(max(ratios) - min(ratios), 0.2)
    axes.set_ylim(min([*ratios, 1.0]) - 2 * room, max(ratios) + 2 * room)
    failed = [row["variant"] for row in rows if row["error"] is not None]
    axes.set_title(f"{title}\n", fontsize=13, loc="left")
    axes.text(0, 1.02, where, transform=axes.transAxes, fontsize=9, color="#555555")
    axes.set_xlabel("peak activation memory, MiB" + (f"\nfailed: {', '.join(failed)}" if failed else ""), fontsize=11)
    axes.set_ylabel(f"step time, relative to {measured[0]['baseline']}", fontsize=11)
    axes.annotate("↙ better", (0.012, 0.02), xycoords="axes fraction", fontsize=10, color="#555555", style="italic")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    below = -0.13 if not failed else -0.18
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncol=4, frameon=False, fontsize=9.5, handletextpad=0.2)


def _kind(row: Mapping[str, Any]) -> str:
    return "fused" if row["kind"] == "ours" and not row["variant"].endswith("eager") else row["kind"]


def _mib(row: Mapping[str, Any]) -> float:
    return row["peak_bytes"] / 2**20


def _label_points(axes: Axes, rows: Sequence[Mapping[str, Any]], renderer: Any) -> None:
    """Put each point's name as near to it as possible without covering a point or another name."""
    measured = [row for row in rows if row["error"] is None]
    points = [axes.transData.transform((_mib(row), row["ratio"])) for row in measured]
    taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in points]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    inside = axes.get_window_extent(renderer)
    for row in sorted(measured, key=lambda row: _kind(row) != "fused"):  # important names choose first
        kind = _kind(row)
        style = {"fontsize": 11, "fontweight": "bold"} if kind == "fused" else {"fontsize": 10}
        note = axes.annotate(
            row["variant"],
            (_mib(row), row["ratio"]),
            (0, 0),
            textcoords="offset points",
            color=_POINTS[kind]["color"],
            path_effects=[withStroke(linewidth=3, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": "#AAAAAA", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5},
            **style,
        )
        taken.append(_place(note, taken, inside, renderer))


def _place(note: Annotation, taken: Sequence[Bbox], inside: Bbox, renderer: Any) -> Bbox:
    """Move a name to the first free position around its point, or the least bad one; return the space it takes."""
    places = [(far, across, up) for far in (9, 14, 22, 32, 44, 58, 74, 92) for across, up in _DIRECTIONS]

    def put(far: int, across: int, up: int) -> Bbox:
        note.set_position((across * far, up * far))
        note.set_horizontalalignment(("center", "left", "right")[across])
        note.set_verticalalignment(("center", "bottom", "top")[up])
        if note.arrow_patch is not None:
            # A line to the point only if the name could be taken for another point's.
            note.arrow_patch.set_visible(far > 14)
        note.update_positions(renderer)
        return Text.get_window_extent(note, renderer).padded(2)  # an annotation's own extent includes the line

    def covered(box: Bbox) -> int:
        outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
        return outside + sum(bool(box.overlaps(other)) for other in taken)

    best, least = places[0], None
    for place in places:
        count = covered(put(*place))
        if least is None or count < least:
            best, least = place, count
        if count == 0:
            break
    return put(*best)


def budgets(title: str, rows: Sequence[Mapping[str, Any]], where: str) -> Figure:
    """Draw the curve of memory budgets from reconstructing to storing: time relative to storing against peak memory.

    Args:
        title: what was measured.
        rows: of `revkernels.bench.budget.run`, reconstructing first and storing last.
        where: device, threads and versions.
    """
    figure = Figure(figsize=(8.6, 5.2), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    of = rows[-1]["variant"]
    points = [
        {
            "variant": row["variant"].removeprefix("budget "),
            "kind": "torch" if row["share"] is None else "ours",  # determines the name's colour
            "peak_bytes": row["peak_bytes"],
            "ratio": row["ratio_to"][of],
            "error": None,
        }
        for row in rows
    ]
    ends, curve = [points[0], points[-1]], points[1:-1]
    axes.plot(
        [_mib(end) for end in ends],
        [end["ratio"] for end in ends],
        color="#AAAAAA",
        linestyle="--",
        linewidth=1.2,
        zorder=1,
        label="every byte worth the same",
    )
    axes.plot(
        [_mib(point) for point in curve],
        [point["ratio"] for point in curve],
        color=_BLUE,
        linewidth=2,
        marker="o",
        markersize=8,
        zorder=2,
        label="memory budgets, % of the gap",
    )
    axes.scatter(
        [_mib(end) for end in ends],
        [end["ratio"] for end in ends],
        zorder=3,
        label="no budget",
        color="#000000",
        marker="s",
        s=80,
    )
    sizes, ratios = [_mib(point) for point in points], [point["ratio"] for point in points]
    across, up = max(max(sizes) - min(sizes), 0.1 * max(sizes)), max(max(ratios) - min(ratios), 0.02)
    axes.set_xlim(min(sizes) - 0.12 * across, max(sizes) + 0.12 * across)
    axes.set_ylim(min(ratios) - 0.15 * up, max(ratios) + 0.15 * up)
    axes.set_title(f"{title}\n", fontsize=13, loc="left")
    axes.text(0, 1.02, where, transform=axes.transAxes, fontsize=9, color="#555555")
    axes.set_xlabel("peak activation memory of a training step, MiB", fontsize=11)
    axes.set_ylabel(f"step time, relative to {of}", fontsize=11)
    axes.annotate("↙ better", (0.012, 0.02), xycoords="axes fraction", fontsize=10, color="#555555", style="italic")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False, fontsize=9.5)
    canvas.draw()  # fixes the layout, which determines where labels fit
    figure.set_layout_engine("none")
    _label_points(axes, points, canvas.get_renderer())
    return figure


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


def exact(path: Path, rows: Sequence[DriftRow], trained: Mapping[str, Sequence[Trained]]) -> None:
    """Write two panels to ``path``: the drift of reconstructed streams by depth, and training losses.

    Args:
        path: of the PNG.
        rows: of `revkernels.diagnostics.drift`, for one chain.
        trained: name of a coupling to its trainings, one per seed.
    """
    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    errors, losses = figure.subplots(1, 2)
    lines = list(dict.fromkeys((row.coupling, row.precision) for row in rows))
    for (coupling, precision), line in zip(lines, _DRIFTS, strict=False):
        own = [row for row in rows if (row.coupling, row.precision) == (coupling, precision)]
        errors.plot(
            [row.depth for row in own], [row.rms_error for row in own], label=f"{coupling}, {precision}", **line
        )
    least = min((row.rms_error for row in rows if row.rms_error), default=1e-8)
    errors.set_yscale("symlog", linthresh=least / 4)  # an exact coupling is at 0, which has no logarithm
    errors.set_ylim(-least / 16, 10 * max([least, *(row.rms_error or 0 for row in rows)]))
    errors.set_xscale("log", base=2)
    errors.set_xticks(sorted({row.depth for row in rows}))
    errors.xaxis.set_major_formatter(ScalarFormatter())
    errors.xaxis.set_minor_formatter(NullFormatter())
    errors.set(title="Reconstructed input against the true one", ylabel="relative error (rms)")
    errors.set_xlabel("depth of the chain, reversible blocks")
    for (name, runs), line in zip(trained.items(), (*_LINES, _DRIFTS[1]), strict=False):
        curves = list(zip(*([epoch.loss for epoch in one.epochs] for one in runs), strict=True))
        epochs, means = range(1, len(curves) + 1), [statistics.mean(losses) for losses in curves]
        right = [100 * one.epochs[-1].test_accuracy for one in runs]
        spread = f" ± {statistics.stdev(right):.1f}" if len(right) > 1 else ""
        losses.plot(epochs, means, label=f"{name}: {statistics.mean(right):.1f}{spread} % test accuracy", **line)
        losses.fill_between(
            epochs, [min(c) for c in curves], [max(c) for c in curves], color=line["color"], alpha=0.15, linewidth=0
        )
    count = len(next(iter(trained.values())))
    losses.set(title="RevNet-38 learns 8 x 8 digits", xlabel="epoch", yscale="log")
    losses.set_ylabel("training loss" + (f", mean and range of {count} seeds" if count > 1 else ""))
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (errors, losses):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _label(axes: Axes, text: str, x: float, y: float, offset: tuple[int, int]) -> None:
    axes.annotate(text, (x, y), offset, textcoords="offset points", ha="right", fontsize=9)
