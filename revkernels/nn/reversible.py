# SPDX-License-Identifier: Apache-2.0
"""The reversible residual block and the chain of them, as torch modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

from revkernels import backends, eager
from revkernels.autograd.inverse import invert
from revkernels.autograd.reversal import Reversal
from revkernels.errors import ReconstructionError
from revkernels.nn.arguments import Call, PerBlock, route
from revkernels.nn.streams import check_options, dense, is_store, pair_of

_OPTIONS = ("split_dim", "activations", "coupling", "backend")
_handed_over = threading.local()  # the Reversal a chain hands to a block that it calls through the block's hooks


class ReversibleBlock(nn.Module):
    """y1 = x1 + F(x2); y2 = x2 + G(y1)   (Gomez et al. 2017, eq. 6).

    F and G are modules, or any callables, that keep the shape of what they are given (stride 1). They are kept by
    reference and called as ``F(x, *args, **kwargs)``; each may return ``f``, or ``(f, aux)`` with any object as aux.

    F and G must not write to what they are given (ReLU(inplace=True) first of all): it is the stream that is added to
    later. This is refused, but a pair that the caller passed in has been written by then, as in plain torch.

    Forward hooks of F and G fire again in the recompute (`is_recomputing` tells it apart), those of a block do not: it
    is not recomputed as a whole. Backward hooks fire once. What a plain callable reads is watched as far as it shows:
    the modules it is bound to, closes over, or has as arguments; not those it finds in globals.

    Called alone it works like a `ReversibleSequential` of one block, with the options given here; inside one, the
    chain's options hold.

    Args:
        F, G: the residual functions.
        split_dim: the dimension that a single tensor is halved along.
        activations: "reconstruct" rebuilds the input from the output in the backward; "store" keeps activations.
        coupling: "float".
        backend: "cpu", "cuda", "triton", "eager", "reference", or None for the best that the input's device has.

    Raises:
        TypeError: F or G is not callable.
        ValueError: an option is unknown; BackendError (a ValueError): the backend cannot run here.
    """

    def __init__(
        self,
        F: Callable[..., Any],
        G: Callable[..., Any],
        split_dim: int = 1,
        activations: str = "reconstruct",
        coupling: str = "float",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, branch in (("F", F), ("G", G)):
            if not callable(branch):
                raise TypeError(f"{name} is a {type(branch).__name__}; it must be an nn.Module or another callable")
        check_options(split_dim, activations, coupling, backend)
        self.F = F
        self.G = G
        self.split_dim = split_dim
        self.activations = activations
        self.coupling = coupling
        self.backend = backend

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Map x (halved along ``split_dim``) or (x1, x2) to y or (y1, y2), or to (y, [aux, ...])."""
        reversal, calls = getattr(_handed_over, "to", {}).pop(id(self), (None, None))
        if reversal is None:
            return _run(self, [self], x, args, kwargs)
        reversal.adopt((x, *args), "a block")
        _advance(reversal, self, calls, False)
        return reversal.target, reversal.source

    def inverse(self, y: Any, *args: Any, **kwargs: Any) -> Any:
        """x2 = y2 - G(y1); x1 = y1 - F(x2)   (eq. 7). See `ReversibleSequential.inverse`."""
        return _run_inverse(self, [self], y, args, kwargs)

    def extra_repr(self) -> str:
        return _options_of(self)


class ReversibleSequential(nn.Module):
    """A chain of reversible blocks, whose activation memory does not grow with its depth.

        net = ReversibleSequential(ReversibleBlock(F, G), ReversibleBlock(F, G), ...)
        y = net(x)                  # x is halved along split_dim, y is joined again
        y1, y2 = net((x1, x2))      # a pair goes in and a pair comes out: nothing is copied
        x = net.inverse(y)

    Under ``activations="reconstruct"`` the backward rebuilds each block's input from its output (Algorithm 1), at the
    price of one extra forward of each branch. Gradients, running statistics, random numbers and autocast are those of
    the same network with stored activations. Extra arguments reach the branches: positional ones all of them, keywords
    those that take them; wrap an argument in `PerBlock` to give each block its own. A branch that returns (f, aux)
    makes the call return (y, [aux, ...]) in the order of the calls.

    Args:
        *blocks: `ReversibleBlock`s, or one iterable of them. None at all is the identity.
        split_dim, activations, coupling, backend: see `ReversibleBlock`.

    Raises (in the call):
        TypeError: x is neither a floating-point tensor nor a pair of them; a keyword that no branch takes.
        ValueError: an odd size to halve, unequal halves, a branch that changes the shape.
        ReconstructionError: what a backward needs was changed, or a branch does not do the same twice.
    """

    def __init__(
        self,
        *blocks: Any,
        split_dim: int = 1,
        activations: str = "reconstruct",
        coupling: str = "float",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if len(blocks) == 1 and not isinstance(blocks[0], nn.Module) and isinstance(blocks[0], Iterable):
            blocks = tuple(blocks[0])
        for index, block in enumerate(blocks):
            if not isinstance(block, ReversibleBlock):
                raise TypeError(f"blocks[{index}] is a {type(block).__name__}; it must be a ReversibleBlock")
            if type(block).forward is not ReversibleBlock.forward:
                raise TypeError(
                    f"blocks[{index}] is a {type(block).__name__} with a forward of its own, which a chain would never "
                    f"call: it runs F and G itself. Put the change into F or G, or into forward hooks"
                )
        check_options(split_dim, activations, coupling, backend)
        for index, block in enumerate(blocks):
            self.add_module(str(index), block)
        self.split_dim = split_dim
        self.activations = activations
        self.coupling = coupling
        self.backend = backend

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[ReversibleBlock]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __getitem__(self, index: int | slice) -> Any:
        """Return one block, or a chain of the same blocks with the same options for a slice."""
        if not isinstance(index, slice):
            return list(self)[index]
        options = {name: getattr(self, name) for name in _OPTIONS}
        return ReversibleSequential(list(self)[index], **options)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Map x (halved along ``split_dim``) or (x1, x2) to y or (y1, y2), or to (y, [aux, ...])."""
        return _run(self, list(self), x, args, kwargs)

    def inverse(self, y: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the x that this chain maps to ``y``, up to rounding: x2 = y2 - G(y1); x1 = y1 - F(x2) for each block.

        Takes and returns what `forward` returns and takes, with the same arguments. Running statistics are left as
        they are. Differentiable, with stored activations.
        """
        return _run_inverse(self, list(self), y, args, kwargs)

    def extra_repr(self) -> str:
        return _options_of(self)


def _run(owner: Any, blocks: Sequence[ReversibleBlock], x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a chain, and of a block called alone."""
    (x1, x2), joined = pair_of(x, owner.split_dim, "x")
    calls = route(blocks, args, kwargs)
    if not blocks:
        return x
    keep = is_store(owner.activations)
    side_inputs = _by_name(args, kwargs)
    name = _half_step_name(owner, blocks)
    reversal = Reversal((dense(x1), dense(x2)), _kernels(owner, x1), keep, side_inputs, name)
    try:
        hooked = _hooked(blocks)
        for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
            if hooked[index]:
                _call_through_hooks(reversal, block, call, index)
            else:
                follows = index + 1 < len(blocks) and not hooked[index + 1]
                _advance(reversal, block, call, follows)
        aux, dim = reversal.aux, owner.split_dim
        y1, y2 = reversal.target, reversal.source
        if joined:
            y: Any = torch.cat((y1, y2), dim)
            reversal.finish((y,), lambda y: y.chunk(2, dim))
        else:
            y = (y1, y2)
            reversal.finish(y, lambda y1, y2: (y1, y2))
    except BaseException:
        reversal.release()
        raise
    return (y, aux) if aux else y


def _by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    named = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
    return {name: value.values if isinstance(value, PerBlock) else value for name, value in named.items()}


def _advance(reversal: Reversal, block: ReversibleBlock, calls: tuple[Call, Call], follows: bool) -> None:
    reversal.advance(block.F, *calls[0], read_next=True)
    reversal.advance(block.G, *calls[1], read_next=follows)


def _call_through_hooks(reversal: Reversal, block: ReversibleBlock, calls: tuple[Call, Call], index: int) -> None:
    """Call the block as a module, so that its hooks fire, and let its forward advance our reversal."""
    if not hasattr(_handed_over, "to"):
        _handed_over.to = {}
    _handed_over.to[id(block)] = (reversal, calls)
    try:
        # As two arguments: a full-backward hook looks for tensors among these only, not inside a tuple.
        streams = block(reversal.target, reversal.source)
    finally:
        _handed_over.to.pop(id(block), None)
    reversal.adopt(streams, f"block {index}")


def _run_inverse(
    owner: Any, blocks: Sequence[ReversibleBlock], y: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    (y1, y2), joined = pair_of(y, owner.split_dim, "y")
    calls = route(blocks, args, kwargs)
    if not blocks:
        return y
    half_steps = [
        (branch, call)
        for block, pair in zip(blocks, calls, strict=True)
        for branch, call in zip((block.F, block.G), pair, strict=True)
    ]
    x1, x2 = invert((dense(y1), dense(y2)), half_steps, _kernels(owner, y1), _half_step_name(owner, blocks))
    return torch.cat((x1, x2), owner.split_dim) if joined else (x1, x2)


def _kernels(owner: Any, x: torch.Tensor) -> Any:
    # Tensor subclasses, and tensors inside torch.func, have no memory that a kernel could be given.
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        if owner.activations == "reconstruct":
            raise ReconstructionError(
                "torch.func transforms cannot run a reversible backward: set activations='store' for them "
                "(torch.func.functional_call alone needs nothing)"
            )
        return eager
    if owner.backend is None and type(x) not in (torch.Tensor, nn.Parameter):
        return eager
    return backends.select(x, owner.backend)


def _half_step_name(owner: Any, blocks: Sequence[ReversibleBlock]) -> Callable[[int], str]:
    def name(k: int) -> str:
        branch = "FG"[k % 2]
        kind = type(getattr(blocks[k // 2], branch)).__name__
        return f"block {k // 2}, branch {branch} ({kind})" if owner is not blocks[0] else f"branch {branch} ({kind})"

    return name


def _hooked(blocks: Sequence[nn.Module]) -> list[bool]:
    everywhere = _torch_module._has_any_global_hook()
    return [
        bool(
            everywhere
            or block._forward_hooks
            or block._forward_pre_hooks
            or block._backward_hooks
            or block._backward_pre_hooks
        )
        for block in blocks
    ]


def _options_of(owner: Any) -> str:
    return ", ".join(f"{name}={getattr(owner, name)!r}" for name in _OPTIONS)
