"""Q-Former of InstructBLIP: learned queries read an image, told by the instruction what to look for.

B samples, Q queries, L instruction tokens, S image tokens, V vision width, H width. One layer:
  [q ; t] = SelfAttention([q ; t]);  q = CrossAttention(q, image) in every second layer;  q = FFN_q(q);  t = FFN_t(t)
In: image states [B, S, V], instruction ids and mask [B, L], L >= 0. Out: queries [B, Q, H].
Source: InstructBLIP [paper], to whose model in transformers it is numerically equal (tests/model/test_qformer.py).
Decision: text runs through every module even when L = 0, as an empty tensor. So ranks with and without instructions
gather the same parameters under ZeRO-3 (P5), and the same parameters get gradients.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from eventlens_ds.model.post_norm import INITIAL_STD, PostNormAttention, PostNormFFN, SelfInitialised


class QFormerLayer(GradientCheckpointingLayer):
    """One layer; vision_width None: without cross-attention. last: text that nobody reads any more is not computed."""

    def __init__(
        self,
        width: int,
        heads: int,
        intermediate: int,
        vision_width: int | None,
        *,
        last: bool,
        eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.last = last
        self.self_attention = PostNormAttention(width, heads, eps=eps, dropout=dropout)
        self.cross_attention = (
            None if vision_width is None else PostNormAttention(width, heads, vision_width, eps=eps, dropout=dropout)
        )
        self.query_ffn = PostNormFFN(width, intermediate, eps=eps, dropout=dropout)
        # Published weights have it in the last layer too, where no output depends on it.
        self.text_ffn = PostNormFFN(width, intermediate, eps=eps, dropout=dropout)

    def forward(
        self, queries_BQH: torch.Tensor, text_BLH: torch.Tensor, image_BSV: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """mask bool[B, 1, 1, Q + L], true where a token is seen -> (queries, text)"""
        both = torch.cat([queries_BQH, text_BLH], 1)
        both = self.self_attention(both, both, mask)
        queries_BQH, text_BLH = both.split([queries_BQH.shape[1], text_BLH.shape[1]], 1)
        if self.cross_attention is not None:
            queries_BQH = self.cross_attention(queries_BQH, image_BSV)
        return self.query_ffn(queries_BQH), text_BLH if self.last else self.text_ffn(text_BLH)


class QFormer(nn.Module, SelfInitialised):
    """Queries of an image under an instruction.

    LION: 32 queries and cross-attention in every second layer of BERT-base (width 768, 12 heads, intermediate 3072,
    12 layers, 512 positions), whose vocabulary gains "[DEC]" [released code]. dropout: 0 is [ours], BERT's own is 0.1.
    Raises ValueError for a width that the heads do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        intermediate: int,
        layers: int,
        *,
        vision_width: int,
        num_queries: int,
        vocabulary: int,
        positions: int = 512,
        cross_attention_frequency: int = 2,
        eps: float = 1e-12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        # With a leading one as in every published file: a map of names is then all that loading needs.
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, width))
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(
                width,
                heads,
                intermediate,
                None if index % cross_attention_frequency else vision_width,
                last=index == layers - 1,
                eps=eps,
                dropout=dropout,
            )
            for index in range(layers)
        )

    def initialise(self) -> None:
        """N(0, 0.02), as BERT, for queries and both embeddings [ours]; LION starts from published weights."""
        for parameter in (self.query_tokens, self.word_embeddings.weight, self.position_embeddings.weight):
            init.normal_(parameter, std=INITIAL_STD)

    def idle_parameters(self) -> list[str]:
        """Names of parameters that the output does not depend on: they are loaded and saved, and never get a gradient.
        For the caller that freezes them."""
        prefix = f"layers.{len(self.layers) - 1}.text_ffn."
        return [name for name, _ in self.named_parameters() if name.startswith(prefix)]

    def forward(
        self, image_states: torch.Tensor, instruction_ids: torch.Tensor, instruction_mask: torch.Tensor
    ) -> torch.Tensor:
        """image_states [B, S, V] after the tower's final norm; instruction_ids int64[B, L]; instruction_mask [B, L],
        zero at padding -> [B, Q, H].

        Raises ValueError for more instruction tokens than positions, and for another number of images than
        instructions.
        """
        batch, length = instruction_ids.shape
        # Attention would broadcast a single image without a word.
        if image_states.shape[0] != batch:
            raise ValueError(f"{image_states.shape[0]} images, {batch} instructions")
        if length > self.position_embeddings.num_embeddings:
            raise ValueError(f"{length} instruction tokens, {self.position_embeddings.num_embeddings} positions")
        num_queries = self.query_tokens.shape[1]
        positions = torch.arange(length, device=instruction_ids.device)
        text = self.word_embeddings(instruction_ids) + self.position_embeddings(positions)
        embedded = self.dropout(self.norm(torch.cat([self.query_tokens.expand(batch, -1, -1), text], 1)))
        queries, text = embedded.split([num_queries, length], 1)
        mask = None
        if length:
            seen = instruction_mask.new_ones(batch, num_queries)
            mask = torch.cat([seen, instruction_mask], 1).bool()[:, None, None]
        for layer in self.layers:
            queries, text = layer(queries, text, image_states, mask)
        return queries
