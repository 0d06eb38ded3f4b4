# SPDX-License-Identifier: Apache-2.0
"""Train a reversible transformer to predict the next byte of real text: stored, reconstructed and bit-exact.

    pip install '.[torch]'                      # in a checkout
    python examples/language_model.py
    python examples/language_model.py --autocast --context 512 --blocks 16
    python examples/language_model.py --text book.txt letters.txt --steps 2000 --device cuda

Two streams, attention F and MLP G, as in Reformer (Kitaev et al. 2020, section 3): both start as the embedding, and
their mean is read at the end. Without ``--text`` the text is the source of Python's own standard library, which is
there wherever this runs. Every way starts from the same weights, reads the same batches, draws the same dropout masks,
and is scored in bits a byte on text that none of them was trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from revkernels.measure import peak_bytes
from revkernels.nn import AttentionBranch, MLPBranch, ReversibleBlock, ReversibleSequential

BYTES = 256
WAYS: dict[str, dict[str, Any]] = {
    "stored, plain torch": {"activations": "store", "backend": "eager"},
    "stored": {"activations": "store"},
    "reconstructed": {},
    "reconstructed, exact": {"coupling": "exact"},
}


class Text(NamedTuple):
    train: Tensor  # bytes, as uint8
    unseen: Tensor


def read(paths: Sequence[Path], least: int) -> Text:
    """Join the files, in an order that is always the same; every tenth is held out, or a tenth of a single one.

    Raises:
        ValueError: fewer than ``least`` bytes in one of the parts.
    """
    files = [path.read_bytes() for path in paths]
    random.Random(0).shuffle(files)
    if len(files) < 10:
        whole = b"\n".join(files)
        cut = len(whole) * 9 // 10
        parts = whole[:cut], whole[cut:]
    else:
        parts = b"\n".join(b for k, b in enumerate(files) if k % 10), b"\n".join(files[::10])
    for part in parts:
        if len(part) < least:
            raise ValueError(f"the text has {len(parts[0])} bytes to train on and {len(parts[1])} held out; give more")
    return Text(*(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts))


class Model(nn.Module):
    """Bytes (N, T) -> logits (N, T, 256). ``ways``: options of the chain."""

    def __init__(self, width: int, heads: int, blocks: int, context: int, dropout: float, **ways: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        pairs = [
            ReversibleBlock(
                AttentionBranch(width, heads, dropout, causal=True), MLPBranch(width, 4 * width, dropout=dropout)
            )
            for _ in range(blocks)
        ]
        self.chain = ReversibleSequential(pairs, split_dim=-1, **ways)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.position[: x.shape[1]]  # float32, under autocast too: streams drift in bfloat16
        y1, y2 = self.chain((h, h))
        logits: Tensor = self.head(self.norm((y1 + y2) / 2))
        return logits


class Trained(NamedTuple):
    """``losses`` in bits a byte, one a step; ``unseen`` the same of the text held out; ``peak`` bytes of a step."""

    losses: list[float]
    unseen: float
    peak: int
    seconds: float


def bits(model: nn.Module, x: Tensor, following: Tensor) -> Tensor:
    return functional.cross_entropy(model(x).flatten(0, 1).float(), following.flatten()) / math.log(2)


def batches(text: Tensor, batch: int, context: int, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Windows of the text at random places, and the same moved on by one byte."""
    draw = torch.Generator().manual_seed(seed)

    def following() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(text) - context, (batch, 1), generator=draw)
        windows = text[starts + torch.arange(context + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    return following


def train(model: nn.Module, text: Text, options: argparse.Namespace) -> Trained:
    device, total = torch.device(options.device), options.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / (0.1 * total), 0.55 + 0.45 * math.cos(math.pi * k / total))
    )
    losses, seconds, peak = [], [], 0

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if options.autocast else contextlib.nullcontext()

    def step(x: Tensor, following: Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)
        with autocast():
            loss = bits(model, x, following)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    torch.manual_seed(1)  # for dropout
    model.train()
    draw = batches(text.train, options.batch, options.context, seed=2)
    for k in range(total):
        x, following = (t.to(device) for t in draw())
        if k == 2:  # gradients and the optimizer's state are there
            peak = peak_bytes(lambda x=x, following=following: step(x, following), device)
            continue
        start = time.perf_counter()
        step(x, following)
        seconds.append(time.perf_counter() - start)

    model.eval()
    draw = batches(text.unseen, options.batch, options.context, seed=3)
    with torch.no_grad(), autocast():
        scores = [bits(model, *(t.to(device) for t in draw())).item() for _ in range(20)]
    return Trained(losses, sum(scores) / len(scores), peak, sorted(seconds[3:])[len(seconds[3:]) // 2])


@torch.no_grad()
def sample(model: nn.Module, start: bytes, count: int, context: int) -> bytes:
    """``count`` bytes that the model puts after ``start``."""
    model.eval()
    written = list(start)
    device = next(model.parameters()).device
    for _ in range(count):
        logits = model(torch.tensor([written[-context:]], device=device))[0, -1]
        written.append(int(torch.multinomial((logits.float() / 0.8).softmax(0), 1)))
    return bytes(written)


def main(arguments: list[str] | None = None) -> dict[str, Trained]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="default: Python's standard library")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"of {list(WAYS)}")
    parser.add_argument("--width", type=int, default=128, help="of each stream")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=8, help="an attention and an MLP each")
    parser.add_argument("--context", type=int, default=256, help="bytes")
    parser.add_argument("--batch", type=int, default=8, help="windows of the text")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--autocast", action="store_true", help="branches in bfloat16; the streams stay in float32")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="write N bytes with the last model")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.steps < 5:
        parser.error("--steps must be 5 or more: the first ones warm up, and none would be timed")
    try:
        paths = options.text or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = read(paths, least=options.context + 2)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    sizes = options.width, options.heads, options.blocks, options.context, options.dropout
    torch.manual_seed(0)
    first = Model(*sizes).state_dict()
    print(f"{len(text.train):,} bytes to train on, {len(text.unseen):,} held out; {options.steps} steps")
    print(f"{'':22}{'first':>8}{'last 20':>9}{'held out':>10}{'peak MiB':>10}{'s a step':>10}")
    found = {}
    for name in options.ways:
        model = Model(*sizes, **WAYS[name]).to(options.device)
        model.load_state_dict(first)
        found[name] = trained = train(model, text, options)
        last = sum(trained.losses[-20:]) / len(trained.losses[-20:])
        print(
            f"{name:22}{trained.losses[0]:8.3f}{last:9.4f}{trained.unseen:10.4f}{trained.peak / 2**20:10.1f}"
            f"{trained.seconds:10.3f}"
        )
    if options.sample:
        print(sample(model, b"def ", options.sample, options.context).decode(errors="replace"))
    return found


if __name__ == "__main__":
    main()
