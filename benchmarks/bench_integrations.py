# SPDX-License-Identifier: Apache-2.0
"""Networks of other packages before and after `revkernels.integrations`: peak memory and time of a training step.

    python -m benchmarks.bench_integrations
    python -m benchmarks.bench_integrations --packages pyg freia --depths 4 16 64 --repeat 5

Variants: the changed network with stored and with reconstructed activations, and, where the package has a driver of its
own that saves memory, the network as it was. A package that cannot be imported is a line that says so. Peak:
bytes allocated during a step above those before it (`revkernels.measure.peak_bytes`), the gradients being there
already. Time: the fastest of ``--repeat`` steps; variants take turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from revkernels.measure import peak_bytes


class Case(NamedTuple):
    """A network as its package has it, what changes it, and what it is called with."""

    network: nn.Module
    change: Callable[..., Any]
    inputs: tuple[Any, ...]
    has_driver: bool  # of its own


class Rows(NamedTuple):
    """One network of one depth: the variants' peaks in bytes and seconds, in the order of `VARIANTS`."""

    package: str
    depth: int
    peaks: list[int | None]
    seconds: list[float | None]


VARIANTS = ("stored", "its own driver", "revkernels")


def transformers(depth: int) -> Case:
    """Reformer, local and LSH attention in turns, 2 x 512 tokens of 128 features, dropout."""
    import transformers as hf

    from revkernels.integrations import transformers

    hf.logging.set_verbosity_error()
    config = hf.ReformerConfig(
        attn_layers=[("local", "lsh")[k % 2] for k in range(depth)],
        hidden_size=128,
        num_attention_heads=4,
        attention_head_size=32,
        feed_forward_size=256,
        axial_pos_shape=[16, 32],
        axial_pos_embds_dim=[64, 64],
        max_position_embeddings=512,
        num_buckets=16,
        num_hashes=2,
        lsh_attention_probs_dropout_prob=0.1,
        is_decoder=True,
        use_cache=False,
    )
    return Case(hf.ReformerModel(config), transformers.replace, (torch.randint(3, 300, (2, 512)),), True)


def pyg(depth: int) -> Case:
    """GroupAddRev layers, 4000 nodes of 64 features."""
    from torch_geometric.nn import GroupAddRev, SAGEConv

    from revkernels.integrations import pyg

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.LayerNorm(32), SAGEConv(32, 32)

        def forward(self, x: Any, edge_index: Any) -> Any:
            return self.conv(self.norm(x).relu(), edge_index)

    class Layers(nn.ModuleList):
        def forward(self, x: Any, edge_index: Any) -> Any:
            x = x * 1  # which the package's first layer will empty
            for layer in self:
                x = layer(x, edge_index)
            return x

    net = Layers(GroupAddRev(nn.ModuleList([Block(), Block()])) for _ in range(depth))
    return Case(net, pyg.replace, (torch.randn(4000, 64, requires_grad=True), torch.randint(4000, (2, 16000))), True)


def timm(depth: int) -> Case:
    """A vision transformer, 16 images of 64 x 64 pixels, 65 tokens of 128 features."""
    from timm.models.vision_transformer import VisionTransformer

    from revkernels.integrations import timm

    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=128, depth=depth, num_heads=4, num_classes=10)
    return Case(model, timm.make_reversible, (torch.randn(16, 3, 64, 64),), False)


def _subnet(i: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Linear(i, 128), nn.ReLU(), nn.Linear(128, o))


def freia(depth: int) -> Case:
    """NICE couplings with random permutations between them, 4000 rows of 64 features, as a GraphINN."""
    from FrEIA import framework, modules

    from revkernels.integrations import freia

    nodes: list[Any] = [framework.InputNode(64)]
    for index in range(depth):
        nodes.append(framework.Node(nodes[-1], modules.NICECouplingBlock, {"subnet_constructor": _subnet}))
        nodes.append(framework.Node(nodes[-1], modules.PermuteRandom, {"seed": index}))
    inn = framework.GraphINN([*nodes, framework.OutputNode(nodes[-1])])
    return Case(inn, freia.replace, (torch.randn(4000, 64),), False)


def nflows(depth: int) -> Case:
    """The log-density of a flow of additive couplings and random permutations, 4000 rows of 64 features."""
    from nflows import transforms
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet

    from revkernels.integrations import nflows

    found: list[Any] = []
    for index in range(depth):
        mask = (torch.arange(64) + index) % 2
        found.append(transforms.AdditiveCouplingTransform(mask, lambda i, o: ResidualNet(i, o, 128, num_blocks=1)))
        found.append(transforms.RandomPermutation(64))
    flow = Flow(transforms.CompositeTransform(found), StandardNormal([64]))
    flow.forward = flow.log_prob
    return Case(flow, nflows.replace, (torch.randn(4000, 64),), False)


PACKAGES = {"transformers": transformers, "pyg": pyg, "timm": timm, "freia": freia, "nflows": nflows}


def measure(package: str, depth: int, repeat: int) -> Rows:
    """Make the network and its variants, and let each take its steps."""
    cases = []
    for _ in VARIANTS:
        torch.manual_seed(0)
        cases.append(PACKAGES[package](depth))
    stored, own, rebuilt = cases
    stored.change(stored.network, activations="store")
    rebuilt.change(rebuilt.network)
    steps = [None if case is own and not case.has_driver else _step(case.network, case.inputs) for case in cases]
    for step in steps:
        if step is not None:
            step()  # the gradients are there from now on
    peaks = [None if step is None else peak_bytes(step) for step in steps]
    seconds = [[float("inf")] for _ in steps]
    for _ in range(repeat):
        for step, times in zip(steps, seconds, strict=True):
            if step is not None:
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
    return Rows(
        package, depth, peaks, [None if step is None else min(t) for step, t in zip(steps, seconds, strict=True)]
    )


def _step(network: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
    def step() -> None:
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        y = network(*inputs)
        (y if torch.is_tensor(y) else y[0]).square().mean().backward()

    return step


def main(arguments: list[str] | None = None) -> list[Rows]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; MiB at the peak, seconds a step\n")
    print(f"{'package':14}{'depth':>6}" + "".join(f"{name:>22}" for name in VARIANTS))
    found = []
    for package in options.packages:
        for depth in options.depths:
            try:
                rows = measure(package, depth, options.repeat)
            except (ImportError, RuntimeError) as error:
                print(f"{package:14} not run: {str(error).splitlines()[0]}")
                break
            found.append(rows)
            cells = [
                "-" if peak is None else f"{peak / 2**20:.1f} MiB {seconds:.3f} s"
                for peak, seconds in zip(rows.peaks, rows.seconds, strict=True)
            ]
            print(f"{package:14}{depth:6}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    return found


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
