# SPDX-License-Identifier: Apache-2.0
"""Random trees of modules as branches: `tree` makes the same one of the same random numbers."""

from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from behaviour.common import torch

CHANNELS = 4
SHAPES = {"rows": (5, CHANNELS), "tokens": (3, 3, CHANNELS), "images": (2, CHANNELS, 4, 3)}


class Of(nn.Module):
    """``function(x, *parts)``"""

    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x):
        return self.function(x, *self.parts)


class Average(nn.Module):
    """A buffer that the forward writes, in place or not, before or after it is read."""

    def __init__(self, part, after, replaced):
        super().__init__()
        self.part, self.after, self.replaced = part, after, replaced
        self.register_buffer("average", torch.ones(()))

    def update(self, f):
        if self.training and self.replaced:
            self.average = self.average * 0.9 + 0.1 * f.detach().abs().mean()
        elif self.training:
            self.average.lerp_(f.detach().abs().mean(), 0.1)

    def forward(self, x):
        f = self.part(x)
        if not self.after:
            self.update(f)
        scale = self.average.clone()
        if self.after:
            self.update(f)
        return f * scale


class Remembers(nn.Module):
    """A state that one call leaves for the next, in an attribute that is None at first."""

    def __init__(self, part):
        super().__init__()
        self.part, self.state = part, None

    def forward(self, x):
        f = self.part(x)
        before, self.state = self.state, f.detach().tanh()
        return f if before is None else f + 0.3 * before


def _no_grad(x, a, b):
    with torch.no_grad():
        gate = torch.tanh(a(x))
    return b(x) * gate


def _permuted(x):
    order = range(x.dim() - 1, -1, -1)
    return torch.tanh(x).permute(*order).contiguous().permute(*order)


CONTAINERS = {
    "sequential": (3, lambda rng, *parts: nn.Sequential(*parts[: rng.randint(1, 3)])),
    "residual": (1, lambda rng, a: Of(lambda x, a: x + a(x), a)),
    "gate": (2, lambda rng, a, b: Of(lambda x, a, b: a(x) * torch.sigmoid(b(x)), a, b)),
    "twice": (1, lambda rng, a: Of(lambda x, a: a(a(x)), a)),
    "route": (2, lambda rng, a, b: Of(lambda x, a, b: a(x) if x.detach().flatten()[0] > 0.1 else b(x), a, b)),
    "detached": (2, lambda rng, a, b: Of(lambda x, a, b: a(x.detach()) + b(x).detach(), a, b)),
    "no_grad": (2, lambda rng, a, b: Of(_no_grad, a, b)),
    "checkpoint": (1, lambda rng, a: Of(lambda x, a: checkpoint(a, x, use_reentrant=False), a)),
    "average": (1, lambda rng, a: Average(a, rng.random() < 0.5, rng.random() < 0.5)),
    "remembers": (1, lambda rng, a: Remembers(a)),
}
LAYOUTS = {
    "expanded": lambda x: x.mean(-1, keepdim=True).expand_as(x),
    "permuted": _permuted,
    "strided": lambda x: torch.stack((x, x * 2), -1)[..., 1],
    "in place": lambda x: (x * 1.5).mul_(0.9).relu_(),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "random rows": lambda x: x[torch.randperm(x.shape[0])],
    "split": lambda x: torch.cat((x[:, 1:].sin(), x[:, :1]), 1),
}


def along_the_channels(layer, shape, rows=False):
    """The layer on x with its channels last; ``rows``: with one dimension beside them, and two in a result."""

    def run(x, layer):
        h = x if shape != "images" else x.movedim(1, -1)
        f = layer(h.reshape(1, -1, CHANNELS) if rows else h)
        f = (f[0] if type(f) is tuple else f).reshape(h.shape)
        return f if shape != "images" else f.movedim(-1, 1)

    return Of(run, layer)


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


def leaf(rng, shape):
    kind = rng.choice(["layer"] * 3 + ["norm"] * 4 + ["activation"] * 3 + ["dropout", "layout", "mlp", "others"])
    if kind == "norm":
        return norm(rng, shape)
    if kind == "activation":
        return rng.choice([nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.PReLU, nn.Hardswish, nn.Mish])()
    if kind == "dropout":
        return rng.choice([nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout])(0.3)
    if kind == "layout":
        return Of(LAYOUTS[rng.choice(sorted(LAYOUTS))])
    if kind == "mlp":
        inplace = nn.ReLU(inplace=rng.random() < 0.5)
        return nn.Sequential(norm(rng, shape), rng.choice([inplace, nn.GELU()]), layer(rng, shape))
    return along_the_channels(*rng.choice([
        (nn.GRU(CHANNELS, CHANNELS, 2, batch_first=True, dropout=0.2), shape, True),
        (nn.LSTM(CHANNELS, CHANNELS, batch_first=True), shape, True),
        (Attention(CHANNELS, 2, dropout=0.2, batch_first=True), shape, True),
        (nn.TransformerEncoderLayer(CHANNELS, 2, 6, 0.1, batch_first=True), shape, True),
        (nn.Linear(CHANNELS, CHANNELS), shape),
    ]))  # fmt: skip


def layer(rng, shape):
    images = shape == "images"
    made = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) if images else nn.Linear(CHANNELS, CHANNELS)
    how = rng.choice([None, None, parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
    return made if how is None else how(made)


def norm(rng, shape):
    batch_norm = nn.BatchNorm2d if shape == "images" else nn.BatchNorm1d
    options = rng.choice([{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"momentum": 0.0}])
    made = rng.choice([
        *(batch_norm(CHANNELS, **options), nn.GroupNorm(2, CHANNELS), nn.LayerNorm(SHAPES[shape][-1])),
        *(nn.RMSNorm(SHAPES[shape][-1]), nn.InstanceNorm2d(CHANNELS, affine=True)),
    ])  # fmt: skip
    if isinstance(made, nn.InstanceNorm2d) and shape != "images":
        made = nn.LayerNorm(CHANNELS, bias=False)
    if shape == "tokens" and isinstance(made, nn.BatchNorm1d | nn.GroupNorm):
        return Of(lambda x, made: made(x.transpose(1, 2)).transpose(1, 2), made)
    return made


def tree(rng, depth, shape, known):
    """Some of them again: ``known`` has those that are there already."""
    if known and rng.random() < 0.08:
        return rng.choice(known)
    if depth == 0 or rng.random() < 0.15:
        made = leaf(rng, shape)
    else:
        count, make = CONTAINERS[rng.choice(["sequential"] * 8 + sorted(CONTAINERS))]
        made = make(rng, *(tree(rng, depth - 1, shape, known) for _ in range(count)))
    known.append(made)
    return made
