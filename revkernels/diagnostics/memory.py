# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a training step are: which module holds what between its forward and its backward, and why."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from revkernels.budget import MemoryBudget
from revkernels.diagnostics import holders
from revkernels.diagnostics.report import (
    BUFFERS,
    CHAIN,
    GRADIENTS,
    INPUT,
    OUTPUT,
    OUTSIDE,
    PARAMETERS,
    SAVED,
    UNSEEN,
    ChainFrames,
    MemoryReport,
    MemoryRow,
)
from revkernels.diagnostics.untouched import (
    check_shapes,
    detached,
    loss_from,
    outside_autocast,
    tensors_in,
    untouched,
)
from revkernels.diagnostics.watching import Chain, Made, Watch, address, has_memory
from revkernels.measure import peak_bytes

__all__ = ["memory_report"]


def memory_report(
    net: nn.Module, x: Any, *args: Any, loss: Callable[[Any], torch.Tensor] | None = None, **kwargs: Any
) -> MemoryReport:
    """Report where every byte of one training step ``loss(net(x, *args, **kwargs)).backward()`` is.

    For any module, reversible or not. The step runs once unchanged, for its peak, and once watched, for the bytes
    present between forward and backward, each with the module that made it and the reason why it is alive (on CUDA also
    once before, because libraries allocate workspaces at their first call). Watching does not change what runs: fused
    kernels stay fused. Call it as you train: in the same mode, under the same autocast (the backward runs outside it,
    as torch requires).

        total = parameters + buffers + gradients + input + held
        held  = output + kept by chains + saved tensors + ... + outside saved tensors + not attributed

    ``held`` is the allocator's figure, what the forward allocated and has not freed. So the last row is what the others
    do not explain: random states of ``torch.utils.checkpoint`` (5 KB per call) or memory hidden in native code; on CUDA
    also the allocator's rounding to 512 bytes and libraries' workspaces.

    Outside saved tensors is memory that neither autograd's saved-tensor hooks nor a reversible chain can see or
    reconstruct: a tensor that an ``autograd.Function`` puts on ``ctx`` as an attribute, or one that a module caches on
    ``self``. The rows name the module, the operator that made it and, if found, the attribute.

    Afterwards the network is unchanged: ``.grad``, buffers, attributes, random numbers, mode, hooks.

    Args:
        net: the module; its parameters, buffers and ``x`` are on one device, the CPU or a CUDA device.
        x, *args, **kwargs: its arguments. Tensors are not written to and get no ``.grad``.
        loss: makes a scalar from the output. Default: the mean square of each floating-point output, summed.

    Returns:
        A `MemoryReport`; ``print`` shows a table, the chains and advice.

    Raises:
        TypeError: ``net`` is not a module, or ``loss`` not callable.
        ValueError: the loss is not a scalar that requires grad, a lazy parameter has no shape yet, or the device is
            neither the CPU nor CUDA.
        RuntimeError: a torch profiler is running already.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is a {type(net).__name__}; it must be an nn.Module")
    loss = loss_from(loss)
    check_shapes(net)
    device = _device(net, (x, args, kwargs))
    torch.clear_autocast_cache()
    first = 0 if device.type == "cpu" else 1  # on a GPU libraries allocate their workspaces once
    if any(isinstance(getattr(module, "activations", None), MemoryBudget) for module in net.modules()):
        first = 2  # the first step is the planner's
    for _ in range(first):
        with untouched(net):
            _step(net, loss, *detached((x, args, kwargs)))
    with untouched(net):
        peak = peak_bytes(lambda: _step(net, loss, *detached((x, args, kwargs))), device)
    with untouched(net), torch.enable_grad():
        return _watched(net, loss, detached((x, args, kwargs)), device, peak)


def _step(net: nn.Module, loss: Any, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    with torch.enable_grad():
        held = _forward(net, loss, x, args, kwargs)  # holds the output too, as in a training loop
        _backward(held[1])


def _forward(
    net: nn.Module, loss: Any, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, torch.Tensor]:
    y = net(x, *args, **kwargs)
    total = loss(y)
    torch.clear_autocast_cache()  # as leaving a ``with torch.autocast`` does
    return y, total


def _backward(total: Any) -> None:
    if not isinstance(total, torch.Tensor) or total.numel() != 1 or not total.requires_grad:
        what = f"a {type(total).__name__}"
        if isinstance(total, torch.Tensor):
            what = f"a tensor of shape {tuple(total.shape)}, requires_grad={total.requires_grad}"
        raise ValueError(f"the loss is {what}; it must be a scalar tensor that requires grad")
    with outside_autocast(total.device.type):
        total.backward()


def _watched(
    net: nn.Module,
    loss: Any,
    given: tuple[Any, tuple[Any, ...], dict[str, Any]],
    device: torch.device,
    peak: int,
) -> MemoryReport:
    watch = Watch(net)
    with watch.modules():

        def forward() -> tuple[Any, torch.Tensor]:
            with watch, watch.saved_tensors():
                return _forward(net, loss, *given)

        (y, total), held = _held_after(forward, device)
        rows = [*_resident(net, given), *_between(watch, net, given, y, total, held)]
        kept = [_bytes_at(chain.outputs, watch) for chain in watch.chains]
        _backward(total)
    rows += _rows(GRADIENTS, ((name, p.grad) for name, p in net.named_parameters() if p.grad is not None), watch.root)
    frames = [_frames(chain, size) for chain, size in zip(watch.chains, kept, strict=True)]
    return MemoryReport(tuple(rows), tuple(frames), held, peak, str(device))


def _device(net: nn.Module, given: Any) -> torch.device:
    devices = {t.device for t in (*net.parameters(), *net.buffers(), *tensors_in(given)) if t.dim() or t.is_cuda}
    devices = devices or {torch.device("cpu")}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(
            f"the network and its input are on {', '.join(sorted(map(str, devices)))}; they must be on one device, the "
            f"CPU or a CUDA device"
        )
    return devices.pop()


def _held_after(forward: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Run it; return its result, and the bytes that it allocated and that are alive with its result."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        result = forward()
        gc.collect()
        torch.cuda.synchronize(device)
        return result, torch.cuda.memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # as in `measure`
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        result = forward()
        gc.collect()  # garbage does not count as held
    events = session.profiler.kineto_results.events()
    memory = [e for e in events if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    return result, sum(e.nbytes() for e in memory)


# ---- rows


def _resident(net: nn.Module, given: Any) -> list[MemoryRow]:
    root = f"({type(net).__name__})"
    seen: set[int] = set()
    rows = _rows(PARAMETERS, net.named_parameters(), root, seen)
    rows += _rows(BUFFERS, net.named_buffers(), root, seen)
    return rows + _rows(INPUT, (("", t) for t in tensors_in(given)), "(input)", seen)


def _rows(kind: str, named: Iterable[tuple[str, Any]], root: str, seen: set[int] | None = None) -> list[MemoryRow]:
    """One row per module, of the tensors directly in it. Shared memory counts once."""
    seen = set() if seen is None else seen
    sizes: dict[str, list[int]] = {}
    for name, tensor in named:
        if has_memory(tensor):
            if address(tensor) in seen:
                continue
            seen.add(address(tensor))
            count = tensor.untyped_storage().nbytes()
        else:
            count = _bytes_elsewhere(tensor)
        sizes.setdefault(name.rpartition(".")[0] or root, []).append(count)
    return [MemoryRow(module, kind, sum(counts), len(counts)) for module, counts in sizes.items()]


def _bytes_elsewhere(tensor: torch.Tensor) -> int:
    """Bytes of a tensor without one block of memory: sparse, or a wrapper of others."""
    if tensor.layout == torch.sparse_coo:
        return sum(t.untyped_storage().nbytes() for t in (tensor._indices(), tensor._values()))
    return tensor.numel() * tensor.element_size()


def _between(watch: Watch, net: nn.Module, given: Any, y: Any, total: torch.Tensor, held: int) -> list[MemoryRow]:
    """What the forward left behind."""
    present = {address(t) for t in tensors_in(given) if has_memory(t)}
    outputs = {address(t) for t in tensors_in((y, total)) if has_memory(t)}
    kept = {place for chain in watch.chains for place in chain.outputs}
    noted: set[int] = set()
    of_budgets: set[int] = set()
    for chain in watch.chains:
        of_budgets.update(address(t) for t in holders.kept_operators(chain.reversal()) if has_memory(t))
        watch.stack.append(chain.module)
        for tensor in holders.notes(chain.reversal()):
            if watch.note(tensor) is not None:
                noted.add(address(tensor))
        watch.stack.pop()
    whose = holders.attributes(net) | holders.contexts(t for t in tensors_in((y, total)))
    groups: dict[tuple[str, str, str | None, str | None], list[int]] = {}
    for place, made in watch.made.items():
        count = 0 if place in present else made.nbytes()
        if not count:
            continue
        operator = holder = None
        if place in outputs:
            kind = OUTPUT
        elif place in of_budgets and place not in kept:
            kind, holder = CHAIN, "its memory budget"
        elif place in kept or (place in noted and not made.saved):
            kind, holder = CHAIN, "its outputs" if place in kept else "statistics, random states, arguments"
        elif made.saved and made.budget:
            kind, holder = CHAIN, "its memory budget"
        elif made.saved:
            kind, holder = SAVED, whose.get(place)  # would stay alive if it were reconstructed
        else:
            kind, operator, holder = OUTSIDE, made.operator, whose.get(place)
        groups.setdefault((_module_of(kind, made, place, watch), kind, operator, holder), []).append(count)
    rows = [
        MemoryRow(module, kind, sum(counts), len(counts), operator, holder)
        for (module, kind, operator, holder), counts in groups.items()
    ]
    rest = held - sum(row.bytes for row in rows)
    return [*rows, MemoryRow("", UNSEEN, rest, 0)] if rest else rows


def _module_of(kind: str, made: Made, place: int, watch: Watch) -> str:
    if kind == CHAIN:
        for chain in watch.chains:
            if place in chain.outputs:
                return chain.module
    return made.module


def _bytes_at(places: Iterable[int], watch: Watch) -> int:
    return sum(watch.made[place].nbytes() for place in set(places) if place in watch.made)


def _frames(chain: Chain, kept: int) -> ChainFrames:
    if not chain.frames:
        return ChainFrames(chain.module, chain.half_steps, kept, 0, None, chain.stored)
    largest = max(chain.frames, key=lambda k: chain.frames[k])
    return ChainFrames(chain.module, chain.half_steps, kept, chain.frames[largest], chain.name(largest))
