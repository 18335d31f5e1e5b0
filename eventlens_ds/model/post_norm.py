"""BERT's two sublayers with the norm after the sum: attention and feed-forward. Aggregator and Q-Former use them.

N images or samples, T tokens, S source tokens, D width, C source width, H heads.
  attention: y = LN(x + W_o softmax(q(x) k(s)^T / sqrt(D / H)) v(s))    FFN: y = LN(x + W_2 GELU(W_1 x))
In: states. Out: states of the same shape. Source: BERT, as LION's released code uses it [released code].
Decision: the linear layer that ends a branch knows that it starts at zero, not the block around it, because only
modules with parameters of their own are sure to be asked for initial values (SelfInitialised).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

INITIAL_STD = 0.02
"""Standard deviation of new linear layers in the aggregator [released code]; elsewhere [ours], as BERT."""


class SelfInitialised:
    """Marks a module that knows its initial values. It must have parameters of its own.

    transformers' `post_init` and `from_pretrained` pass over modules of foreign code without any: the rule "all own
    parameters are loaded" holds for none. `initialise` writes own parameters and those of direct children, nothing
    deeper: under ZeRO-3 no more is gathered (model/initial.py). It draws through transformers.initialization, so values
    that came from a file stay.
    """

    def initialise(self) -> None:
        raise NotImplementedError


def init_weights(module: nn.Module) -> bool:
    """Initial values of one SelfInitialised module; False, and nothing done, for any other.

    For `_init_weights(module)` of a PreTrainedModel, and for `part.apply(init_weights)` on a part alone: both visit
    children first.
    """
    if isinstance(module, SelfInitialised):
        with torch.no_grad():
            module.initialise()
        return True
    return False


class BertLinear(nn.Linear, SelfInitialised):
    """A linear layer that starts as N(0, INITIAL_STD), or with `zero` at zero; its bias at zero."""

    def __init__(self, width: int, out: int, *, zero: bool = False) -> None:
        super().__init__(width, out)
        self.zero = zero

    def initialise(self) -> None:
        if self.zero:
            init.zeros_(self.weight)
        else:
            init.normal_(self.weight, std=INITIAL_STD)
        init.zeros_(self.bias)


class PostNormAttention(nn.Module):
    """Multi-head attention from x to a source, added to x and normalised.

    source_width: width C of the source (default: D). zero_output: the branch starts at zero, y = LN(x). dropout: of
    attention probabilities and of the branch. Raises ValueError for a width that the heads do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        source_width: int | None = None,
        *,
        eps: float = 1e-12,
        dropout: float = 0.0,
        zero_output: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.query = BertLinear(width, width)
        self.key = BertLinear(source_width or width, width)
        self.value = BertLinear(source_width or width, width)
        self.output = BertLinear(width, width, zero=zero_output)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_NTD: torch.Tensor, source_NSC: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, T, D], source [N, S, C], mask bool, true where a source token is seen, broadcast to [N, H, T, S]
        (None: all) -> [N, T, D]."""
        attended = nn.functional.scaled_dot_product_attention(
            self._by_head(self.query(x_NTD)),
            self._by_head(self.key(source_NSC)),
            self._by_head(self.value(source_NSC)),
            attn_mask=mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return self.norm(x_NTD + self.dropout(self.output(attended.transpose(1, 2).flatten(2))))

    def _by_head(self, states: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> [N, H, T, D / H]"""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PostNormFFN(nn.Module):
    """Two linear layers with exact GELU, added to x and normalised. zero_output: the branch starts at zero."""

    def __init__(
        self, width: int, intermediate: int, *, eps: float = 1e-12, dropout: float = 0.0, zero_output: bool = False
    ) -> None:
        super().__init__()
        self.up = BertLinear(width, intermediate)
        self.down = BertLinear(intermediate, width, zero=zero_output)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_NTD: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> [N, T, D]"""
        return self.norm(x_NTD + self.dropout(self.down(nn.functional.gelu(self.up(x_NTD)))))
