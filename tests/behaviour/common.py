# SPDX-License-Identifier: Apache-2.0
"""The same network in plain PyTorch, and what it means that a reversible one does the same.

Nothing here uses the library's own store mode: `Plain` is written with torch calls alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.torch_version import TorchVersion  # noqa: E402

from revkernels import use_backend  # noqa: E402
from revkernels.models.layers import BasicBranch, BottleneckBranch  # noqa: E402
from revkernels.nn import PerBlock, ReversibleBlock, ReversibleSequential  # noqa: E402

WIDE = torch.float64
TOLERANCE = 1e-10


# ---- networks


class PlainBlock(nn.Module):
    def __init__(self, F, G):
        super().__init__()
        self.F, self.G = F, G


class Plain(nn.Module):
    """y1 = x1 + F(x2); y2 = x2 + G(y1), block after block, as torch stores it. Parameter names are the library's."""

    def __init__(self, pairs, split_dim=1):
        super().__init__()
        for index, (F, G) in enumerate(pairs):
            self.add_module(str(index), PlainBlock(F, G))
        self.split_dim = split_dim

    def forward(self, x, *args, **kwargs):
        with use_backend("eager"):  # the library's branches as plain layers too
            return self.plainly(x, *args, **kwargs)

    def plainly(self, x, *args, **kwargs):
        x1, x2 = x if isinstance(x, tuple) else x.chunk(2, self.split_dim)
        aux = []
        for index, block in enumerate(self.children()):
            here = [_at(value, index) for value in args], {name: _at(value, index) for name, value in kwargs.items()}
            x1 = x1 + _branch(block.F, x2, here, aux)
            x2 = x2 + _branch(block.G, x1, here, aux)
        y = (x1, x2) if isinstance(x, tuple) else torch.cat((x1, x2), self.split_dim)
        return (y, aux) if aux else y


def _at(value, index):
    return value.values[index] if isinstance(value, PerBlock) else value


def _branch(branch, x, call, aux):
    args, kwargs = call
    known = getattr(branch, "keywords", None)  # branches of tests that do not take every keyword say which they take
    f = branch(x, *args, **(kwargs if known is None else {k: v for k, v in kwargs.items() if k in known}))
    if isinstance(f, tuple):
        f, extra = f
        aux.append(extra)
    return f


def twins(pairs, split_dim=1, **options):
    """Return the reversible network on ``pairs`` and a plain one on copies of them (what is shared stays shared)."""
    plain = Plain(copy.deepcopy(pairs), split_dim)
    return ReversibleSequential([ReversibleBlock(F, G) for F, G in pairs], split_dim=split_dim, **options), plain


def mlp(width=4, hidden=6):
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)).to(WIDE)


def norm_mlp(width=4, p=0.0):
    return nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.Dropout(p)).to(WIDE)


def conv(channels=4):
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    ).to(WIDE)


def dropout_mlp(width=4, p=0.1):
    return nn.Sequential(nn.Linear(width, width), nn.Dropout(p), nn.Tanh()).to(WIDE)


def pairs_of(make, depth):
    return [(make(), make()) for _ in range(depth)]


def old_torch(what):
    """For what torch 2.6 gets wrong by itself, and later versions may too (nobody knows up to which)."""
    return pytest.mark.xfail(TorchVersion(torch.__version__) < "2.13", reason=f"torch 2.6: {what}", strict=False)


def rows(*shape, dtype=WIDE, requires_grad=True):
    return torch.randn(*(shape or (5, 8)), dtype=dtype).requires_grad_(requires_grad)


def images(n=2, c=8, h=5, w=6):
    return rows(n, c, h, w)


def tanh_norm_mlp(width=4):
    return nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, width)).to(WIDE)


@dataclass(frozen=True)
class Kind:
    """Residual functions of one kind, and inputs of the shape that they keep."""

    make: Callable[[], nn.Module]
    stream: tuple[int, ...]  # the shape of one stream

    def pairs(self, depth):
        return pairs_of(self.make, depth)

    def twins(self, depth, **options):
        return twins(self.pairs(depth), **options)

    def x(self, **options):
        n, width, *rest = self.stream
        return rows(n, 2 * width, *rest, **options)

    def pair(self, **options):
        return rows(*self.stream, **options), rows(*self.stream, **options)

    def within(self, wrap):
        """The same kind inside a module: ``wrap(branch)`` makes one."""
        return Kind(lambda: wrap(self.make()), self.stream)

    def with_dropout(self, p):
        return self.within(lambda branch: nn.Sequential(branch, nn.Dropout(p)))


#: Somebody's own modules, and the residual functions that this package has for its networks.
KINDS = {
    "mlp": Kind(tanh_norm_mlp, (6, 4)),
    "conv": Kind(conv, (2, 4, 5, 6)),
    "basic": Kind(lambda: BasicBranch(4, 4).to(WIDE), (2, 4, 5, 6)),
    "bottleneck": Kind(lambda: BottleneckBranch(4, 4).to(WIDE), (2, 4, 5, 6)),
}


# ---- one training step, and everything that it leaves behind


@dataclass
class Outcome:
    outputs: list[Any]
    inputs: list[Any]
    parameters: dict[str, Any]
    buffers: dict[str, Any] = field(default_factory=dict)
    generator: Any = None
    sides: list[Any] = field(default_factory=list)


def loss_of(outputs):
    """A loss that gives every element a gradient of its own."""
    total = 0.0
    for index, y in enumerate(tensors_in(outputs)):
        weights = torch.linspace(-1, 1.5 + index, max(y.numel(), 1), dtype=WIDE)[: y.numel()].reshape(y.shape)
        total = total + (y.to(WIDE) * weights).sum() + 0.5 * y.to(WIDE).square().sum()
    return total


def step(network, x, *args, seed=3, sides=(), **kwargs):
    """Forward and backward once from seed, and return what came of it. ``x`` and ``sides`` are copied."""
    torch.manual_seed(seed)
    leaves, x = fresh(x)
    copies = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in sides}
    args, kwargs = swap(list(args), copies), swap(kwargs, copies)
    network.zero_grad(set_to_none=True)
    outputs = network(x, *args, **kwargs)
    loss = loss_of(outputs)
    if loss.requires_grad:
        loss.backward()
    return gathered(network, outputs, leaves, copies.values())


def gathered(network, outputs, leaves, sides=()):
    return Outcome(
        outputs=[y.detach().clone() for y in tensors_in(outputs)],
        inputs=[leaf.grad for leaf in leaves],
        parameters={name: p.grad for name, p in network.named_parameters()},
        buffers={name: b.clone() for name, b in network.named_buffers()},
        generator=torch.get_rng_state(),
        sides=[side.grad for side in sides],
    )


def fresh(x):
    """Copies of the input with the same strides, as leaves of their own."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors_in(x)]
    return leaves, tuple(leaves) if isinstance(x, tuple) else leaves[0]


def swap(value, copies):
    if torch.is_tensor(value):
        return copies.get(id(value), value)
    if isinstance(value, PerBlock):
        return PerBlock([swap(item, copies) for item in value.values])
    if isinstance(value, dict):
        return {key: swap(item, copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(swap(item, copies) for item in value)
    return value


def tensors_in(value):
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_in(item)]
    return []


# ---- comparison


def relative_error(got, expected):
    difference = (got.detach().to(WIDE) - expected.detach().to(WIDE)).norm().item()
    size = expected.detach().to(WIDE).norm().item()
    return difference if size == 0 else difference / size


def assert_close(got, expected, tolerance=TOLERANCE, what="tensor"):
    if expected is None or got is None:
        assert got is None and expected is None, f"{what}: got {got}, expected {expected}"
        return
    assert got.dtype == expected.dtype, f"{what}: got {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: got {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(got, expected), f"{what}: got {got}, expected {expected}"
        return
    error = relative_error(got, expected)
    assert error < tolerance, f"{what}: relative error {error:.2g}, allowed {tolerance:.2g}"


def assert_all_close(got, expected, tolerance=TOLERANCE, what="tensors"):
    assert len(got) == len(expected), f"{what}: got {len(got)}, expected {len(expected)}"
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_close(a, b, tolerance, f"{what}[{index}]")


def assert_same(got, expected, tolerance=TOLERANCE):
    """Outputs, gradients of inputs, parameters and side inputs, buffers, and the generator's state."""
    assert_all_close(got.outputs, expected.outputs, tolerance, "outputs")
    assert_all_close(got.inputs, expected.inputs, tolerance, "input gradients")
    assert_all_close(got.sides, expected.sides, tolerance, "side input gradients")
    for what in ("parameters", "buffers"):
        ours, theirs = getattr(got, what), getattr(expected, what)
        assert ours.keys() == theirs.keys(), f"{what}: {sorted(ours)} against {sorted(theirs)}"
        for name in theirs:
            assert_close(ours[name], theirs[name], tolerance, name)
    assert torch.equal(got.generator, expected.generator), "the generator's state differs"


def check_step(net, plain, x, *args, steps=1, tolerance=TOLERANCE, sides=(), **kwargs):
    """Both networks take the same training steps and end the same."""
    for seed in range(steps):
        got = step(net, x, *args, seed=seed, sides=sides, **kwargs)
        expected = step(plain, x, *args, seed=seed, sides=sides, **kwargs)
        assert_same(got, expected, tolerance)
    return got


def assert_raises(error, parts, action):
    """``action()`` raises ``error`` and its message contains each of ``parts``. AssertionError otherwise."""
    try:
        action()
    except error as raised:
        message = str(raised)
        for part in parts:
            assert part in message, f"the message does not say {part!r}: {message}"
        return raised
    raise AssertionError(f"nothing was raised; expected {error} saying {parts}")


@contextmanager
def unwritten(network, *values):
    """Nothing is written inside: the bytes of ``values``, parameters, gradients, buffers and generator stay."""

    def watched():
        yield from tensors_in(list(values))
        for p in network.parameters():
            yield from (p,) if p.grad is None else (p, p.grad)
        yield from network.buffers()
        yield torch.get_rng_state()

    def state():
        tensors = [t.detach() for t in watched() if t.device.type != "meta"]
        return [(t.cpu().reshape(-1).view(torch.uint8).numpy().tobytes(), t._version) for t in tensors]

    before = state()
    yield
    assert state() == before, "something was written to"
