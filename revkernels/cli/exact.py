# SPDX-License-Identifier: Apache-2.0
"""``revkernels exact``: what the grid of an exact coupling costs a training on real digits, and what it gains.

The grid rounds every branch's output, which is noise in the training; float coupling drifts instead. RevNet-38 learns
handwritten digits from the same starts and batches with several seeds, with each coupling: test accuracy and its
spread, training loss, the angle between its gradient and the stored one. Stored and reconstructed float activations
differ by rounding alone, so the difference between those two is the effect of any rounding on a training. Also the
drift by depth of a chain, which the exact coupling does not have. Tables, and one picture.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from revkernels.cli import demo, digits, plots, training
from revkernels.cli.bench_tables import picture, positive, threads
from revkernels.cli.output import Table, add_json_option, progress, remark, report
from revkernels.diagnostics import Drift, drift
from revkernels.exact import Exact
from revkernels.measure import angle
from revkernels.models import BasicBranch, RevNet
from revkernels.nn import ReversibleBlock, ReversibleSequential
from revkernels.nn.exact import known_exponent

__all__ = ["Trained", "add_arguments", "run"]

#: Options of the model, all on the fused kernels. The others' gradients are compared with the first's.
MODES: dict[str, dict[str, Any]] = {
    "float, stored": {"activations": "store"},
    "float": {},
    "exact": {"coupling": "exact"},
}
INT16 = {"exact, int16": {"coupling": Exact("int16")}}
PRECISIONS = ("float32", "float32, bfloat16 branches")
HALF_WIDTH, SIZE, BATCH = 16, 8, 8  # of the chain whose drift is measured


@dataclass(frozen=True)
class Trained:
    """One training.

    Attributes:
        seed: of weights, order and shifts.
        epochs: its curve.
        degrees: on the trained weights and one batch, the angle between its gradient and that of stored activations
            with a float coupling on the same kernels.
        k: the grid's exponent in each chain; empty without a grid.
    """

    seed: int
    epochs: Sequence[training.Epoch]
    degrees: float
    k: Sequence[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--epochs", type=positive, default=10, metavar="N", help="epochs of each training (default 10)")
    parser.add_argument(
        "--seeds",
        type=positive,
        default=3,
        metavar="N",
        help="seeds, a training of each kind for every one (default 3)",
    )
    parser.add_argument(
        "--blocks",
        type=positive,
        default=64,
        metavar="N",
        help="depth of the chain whose drift is measured (default 64)",
    )
    parser.add_argument("--int16", action="store_true", help="also train on streams that are kept as int16")
    parser.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--out", type=picture, default="exact.png", metavar="FILE", help="the picture, a PNG (default exact.png)"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, train, show, draw. Returns 0."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    modes = MODES | (INT16 if args.int16 else {})
    depths = [1 << power for power in range(args.blocks.bit_length()) if 1 << power < args.blocks] + [args.blocks]
    data = digits.load()
    measurements = 2 * len(PRECISIONS) * len(depths)
    with progress("exact", measurements + len(modes) * args.seeds * args.epochs) as begin:
        found = _drift(depths, begin)
        trained: dict[str, list[Trained]] = {name: [] for name in modes}
        for seed in range(args.seeds):  # seeds in the outer loop: disturbances affect all modes
            for name, options in modes.items():
                trained[name].append(_trained(name, options, data, args.epochs, seed, begin))
    table = found.table()
    table.title += f": {args.blocks} basic blocks, half width {HALF_WIDTH}, batch {BATCH}, {SIZE} x {SIZE}"
    report("exact", [table, _summary(trained, args.epochs), _by_seed(trained)], args.json)
    plots.exact(args.out, [row for row in found.rows if row.problem is None], trained)
    remark(f"picture: {args.out}", args.json)
    return 0


def _drift(depths: Sequence[int], begin: Callable[[str], None]) -> Drift:
    torch.manual_seed(0)
    blocks = (
        ReversibleBlock(BasicBranch(HALF_WIDTH, HALF_WIDTH), BasicBranch(HALF_WIDTH, HALF_WIDTH))
        for _ in range(max(depths))
    )
    x = torch.randn(BATCH, 2 * HALF_WIDTH, SIZE, SIZE)
    return drift(
        ReversibleSequential(*blocks), x, precisions=PRECISIONS, depths=depths, on_step=lambda word, _: begin(word)
    )


def _trained(
    name: str, options: dict[str, Any], data: digits.Digits, epochs: int, seed: int, begin: Callable[[str], None]
) -> Trained:
    model, history = demo.trained(
        f"{name}, seed {seed}", lambda: demo.build("reconstruct, fused", **options), data, epochs, seed, begin
    )
    reference = demo.build("reconstruct, fused", activations="store")
    reference.load_state_dict(model.state_dict())
    degrees = angle(_gradients(model, data), _gradients(reference, data))
    chains = [part for part in model.modules() if isinstance(part, ReversibleSequential)]
    exponents = [known_exponent(chain) for chain in chains]
    return Trained(seed, history, degrees, [k for k in exponents if k is not None])


def _gradients(model: RevNet, data: digits.Digits) -> list[torch.Tensor]:
    model.train()
    model.zero_grad()
    images, classes = data.train_images[: training.BATCH], data.train_classes[: training.BATCH]
    functional.cross_entropy(model(images), classes).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _accuracies(runs: Sequence[Trained]) -> list[float]:
    return [100 * one.epochs[-1].test_accuracy for one in runs]


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _summary(trained: dict[str, list[Trained]], epochs: int) -> Table:
    seeds = len(next(iter(trained.values())))
    table = Table(
        f"RevNet-38 on {digits.TRAIN_IMAGES:,} handwritten digits, {epochs} epochs, {seeds} seed{'s' * (seeds > 1)}",
        {
            "coupling": "coupling",
            "accuracy_percent": "test accuracy, %",
            "accuracy_spread": "spread",
            "difference_points": "above float, points",
            "difference_spread": "spread ",
            "loss": "training loss",
            "loss_spread": "spread  ",
            "angle_degrees": "gradient angle, degrees",
            "k": "k of the chains",
        },
        notes=[
            "means over the seeds; spread: standard deviation; above float: seed by seed, from the same start",
            "training loss: mean of the last epoch; 'float, stored' and 'float' differ by rounding alone",
            "angle: to the gradient of stored activations on the same weights, one batch; median over the seeds",
            "k: streams lie on multiples of 2^-k",
        ],
    )
    for name, runs in trained.items():
        accuracies, losses = _accuracies(runs), [one.epochs[-1].loss for one in runs]
        difference = [a - b for a, b in zip(accuracies, _accuracies(trained["float"]), strict=True)]
        table.rows.append(
            {
                "coupling": name,
                "accuracy_percent": statistics.mean(accuracies),
                "accuracy_spread": _spread(accuracies),
                "difference_points": None if name == "float" else statistics.mean(difference),
                "difference_spread": None if name == "float" else _spread(difference),
                "loss": statistics.mean(losses),
                "loss_spread": _spread(losses),
                "angle_degrees": statistics.median(one.degrees for one in runs),
                "k": ", ".join(map(str, runs[0].k)) or None,
            }
        )
    return table


def _by_seed(trained: dict[str, list[Trained]]) -> Table:
    columns = {"seed": "seed"}
    columns |= {f"accuracy_percent, {name}": f"{name}: test accuracy, %" for name in trained}
    columns |= {f"loss, {name}": f"{name}: training loss" for name in trained}
    table = Table("The same by seed", columns)
    for runs in zip(*trained.values(), strict=True):
        row: dict[str, Any] = {"seed": runs[0].seed}
        for name, one in zip(trained, runs, strict=True):
            row[f"accuracy_percent, {name}"] = 100 * one.epochs[-1].test_accuracy
            row[f"loss, {name}"] = one.epochs[-1].loss
            row[f"losses, {name}"] = [epoch.loss for epoch in one.epochs]
            row[f"degrees, {name}"] = one.degrees
            row[f"k, {name}"] = list(one.k)
        table.rows.append(row)
    return table
