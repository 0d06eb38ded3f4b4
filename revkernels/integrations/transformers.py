# SPDX-License-Identifier: Apache-2.0
"""Runs Hugging Face's Reformer (``transformers``) on this package's driver.

    from revkernels.integrations import transformers
    transformers.replace(model)             # a ReformerModel, or a model that contains one

The original is Kitaev, Kaiser, Levskaya 2020, "Reformer: The Efficient Transformer", section 3: the layers

    attn_output = attn_output + attention(hidden_states)
    hidden_states = hidden_states + feed_forward(attn_output)

in an ``autograd.Function`` that runs them backwards from seeds. Here their layers are called like plain layers, by
their own code, and the recompute is this package's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from revkernels.integrations._swap import Replaced, Swapped, needs, own
from revkernels.integrations._swap import replace as _replace
from revkernels.nn import linked
from revkernels.nn.chain import HalfStep
from revkernels.options import Activations

__all__ = ["replace"]

_local = threading.local()  # .hashes: the record of the attention that runs in this thread

_CACHE_NOTE = (
    "config.use_cache is True: while training give use_cache=False, or the model returns, and so keeps, the hidden "
    "states of every layer"
)


def replace(model: Any, *, activations: Activations = "reconstruct", backend: str | None = None) -> Replaced:
    """Run every Reformer in the model on this package's driver.

    Outputs are those of the package's own layers; gradients are those of its layers with stored activations, including
    dropout, the forward's buckets, autocast, ``num_hashes`` and eval mode. The model's other outputs
    (``hidden_states``, ``attentions``) have gradients too. LSH layers keep their buckets, batch * heads * hashes *
    length integers of 32 bits, because a reconstructed stream may fall into another bucket; all other memory is
    independent of depth.

    Unlike in the original, torch's generator is not reseeded by every layer: ``torch.manual_seed`` makes a run
    repeatable. (A config with a ``hash_seed`` still reseeds it when hashing.)

    Args:
        model: any nn.Module that contains a ``ReformerModel`` or ``ReformerEncoder``.
        activations: "reconstruct", or "store": plain activations, for comparison.
        backend: of the couplings; None takes the best on the tensors' device.

    Raises:
        MissingPackageError: transformers is not installed.
        ValueError: the model has no Reformer layer, or an encoder that this release of transformers has changed.
    """
    theirs = needs("transformers.models.reformer.modeling_reformer", "transformers")
    kinds: dict[type, tuple[type, str, tuple[str, ...]]] = {
        theirs.ReformerEncoder: (Encoder, "an encoder whose layers are plain layers", ("forward",)),
        theirs.ReformerLayer: (Layer, "a layer on the driver of revkernels", ("forward",)),
        theirs.LSHSelfAttention: (Hashing, "attention that comes back to its buckets", ("forward", "_hash_vectors")),
    }

    def look(module: nn.Module) -> tuple[type | None, str] | None:
        for kind, (way, text, methods) in kinds.items():
            if isinstance(module, kind):
                changed = own(module, kind, *methods)
                if changed:  # it cannot be left: its layers, or its encoder, would not match
                    raise ValueError(f"nothing was changed in this {type(model).__name__}: {changed}")
                return way, text
        return None

    if not hasattr(theirs, "ReformerDynamicCache"):
        raise ValueError("this release of transformers is too old: 4.57 is the first that is known to work")
    for kind, name in ((theirs.ReformerEncoder, _Plainly.name), (theirs.LSHSelfAttention, _ReverseSort.name)):
        if name not in kind.forward.__code__.co_names:
            raise ValueError(
                f"this release of transformers has a {kind.__name__} that does not use {name}, which would be replaced"
            )
    configs = [getattr(module, "config", None) for module in getattr(model, "modules", list)()]
    notes = [_CACHE_NOTE] if any(getattr(config, "use_cache", False) for config in configs) else []
    options = {"activations": activations, "backend": backend}
    return _replace(model, "transformers", look, "a ReformerEncoder with its ReformerLayers", Layer, options, notes)


class Encoder(Swapped):
    """Replaces a ``ReformerEncoder``: its layers are called one by one, in the graph."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See ``ReformerEncoder``."""
        return _with(self.original.forward, _Plainly)(self, *args, **kwargs)


class Layer(Swapped):
    """Replaces a ``ReformerLayer``: two half-steps, which continue those of the previous layer."""

    attention: Any
    feed_forward: nn.Module

    def forward(self, prev_attn_output: torch.Tensor, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See ``ReformerLayer``; the arguments after the streams go to its attention."""
        half_steps = [
            HalfStep(_Attend(self.attention), 0, (1,), args, kwargs),
            HalfStep(self.feed_forward, 1, (0,)),
        ]
        streams, names = (prev_attn_output, hidden_states), ("attention", "feed_forward").__getitem__
        options = self.revkernels_options
        cache = kwargs.get("past_buckets_states")
        if cache is not None and len(cache) > self.attention.layer_id:
            options = {**options, "activations": "store"}  # the cache's present contents will not be there again
        y, aux = linked.run(half_steps, streams, 2, names, **options)
        return self._output(*y, *aux)

    def _output(self, attn_output: torch.Tensor, hidden_states: torch.Tensor, attended: Any) -> Any:
        output = self.original.forward.__globals__["ReformerOutput"]
        return output(
            attn_output=attn_output,
            hidden_states=hidden_states,
            attention_probs=attended.attention_probs,
            buckets=attended.buckets,
        )


class Hashing(Swapped):
    """Replaces an ``LSHSelfAttention``: a recompute uses the buckets of the first run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See ``LSHSelfAttention``."""
        return _with(self.original.forward, _ReverseSort)(self, *args, **kwargs)

    def _hash_vectors(self, *args: Any, **kwargs: Any) -> Any:
        buckets = super()._hash_vectors(*args, **kwargs)  # type: ignore[misc]
        hashes = getattr(_local, "hashes", None)
        return buckets if hashes is None else hashes.settle(buckets)


class _Attend:
    """An attention as a branch: the second call repeats the first, but does not use the cache."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention, self.hashes = attention, _Hashes()

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        if self.hashes.again():
            kwargs = {**kwargs, "past_buckets_states": None, "use_cache": False}
        outer, _local.hashes = getattr(_local, "hashes", None), self.hashes
        try:
            attended = self.attention(hidden_states, *args, **kwargs)
        finally:
            _local.hashes = outer
        return attended.hidden_states, attended._replace(hidden_states=None)


class _Hashes:
    """The buckets of one attention's first run, in the order of hashing."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []
        self.runs = 0

    def again(self) -> bool:
        """Start a run; return whether it is not the first."""
        self.runs, self.place = self.runs + 1, 0
        return self.runs > 1

    def settle(self, buckets: torch.Tensor) -> torch.Tensor:
        """Return the first run's buckets. Every run hashes, because hashing draws random numbers before dropout."""
        if self.runs == 1:
            if torch.is_grad_enabled():
                self.kept.append(buckets.to(torch.int32))
            return buckets
        self.place += 1
        return self.kept[self.place - 1].to(buckets.dtype)


class _Plainly:
    """``_ReversibleFunction.apply`` as what its forward does, within the graph."""

    name = "_ReversibleFunction"

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def apply(self, *args: Any) -> Any:
        nothing = SimpleNamespace(save_for_backward=lambda *tensors: None)
        return self.theirs.forward(nothing, *args)

    @classmethod
    def instead_of(cls, theirs: Any) -> Any:
        """The replacement."""
        return cls(theirs)


class _ReverseSort(torch.autograd.Function):
    """``ReverseSort`` that saves its index through autograd, so that it can be recomputed."""

    name = "ReverseSort"

    @staticmethod
    def forward(ctx: Any, out_vectors: Any, logits: Any, sorted_bucket_idx: Any, undo_sorted_bucket_idx: Any) -> Any:
        ctx.save_for_backward(sorted_bucket_idx)
        return _gather(out_vectors, undo_sorted_bucket_idx), _gather(logits, undo_sorted_bucket_idx)

    @classmethod
    def instead_of(cls, theirs: Any) -> Any:
        """The replacement."""
        return cls

    @staticmethod
    def backward(ctx: Any, d_out_vectors: Any, d_logits: Any) -> Any:
        (sorted_bucket_idx,) = ctx.saved_tensors
        return _gather(d_out_vectors, sorted_bucket_idx), _gather(d_logits, sorted_bucket_idx), None, None


def _gather(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values [batch, heads, length, ...] in the order of index [batch, heads, length]."""
    return values.gather(2, index.reshape(*index.shape, *(1,) * (values.dim() - 3)).expand(values.shape))


def _with(forward: Any, stand_in: Any) -> Callable[..., Any]:
    """``forward`` with the global named by ``stand_in`` replaced."""
    again = _made.get((forward, stand_in))
    if again is None:
        value = stand_in.instead_of(forward.__globals__[stand_in.name])
        again = _made[forward, stand_in] = FunctionType(
            forward.__code__.replace(),  # torch.compile distinguishes functions by their code
            {**forward.__globals__, stand_in.name: value},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        again.__kwdefaults__ = forward.__kwdefaults__
    return again


_made: dict[tuple[Any, Any], FunctionType] = {}
