# SPDX-License-Identifier: Apache-2.0
"""Networks of other packages before and after `revkernels.integrations`: peak memory and time of a training step.

    python -m benchmarks.bench_integrations
    python -m benchmarks.bench_integrations --packages pyg freia --depths 4 16 64 --repeat 5

Rows: the network with stored activations, with the memory-saving driver of its package if that has one, and on this
package's. A package that is not installed is a line that says so. Peak: bytes allocated during the step above those
before it (`revkernels.measure.peak_bytes`), gradients being there already. Time: the fastest of ``--repeat`` steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from revkernels.measure import peak_bytes

#: A variant's name, the network, and what it is called with.
Variant = tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]


def reformer(depth: int) -> Iterator[Variant]:
    import transformers as hf

    from revkernels.integrations import transformers

    hf.logging.set_verbosity_error()
    config = hf.ReformerConfig(
        attn_layers=["local", "lsh"] * (depth // 2) or ["local"],
        hidden_size=128,
        num_attention_heads=4,
        attention_head_size=32,
        feed_forward_size=256,
        axial_pos_shape=[16, 32],
        axial_pos_embds_dim=[64, 64],
        max_position_embeddings=512,
        num_buckets=16,
        num_hashes=2,
        lsh_attention_probs_dropout_prob=0.1,
        is_decoder=True,
        use_cache=False,
    )
    model = hf.ReformerModel(config)
    ids = torch.randint(3, 300, (2, 512))
    yield "its own driver", model, (ids,), {}
    transformers.replace(model)
    for layer in model.encoder.layers:  # what the driver would do with activations="store"
        layer.revkernels_options["activations"] = "store"
    del layer
    transformers_restored = model
    yield "revkernels", transformers_restored, (ids,), {}


class GNNBlock(nn.Module):
    def __init__(self, width: int) -> None:
        from torch_geometric.nn import SAGEConv

        super().__init__()
        self.norm, self.conv = nn.LayerNorm(width), SAGEConv(width, width)

    def forward(self, x: Any, edge_index: Any) -> Any:
        return self.conv(self.norm(x).relu(), edge_index)
