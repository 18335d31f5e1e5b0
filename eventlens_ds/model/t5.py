"""FLAN-T5 as the language model of a RegionVLM: packed rows, adapters beside every FFN, transformers' weights.

In: embeddings [T, D] of a packed row and its `Sequences`. Out: for every token of the row that the decoder reads, the
state [D] that predicts the next one. A block with adapters, of the encoder as of the decoder:
  x = x + SelfAttention(norm x);  decoder: x = x + CrossAttention(norm x, encoder)
  y = x + Dropout(FFN(norm x)) + A(u),  u = x ("residual", as LION) or norm x ("normed")
Attention runs sequence by sequence ("blocks"), or under 4-D masks over the whole row ("sdpa", the reference).
Decision: sequences of a row never see each other, so the cost is the sum of their squares; and T5's position bias
depends on distance alone, so one table as long as the longest sequence serves all of them, layers included, where a
masked row would hold heads x T x T numbers.
Importing this module registers "eventlens_t5" with transformers; no mask function goes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, T5Config, T5ForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

from eventlens_ds.data.records import Batch
from eventlens_ds.model.adapters import Routing
from eventlens_ds.model.attention import BLOCKS
from eventlens_ds.model.encoder_decoder import Sequences, Span, sequences, span_mask

T5_ATTENTION = "eventlens_t5"
"""The attn_implementation of both stacks."""


class T5(T5ForConditionalGeneration):
    """T5ForConditionalGeneration whose blocks have a place for adapters; names of parameters are transformers' own.

    transformers 5 ties the head of every T5 to its embeddings and keeps of the published setting only what it meant
    for the head's scale; T5 1.1 and FLAN-T5 have a head of their own, which this class leaves alone.
    Adapters are numbered through the encoder, then through the decoder.
    """

    def __init__(self, config: T5Config, source: str) -> None:
        self._tied_weights_keys = dict(T5ForConditionalGeneration._tied_weights_keys)
        if not config.scale_decoder_outputs:
            del self._tied_weights_keys["lm_head.weight"]
        super().__init__(config)
        number = 0
        for stack in (self.encoder, self.decoder):
            # Every attention of a stack reads this one object.
            stack.config._attn_implementation = T5_ATTENTION
            for i, block in enumerate(stack.block):
                stack.block[i] = AdaptedT5Block(block, number, source)
                number += 1

    def states(self, embeds_TD: torch.Tensor, batch: Batch, form: str, routing_of: RoutingOf) -> torch.Tensor:
        """States [T, D] of a row: at a token that the decoder reads, what predicts the next token; not-a-number at
        those of the encoder, which predict nothing.

        form: BLOCKS or sdpa. routing_of: task ids int64 of a token sequence -> its adapters, or None.
        """
        row = sequences(batch.parents, batch.bounds, batch.start_slots)
        device = embeds_TD.device
        encoder, decoder = (index.to(device, non_blocking=True) for index in (row.encoder, row.decoder))
        packing = _packing(row, form, device)
        encoded = self.encoder(
            inputs_embeds=embeds_TD[encoder][None],
            attention_mask=packing.encoder_mask,
            packing=packing,
            routing=routing_of(batch.task_ids[encoder]),
        ).last_hidden_state
        decoded = self.decoder(
            inputs_embeds=embeds_TD[decoder][None],
            attention_mask=packing.decoder_mask,
            encoder_hidden_states=encoded,
            encoder_attention_mask=packing.cross_mask,
            use_cache=False,
            packing=packing,
            routing=routing_of(batch.task_ids[decoder]),
        ).last_hidden_state[0]
        if self.config.scale_decoder_outputs:
            decoded = decoded * self.config.d_model**-0.5
        read = row.read.to(device, non_blocking=True)
        return torch.where((read >= 0)[:, None], decoded[read.clamp(min=0)], torch.nan)


RoutingOf = Callable[[torch.Tensor], Routing | None]


@dataclass(frozen=True)
class Packing:
    """How the tokens of a row see each other: spans (blocks) or masks bool[1, 1, queries, keys] (sdpa)."""

    spans: dict[str, tuple[Span, ...]] | None = None
    encoder_mask: torch.Tensor | None = None
    decoder_mask: torch.Tensor | None = None
    cross_mask: torch.Tensor | None = None


def _packing(row: Sequences, form: str, device: torch.device) -> Packing:
    if form == BLOCKS:
        spans = {"encoder": row.encoder_spans, "decoder": row.decoder_spans, "cross": row.cross_spans}
        return Packing(spans)
    encoded, decoded = len(row.encoder), len(row.decoder)
    masks = (
        span_mask(row.encoder_spans, encoded, encoded),
        span_mask(row.decoder_spans, decoded, decoded, causal=True),
        span_mask(row.cross_spans, decoded, encoded),
    )
    return Packing(None, *(mask.to(device, non_blocking=True) for mask in masks))


class AdaptedT5Block(GradientCheckpointingLayer):
    """A block of T5's encoder or decoder with a place for adapters at its FFN.

    It takes over the submodules of `block` under their own names, so checkpoints of T5 fit.
    """

    def __init__(self, block: Any, index: int, source: str) -> None:
        super().__init__()
        self.index, self.source = index, source
        self.is_decoder = block.is_decoder
        self.layer = block.layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_decoder_position_bias: torch.Tensor | None = None,
        packing: Packing | None = None,
        routing: Routing | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As T5Block. position_bias [1, heads, L, L] is the first block's and handed on by the stack."""
        spans = packing.spans if packing is not None else None
        own = spans["decoder" if self.is_decoder else "encoder"] if spans else None
        if own is not None and position_bias is None:
            position_bias = self._bias(max(span.q1 - span.q0 for span in own), hidden_states.device)
        hidden_states, position_bias, _ = self.layer[0](
            hidden_states, attention_mask=attention_mask, position_bias=position_bias, spans=own
        )
        cross_bias = encoder_decoder_position_bias
        if self.is_decoder:
            if spans is not None and cross_bias is None:
                # Cross-attention has no bias; T5Attention would make one of zeros as large as row times row.
                cross_bias = hidden_states.new_zeros(1)
            hidden_states, cross_bias, _ = self.layer[1](
                hidden_states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                position_bias=cross_bias,
                spans=spans["cross"] if spans else None,
            )
        return self._feed_forward(hidden_states, routing), position_bias, cross_bias

    def _bias(self, longest: int, device: torch.device) -> torch.Tensor:
        """Position bias [1, heads, L, L], in the decoder with nothing to see behind a token."""
        bias = self.layer[0].SelfAttention.compute_bias(longest, longest, device=device)
        if self.is_decoder:
            later = torch.ones(longest, longest, dtype=torch.bool, device=device).triu(1)
            bias = bias.masked_fill(later, torch.finfo(bias.dtype).min)
        return bias

    def _feed_forward(self, x: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        ffn = self.layer[-1]
        normed = ffn.layer_norm(x)
        out = x + ffn.dropout(ffn.DenseReluDense(normed))
        return out if routing is None else routing(self.index, x if self.source == "residual" else normed, out)


def t5_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    spans: tuple[Span, ...] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for T5: query [1, H, M, d], key and value [1, H, K, d] -> ([1, M, H, d], None).

    With spans each is computed alone, with the upper left corner of position_bias [1, H, L, L]; else the mask bool
    [1, 1, M, K] is taken. Raises ValueError without either: sequences would see each other.
    """
    if spans is None:
        if attention_mask is None:
            raise ValueError(f"{T5_ATTENTION} needs spans or a mask: the sequences of a row must not see each other")
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, position_bias=position_bias
        )
        return attended, None
    # Cross-attention has no bias and is handed a placeholder.
    bias = position_bias if position_bias is not None and position_bias.dim() == 4 else None
    outputs = []
    for q0, q1, k0, k1 in spans:
        corner = None if bias is None else bias[:, :, : q1 - q0, : k1 - k0].to(query.dtype)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], corner, dropout_p=dropout, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(T5_ATTENTION, t5_attention)
