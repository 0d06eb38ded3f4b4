# SPDX-License-Identifier: Apache-2.0
"""The networks of a random case, and what they are called with.

A branch is a layer, a norm, an activation and a peculiarity, on streams [N, C], [N, C, L], [N, C, H, W] or
[N, C, D, H, W]. Whatever a peculiarity does, plain torch can do as well: the same module stands in both networks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from behaviour.common import WIDE, PerBlock, Plain, torch, twins
from behaviour.common import _at as at
from behaviour.common import _branch as call_branch
from revkernels.models.layers import BasicBranch, BottleneckBranch
from revkernels.nn import ReversibleBlock, ReversibleSequential


class Branch(nn.Module):
    """f = peculiar(activation(norm(layer(x)))) of x's shape."""

    keywords = frozenset()

    def __init__(self, part, case):
        super().__init__()
        channels = case.shape()[1]
        self.kind, self.activation = part.peculiarity, part.activation
        self.layer = _layer(part, channels, case)
        self.norm = _norm(part.norm, case.shape())
        self.drop = nn.Dropout(0.4 if self.kind == "dropout" else 0.0)
        if self.kind == "spectral norm":
            nn.utils.parametrizations.spectral_norm(self.layer)
        if self.kind in ("writes a buffer", "no_grad part"):
            self.register_buffer("average", torch.ones(channels))
        if self.kind == "chain":
            inner = [(nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.2)), nn.Tanh()) for _ in range(2)]
            self.chain = twins(inner, backend=case.backend, activations=case.activations)[0]
        if self.kind == "module hooks":
            self.layer.register_forward_pre_hook(_sine)
            self.register_forward_hook(_double)
            self.layer.register_full_backward_hook(_halve)

    def body(self, x):
        f = self.norm(self.layer(x))
        f = {"tanh": torch.tanh, "gelu": functional.gelu, "relu in place": lambda f: f.mul(1.5).relu_()}[
            self.activation
        ](f)
        return self.drop(f)

    def forward(self, x, scale=None):
        f = self.peculiar(x)
        if scale is None:
            return f
        return (f[0] * scale, f[1]) if isinstance(f, tuple) else f * scale

    def peculiar(self, x):
        simple = _WITHOUT_BODY.get(self.kind)
        if simple is not None:
            return simple(x)
        if self.kind == "checkpoint":
            return checkpoint(self.body, x, use_reentrant=False)
        if self.kind == "reentrant checkpoint":
            return checkpoint(self.body, x, use_reentrant=True)
        if self.kind == "differentiates":
            graph = torch.is_grad_enabled() and x.requires_grad
            with torch.enable_grad():
                x = x if graph else x.detach().requires_grad_()
                return torch.autograd.grad(self.body(x).square().sum(), x, create_graph=True)[0]
        if self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.body(x).to(x.dtype)
        f = self.body(x)
        if self.kind == "gate":
            return f * torch.sigmoid(x)
        if self.kind == "auxiliary":
            return f, f.square().mean()
        if self.kind == "auxiliary dict":
            return f, {"mean": f.mean(), "all": [x.sin(), f.detach()]}
        if self.kind == "second output unused":
            return torch.stack((f, f * 3)).unbind()[0]
        if self.kind == "tensor hook" and f.requires_grad:
            f.register_hook(lambda gradient: gradient * 0.5)
        if self.kind == "chain":
            return sum(self.chain((x.movedim(1, -1), f.to(x.dtype).movedim(1, -1)))).movedim(-1, 1)
        if self.kind == "own generator":
            return f * torch.rand(f.shape[1:], generator=self.generator, dtype=WIDE).to(f.dtype)
        if self.kind == "no_grad part":
            with torch.no_grad():
                factor = self.body(x).mean()
            return f * factor
        if self.kind == "writes a buffer":
            with torch.no_grad():
                self.average.mul_(0.9).add_(0.1)
            return f * self.average.sum().to(f.dtype)
        return f.to(torch.bfloat16) if self.kind == "narrow" and f.dtype != WIDE else f


_WITHOUT_BODY = {
    "itself": lambda x: x,
    "constant": torch.ones_like,
    "a view": lambda x: x.unsqueeze(0).squeeze(0),
}


class Masked(Branch):
    keywords = frozenset(["mask"])

    def forward(self, x, scale=None, mask=None):
        f = super().forward(x, scale)
        return f if mask is None else f * mask


class Remembering(Branch):
    keywords = frozenset(["mask", "memory"])

    def forward(self, x, scale=None, *, memory=None, mask=None):
        if memory is not None:
            x = x + torch.tanh(memory)
        return super().forward(x, scale)


def _sine(module, inputs):
    return (torch.sin(inputs[0]),)


def _double(module, inputs, output):
    return output * 2


def _halve(module, grad_input, grad_output):
    return tuple(None if g is None else g * 0.5 for g in grad_input)


def _layer(part, channels, case):
    rank = case.rank
    library = {"basic": BasicBranch, "bottleneck": BottleneckBranch}.get(part.peculiarity)
    if library is not None and rank == 4:
        return library(channels, channels)
    # The gradient of a bias that a norm takes out again is zero but for roundings.
    bias = part.bias and part.norm in ("none", "batch eval", "layer") and not case.joint_layers
    if rank == 2:
        return nn.Linear(channels, channels, bias=bias)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 3](channels, channels, 3, padding=1, bias=bias)


def _norm(kind, shape):
    channels, rank = shape[1], len(shape)
    dimensions = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}[rank]
    batch_norm, instance_norm = (getattr(nn, name + dimensions) for name in ("BatchNorm", "InstanceNorm"))
    if rank == 2 and kind in ("instance", "tracked"):
        kind = "layer"
    if kind == "batch":
        return batch_norm(channels)
    if kind == "batch cumulative":
        return batch_norm(channels, momentum=None)
    if kind == "batch only":
        return batch_norm(channels, track_running_stats=False)
    if kind == "batch eval":
        norm = batch_norm(channels)
        norm.stays_in_eval = True
        return norm
    if kind == "group":
        return nn.GroupNorm(2 if channels * math.prod(shape[2:]) >= 8 else 1, channels)
    if kind == "layer":
        return nn.LayerNorm(shape[1:])
    if kind in ("instance", "tracked"):
        return instance_norm(channels, affine=kind == "instance", track_running_stats=kind == "tracked")
    return nn.Identity()


# ---- networks and what they are called with


def networks_of(case):
    """Return the reversible network and the plain one."""
    torch.manual_seed(case.number)
    classes = {"masked": Masked, "memory": Remembering}
    pairs = [tuple(classes.get(p.peculiarity, Branch)(p, case) for p in block) for block in case.blocks]
    count = len(pairs)
    for index in case.tied:
        if index < count:
            pairs[index] = (pairs[index][0],) * len(pairs[index])
    for index in case.joint_layers:
        if index < count:
            pairs[index][1].layer = pairs[index][0].layer
    for i, j in case.shared:
        if max(i, j) < count:
            pairs[i] = pairs[j]
    for index in case.frozen:
        if index // 2 < count:
            pairs[index // 2][index % 2].requires_grad_(False)
    net, plain = _twins(pairs, case)
    for network in (net, plain):
        network.train(case.training).to(case.dtype)
        for number, module in enumerate(network.modules()):
            if getattr(module, "kind", None) == "own generator":  # a generator cannot be copied
                module.generator = torch.Generator().manual_seed(number)
            if getattr(module, "kind", None) == "chain" and network is plain:
                module.chain = Plain([(block.F, block.G) for block in module.chain])
            if getattr(module, "stays_in_eval", False):
                module.eval()
    return net, plain


def branches_of(block):
    """A plain block's branches in order; one that is tied counts every time (`children` would name it once)."""
    return list(block._modules.values())


class Groups(Plain):
    """Three streams and more: y_0 = x_0 + B_0(x_1 + x_2 + ...), then y_i = x_i + B_i(y_{i-1}), block after block."""

    def __init__(self, blocks, split_dim):
        super().__init__([], split_dim)
        for index, branches in enumerate(blocks):
            names = ["F", "G", *(f"branch{i}" for i in range(2, len(branches)))]
            self.add_module(str(index), nn.ModuleDict(dict(zip(names, branches, strict=True))))

    def forward(self, x, *args, **kwargs):
        blocks, aux = list(self.children()), []
        s = list(x if isinstance(x, tuple) else x.chunk(len(blocks[0]), self.split_dim))
        for index, block in enumerate(blocks):
            here = [at(value, index) for value in args], {name: at(value, index) for name, value in kwargs.items()}
            for target, branch in enumerate(branches_of(block)):
                s[target] = s[target] + call_branch(branch, s[target - 1] if target else sum(s[1:]), here, aux)
        y = tuple(s) if isinstance(x, tuple) else torch.cat(s, self.split_dim)
        return (y, aux) if aux else y


def _twins(blocks, case):
    options = {"split_dim": case.split_dim, "backend": case.backend, "activations": case.activations}
    if case.groups() == 2:
        return twins(blocks, **options)
    plain = Groups(copy.deepcopy(blocks), case.split_dim)
    return ReversibleSequential([ReversibleBlock(*branches) for branches in blocks], **options), plain


@dataclass
class Given:
    """What one network is called with: leaves of its own, the input made of them, and the other arguments."""

    leaves: list
    x: object
    args: list
    kwargs: dict
    sides: list


def given(case, network, salt=0):
    """Fresh leaves, the same for every network and every time."""
    generator = torch.Generator().manual_seed(case.number + 1 + salt)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=WIDE).to(case.dtype)

    shape = list(case.shape())
    if case.pair:
        made = [_laid_out(shape, layout, normal) for layout in case.layouts()]
    else:
        shape[case.split_dim] *= case.groups()
        made = [_laid_out(shape, case.layouts()[0], normal)]
    leaves = [leaf.requires_grad_(wants) for (leaf, _), wants in zip(made, 2 * case.requires_grad, strict=False)]
    streams = [view(leaf) for leaf, (_, view) in zip(leaves, made, strict=True)]
    sides = []

    def side(kind, shape):
        def one():
            sides.append((0.5 + 0.3 * normal(*shape)).requires_grad_("learnt" in kind))
            return sides[-1]

        return PerBlock([one() for _ in case.blocks]) if "per block" in kind else one()

    channels = [case.shape()[1], *[1] * (case.rank - 2)]
    args = [side(case.positional, channels)] if case.positional != "none" else []
    kwargs = {}
    taken = {name for module in network.modules() for name in getattr(module, "keywords", ())}
    if case.mask != "none" and "mask" in taken:
        kwargs["mask"] = side(case.mask, channels)
    if case.memory != "none" and "memory" in taken:
        kwargs["memory"] = side(case.memory, case.shape())
    return Given(leaves, tuple(streams) if case.pair else streams[0], args, kwargs, sides)


def _laid_out(shape, layout, normal):
    """Return a leaf, and the function that makes a tensor of the shape of it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    if layout == "channels last" and last is not None:
        return normal(*shape).to(memory_format=last), lambda leaf: leaf
    if layout == "strided":
        return normal(*shape[:-1], 2 * shape[-1]), lambda leaf: leaf[..., ::2]
    if layout in ("transposed", "channels last"):
        return normal(*reversed(shape)), lambda leaf: leaf.permute(*range(len(shape) - 1, -1, -1))
    if layout == "expanded":
        return normal(1, *shape[1:]), lambda leaf: leaf.expand(shape)
    if layout == "offset":
        return normal(math.prod(shape) + 1), lambda leaf: leaf[1:].view(shape)
    return normal(*shape), lambda leaf: leaf
