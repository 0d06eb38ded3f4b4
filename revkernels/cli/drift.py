# SPDX-License-Identifier: Apache-2.0
"""``revkernels drift``: reconstruction errors and gradient angles, by depth, or during a training on real digits."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from revkernels import models
from revkernels.cli.bench_tables import device_problem, positive, seed, threads
from revkernels.cli.output import Table, add_json_option, file_to_write, progress, remark, report
from revkernels.diagnostics import PRECISIONS, DriftMonitor, drift
from revkernels.diagnostics.plots import plot_training
from revkernels.models import BasicBranch
from revkernels.nn import ReversibleBlock, ReversibleSequential

__all__ = ["add_arguments", "run"]

#: Networks for images of CIFAR's size.
NETWORKS = ("revnet38", "revnet110", "revnet164")
CHAIN = {"blocks": 32, "half_width": 16, "batch": 8, "size": 8}
#: Values of options that were not given: None until it is known whether they are used.
DEFAULTS = {"blocks": CHAIN["blocks"], "batch": CHAIN["batch"], "cut": "last", "epochs": 10, "device": "cpu"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--network", choices=NETWORKS, help="the chains of a network, on random images of 32 x 32")
    what.add_argument(
        "--digits",
        action="store_true",
        help="the paper's figure: RevNet-38 learns handwritten digits, stored and reconstructed",
    )
    parser.add_argument(
        "--blocks", type=positive, metavar="N", help=f"blocks of the built-in chain (default {DEFAULTS['blocks']})"
    )
    parser.add_argument("--batch", type=positive, metavar="N", help=f"images (default {DEFAULTS['batch']})")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help="may be repeated (default: all but float64)"
    )
    parser.add_argument("--cut", choices=("last", "first"), help="which end of a chain is run (default last)")
    parser.add_argument(
        "--epochs", type=positive, metavar="N", help=f"epochs with --digits (default {DEFAULTS['epochs']})"
    )
    parser.add_argument("--device", help="cpu or cuda (default cpu); --digits runs on the CPU")
    parser.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of weights and images (default 0)")
    parser.add_argument(
        "--out", type=_picture, default="drift.png", metavar="FILE", help="the picture (default drift.png)"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, show, draw. Returns 0, or 2 for a missing device or an option that does not apply."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    problem = _not_looked_at(args)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    problem = problem or device_problem(args.device)
    if problem is not None:
        print(f"revkernels drift: {problem}", file=sys.stderr)
        return 2
    torch.manual_seed(args.seed)
    with ExitStack() as stack:
        table, draw = (_training if args.digits else _by_depth)(args, stack)
    report("drift", [table], args.json, args.device)
    draw(args.out)
    remark(f"picture: {args.out}", args.json)
    return 0


def _not_looked_at(args: argparse.Namespace) -> str | None:
    """Why a given option does not apply; None if there is no such option."""
    if args.digits:
        for name in ("blocks", "batch", "precision", "cut"):
            if getattr(args, name) is not None:
                return f"--{name}: not allowed with --digits"
        return None if args.device in (None, "cpu") else f"--device {args.device}: not allowed with --digits"
    if args.network is not None and args.blocks is not None:
        return "--blocks: not allowed with --network, whose chains are as long as they are"
    return "--epochs: it is of --digits alone" if args.epochs is not None else None


# ---- by depth


def _by_depth(args: argparse.Namespace, stack: ExitStack) -> tuple[Table, Callable[[Path], None]]:
    net, x = _network(args)
    begin: Callable[[str], None] | None = None

    def on_step(words: str, count: int) -> None:
        nonlocal begin
        if begin is None:
            begin = stack.enter_context(progress("drift", count))
        begin(words)

    found = drift(net, x, precisions=args.precision, cut=args.cut, on_step=on_step)
    table = found.table()
    table.title += f": {_words(args)}"
    return table, found.plot


def _network(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    if args.network is not None:
        net = getattr(models, args.network)().to(args.device)
        return net, torch.randn(args.batch, 3, 32, 32, device=args.device)
    half, size = CHAIN["half_width"], CHAIN["size"]
    blocks = (ReversibleBlock(BasicBranch(half, half), BasicBranch(half, half)) for _ in range(args.blocks))
    net = ReversibleSequential(*blocks).to(args.device)
    return net, torch.randn(args.batch, 2 * half, size, size, device=args.device)


def _words(args: argparse.Namespace) -> str:
    if args.network is not None:
        return f"{args.network}, batch {args.batch}"
    half, size = CHAIN["half_width"], CHAIN["size"]
    return f"{args.blocks} basic blocks, half width {half}, batch {args.batch}, {size} x {size}"


# ---- during a training


def _training(args: argparse.Namespace, stack: ExitStack) -> tuple[Table, Callable[[Path], None]]:
    """RevNet-38 from one start, stored and reconstructed; after each epoch of the second, the angle on one batch."""
    from revkernels.cli import demo, digits, training

    data = digits.load()
    begin = stack.enter_context(progress("drift", 2 * args.epochs))
    images, classes = data.train_images[: training.BATCH], data.train_classes[: training.BATCH]
    curves: dict[str, list[training.Epoch]] = {}
    for name in ("stored", "reconstructed"):
        torch.manual_seed(args.seed)
        model = demo.build("reconstruct, fused")
        if name == "stored":  # on the same kernels: others round a ReLU's input across zero
            for module in model.modules():
                if isinstance(module, ReversibleSequential):
                    module.activations = "store"
        monitor = DriftMonitor(model, angle_every=None if name == "stored" else 1)

        def closure(model: nn.Module = model) -> None:
            model.train()
            functional.cross_entropy(model(images), classes).backward()

        done = 0

        def announce(epoch: Any = None, name: str = name, monitor: DriftMonitor = monitor, run: Any = closure) -> None:
            nonlocal done
            if epoch is not None:
                done += 1
                monitor.compare(run)
            if done < args.epochs:
                begin(f"{name}, epoch {done + 1} of {args.epochs}")

        announce()
        with monitor:
            curves[name] = training.train(model, data, args.epochs, args.seed, announce)
    table = Table(
        f"RevNet-38 on handwritten digits, {args.epochs} epochs of batches of {training.BATCH}",
        {
            "epoch": "epoch",
            "angle_degrees": "gradient angle, degrees",
            "rms_error": "largest rms error of the epoch",
            **{f"loss, {name}": f"loss, {name}" for name in curves},
            **{f"error, {name}": f"test error, {name}, %" for name in curves},
        },
        notes=["angle: on one batch after the epoch, reconstructed to stored activations, the weights being the same"],
    )
    steps = len(data.train_images) // training.BATCH
    for epoch, angle in enumerate(monitor.angles):
        errors = [r.rms_error for r in monitor.history if epoch * steps <= r.step < (epoch + 1) * steps]
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "angle_degrees": angle.degrees,
            "rms_error": max(errors, default=None),
        }
        for name, epochs in curves.items():
            row[f"loss, {name}"] = epochs[epoch].loss
            row[f"error, {name}"] = _error(epochs[epoch])
        table.rows.append(row)

    def draw(path: Path) -> None:
        both = {
            name: {
                "training loss": [(k + 1, epoch.loss) for k, epoch in enumerate(epochs)],
                "test error, %": [(k + 1, _error(epoch)) for k, epoch in enumerate(epochs)],
            }
            for name, epochs in curves.items()
        }
        angles = [dataclasses.replace(angle, step=angle.step + 1) for angle in monitor.angles]
        plot_training(path, stored=both["stored"], reconstructed=both["reconstructed"], angles=angles, unit="epoch")

    return table, draw


def _error(epoch: Any) -> float:
    return 100 * (1 - epoch.test_accuracy)


def _picture(name: str) -> Path:
    path = file_to_write(name)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{name} ends in {path.suffix or 'nothing'}; .png, .svg or .pdf is needed")
    return path
