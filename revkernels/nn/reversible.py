# SPDX-License-Identifier: Apache-2.0
"""The reversible residual block, and the chain of such blocks, as torch modules."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast, overload

import torch
from torch import nn
from torch.fx import Proxy

from revkernels.autograd.driver_forward import Reversal
from revkernels.autograd.half_step import HalfStep, grouped
from revkernels.nn.arguments import route
from revkernels.nn.chain import advance, forward, input_on_grid, inverse
from revkernels.nn.fusion import Explanation, explain
from revkernels.nn.hooks import have_hooks
from revkernels.nn.kernels_of import rebuilds
from revkernels.nn.plan import Plan, plan_of
from revkernels.nn.streams import Streams
from revkernels.nn.with_options import OPTIONS, WithOptions, check_block
from revkernels.options import ActivationsOption, CouplingOption

_handed_over = threading.local()  # the Reversal passed to a block that is called through its hooks


class ReversibleBlock(WithOptions):
    """y1 = x1 + F(x2); y2 = x2 + G(y1)   (Gomez et al. 2017, eq. 6).

    With more branches it couples as many streams: y1 = x1 + F(x2 + x3 + ...); y2 = x2 + G(y1); y3 = x3 + H(y2) ... (Li
    et al. 2021, Training Graph Neural Networks with 1000 Layers, grouped reversible connections).

    F and G are modules, or any callables, that preserve the shape of their input (stride 1). They are kept by reference
    and called as ``F(x, *args, **kwargs)``; each may return ``f``, or ``(f, aux)`` with any object as aux.

    F and G must not write to their input (such as ReLU(inplace=True) as the first layer): the stream is still needed.
    This raises an error, but a pair passed in by the caller has been written by then, as in plain torch.

    Forward hooks of F and G fire again in the recompute (`is_recomputing` tells it apart), those of a block do not: it
    is not recomputed as a whole. Backward hooks fire once. What a plain callable reads is watched as far as visible:
    the modules it is bound to, closes over, or has as arguments; not those it finds in globals.

    Called alone it works like a `ReversibleSequential` of one block, with its own options; inside one, the chain's
    options apply.

    Args:
        F, G, *more: the residual functions, one per stream. Those after G are the attributes branch2, branch3 ...
        split_dim: the dimension along which a single tensor is split into streams.
        activations: "reconstruct" reconstructs the input from the output in the backward; "store" stores activations; a
            `revkernels.MemoryBudget` stores what saves most time within a peak of memory, and reconstructs the rest.
        coupling: "float"; or "exact", whose streams are reconstructed bit for bit at any depth: see `revkernels.Exact`.
        backend: "cpu", "cuda", "triton", "eager", "reference", or None for the best on the input's device.

    Raises:
        TypeError: a branch is not callable.
        ValueError: an option is unknown.
        BackendError: (a ValueError) the backend cannot run here.
    """

    def __init__(
        self,
        F: Callable[..., Any],
        G: Callable[..., Any],
        *more: Callable[..., Any],
        split_dim: int = 1,
        activations: ActivationsOption = "reconstruct",
        coupling: CouplingOption = "float",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        names = ("F", "G", *(f"branch{index}" for index in range(2, 2 + len(more))))
        for name, branch in zip(names, (F, G, *more), strict=True):
            if not callable(branch):
                raise TypeError(f"{name} is a {type(branch).__name__}; it must be an nn.Module or another callable")
            if isinstance(branch, type):
                raise TypeError(
                    f"{name} is the class {branch.__name__}; it must be an instance: {branch.__name__}(...)"
                )
        self.branch_names = names
        for name, branch in zip(names, (F, G, *more), strict=True):
            setattr(self, name, branch)
        self._set_options(split_dim, activations, coupling, backend)  # now, for the grid is where the branches are

    #: A call whose input is exactly a linked module's output continues its chain: see `revkernels.nn.linked`.
    linked = False

    @property
    def branches(self) -> tuple[Callable[..., Any], ...]:
        """F, G and the branches after them: one per stream."""
        modules: dict[str, Any] = self._modules  # looked up here first: nn.Module's own lookup is slow
        return tuple([modules[name] if name in modules else getattr(self, name) for name in self.branch_names])

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Map x (split along ``split_dim``) or (x1, x2, ...) to y or (y1, y2, ...), or to (y, [aux, ...])."""
        reversal, half_steps = getattr(_handed_over, "to", {}).pop(id(self), (None, None))
        if reversal is None:
            return _run(self, {"": self}, x, args, kwargs)
        reversal.adopt((x, *args), "a block")
        advance(reversal, half_steps, shown=True)
        return reversal.show()

    def inverse(self, y: Streams, *args: Any, **kwargs: Any) -> Streams:
        """x2 = y2 - G(y1); x1 = y1 - F(x2)   (eq. 7). See `ReversibleSequential.inverse`."""
        return _run_inverse(self, [self], y, args, kwargs)

    def to_grid(self, x: Streams) -> Streams:
        """See `ReversibleSequential.to_grid`."""
        return input_on_grid(self, x, len(self.branch_names))

    def explain(self) -> Explanation:
        """Report for every branch which norms and activations are fused, and why others are not."""
        return explain(_named_branches("", [self]), self.backend)

    def plan(self, x: Any = None, *args: Any, **kwargs: Any) -> Plan:
        """See `ReversibleSequential.plan`."""
        return plan_of(self, self.activations, x, args, kwargs)

    def extra_repr(self) -> str:
        """The options that are not defaults; inside a chain a block's options are not used."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return ", ".join(f"{name}={value!r}" for name, value in options.items() if value != OPTIONS[name])


class ReversibleSequential(WithOptions):
    """A chain of reversible blocks, whose activation memory does not grow with its depth.

        net = ReversibleSequential(ReversibleBlock(F, G), ReversibleBlock(F, G), ...)
        y = net(x)                  # x is halved along split_dim, y is joined again
        y1, y2 = net((x1, x2))      # a pair in, a pair out: nothing is copied
        x = net.inverse(y)

    With ``activations="reconstruct"`` the backward reconstructs each block's input from its output (Algorithm 1), at
    the cost of one extra forward of each branch. Gradients, running statistics, random numbers and autocast are those
    of the same network with stored activations. Extra arguments reach the branches: positional ones all of them,
    keywords those that take them; wrap an argument in `PerBlock` to give each block its own. If a branch returns (f,
    aux), the call returns (y, [aux, ...]) in the order of the calls.

    Args:
        *blocks: `ReversibleBlock`s, or one iterable of them. No blocks are the identity.
        split_dim, activations, coupling, backend: see `ReversibleBlock`.

    Raises:
        TypeError: a block is no `ReversibleBlock`; in the call, x is neither a floating-point tensor nor a pair of
            them, or no branch takes a keyword.
        ValueError: an option is unknown, or blocks do not fit each other; in the call, a size cannot be split into the
            streams, streams are unequal, or a branch changes the shape.
        BackendError: (a ValueError) the backend cannot run here.
        ReconstructionError: in the call or its backward, something that the backward needs was changed, or a branch
            does not do the same twice.
    """

    def __init__(
        self,
        *blocks: Any,
        split_dim: int = 1,
        activations: ActivationsOption = "reconstruct",
        coupling: CouplingOption = "float",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if len(blocks) == 1 and isinstance(blocks[0], Iterable) and not isinstance(blocks[0], ReversibleSequential):
            blocks = tuple(blocks[0])
        self._set_options(split_dim, activations, coupling, backend)
        self.extend(blocks)

    linked = False  # as in `ReversibleBlock`

    def append(self, block: ReversibleBlock) -> ReversibleSequential:
        """Add a block at the end. Returns the chain."""
        return self.extend([block])

    def extend(self, blocks: Iterable[ReversibleBlock]) -> ReversibleSequential:
        """Add blocks at the end. Returns the chain."""
        blocks = list(blocks)
        known = [*self, *blocks]
        for index, block in enumerate(blocks, len(self)):
            self._check(block, index, known[0])
        for block in blocks:
            self.add_module(str(len(self)), block)
        return self

    def insert(self, index: int, block: ReversibleBlock) -> ReversibleSequential:
        """Add a block before the one at ``index``. Returns the chain."""
        blocks = list(self)
        at = slice(index, None).indices(len(blocks))[0]
        self._check(block, at, blocks[0] if blocks else block)
        self._renumber([*blocks[:at], block, *blocks[at:]])
        return self

    def __delitem__(self, index: int | slice) -> None:
        """Remove one block, or those of a slice."""
        blocks = list(self)
        del blocks[index]
        self._renumber(blocks)

    def _renumber(self, blocks: list[ReversibleBlock]) -> None:
        """Hold these blocks under the names "0", "1", ..., as an `nn.Sequential` would: `extend` counts on them."""
        self._modules.clear()
        self._modules.update((str(number), block) for number, block in enumerate(blocks))

    def __setitem__(self, index: int, block: ReversibleBlock) -> None:
        """Replace a block."""
        name = list(self._modules)[index]
        self._check(block, int(name), next((other for at, other in self._modules.items() if at != name), block))
        setattr(self, name, block)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and not isinstance(value, ReversibleBlock):
            raise TypeError(f"{name} is a {type(value).__name__}; a chain holds ReversibleBlocks alone")
        super().__setattr__(name, value)

    def _check(self, block: Any, index: int, first: Any) -> None:
        """Check that the block may be in this chain, next to ``first``."""
        if not isinstance(block, ReversibleBlock):
            raise TypeError(f"blocks[{index}] is a {type(block).__name__}; it must be a ReversibleBlock")
        if type(block).forward is not ReversibleBlock.forward:
            raise TypeError(
                f"blocks[{index}] is a {type(block).__name__} with a forward of its own, which a chain would never "
                f"call: it runs F and G itself. Put the change into F or G, or into forward hooks"
            )
        if len(block.branches) != len(first.branches):
            raise ValueError(
                f"blocks[{index}] couples {len(block.branches)} streams, blocks[0] couples "
                f"{len(first.branches)}: all blocks of a chain must have as many branches"
            )
        check_block(self, block, index)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[ReversibleBlock]:
        return iter(cast(Iterable[ReversibleBlock], self._modules.values()))

    @overload
    def __getitem__(self, index: int) -> ReversibleBlock: ...

    @overload
    def __getitem__(self, index: slice) -> ReversibleSequential: ...

    def __getitem__(self, index: int | slice) -> ReversibleBlock | ReversibleSequential:
        """Return one block, or a chain of the same blocks with the same options for a slice."""
        if not isinstance(index, slice):
            return list(self)[index]
        options = {name: getattr(self, name) for name in OPTIONS}
        return ReversibleSequential(list(self)[index], **options)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Map x (split along ``split_dim``) or (x1, x2, ...) to y or (y1, y2, ...), or to (y, [aux, ...])."""
        return _run(self, self._modules, x, args, kwargs)

    def inverse(self, y: Streams, *args: Any, **kwargs: Any) -> Streams:
        """Return the x that this chain maps to ``y``, up to rounding: x2 = y2 - G(y1); x1 = y1 - F(x2) for each block.

        With an exact coupling it is ``to_grid(x)``, bit for bit, for a y that the chain computed with its present
        exponent.

        Input and output are swapped with respect to `forward`, with the same arguments. Running statistics stay
        unchanged. Differentiable, with stored activations.
        """
        return _run_inverse(self, list(self), y, args, kwargs)

    def to_grid(self, x: Streams) -> Streams:
        """Return x (or the pair) as the chain sees it: with an exact coupling rounded to its grid, in float32.

            rint(x * 2^k) * 2^-k

        with the present exponent; if there is none yet, it is chosen from x, as in the forward. With coupling="float"
        it is x itself.
        """
        return input_on_grid(self, x, _groups(list(self), x))

    def explain(self) -> Explanation:
        """Report for every branch which norms and activations are fused, and why others are not."""
        return explain(_named_branches("block {}, ", self), self.backend)

    def plan(self, x: Any = None, *args: Any, **kwargs: Any) -> Plan:
        """What is stored under ``activations=MemoryBudget(...)``, and the time and peak of a step; prints as a table.

        Without an input: the plan of the last training step. With one, a few steps are run on it (the loss is the mean
        of squares), peak and time are measured, and everything that they changed is restored; ``args`` and ``kwargs``
        go to the call.

        Raises:
            ValueError: there is no memory budget, or an infinite one; no step has been measured yet; even
                reconstructing everything exceeds the budget; x is given under no_grad.
        """
        return plan_of(self, self.activations, x, args, kwargs)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in OPTIONS)


def _run(owner: Any, named: Mapping[str, Any], x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a chain, and of a block called alone."""
    if torch.compiler.is_dynamo_compiling() and rebuilds(owner):  # before the blocks are inspected
        from revkernels.autograd.compiling import untraced

        return untraced(_run, owner, named, x, args, kwargs)
    for given in itertools.chain(x if isinstance(x, (tuple, list)) else (x,), args, kwargs.values()):
        if isinstance(given, Proxy):
            return _symbolically(owner, given.tracer, x, args, kwargs)
    blocks = list(named.values())
    half_steps = _half_steps(blocks, args, kwargs)
    # A block called alone has already been called through its hooks.
    hooks = [has and block is not owner for has, block in zip(have_hooks(blocks), blocks, strict=True)]

    def through(reversal: Reversal) -> None:
        pending: list[HalfStep] = []
        for index, block in enumerate(blocks):
            if hooks[index]:
                advance(reversal, pending, shown=True)
                pending = []
                _call_through_hooks(reversal, block, half_steps[index], index)
            else:
                pending += half_steps[index]
        advance(reversal, pending, shown=True)

    flat = [half_step for of_block in half_steps for half_step in of_block]
    name, linked = _half_step_name(owner, blocks), owner.linked
    return forward(owner, x, _groups(blocks, x), flat, name, through if any(hooks) else None, linked)


def _symbolically(owner: Any, tracer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Trace with `torch.fx`: its graph calls the chain as a whole, like torch's own layers.

    A chain depends on more than a symbolic graph can express, and recorded in one it would store its activations."""
    path = "" if owner is tracer.root else tracer.path_of_module(owner)
    if not path:  # the traced root: args and kwargs are symbols too
        raise TypeError(
            f"torch.fx traces a {type(owner).__name__} by itself, and its graph calls it as a whole: trace a network "
            f"that holds it, such as nn.Sequential(chain), or take torch.export"
        )
    return tracer.create_proxy("call_module", path, (x, *args), kwargs)


def _run_inverse(
    owner: Any, blocks: Sequence[ReversibleBlock], y: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    flat = [half_step for of_block in _half_steps(blocks, args, kwargs) for half_step in of_block]
    return inverse(owner, y, _groups(blocks, y), flat, _half_step_name(owner, blocks))


def _groups(blocks: Sequence[ReversibleBlock], x: Any = None) -> int:
    if blocks:
        return len(blocks[0].branch_names)
    return max(2, len(x)) if isinstance(x, (tuple, list)) else 2  # without blocks, any number of streams


def _half_steps(
    blocks: Sequence[ReversibleBlock], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[list[HalfStep]]:
    places = grouped(_groups(blocks))
    return [
        [HalfStep(branch, *place, *call) for branch, place, call in zip(block.branches, places, of_block, strict=True)]
        for block, of_block in zip(blocks, route(blocks, args, kwargs), strict=True)
    ]


def _call_through_hooks(reversal: Reversal, block: ReversibleBlock, half_steps: Sequence[HalfStep], index: int) -> None:
    """Call the block as a module, so that its hooks fire, and let its forward advance our reversal."""
    if not hasattr(_handed_over, "to"):
        _handed_over.to = {}
    _handed_over.to[id(block)] = (reversal, half_steps)
    try:
        # As separate arguments: a full-backward hook looks for tensors among these only, not inside a tuple.
        streams = block(*reversal.show())
    finally:
        _handed_over.to.pop(id(block), None)
    reversal.adopt(streams, f"block {index}")


def _named_branches(prefix: str, blocks: Iterable[ReversibleBlock]) -> Iterator[tuple[str, Callable[..., Any]]]:
    for number, block in enumerate(blocks):
        for name, branch in zip(block.branch_names, block.branches, strict=True):
            yield f"{prefix.format(number)}{name}", branch


def _half_step_name(owner: Any, blocks: Sequence[ReversibleBlock]) -> Callable[[int], str]:
    def name(k: int) -> str:
        number, place = divmod(k, _groups(blocks))
        attribute = blocks[number].branch_names[place]
        kind = type(getattr(blocks[number], attribute)).__name__
        branch = f"branch {attribute.removeprefix('branch')} ({kind})"
        return branch if owner is blocks[0] else f"block {number}, {branch}"

    return name
