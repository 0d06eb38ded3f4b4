# SPDX-License-Identifier: Apache-2.0
"""``revkernels demo``: RevNet-38 learns real handwritten digits, with stored and with reconstructed activations.

Three modes with the same seed, initial weights and batches; then every claim of the table is measured on the trained
network, and activation memory and gradient angle on chains of increasing depth. One table, one picture.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from revkernels.cli import digits, plots, training
from revkernels.cli.bench_tables import positive, seed
from revkernels.cli.output import Table, add_json_option, file_to_write, folder_to_write, progress, remark, report
from revkernels.measure import angle, branch_calls, multiply_adds, peak_bytes
from revkernels.models import BasicBranch, RevNet, revnet38
from revkernels.nn import ReversibleBlock, ReversibleSequential

__all__ = ["add_arguments", "build", "run", "trained"]

#: Options of the model in each mode. The last uses the device's fused kernels.
MODES: dict[str, dict[str, Any]] = {
    "store": {"activations": "store", "backend": "eager"},
    "reconstruct, eager": {"activations": "reconstruct", "backend": "eager"},
    "reconstruct, fused": {"activations": "reconstruct", "backend": None},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEPTHS = (6, 12, 24, 48, 96)
TIMED_STEPS = 15
CHAIN_HALF_WIDTH = 16  # of the chains of increasing depth: RevNet-38's first stage, on 8 x 8 images
CHAIN_BATCH = 16
CHAIN_DRAWS = 3  # of weights and input: a ReLU input that rounds across 0 moves an angle tenfold, so take the median


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer epochs, steps and draws")
    parser.add_argument("--epochs", type=positive, metavar="N", help="passes over the training digits (20; quick: 5)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the training (default 0)")
    parser.add_argument(
        "--out", type=_folder, default=".", metavar="DIR", help="folder of demo.png, created if missing (default: .)"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Train, measure, show. Returns 0."""
    epochs = args.epochs or (5 if args.quick else 20)
    timed_steps, draws = (5, 1) if args.quick else (TIMED_STEPS, CHAIN_DRAWS)
    data = digits.load()
    steps = len(MODES) * epochs + 1 + len(DEPTHS)
    with progress("demo", steps) as begin:
        curves, trained_by_mode = {}, {}
        for mode in MODES:
            trained_by_mode[mode], curves[mode] = trained(mode, partial(build, mode), data, epochs, args.seed, begin)
        begin("measuring a step")
        costs = _step_costs(trained_by_mode["store"].state_dict(), data, timed_steps)
        depths = []
        for depth in DEPTHS:
            begin(f"chains of {depth} blocks")
            depths.append(_chain_costs(depth, args.seed, draws))
    report("demo", [_summary(curves, costs, timed_steps), _by_depth(depths, draws)], args.json)
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "demo.png"
    plots.demo(picture, curves, depths)
    remark(f"picture: {picture}", args.json)
    return 0


def build(mode: str, **changes: Any) -> RevNet:
    """RevNet-38 for the digits in ``mode``, with some options changed."""
    model = revnet38(in_channels=1, **MODES[mode] | changes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # The paper's running average spans thousands of steps; the demo has a few hundred.
            module.momentum = 0.1
    return model


def trained(
    name: str,
    make: Callable[[], RevNet],
    data: digits.Digits,
    epochs: int,
    seed: int,
    begin: Callable[[str], None],
) -> tuple[RevNet, list[training.Epoch]]:
    """Train the model that ``make`` returns, from ``seed``; ``begin`` is called for every epoch."""
    torch.manual_seed(seed)
    model = make()
    done = 0

    def announce(epoch: training.Epoch | None = None) -> None:
        nonlocal done
        if epoch is not None:
            done += 1
        if done < epochs:
            begin(f"{name}, epoch {done + 1} of {epochs}" + (f", test {epoch.test_accuracy:.1%}" if epoch else ""))

    announce()
    history = training.train(model, data, epochs, seed, announce)
    return model, history


def _step_costs(state: dict[str, Tensor], data: digits.Digits, timed_steps: int) -> dict[str, dict[str, float]]:
    """One training step of the trained weights on one batch, in each mode."""
    images, classes = data.train_images[: training.BATCH], data.train_classes[: training.BATCH]
    steps, costs, gradients = {}, {}, {}
    for mode in MODES:
        model = build(mode)
        model.load_state_dict(state)
        steps[mode] = step = _step(model, images, classes)
        step()  # warm-up: from here on gradients exist, so only activations count as new memory
        gradients[mode] = [dp.clone() for dp in _gradients(model)]
        costs[mode] = {
            "peak_bytes": peak_bytes(step),
            "branch_calls": branch_calls(_branches(model), step),
            "multiply_adds": multiply_adds(step),
            "chain_multiply_adds_n": _chain_multiply_adds(model, images),
            "angle_degrees": angle(gradients[mode], _stored_gradients(mode, state, images, classes)),
        }
    for mode, seconds in _interleaved_medians(steps, timed_steps).items():
        costs[mode]["ms"] = 1e3 * seconds
    return costs


def _stored_gradients(mode: str, state: dict[str, Tensor], images: Tensor, classes: Tensor) -> list[Tensor]:
    """Gradients of the mode's own kernels with stored activations: other kernels round a ReLU's input across zero."""
    model = build(mode)
    model.load_state_dict(state)
    for module in model.modules():
        if isinstance(module, ReversibleSequential):
            module.activations = "store"
    _step(model, images, classes)()
    return _gradients(model)


def _step(model: nn.Module, images: Tensor, classes: Tensor) -> Callable[[], None]:
    def step() -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        functional.cross_entropy(model(images), classes).backward()

    return step


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _branches(model: RevNet) -> list[nn.Module]:
    blocks = [m for m in model.modules() if isinstance(m, ReversibleBlock)]
    return [branch for block in blocks for branch in (block.F, block.G) if isinstance(branch, nn.Module)]


def _chain_multiply_adds(model: RevNet, images: Tensor) -> float:
    """Multiply-adds of a step through the reversible chains alone, in units of N, those of their forward."""
    forward = step = 0
    with torch.no_grad():
        pair = tuple(model.stem(images).chunk(2, dim=1))
    for stage in model.stages:
        transition, chain = stage.children()
        with torch.no_grad():
            pair = transition(pair)
            forward += multiply_adds(partial(chain, pair))
        inputs = tuple(x.detach().requires_grad_() for x in pair)
        step += multiply_adds(partial(_forward_backward, chain, inputs))
        with torch.no_grad():
            pair = chain(pair)
    return step / forward


def _forward_backward(chain: nn.Module, pair: tuple[Tensor, Tensor]) -> None:
    y1, y2 = chain(pair)
    torch.autograd.backward((y1, y2), (torch.ones_like(y1), torch.ones_like(y2)))


def _interleaved_medians(steps: dict[str, Callable[[], None]], count: int) -> dict[str, float]:
    """Median seconds of each step; interleaved, so that other load on the machine affects all of them."""
    seconds: dict[str, list[float]] = {mode: [] for mode in steps}
    for _ in range(count):
        for mode, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[mode].append(time.perf_counter() - start)
    return {mode: statistics.median(times) for mode, times in seconds.items()}


def _chain_costs(depth: int, seed: int, draws: int) -> dict[str, Any]:
    """At one depth: activation bytes per mode (float32), and the angle of fused to stored gradients per dtype."""
    peaks = {mode: peak_bytes(_chain_step(depth, mode, torch.float32, seed)[1]) for mode in MODES}
    degrees = {
        name: statistics.median(_chain_angle(depth, dtype, seed + draw) for draw in range(draws))
        for name, dtype in DTYPES.items()
    }
    return {"blocks": depth, "bytes": peaks, "degrees": degrees}


def _chain_angle(depth: int, dtype: torch.dtype, seed: int) -> float:
    """The drift alone: both run on the same kernels, because others round a ReLU's input across zero."""
    fused, stored = (
        _chain_step(depth, "reconstruct, fused", dtype, seed, **changes)[0]
        for changes in ({}, {"activations": "store"})
    )
    return angle(_gradients(fused), _gradients(stored))


def _chain_step(
    depth: int, mode: str, dtype: torch.dtype, seed: int, **changes: Any
) -> tuple[ReversibleSequential, Callable[[], None]]:
    """A chain and its step on random images, run once so that gradients exist and only activations are new memory."""
    torch.manual_seed(seed)
    net = _chain(depth, mode, **changes).to(dtype)
    pair = tuple(torch.randn(2, CHAIN_BATCH, CHAIN_HALF_WIDTH, 8, 8).to(dtype))
    dy = [torch.randn_like(half) for half in pair]

    def step() -> None:
        torch.autograd.backward(net(pair), dy)

    step()
    return net, step


def _chain(depth: int, mode: str, **changes: Any) -> ReversibleSequential:
    def branch() -> BasicBranch:
        return BasicBranch(CHAIN_HALF_WIDTH, CHAIN_HALF_WIDTH)

    return ReversibleSequential(*(ReversibleBlock(branch(), branch()) for _ in range(depth)), **MODES[mode] | changes)


def _summary(curves: dict[str, list[training.Epoch]], costs: dict[str, dict[str, float]], timed_steps: int) -> Table:
    epochs = len(curves["store"])
    table = Table(
        f"RevNet-38 on {digits.TRAIN_IMAGES:,} handwritten digits, {epochs} epochs of batches of {training.BATCH}",
        {
            "mode": "activations",
            "accuracy_percent": "test accuracy, %",
            "time_ratio": "step time / store",
            "peak_mib": "peak activations, MiB",
            "branch_calls": "branch calls",
            "multiply_adds_millions": "multiply-adds, M",
            "chain_multiply_adds_n": "in chains, N",
            "theory_n": "theory, N",
            "angle_degrees": "angle to store, degrees",
        },
    )
    for mode, cost in costs.items():
        table.rows.append(
            {
                "mode": mode,
                "accuracy_percent": round(100 * curves[mode][-1].test_accuracy, 2),
                "time_ratio": cost["ms"] / costs["store"]["ms"],
                "time_ms": cost["ms"],
                "peak_mib": cost["peak_bytes"] / 2**20,
                "peak_bytes": cost["peak_bytes"],
                "branch_calls": cost["branch_calls"],
                "multiply_adds_millions": cost["multiply_adds"] / 1e6,
                "chain_multiply_adds_n": cost["chain_multiply_adds_n"],
                "theory_n": 3 if mode == "store" else 4,
                "angle_degrees": cost["angle_degrees"],
            }
        )
    table.notes = [
        f"one training step on {training.BATCH} digits, float32; angle: to the gradients of the same kernels, storing",
        f"time: median of {timed_steps} steps of each mode, taken in turns; store takes {costs['store']['ms']:.1f} ms",
        "N: the multiply-adds of the reversible chains' forward pass, counted by torch's FLOP counter like the rest",
    ]
    return table


def _by_depth(depths: Sequence[dict[str, Any]], draws: int) -> Table:
    table = Table(
        f"Chains of basic blocks, half width {CHAIN_HALF_WIDTH}, batch {CHAIN_BATCH}, 8 x 8",
        {
            "blocks": "blocks",
            **{f"mib, {mode}": f"{mode}, MiB" for mode in MODES},
            **{f"degrees, {name}": f"angle in {name}, degrees" for name in DTYPES},
        },
    )
    for row in depths:
        table.rows.append(
            {
                "blocks": row["blocks"],
                **{f"mib, {mode}": count / 2**20 for mode, count in row["bytes"].items()},
                **{f"degrees, {name}": value for name, value in row["degrees"].items()},
            }
        )
    table.notes = [
        "MiB: peak activations of forward and backward, float32",
        f"angle: between the gradients of fused reconstruct and fused store, that dtype; draws, median taken: {draws}",
    ]
    return table


def _folder(name: str) -> Path:
    folder = folder_to_write(name)
    if folder.is_dir():
        file_to_write(str(folder / "demo.png"))
    elif folder.suffix.lower() in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{folder.name} is the name of a picture; the folder of demo.png is needed")
    return folder
