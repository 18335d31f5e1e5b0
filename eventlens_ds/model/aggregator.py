"""Vision aggregator of LION: several depths of the vision tower in one grid, and the MLP to the language model.

N images, S = cls + P tokens, V vision width, D model width, h_k output of block k of the tower (0-based).
  X_0 = h[layers[0]];  X_i = Block_i(X_(i-1), KV = h[layers[i]]);  V = LN(X_n);  T = W_2 GELU(W_1 V)
LION: layers (38, 28, 18) of ViT-g/14, width 1408, 16 heads, intermediate 3072 [released code].
In: the hidden states of the tower. Out: [N, S, V], and T [N, S, D].
Decision: the aggregator keeps class token and width of the tower, so its output is one more level of hidden states,
and RoI-align and projectors read it as they read the tower's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from eventlens_ds.model.post_norm import BertLinear, PostNormAttention, PostNormFFN

NORM_EPS = 1e-5
"""Of the norm after the last block (`ln_adapter`); those inside the blocks have BERT's 1e-12 [released code]."""


class AggregatorBlock(GradientCheckpointingLayer):
    """A BERT layer with cross-attention: self-attention, cross-attention, FFN, no mask [released code].

    Every branch starts at zero, so a new block is LN(LN(LN(x))) = LN(x).
    """

    def __init__(self, width: int, heads: int, intermediate: int, *, eps: float = 1e-12, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attention = PostNormAttention(width, heads, eps=eps, dropout=dropout, zero_output=True)
        self.cross_attention = PostNormAttention(width, heads, eps=eps, dropout=dropout, zero_output=True)
        self.ffn = PostNormFFN(width, intermediate, eps=eps, dropout=dropout, zero_output=True)

    def forward(self, x_NSV: torch.Tensor, source_NSV: torch.Tensor) -> torch.Tensor:
        """x [N, S, V], source of keys and values [N, S', V] -> [N, S, V]"""
        x_NSV = self.self_attention(x_NSV, x_NSV)
        return self.ffn(self.cross_attention(x_NSV, source_NSV))


class VisionAggregator(nn.Module):
    """V = LN(X_n) of the file's formula [released code].

    layers: blocks of the tower, 0-based; the first is what is refined, each further one costs a block that reads it.
    eps: of the norms inside the blocks. dropout: 0 is ours; the released code leaves BERT's 0.1.
    Raises ValueError for no layer, for a negative one, and for a width that the heads do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        intermediate: int,
        layers: Sequence[int],
        eps: float = 1e-12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not layers or min(layers) < 0:
            raise ValueError(f"layers {list(layers)}: one or more blocks of the tower, counted from 0")
        self.layers = tuple(layers)
        self.blocks = nn.ModuleList(
            AggregatorBlock(width, heads, intermediate, eps=eps, dropout=dropout) for _ in self.layers[1:]
        )
        # Not BERT's: the released code has torch's default here.
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def select(self, hidden_states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """h[k] of every layer k, out of the tuple that transformers returns with output_hidden_states.

        hidden_states[0] is the embedding, so h[k], the output of block k, is hidden_states[k + 1]: of the 39 blocks
        of ViT-g, 38 is the last, and hidden_states[39]. The last entry of the tuple is the block's own output only
        where the tower records it before its final norm: transformers 5 does for CLIP, SigLIP, BLIP-2 and InstructBLIP
        (`capture_outputs(tie_last_hidden_states=False)`); a tower that ties it hands over LN(h) there.
        Raises ValueError when the tower has fewer blocks.
        """
        if max(self.layers) + 1 >= len(hidden_states):
            raise ValueError(f"layers {list(self.layers)}: the tower has {len(hidden_states) - 1} blocks")
        return [hidden_states[layer + 1] for layer in self.layers]

    def forward(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """hidden_states: embedding and block outputs of the tower, [N, S, V] each (see `select`) -> [N, S, V]"""
        x_NSV, *sources = self.select(hidden_states)
        for block, source_NSV in zip(self.blocks, sources):
            x_NSV = block(x_NSV, source_NSV)
        return self.norm(x_NSV)


class AggregatorMLP(nn.Module):
    """T = W_2 GELU(W_1 V), hidden width 4 V: [N, S, V] -> [N, S, D] [released code]; its initial values are [ours]."""

    def __init__(self, vision_width: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear_1 = BertLinear(vision_width, 4 * vision_width)
        self.linear_2 = BertLinear(4 * vision_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states_NSV: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear_2(nn.functional.gelu(self.linear_1(states_NSV))))
