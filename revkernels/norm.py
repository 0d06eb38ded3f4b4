# SPDX-License-Identifier: Apache-2.0
"""Options of a normalisation with activation, and the statistics that it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

NormKind = Literal["batch", "layer", "rms", "group"]
ActivationName = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]
#: The norms, in the order of the C interface's revk_norm_kind.
KINDS: tuple[NormKind, ...] = get_args(NormKind)
#: The activations, in the order of the C interface's revk_activation.
ACTIVATIONS: tuple[ActivationName, ...] = get_args(ActivationName)

#: How a backward treats the sums, as in the C interface's revk_norm_sums.
SUMS_COMPUTED, SUMS_ONLY, SUMS_GIVEN = range(3)


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Options of `norm_act` and the related functions.

        xhat = (x - mean) * rstd      rstd = 1 / sqrt(variance + eps), the variance biased
        h    = activation(xhat * weight + bias)

    Every operation rounds in the compute type, float64 if x or f is float64, else float32; h is rounded once.

    Attributes:
        kind: which elements share statistics. "batch": a channel, over everything else. "layer": a position, over its
            channels. "rms": likewise, with mean 0 and the mean of x^2 as variance. "group": a sample (dimension 0) and
            a group of its channels.
        weight, bias: ``[channels]``, floating point and dense, of one dtype; None is 1 and 0.
        eps: added to the variance.
        activation: "none", "relu", "gelu" (z Phi(z)), "gelu_tanh" (its tanh approximation) or "silu".
        groups: number of groups of a group norm; must divide the number of channels.
        channel_dim: the channel dimension; None is 1 for "batch" and "group", -1 for "layer" and "rms".
        running_mean, running_var: ``[channels]``, floating point, dense, of one dtype; "batch" only. If statistics are
            computed, running <- (1 - momentum) * running + momentum * batch, with the unbiased variance (0 for one
            element per channel; for no elements both stay unchanged).
        momentum: see running_mean.
    """

    kind: NormKind
    weight: Any = None
    bias: Any = None
    eps: float = 1e-5
    activation: ActivationName = "none"
    groups: int = 1
    channel_dim: int | None = None
    running_mean: Any = None
    running_var: Any = None
    momentum: float = 0.1

    def channel_axis(self, rank: int) -> int:
        """Return the non-negative channel dimension of an array of that rank."""
        dim = self.channel_dim
        if dim is None:
            dim = 1 if self.kind in ("batch", "group") else -1
        return dim % rank if rank else 0

    def statistics_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of `Statistics` for an array of that shape: [channels], [samples, groups] or [positions]."""
        axis = self.channel_axis(len(shape))
        if self.kind == "batch":
            return (shape[axis],)
        if self.kind == "group":
            return (shape[0], self.groups)
        return (*shape[:axis], *shape[axis + 1 :])


class Statistics(NamedTuple):
    """What a norm computed: dense arrays of the compute type, of shape `Norm.statistics_shape`.

    Attributes:
        mean: mean of the elements that share statistics; None for an RMS norm.
        rstd: 1 / sqrt(variance + eps).
    """

    mean: Any
    rstd: Any
