# SPDX-License-Identifier: Apache-2.0
"""A Sequential whose norms and activations run fused, and a report of what is fused in any branch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn

from revkernels import backends
from revkernels.autograd.fused import fusion
from revkernels.autograd.fused.coupled_norm import entry_of
from revkernels.autograd.fused.keywords import keywords_of, passes_keywords
from revkernels.autograd.fused.known_layers import NORM_LAYERS, Fusable, fusable_at, has_hooks, hooked, is_sequential
from revkernels.autograd.fused.norm_context import Within, ambient
from revkernels.autograd.half_step import HalfStep
from revkernels.autograd.state.plain_layers import plain

__all__ = ["BranchFusion", "Explanation", "FusedSequential", "norms_by"]


#: The backend that each module last ran with.
_used: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@plain
class FusedSequential(nn.Sequential):
    """A `torch.nn.Sequential` in which a norm and the following activation are one kernel, forward and backward.

    The same layers under the same names ("0", "1", ...), so that state dicts load both ways, and the same results up to
    rounding. A norm with hooks, parametrisations or sharded parameters runs unfused, as do all norms under
    torch.compile (which fuses by itself), in torch.func transforms, and under backend "eager".

    Supported are BatchNorm1d to 3d, LayerNorm and RMSNorm of one dimension, and GroupNorm; ReLU, GELU and SiLU. Under
    autocast a norm before a convolution or a linear layer writes the narrow type that this layer would cast it to.

    A call's keyword goes to the layers whose ``forward`` names it; if none does, to the layers that take any keyword. A
    keyword that no layer takes raises TypeError.
    """

    @classmethod
    def from_sequential(cls, sequential: nn.Sequential) -> FusedSequential:
        """Return the same layers (not copies) in a `FusedSequential`.

        Raises:
            TypeError: ``sequential`` is not a Sequential, or has a forward of its own.
            ValueError: it has hooks, which would be lost.
        """
        if not is_sequential(sequential):
            raise TypeError(
                f"sequential is a {type(sequential).__name__}; it must be an nn.Sequential with that class's forward"
            )
        if has_hooks(sequential):
            raise ValueError("sequential has hooks, which would be lost: register them on the result instead")
        made = FusedSequential()
        for name, layer in sequential._modules.items():  # one layer may appear twice
            made.add_module(name, layer)
        made.training = sequential.training
        return made

    def forward(self, input: Any, **kwargs: Any) -> Any:
        """Run the layers."""
        layers = list(self._modules.values())
        if kwargs:
            self._refuse_unknown(kwargs)
        if torch.compiler.is_compiling() or not isinstance(input, torch.Tensor):
            return fusion.run(layers, input, None, kwargs)
        kernels = ambient.kernels
        if kernels is None:
            # Called in a backward outside any chain, it is a recompute (torch.utils.checkpoint) and must repeat the
            # forward.
            kernels = _used.get(self) if torch._C._current_graph_task_id() != -1 else None
            kernels = kernels or backends.select(input)
        _used[self] = kernels
        before, ambient.kernels = ambient.kernels, kernels
        try:
            return fusion.run(layers, input, None, kwargs)
        finally:  # no context: an interrupt as its exit begins would leave the kernels to all norms of this thread
            ambient.kernels = before

    forward.passes_keywords = True  # type: ignore[attr-defined]

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> FusedSequential: ...

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A layer; for a slice a `FusedSequential` of these layers under their names, whatever subclass this is."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        made = FusedSequential()
        for name, layer in list(self._modules.items())[index]:
            made.add_module(name, layer)
        return made

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        taken = keywords_of(self)
        unknown = set() if taken is None else set(kwargs) - taken
        if unknown:
            raise TypeError(f"no layer takes the keyword {', '.join(map(repr, sorted(unknown)))}")


def norms_by(backend: str | None, x: torch.Tensor) -> AbstractContextManager[None]:
    """``with norms_by(backend, x)``: the backend of the norms outside any chain, in a model with a backend option."""
    if backend is None or torch.compiler.is_compiling():
        return nullcontext()
    return Within(backends.select(x, backend), ambient.tape)


@dataclass(frozen=True)
class BranchFusion:
    """What is fused in one branch.

    Attributes:
        branch: its place and type.
        entry: the norm that is fused with the preceding coupling, or why there is none.
        fused: the norms, each with its activation, that are one kernel.
        unfused: the norms that run unfused, each with the reason.
    """

    branch: str
    entry: str
    fused: tuple[str, ...]
    unfused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [self.branch, f"  with the coupling: {self.entry}"]
        lines += [f"  fused: {layers}" for layers in self.fused]
        lines += [f"  not fused: {reason}" for reason in self.unfused]
        return "\n".join(lines)


class Explanation(list[BranchFusion]):
    """One `BranchFusion` per branch; prints as text."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def explain(branches: Iterable[tuple[str, Callable[..., Any]]], backend: str | None) -> Explanation:
    """Report what a chain with this backend fuses in each named branch, for plain tensors, without torch.compile."""
    return Explanation(_explain(name, branch, backend) for name, branch in branches)


def _explain(name: str, branch: Callable[..., Any], backend: str | None) -> BranchFusion:
    name = f"{name} ({type(branch).__name__})"
    if backend == "eager":
        return BranchFusion(name, "nothing: backend 'eager' runs every layer as it is", (), ())
    fused: list[str] = []
    unfused: list[str] = []
    if isinstance(branch, nn.Module):
        for place, found in _norms_in(branch, "", True):
            (fused if isinstance(found, Fusable) else unfused).append(f"{place}: {_words(found)}")
    return BranchFusion(name, _entry(branch), tuple(fused), tuple(unfused))


def _entry(branch: Callable[..., Any]) -> str:
    if not isinstance(branch, nn.Module):
        return "nothing: the branch is a plain callable"
    entry = entry_of(HalfStep(branch, 0, (1,)), None)
    if entry is not None:
        return _words(entry.fusable)
    if not isinstance(branch, nn.Sequential):
        return f"nothing: {type(branch).__name__} is not an nn.Sequential, so its first layer is not known"
    if not is_sequential(branch):
        return f"nothing: {type(branch).__name__} has a forward of its own"
    if hooked(branch):
        return "nothing: the branch has hooks or is compiled, and has to be called as a module"
    layers = list(branch)
    reason = fusable_at(layers, 0) if layers else "it has no layers"
    return f"nothing: {reason}"


def _norms_in(module: nn.Module, place: str, ours: bool) -> Iterator[tuple[str, Fusable | str]]:
    """The norms of a branch, as `fusion.run` meets them. ``ours``: the caller of the module is `fusion.run`."""
    plain = ours and is_sequential(module) and not hooked(module)
    taken_apart = plain or (isinstance(module, FusedSequential) and passes_keywords(module))
    layers = list(module._modules.items())
    for index, (name, layer) in enumerate(layers):
        if layer is None:
            continue
        here = f"{place}.{name}" if place else name
        if taken_apart and type(layer) in NORM_LAYERS:
            yield here, fusable_at([one for _, one in layers], index)  # type: ignore[misc]
        elif isinstance(layer, _NORMS) or ("Norm" in type(layer).__name__ and not isinstance(layer, nn.Sequential)):
            if taken_apart:
                yield here, f"{type(layer).__name__} is not a norm that the kernels support"
            else:
                yield (
                    here,
                    (
                        f"{type(layer).__name__} is called by {type(module).__name__}.forward itself (to fuse it, call "
                        f"revkernels.nn.NormAct there, or make {type(module).__name__} an nn.Sequential)"
                    ),
                )
        else:
            yield from _norms_in(layer, here, taken_apart)


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def _words(found: Fusable | str) -> str:
    if isinstance(found, str):
        return found
    norm = type(found.norm).__name__
    return norm if found.activation == "none" else f"{norm} + {found.activation}"
