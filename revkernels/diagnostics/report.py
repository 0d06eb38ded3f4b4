# SPDX-License-Identifier: Apache-2.0
"""The result of `memory_report`, as data and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from revkernels.cli.output import Table, plain

__all__ = ["ChainFrames", "MemoryReport", "MemoryRow"]

PARAMETERS, BUFFERS, GRADIENTS, INPUT = "parameters", "buffers", "gradients", "input"
OUTPUT = "output"
CHAIN = "kept by a chain"
SAVED = "saved tensors"
OUTSIDE = "outside saved tensors"
UNSEEN = "not attributed"
#: In the table's order: memory that is always present, and what the forward leaves for the backward.
RESIDENT = (PARAMETERS, BUFFERS, GRADIENTS, INPUT)
HELD = (OUTPUT, CHAIN, SAVED, OUTSIDE, UNSEEN)

_LOSS = "(loss)"
_SHOWN = 24  # rows of the table; smaller ones are combined into one row
_WORTH_SHOWING = 0.001  # of the bytes held
_WORTH_SAYING = 0.02  # of the bytes held: less outside saved tensors does not matter
_MOST = 0.5
_NAMED = 4  # modules in a sentence


@dataclass(frozen=True)
class MemoryRow:
    """Memory of one kind in one module.

    Attributes:
        module: its dotted name; "(TypeName)" for the network itself, "(loss)" and "(input)" for memory of no module.
        kind: one of `RESIDENT` or `HELD`.
        bytes: of the memory, views counted once.
        tensors: number of memory blocks.
        operator: what made it, if the kind is outside saved tensors.
        holder: what holds it besides autograd: "ctx.NAME of FUNCTION", "self.NAME", or None if nothing was found.
    """

    module: str
    kind: str
    bytes: int
    tensors: int
    operator: str | None = None
    holder: str | None = None


@dataclass(frozen=True)
class ChainFrames:
    """One call of a reversible chain.

    Attributes:
        chain: its dotted name.
        half_steps: the number of branches it ran.
        kept_bytes: of its outputs, from which the backward starts; 0 if nothing is reconstructed from them.
        largest_frame_bytes: of the tensors saved by the recompute of one branch, without the streams: what the chain
            adds to the step's peak besides streams and gradients.
        largest_frame: the half-step with that size; None if nothing was recomputed.
        stored: whether it ran with stored activations.
    """

    chain: str
    half_steps: int
    kept_bytes: int
    largest_frame_bytes: int
    largest_frame: str | None
    stored: bool = False


@dataclass(frozen=True)
class MemoryReport:
    """Where the bytes of one training step are; see `memory_report`.

    Attributes:
        rows: every module and kind.
        chains: every call of a reversible chain, in order.
        held_bytes: what the forward allocated and the backward finds, by the allocator; the sum of the rows of `HELD`.
        peak_bytes: of the whole step, above parameters, buffers and input (`revkernels.measure.peak_bytes`); its
            gradients are new memory and count.
        device: as text.
    """

    rows: tuple[MemoryRow, ...]
    chains: tuple[ChainFrames, ...]
    held_bytes: int
    peak_bytes: int
    device: str

    def total(self, *kinds: str) -> int:
        """Bytes of these kinds; of all kinds if none is named."""
        return sum(row.bytes for row in self.rows if not kinds or row.kind in kinds)

    def by_kind(self) -> dict[str, int]:
        """Bytes of each kind, in the table's order, including zeros."""
        return {kind: self.total(kind) for kind in (*RESIDENT, *HELD)}

    def by_module(self, depth: int | None = None) -> dict[str, int]:
        """Bytes held between forward and backward by module, or by its name's first ``depth`` parts, largest first."""
        sizes: dict[str, int] = {}
        for row in self.rows:
            if row.kind in HELD:
                name = row.module if depth is None else ".".join(row.module.split(".")[:depth])
                sizes[name] = sizes.get(name, 0) + row.bytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def outside(self) -> tuple[MemoryRow, ...]:
        """The rows of memory outside saved tensors, largest first."""
        return tuple(sorted((row for row in self.rows if row.kind == OUTSIDE), key=lambda row: -row.bytes))

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as dictionaries."""
        return [asdict(row) for row in self.rows]

    @property
    def advice(self) -> tuple[str, ...]:
        """Advice, if there is a clear one; empty if nothing stands out."""
        return (*self._outside_advice(), *self._share_advice(), *self._frame_advice())

    def _outside_advice(self) -> list[str]:
        alike: dict[tuple[str | None, str | None], list[MemoryRow]] = {}
        for row in self.outside():
            alike.setdefault((row.operator, row.holder), []).append(row)
        sentences = []
        for (operator, holder), rows in alike.items():
            count = sum(row.bytes for row in rows)
            if count < max(1, _WORTH_SAYING * self.held_bytes):
                continue
            more = f" and {len(rows) - 1} more like it hold" if len(rows) > 1 else " holds"
            how = f"{holder}, made by {operator}" if holder else f"made by {operator}"
            sentences.append(
                f"{rows[0].module}{more} {size(count)} outside saved tensors ({how}): no reversible library can "
                f"reconstruct those"
            )
        return sentences

    def _share_advice(self) -> list[str]:
        if self.total(PARAMETERS, BUFFERS, GRADIENTS) > max(self.held_bytes, self.peak_bytes - self.total(GRADIENTS)):
            return ["parameters and gradients take more than the activations: no reversible library can save those"]
        return [*self._stored_advice(), *self._elsewhere_advice()]

    def _stored_advice(self) -> list[str]:
        names = list(dict.fromkeys(frames.chain for frames in self.chains if frames.stored))
        inside = (row for row in self.rows if row.kind == SAVED and any(_inside(row.module, name) for name in names))
        saved = sum(row.bytes for row in inside)
        if saved <= _MOST * self.held_bytes:
            return []
        who = f"{names[0]} stores" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more chains store"
        return [f"{who} {size(saved)} of activations: activations='reconstruct' would reconstruct them"]

    def _elsewhere_advice(self) -> list[str]:
        groups = self.outside_chains()
        total, most = sum(groups.values()), next(iter(groups.items()), ("", 0))
        if not total > _MOST * self.held_bytes:
            return []
        held = "of the bytes held between forward and backward"
        if most[1] > _MOST * self.held_bytes:
            return [f"{most[0]} holds {self._percent(most[1])} {held}, outside any reversible chain"]
        largest = ", ".join(f"{name} ({size(count)})" for name, count in list(groups.items())[:_NAMED])
        return [f"{self._percent(total)} {held} are outside any reversible chain, most of them here: {largest}"]

    def outside_chains(self) -> dict[str, int]:
        """Bytes held between forward and backward outside reversible chains, by the largest modules without a chain."""
        chains = {frames.chain for frames in self.chains}
        sizes: dict[str, int] = {}
        for row in self.rows:
            if row.kind in (SAVED, OUTSIDE) and row.module[:1] not in ("(", ""):
                if any(_inside(row.module, chain) for chain in chains):
                    continue
                parts = row.module.split(".")
                prefixes = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
                free = (name for name in prefixes if not any(_inside(chain, name) for chain in chains))
                name = next(free, row.module)
                sizes[name] = sizes.get(name, 0) + row.bytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def _percent(self, count: int) -> str:
        return f"{100 * count / self.held_bytes:.0f} %"

    def _frame_advice(self) -> list[str]:
        frames = max(self.chains, key=lambda frames: frames.largest_frame_bytes, default=None)
        if frames is None or frames.largest_frame_bytes <= _MOST * self.peak_bytes:
            return []
        return [
            f"the recompute of {frames.largest_frame} in {frames.chain} holds {size(frames.largest_frame_bytes)} of "
            f"the peak at once: more depth costs nothing, a narrower branch or a smaller batch is what lowers it"
        ]

    def __str__(self) -> str:
        return "\n".join(
            [
                plain(self._table()).lstrip("\n"),
                *([plain(self._chain_table())] if self.chains else []),
                *(["", *(f"- {sentence}." for sentence in self.advice)] if self.advice else []),
            ]
        )

    def _table(self) -> Table:
        unit, scale = self._unit()
        table = Table(
            f"One training step on {self.device}: {size(self.held_bytes)} held between forward and backward, peak "
            f"{size(self.peak_bytes)} above parameters, buffers and input",
            {"kind": "kind", "module": "module", "size": unit, "tensors": "tensors", "why": "made by, held by"},
        )
        worth = [row for row in self.rows if row.bytes >= _WORTH_SHOWING * self.held_bytes]
        worth = [row for row in worth if row.kind not in (PARAMETERS, BUFFERS, GRADIENTS)]
        most = sorted(worth, key=lambda row: -row.bytes)[:_SHOWN]
        for kind, count in self.by_kind().items():
            of_kind = [row for row in self.rows if row.kind == kind]
            if len(of_kind) == 1:
                table.rows.append({"kind": kind, **_cells(of_kind[0], scale)})
            elif of_kind:
                table.rows.append({"kind": kind, **_cells(MemoryRow("", kind, count, _tensors(of_kind)), scale)})
                shown = sorted((row for row in of_kind if row in most), key=lambda row: -row.bytes)
                rest = [row for row in of_kind if row not in shown]
                if shown and rest:
                    left = sum(row.bytes for row in rest)
                    shown.append(MemoryRow(f"{len(rest)} more", kind, left, _tensors(rest)))
                table.rows += [{"kind": "", **_cells(row, scale)} for row in shown]
        return table

    def _unit(self) -> tuple[str, int]:
        return ("MiB", 2**20) if max(self.held_bytes, self.peak_bytes) >= 2**20 else ("KiB", 2**10)

    def _chain_table(self) -> Table:
        unit, scale = self._unit()
        table = Table(
            "Reversible chains",
            {
                "chain": "chain",
                "half_steps": "half-steps",
                "kept": f"outputs kept, {unit}",
                "frame": f"largest recompute, {unit}",
                "where": "of",
            },
        )
        for frames in self.chains:
            rebuilt = frames.largest_frame is not None
            table.rows.append(
                {
                    "chain": frames.chain,
                    "half_steps": frames.half_steps,
                    "kept": frames.kept_bytes / scale,
                    "frame": frames.largest_frame_bytes / scale if rebuilt else None,
                    "where": frames.largest_frame or ("stored" if frames.stored else "nothing"),
                }
            )
        return table


def _cells(row: MemoryRow, scale: int) -> dict[str, Any]:
    why = ", ".join(word for word in (row.operator, row.holder) if word)
    return {"module": row.module, "size": row.bytes / scale, "tensors": row.tensors, "why": why}


def _tensors(rows: list[MemoryRow]) -> int:
    return sum(row.tensors for row in rows)


def _inside(module: str, of: str) -> bool:
    """Whether the module is ``of``, or inside it; all but the loss is in the network, whose name has brackets."""
    return module == of or module.startswith(f"{of}.") or (of.startswith("(") and module != _LOSS)


def size(count: int) -> str:
    """Bytes in words."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"
