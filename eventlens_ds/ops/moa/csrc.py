"""Routing primitives of the mixture of adapters by the compiled extension (C++ on a CPU, CUDA C++ on a GPU).

In: router logits, or rows of tokens and of expert outputs. Out: weights and experts, the slots sorted by expert, rows
in that order, and their weighted sum per token. Slot t * k + j is choice j of token t.
Decision: matrix products stay in Triton or cuBLAS; these are the memory-bound steps around them. All are bitwise
repeatable: ties go to the lowest index, the sort is stable, sums run in slot order. No autograd here.
"""

from __future__ import annotations

import torch

from eventlens_ds.ops import extension


def route(logits: torch.Tensor, k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32[T, k] and experts int32[T, k] of the k largest logits float32[T, E], the largest first.

    The lowest index wins a tie. renormalise=True: softmax over the selected; False: softmax over all E, then selection.
    """
    extension.require(logits.device)
    return torch.ops.eventlens_csrc.moa_route(logits.contiguous(), k, renormalise)


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of experts int32[T, k] in a stable order by expert, int32[T * k], and where each expert begins,
    int32[E + 1]. Needs no device sync and no atomics.
    """
    extension.require(experts.device)
    return torch.ops.eventlens_csrc.moa_sort_by_expert(experts.contiguous(), num_experts)


def gather(x: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    """[T * k, D]: row order[s] // k of x [T, D] for every s."""
    extension.require(x.device)
    return torch.ops.eventlens_csrc.moa_gather(x.contiguous(), order, k)


def combine(y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[T, D]: sum over slots j of weights[t, j] (float32) times the row of y [T * k, D] that `order` gave to slot
    t * k + j, in slot order, accumulated in float32 and rounded once to the dtype of y.
    """
    extension.require(y.device)
    return torch.ops.eventlens_csrc.moa_combine(y.contiguous(), order, weights.contiguous())
