# SPDX-License-Identifier: Apache-2.0
"""Small Reformers, and the same with their layers called as plain torch calls layers."""

import copy

from behaviour.common import WIDE, rows, torch
from torch import nn

from integrations.common import package

hf = package("transformers")
hf.logging.set_verbosity_error()
from transformers.models.reformer import modeling_reformer as reformer  # noqa: E402

LENGTH, WIDTH, VOCABULARY = 32, 16, 20


def config(layers=("local", "lsh", "local", "lsh"), dropout=0.0, **options):
    return hf.ReformerConfig(
        **{
            "attn_layers": list(layers),
            "num_hidden_layers": len(layers),
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "attention_head_size": 8,
            "feed_forward_size": 24,
            "axial_pos_shape": [8, LENGTH // 8],
            "axial_pos_embds_dim": [8, 8],
            "max_position_embeddings": LENGTH,
            "lsh_attn_chunk_length": 8,
            "local_attn_chunk_length": 8,
            "num_buckets": 4,
            "num_hashes": 2,
            "hidden_dropout_prob": dropout,
            "lsh_attention_probs_dropout_prob": dropout,
            "local_attention_probs_dropout_prob": dropout,
            "vocab_size": VOCABULARY,
            "is_decoder": True,
            "use_cache": False,
            "pad_token_id": 0,
            "eos_token_id": 2,
            **options,
        }
    )


class Reformer(nn.Module):
    """A Reformer with a language model's head, called with embedded tokens."""

    def __init__(self, *args, **options):
        super().__init__()
        settings = config(*args, **options)
        head = hf.ReformerModelWithLMHead if settings.is_decoder else hf.ReformerForMaskedLM
        self.model = head(settings).to(WIDE)

    def forward(self, x, **kwargs):
        output = self.model(inputs_embeds=x, **kwargs)
        return [output.logits, list(output.hidden_states or ()), list(output.attentions or ())]


def x_of(n=2, **options):
    return rows(n, LENGTH, WIDTH, **options)


def plainly(network, before_attention=None, before_feed_forward=None):
    """A copy whose layers are called one after the other, with the activations stored.

    ``before_attention`` and ``before_feed_forward`` are called with a layer before its halves.
    """
    twin = copy.deepcopy(network)
    (encoder,) = [module for module in twin.modules() if isinstance(module, reformer.ReformerEncoder)]
    nothing = lambda layer: None  # noqa: E731
    before = before_attention or nothing, before_feed_forward or nothing

    def forward(
        hidden_states,
        output_hidden_states=False,
        use_cache=False,
        past_buckets_states=None,
        orig_sequence_length=None,
        **options,
    ):
        attn_output, states, attentions = hidden_states, [], []
        head_masks = options.pop("head_mask", None)  # of releases before 5
        for index, layer in enumerate(encoder.layers):
            if head_masks is not None:
                options["head_mask"] = head_masks[index]
            states.append(hidden_states)
            before[0](layer)
            attended = layer.attention(hidden_states, **options)
            attn_output = attn_output + attended.hidden_states
            before[1](layer)
            hidden_states = hidden_states + layer.feed_forward(attn_output)
            attentions.append(attended.attention_probs)
        y = encoder.layer_norm(torch.cat([attn_output, hidden_states], -1))
        y = nn.functional.dropout(y, encoder.dropout, encoder.training)
        states = [*states, hidden_states] if output_hidden_states else []
        return reformer.ReformerEncoderOutput(y, states, attentions if options["output_attentions"] else [], None)

    encoder.forward = forward
    return twin
