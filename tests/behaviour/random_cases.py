# SPDX-License-Identifier: Apache-2.0
"""Random chains as data: hypothesis draws a `Case`, `random_networks` builds it, `random_scenarios` plays it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypothesis import strategies as st

from behaviour.common import WIDE, torch

NORMS = ["none", "batch", "batch cumulative", "batch only", "batch eval", "group", "layer", "instance", "tracked"]
STATISTICS = {"batch", "batch cumulative", "tracked"}
BATCH_NORMS = {"batch", "batch cumulative", "batch only"}
ACTIVATIONS = ["tanh", "relu in place", "gelu"]
#: Not the same twice, so that `inverse` cannot undo them.
DRAWS = ["dropout", "own generator", "writes a buffer", "spectral norm"]
PECULIARITIES = [
    *("nothing", "gate", "auxiliary", "auxiliary dict", "masked", "memory", "no_grad part", "checkpoint"),
    *("reentrant checkpoint", "module hooks", "tensor hook", "itself", "constant", "a view", "spectral norm"),
    *("differentiates", "chain", "autocast", "narrow", "basic", "bottleneck", "second output unused", *DRAWS),
]
LAYOUTS = ["contiguous", "channels last", "strided", "transposed", "expanded", "offset"]
SIDES = ["none", "none", "data", "learnt", "per block", "per block learnt"]
SCENARIOS = [
    *("train", "accumulate", "backward twice", "some gradients", "two forwards", "inference between"),
    *("checkpointed", "one output", "penalty", "outer hooks", "no_grad", "two losses", "another thread"),
    *("functional call", "inverse", "copied"),
]


@dataclass(frozen=True)
class Part:
    """One branch."""

    norm: str
    activation: str
    peculiarity: str
    bias: bool


@dataclass
class Case:
    blocks: list[tuple[Part, ...]]
    scenario: str
    rank: int
    width: int
    batch: int
    size: tuple[int, ...]
    split_dim: int
    layout: str
    pair: bool
    requires_grad: tuple[bool, bool]
    shared: list[tuple[int, int]]  # block i is block j
    tied: list[int]  # in these blocks F is G
    joint_layers: list[int]  # in these blocks F's layer is G's
    frozen: list[int]
    positional: str
    mask: str
    memory: str
    training: bool
    autocast: bool
    dtype: torch.dtype
    backend: str
    activations: str
    choice: int
    number: int

    def groups(self):
        return len(self.blocks[0]) if self.blocks else 2

    def parts(self):
        return [part for block in self.blocks for part in block]

    def has(self, *peculiarities):
        return any(part.peculiarity in peculiarities for part in self.parts())

    def play(self):
        """The scenario, or simple training where it makes no sense for these branches."""
        if self.scenario == "inverse" and self.has("own generator", "writes a buffer"):
            return "train"
        if self.scenario == "inverse" and self.training and self.has("chain", *DRAWS):
            return "train"
        if self.scenario == "checkpointed" and (
            self.has("chain", "own generator", "basic", "bottleneck", *DRAWS) or self.norms() & STATISTICS
        ):
            return "train"  # torch's checkpoint rewinds neither buffers nor generators, and stops before its end
        if self.scenario in ("some gradients", "penalty", "checkpointed") and self.has("reentrant checkpoint"):
            return "train"  # torch refuses
        left_in_evaluation = self.scenario == "inference between" and self.choice % 10 == 5
        if left_in_evaluation and self.has("checkpoint") and self.norms():
            return "train"  # torch's checkpoint runs again in evaluation, and fails in plain torch too
        return self.scenario

    def layouts(self):
        """Of the streams. (Equal samples have no variance: a batch norm's gradient would be all roundings.)"""
        equal = "strided" if self.has("basic", "bottleneck") or self.norms() & BATCH_NORMS else "expanded"
        chosen = [self.layout, *(LAYOUTS[(self.choice + index) % len(LAYOUTS)] for index in range(1, self.groups()))]
        return tuple(equal if layout == "expanded" else layout for layout in chosen)

    def simple(self):
        """Whether nothing is shared, so that no gradient is a sum of more than two, and streams are contiguous."""
        depth, sides = len(self.blocks), (self.positional, self.mask, self.memory)
        shared = any(i < depth for i in (*self.tied, *self.joint_layers)) or any(max(p) < depth for p in self.shared)
        contiguous = self.layouts()[0] == "contiguous" and not self.pair
        return contiguous and not shared and not any("learnt" in kind for kind in sides)

    def norms(self):
        return {part.norm for part in self.parts()}

    def shape(self):
        """Of one stream. A norm gets four values at least: the derivative at two is zero but for roundings."""
        size = list(self.size[: self.rank - 2])
        norms, library = self.norms(), self.has("basic", "bottleneck")
        if size and ({"instance", "tracked"} & norms or library):
            size[-1] = max(4, size[-1])
        if norms - {"none", "layer", "group"} or library:
            # torch's batch norm takes a gradient of another layout wrongly if a dimension is 1 long (2.13, CPU)
            size = [max(2, n) for n in size]
        width = 4 if library or math.prod(size) < 2 else self.width
        if self.has("bottleneck"):  # half as wide, a norm's scale has no effect on the next norm, and no gradient
            width = 8
        batch = self.batch
        if library or norms & BATCH_NORMS:
            batch = max(batch, 4 if math.prod(size) < 2 else 2)
        if self.has("auxiliary", "auxiliary dict", "no_grad part"):
            batch = max(batch, 1)  # there is no mean of nothing
        if norms & {"instance", "tracked"}:  # a batch norm inside, of one sample: that is one dimension 1 long more
            batch = max(batch, 2)
        return (batch, width, *size)


def _parts(peculiarities):
    choose = st.sampled_from
    return st.builds(Part, choose(NORMS), choose(ACTIVATIONS), choose(peculiarities), st.booleans())


def cases(dtypes=(WIDE,), scenarios=SCENARIOS, without=(), rank=5, depths=(1, 8), simple=False):
    """The strategy: some scenarios, all peculiarities but those ``without``; ``simple`` makes `Case.simple` true."""
    choose = st.sampled_from
    parts = _parts([p for p in PECULIARITIES if p not in without])
    shallow, deep = ({"min_size": depths[0], "max_size": most} for most in (min(3, depths[1]), depths[1]))
    sides = choose(["none", "data", "per block"] if simple else SIDES)
    numbers, some = st.integers(0, 7), not simple
    return st.builds(
        Case,
        blocks=choose([2, 2, 2, 3, 4]).flatmap(
            lambda groups: st.one_of(*(st.lists(st.tuples(*[parts] * groups), **size) for size in (shallow, deep)))
        ),
        scenario=choose(scenarios),
        rank=st.integers(2, rank),
        width=choose([2, 4, 4, 6]),
        batch=st.integers(0, 3),
        size=st.tuples(*[st.integers(1, 3)] * 3),
        split_dim=choose([1, 1, 0, -1]),
        layout=choose(["contiguous"] if simple else LAYOUTS),
        pair=st.just(False) if simple else st.booleans(),
        requires_grad=choose([(True, True), (True, True), (True, False), (False, True), (False, False)]),
        shared=st.lists(st.tuples(numbers, numbers), max_size=2 * some),
        tied=st.lists(numbers, max_size=int(some)),
        joint_layers=st.lists(numbers, max_size=int(some)),
        frozen=st.lists(st.integers(0, 15), max_size=4),
        positional=sides,
        mask=sides,
        memory=sides,
        training=choose([True, True, True, False]),
        autocast=st.booleans(),
        dtype=choose(dtypes),
        backend=choose(["cpu"] if simple else ["cpu", "cpu", "eager"]),
        activations=choose(["reconstruct"] * 3 + ["store"] * some),
        choice=st.integers(0, 2**16),
        number=st.integers(0, 2**20),
    )
