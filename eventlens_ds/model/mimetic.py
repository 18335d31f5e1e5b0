"""Mimetic initialization: query and key weights of an untrained language model that start correlated.

In: a language model whose weights were just drawn, a correlation c in [0, 1). Out: every key matrix replaced by
sqrt(1 - c^2) W_k + c W_q, so that W_q^T W_k starts with a positive diagonal, as trained models have it (Trockman and
Kolter, 2023, "Mimetic Initialization of Self-Attention Layers"). A token then looks at tokens like itself from the
first step on, which is what matching in context is made of, such as a query image with its like.
Decision: keys take from queries, and the mixture keeps their variance, so nothing but the correlation differs from the
usual start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from eventlens_ds.model.weights import full_shape, gathered, rank_and_size


def correlate(language_model: nn.Module, correlation: float) -> None:
    """Correlate `q_proj` and `k_proj` of every attention layer in place. A collective under ZeRO-3.

    q_proj.weight [H * d, D] and k_proj.weight [G * d, D] with G key heads for H query heads; a key head takes from the
    first query head that reads it.
    """
    module: Any
    for module in language_model.modules():
        if not (hasattr(module, "q_proj") and hasattr(module, "k_proj")):
            continue
        query, key = _matrix(module.q_proj), _matrix(module.k_proj)
        with torch.no_grad(), gathered([query, key]):
            # Partitioned parameters take rank 0's values.
            if not hasattr(key, "ds_id") or rank_and_size()[0] == 0:
                width = full_shape(query)[1]
                heads = key.view(-1, module.head_dim, width)
                first = query.view(len(heads), -1, module.head_dim, width)[:, 0]
                heads.mul_((1 - correlation**2) ** 0.5).add_(first, alpha=correlation)


def _matrix(linear: Any) -> nn.Parameter:
    """The weight of a linear layer; LoRA keeps the matrix it is added to as base_layer."""
    weight: nn.Parameter = getattr(linear, "base_layer", linear).weight
    return weight
