# SPDX-License-Identifier: Apache-2.0
"""The ways to train one workload: how its chains run, and a repeatable step.

Every contender is a separate copy with the same weights, so that none shares running statistics, gradients or compiled
code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from revkernels.autograd.planning.planner import planner_of
from revkernels.bench.chains import plain_block, unfuse
from revkernels.bench.networks import Data, Workload
from revkernels.bench.peers import PEERS, Pairs, Peer
from revkernels.budget import MemoryBudget
from revkernels.nn import ReversibleSequential, selective_checkpoint
from revkernels.nn.plan import Plan

__all__ = ["BASELINE", "BUDGET", "CASTING", "COMPILED", "OPTIONS", "WAYS", "Contender", "Way"]

BASELINE = "store, eager"
BUDGET = 0.5  # of the stored activations: what torch's partitioner may keep
_SETTLING = 2  # steps until a memory budget has measured and planned, and a grid is as fine as whole batches allow


@dataclass(frozen=True)
class Way:
    """How a contender's chains run.

    Attributes:
        name: of the contender.
        kind: "ours", "torch" or "peer"; determines the plot's colours.
        activations, coupling, backend: of the `ReversibleSequential`s, and of the network around them.
        share: of the way from the memory of reconstructing to that of storing, for a `MemoryBudget` instead of
            ``activations``.
        chain: makes the chains' replacement from their branches.
        compiled: by torch.compile.
        budget: torch's ``activation_memory_budget``, for a compiled one.
        peer: the library whose chain it is.
        casting: branches enter autocast themselves, so that they are recomputed in it too.
        transitions: of a RevNet; None is its default.
        selective: under `selective_checkpoint`.
    """

    name: str
    kind: str
    activations: str = "store"
    backend: str | None = "eager"
    coupling: str = "float"
    share: float | None = None
    chain: Callable[[Pairs], nn.Module] | None = None
    compiled: bool = False
    budget: float | None = None
    peer: Peer | None = None
    casting: bool = False
    transitions: str | None = None
    selective: bool = False

    @property
    def settles(self) -> bool:
        """Whether its first steps differ from the later ones."""
        return self.share is not None or self.coupling != "float"


class _Checkpointed(nn.Module):
    """Blocks in plain torch, each under a non-reentrant checkpoint."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branch for pair in pairs for branch in pair)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x1, x2 = pair
        for F, G in zip(self.branches[::2], self.branches[1::2], strict=True):
            x1, x2 = checkpoint(plain_block, F, G, x1, x2, use_reentrant=False)
        return x1, x2


class _Casting(nn.Module):
    """A branch that enters autocast itself."""

    def __init__(self, branch: nn.Module, device: str) -> None:
        super().__init__()
        self.branch, self.device = branch, device

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            f: Tensor = self.branch(x)
        return f


#: Compiled by torch.compile, which takes minutes.
COMPILED = (
    Way("store, compiled", "torch", compiled=True),
    Way("checkpoint, compiled", "torch", chain=_Checkpointed, compiled=True),
    Way(f"memory budget {BUDGET}, compiled", "torch", compiled=True, budget=BUDGET),
)
#: The others.
WAYS = (
    Way(BASELINE, "torch"),
    Way("store, fused", "ours", backend=None),
    Way("checkpoint, eager", "torch", chain=_Checkpointed),
    Way("reconstruct, eager", "ours", activations="reconstruct"),
    Way("reconstruct, fused", "ours", activations="reconstruct", backend=None),
    *(Way(peer.name, "peer", chain=peer.chain, peer=peer) for peer in PEERS),
)
#: Other libraries recompute outside autocast. These have autocast inside the branches, as their users would put it.
CASTING = tuple(
    Way(f"{peer.name}, autocast in branches", "peer", chain=peer.chain, peer=peer, casting=True) for peer in PEERS
)
#: More of this package's, for networks: bit-exact streams, less memory, and some memory traded for time.
OPTIONS = (
    Way("store, selective", "ours", backend=None, selective=True),
    Way("reconstruct, selective", "ours", activations="reconstruct", backend=None, selective=True),
    Way("reconstruct, exact", "ours", activations="reconstruct", backend=None, coupling="exact"),
    Way("reconstruct, transitions too", "ours", activations="reconstruct", backend=None, transitions="recompute"),
    Way("budget 25%", "ours", backend=None, share=0.25),
    Way("budget 50%", "ours", backend=None, share=0.5),
)


class Contender:
    """One copy of a workload and its training step.

    ``dtype`` is "float32", "bfloat16" for autocast, or "float64" throughout. ``state`` is the common initial weights;
    None keeps those drawn. Errors of a library or compiler propagate.
    """

    def __init__(self, way: Way, workload: Workload, dtype: str, device: str, state: dict[str, Tensor] | None) -> None:
        self.way = way
        self.device = device.partition(":")[0]
        self.autocast = torch.bfloat16 if dtype == "bfloat16" else None
        # Its own budget, which all chains of the network share.
        self.budget = None if way.share is None else MemoryBudget(way.share)
        more = {} if way.transitions is None else {"transitions": way.transitions}
        module = workload.make(self.budget or way.activations, way.backend, way.coupling, **more)
        if state is not None:
            module.load_state_dict(state)
        self.state = {name: value.clone() for name, value in module.state_dict().items()} if state is None else state
        if dtype == "float64":
            module.double()
        if way.backend == "eager":
            unfuse(module)
        # Before chains are replaced, which changes their names and the order.
        self.parameters = list(module.parameters())
        self.norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
        if way.chain is not None:
            _replace_chains(module, _casting(way.chain, self.device) if way.casting else way.chain)
        self._module = module
        self._call: Callable[..., Any] = torch.compile(module, dynamic=False) if way.compiled else module
        if way.selective:
            self._call = partial(selective_checkpoint, module)

    def step(self, data: Data) -> None:
        """Run a forward and a backward; gradients accumulate, as over micro-batches."""
        inputs, _, backward = data
        with _budget(self.way.budget):
            with self._casting():
                output = self._call(inputs)
            backward(output)

    def settle(self, data: Data) -> None:
        """Run the steps on data of this shape that differ from the later ones, if any."""
        for _ in range(_SETTLING if self.way.settles else 0):
            self.step(data)

    def plan(self, data: Data | None = None) -> Plan | None:
        """Return the plan of the last step's memory budget; None without one.

        Args:
            data: runs steps on it, in which the plan's peak is measured. The times of earlier steps are forgotten: a
                later ``plan()`` reports the steps between the two.
        """
        if self.budget is None:
            return None
        made: Any = next(part for part in self._module.modules() if hasattr(part, "plan"))
        if data is None:
            return made.plan()
        with self._casting():
            found = made.plan(data[0])
        self.forget_times()
        return found

    def forget_times(self) -> None:
        """Let the plan report only the steps from now on."""
        if self.budget is not None:
            planner_of(self.budget).forget_times()

    def _casting(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(self.device, self.autocast)

    def captured(self, data: Data) -> Callable[[], None]:
        """Record a step as a CUDA graph. Returns its replay, which adds to the same gradients as `step`.

        It is warmed up on a side stream, as torch's notes on CUDA graphs require. What cannot be captured raises there.
        """
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step(data)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            self.step(data)
        return graph.replay

    def gradients(self, data: Data) -> list[Tensor]:
        """Return copies of one step's gradients, also of the input's leaves; a missing one is zeros."""
        leaves = [*self.parameters, *data[1]]
        for leaf in leaves:
            leaf.grad = None
        self.step(data)
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in leaves]

    def updates(self) -> int | None:
        """Return how often the most updated batch norm has updated its running statistics; None without one."""
        counts = [int(norm.num_batches_tracked) for norm in self.norms if norm.num_batches_tracked is not None]
        return max(counts, default=None)


def _casting(chain: Callable[[Pairs], nn.Module], device: str) -> Callable[[Pairs], nn.Module]:
    return lambda pairs: chain([(_Casting(F, device), _Casting(G, device)) for F, G in pairs])


def _replace_chains(module: nn.Module, chain: Callable[[Pairs], nn.Module]) -> None:
    """Replace every `ReversibleSequential` that has blocks by ``chain`` of the same branches."""
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, ReversibleSequential) and len(child)
    ]
    for parent, name, child in found:
        pairs: list[Any] = [block.branches for block in child]
        setattr(parent, name, chain(pairs))


@contextmanager
def _budget(value: float | None) -> Iterator[None]:
    if value is None:
        yield
        return
    from torch._functorch import config

    with config.patch(activation_memory_budget=value):
        yield
