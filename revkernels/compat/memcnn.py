# SPDX-License-Identifier: Apache-2.0
"""MemCNN 1.5.2 on this package's driver: `InvertibleModuleWrapper` and the additive coupling.

The names, the signatures and the names in a ``state_dict`` are MemCNN's. Differences: the caller's input keeps its
memory, also under ``no_grad``; dropout masks are the same in the backward without ``preserve_rng_state``; running
statistics are updated once; hooks of the branches fire; branches run under autocast in the backward too;
``autograd.grad``, double backward and a second backward work; a parameter changed between forward and backward, or an
output changed in place, raises instead of corrupting the gradient. Tensors that are not leaves get no ``.grad``: call
``retain_grad()`` on them, as in plain torch.

There is no affine coupling, and no reconstruction through other invertible modules: these raise an error.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from revkernels.autograd.state.rewinding import Undo, put_back
from revkernels.autograd.state.snapshot import Snapshot
from revkernels.compat import UnsupportedError
from revkernels.compat._chains import kind_of
from revkernels.nn.chain import HalfStep, run

__all__ = [
    "AdditiveBlock",
    "AdditiveCoupling",
    "InvertibleModuleWrapper",
    "ReversibleBlock",
    "create_coupling",
    "is_invertible_module",
]

#: MemCNN's implementation numbers: stored; recomputed from the input; recomputed from the output.
_ACTIVATIONS = {-1: "store", 0: "reconstruct", 1: "reconstruct"}


class AdditiveCoupling(nn.Module):
    """y1 = x1 + Fm(x2); y2 = x2 + Gm(y1), with stored activations: `InvertibleModuleWrapper` saves them.

    Args:
        Fm, Gm: modules that preserve the shape of their input; Gm None is a deep copy of Fm.
        implementation_fwd, implementation_bwd: of `forward` and of `inverse`. -1 stores activations; 0 and 1
            (deprecated in MemCNN) reconstruct them.
        split_dim: the dimension along which the input is halved.

    Raises:
        UnsupportedError: another implementation than -1, 0 and 1.
    """

    def __init__(
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        implementation_fwd: int = -1,
        implementation_bwd: int = -1,
        split_dim: int = 1,
    ) -> None:
        super().__init__()
        for name, number in (("implementation_fwd", implementation_fwd), ("implementation_bwd", implementation_bwd)):
            if number not in _ACTIVATIONS:
                raise UnsupportedError(f"{name} is {number!r}; it must be -1, 0 or 1")
            if number != -1:
                warnings.warn(f"{name}={number} is deprecated in MemCNN", DeprecationWarning, stacklevel=2)
        self.Gm = copy.deepcopy(Fm) if Gm is None else Gm  # before Fm: the order of MemCNN's parameters
        self.Fm = Fm
        self.implementation_fwd = implementation_fwd
        self.implementation_bwd = implementation_bwd
        self.split_dim = split_dim

    def forward(self, x: torch.Tensor) -> Any:
        return _forward([self], x, _ACTIVATIONS[self.implementation_fwd])

    def inverse(self, y: torch.Tensor) -> Any:
        """x2 = y2 - Gm(y1); x1 = y1 - Fm(x2)."""
        return _inverse([self], y, _ACTIVATIONS[self.implementation_bwd])


class AdditiveBlock(AdditiveCoupling):
    """`AdditiveCoupling` that reconstructs activations; deprecated in MemCNN."""

    def __init__(
        self, Fm: nn.Module, Gm: nn.Module | None = None, implementation_fwd: int = 1, implementation_bwd: int = 1
    ) -> None:
        super().__init__(Fm, Gm, implementation_fwd, implementation_bwd)


class InvertibleModuleWrapper(nn.Module):
    """fn(x), with activations that the backward reconstructs from the output.

    A stack of wrappers keeps one output each. One wrapper around an ``nn.Sequential`` of couplings or of wrappers,
    which MemCNN does not support, takes the same memory at any depth. Hooks of ``fn`` itself do not fire (nor do they
    in MemCNN); those of Fm and Gm, and of the wrapper, do.

    Args:
        fn: an `AdditiveCoupling`, an ``nn.Sequential`` of them, or such a wrapper. Other modules with an ``inverse``
            run with ``disable=True`` only.
        keep_input, keep_input_inverse: accepted, not needed: no input is ever emptied.
        num_bwd_passes: accepted, not needed: a second backward takes ``retain_graph=True``, as in plain torch.
        disable: run ``fn(x)`` unchanged, with stored activations.
        preserve_rng_state: accepted, not needed: random numbers are always the same in the backward.

    Raises:
        TypeError: in the call, fn is not built of additive couplings and ``disable`` is False.
    """

    def __init__(
        self,
        fn: nn.Module,
        keep_input: bool = False,
        keep_input_inverse: bool = False,
        num_bwd_passes: int = 1,
        disable: bool = False,
        preserve_rng_state: bool = False,
    ) -> None:
        super().__init__()
        self.disable = disable
        self.keep_input = keep_input
        self.keep_input_inverse = keep_input_inverse
        self.num_bwd_passes = num_bwd_passes
        self.preserve_rng_state = preserve_rng_state
        self._fn: Any = fn

    def forward(self, *xin: torch.Tensor) -> Any:
        if self.disable:
            return _only(self._fn(*xin))
        return _forward(self._couplings(), _widened(xin), "reconstruct")

    def inverse(self, *yin: torch.Tensor) -> Any:
        """The x that `forward` maps to y; the backward reconstructs activations here too. Branches run as in a forward:
        running statistics are updated."""
        if self.disable and hasattr(self._fn, "inverse"):
            return _only(self._fn.inverse(*yin))
        return _inverse(self._couplings(), _widened(yin), "store" if self.disable else "reconstruct")

    def _couplings(self) -> list[AdditiveCoupling]:
        couplings = _couplings_of(self._fn)
        if couplings is None:
            raise TypeError(
                f"fn is a {kind_of(self._fn, AdditiveCoupling)}; it must be an AdditiveCoupling of {__name__}, an "
                f"nn.Sequential of them, or an InvertibleModuleWrapper of one of these (affine couplings and other "
                f"invertible modules cannot be reconstructed here: disable=True runs them with stored activations)"
            )
        return couplings


class ReversibleBlock(InvertibleModuleWrapper):
    """A wrapper and its coupling in one; deprecated in MemCNN. See `create_coupling` for the arguments."""

    def __init__(
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        coupling: str = "additive",
        keep_input: bool = False,
        keep_input_inverse: bool = False,
        implementation_fwd: int = -1,
        implementation_bwd: int = -1,
        adapter: Any = None,
    ) -> None:
        warnings.warn(
            "ReversibleBlock is deprecated in MemCNN: use InvertibleModuleWrapper", DeprecationWarning, stacklevel=2
        )
        fn = create_coupling(Fm, Gm, coupling, implementation_fwd, implementation_bwd, adapter)
        super().__init__(fn, keep_input=keep_input, keep_input_inverse=keep_input_inverse)


def create_coupling(
    Fm: nn.Module,
    Gm: nn.Module | None = None,
    coupling: str = "additive",
    implementation_fwd: int = -1,
    implementation_bwd: int = -1,
    adapter: Any = None,
) -> AdditiveCoupling:
    """Return the coupling of that name. ``adapter`` belongs to MemCNN's affine coupling and is ignored.

    Raises:
        UnsupportedError: coupling is not "additive".
    """
    if coupling != "additive":
        raise UnsupportedError(f"coupling is {coupling!r}; it must be 'additive', the only coupling there is here")
    return AdditiveCoupling(Fm, Gm, implementation_fwd, implementation_bwd)


def is_invertible_module(
    module_in: nn.Module,
    test_input_shape: Sequence[Any],
    test_input_dtype: torch.dtype = torch.float32,
    atol: float = 1e-6,
    random_seed: int = 42,
) -> bool:
    """Whether ``inverse`` inverts the module, and the module its ``inverse``, on random inputs in [0, 1).

    Works for any module with an ``inverse``. The caller's generators and the module's buffers stay unchanged.

    Args:
        test_input_shape: the shape of the input, or one for each input.
        atol: the largest difference allowed, besides 1e-5 relative (`torch.allclose`).

    Raises:
        ValueError: test_input_shape is neither a shape nor a sequence of shapes.
    """
    shapes = _shapes(test_input_shape)
    module: Any = module_in._fn if isinstance(module_in, InvertibleModuleWrapper) else module_in
    if _couplings_of(module) is not None:
        module = InvertibleModuleWrapper(module)  # a Sequential has no inverse of its own
    if not hasattr(module, "inverse"):
        return False
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    snapshot = Snapshot(module)
    with snapshot.turn:
        snapshot.take()
        undo: Undo = []
        try:
            snapshot.restore(undo)
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(random_seed)
                x = tuple(torch.rand(shape, dtype=test_input_dtype).to(device) for shape in shapes)
                y = _tuple(module(*x))
                rebuilt = _tuple(module.inverse(*y))
                again = _tuple(module(*rebuilt))
        finally:
            put_back(undo)
    if not (_close(rebuilt, x, atol) and _close(again, y, atol)):
        return False
    for what, given, made in (("forward", x, y), ("inverse", y, rebuilt)):
        if len({id(t) for t in given + made}) < len(given + made):
            warnings.warn(f"inputs and outputs of {what} share tensors", UserWarning, stacklevel=2)
    return True


def _couplings_of(fn: nn.Module) -> list[AdditiveCoupling] | None:
    """The couplings that ``fn`` consists of, or None if it is something else."""
    if isinstance(fn, AdditiveCoupling) and type(fn).forward is AdditiveCoupling.forward:
        return [fn]
    if isinstance(fn, InvertibleModuleWrapper) and type(fn).forward is InvertibleModuleWrapper.forward:
        return _couplings_of(fn._fn)
    if type(fn) is not nn.Sequential:
        return None
    found: list[AdditiveCoupling] = []
    for part in fn:
        couplings = _couplings_of(part)
        if couplings is None:
            return None
        found += couplings
    return found


def _forward(couplings: Sequence[AdditiveCoupling], x: Any, activations: str) -> Any:
    for split_dim, chain in groupby(couplings, lambda coupling: coupling.split_dim):
        half_steps = [step for c in chain for step in (HalfStep(c.Fm, 0, (1,)), HalfStep(c.Gm, 1, (0,)))]
        x = _run(half_steps, x, split_dim, activations, "", ("Fm", "Gm"))
    return x


def _inverse(couplings: Sequence[AdditiveCoupling], y: Any, activations: str) -> Any:
    """The reversed chain is a chain too: of branches with the opposite sign."""
    for split_dim, chain in groupby(reversed(couplings), lambda coupling: coupling.split_dim):
        half_steps = [
            step for c in chain for step in (HalfStep(_minus(c.Gm), 1, (0,)), HalfStep(_minus(c.Fm), 0, (1,)))
        ]
        y = _run(half_steps, y, split_dim, activations, " from the end", ("Gm", "Fm"))
    return y


def _run(half_steps: Sequence[HalfStep], x: Any, split_dim: int, activations: str, where: str, branches: Any) -> Any:
    def name(k: int) -> str:
        return f"coupling {k // 2}{where}, {branches[k % 2]}"

    return run(half_steps, x, name=name, split_dim=split_dim, activations=activations)


def _minus(branch: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: -branch(x)


def _widened(inputs: tuple[Any, ...]) -> Any:
    """The one input; under autocast a half type is widened to float32, as in MemCNN's documentation."""
    if len(inputs) != 1:
        raise TypeError(f"an additive coupling takes one tensor; it got {len(inputs)}")
    x = inputs[0]
    if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return x.float()
    return x


def _only(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple) and len(outputs) == 1 else outputs


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _close(got: tuple[Any, ...], expected: tuple[Any, ...], atol: float) -> bool:
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(got, expected, strict=False))


def _shapes(shape: Any) -> list[Any]:
    def is_shape(value: Any) -> bool:
        return isinstance(value, tuple | list) and all(type(size) is int for size in value)

    if is_shape(shape):
        return [shape]
    if isinstance(shape, tuple | list) and all(map(is_shape, shape)):
        return list(shape)
    raise ValueError(f"test_input_shape is {shape!r}; it must be a shape (a tuple of ints), or a tuple of shapes")
