"""Mixture of adapters in plain torch: the specification that every other path and backend is tested against.

In: token features [T, D], the stacked weights of E bottleneck adapters and one kind of gate. Out: the gated sum of
the adapters' outputs, to be added to the residual.
Decision: dense. All adapters of a block are one pair of matrix products and gates of zero are multiplied in, so the
code reads like the formula, needs no sizes from the device, and every parameter takes part in every step (ZeRO-3 needs
equal collectives on all ranks). Work is skipped in grouped.py (CPU) and in the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from eventlens_ds.errors import ArgumentError
from eventlens_ds.ops.moa.gates import AdapterStack, Gates, SoftMixture, TaskOneHot, TaskVectors, TopKRouter

DENSE_COLUMNS = 512
"""Hidden columns E * r of one matrix product; about where a dense pass turns from memory- to compute-bound."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda hidden: hidden,
}
"""All map 0 to 0, which lets a gate of zero be applied before the activation."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that routing and sums run in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def scalar_gates(gates: TaskOneHot | TopKRouter | SoftMixture, num_adapters: int) -> torch.Tensor:
    """[T, E] gates in at least float32: bfloat16 logits would flip the selection between near-equal experts."""
    if isinstance(gates, TaskOneHot):
        return (gates.task_ids[:, None] == torch.arange(num_adapters, device=gates.task_ids.device)).float()
    logits = gates.logits.to(wide(gates.logits.dtype))
    if isinstance(gates, SoftMixture):
        return logits.softmax(-1)
    selected = top_k_mask(logits, gates.k)
    if gates.renormalise:
        return logits.masked_fill(~selected, float("-inf")).softmax(-1)
    return torch.where(selected, logits.softmax(-1), 0.0)


def top_k_mask(logits: torch.Tensor, k: int) -> torch.Tensor:
    """bool [T, E], True at the k largest logits of each row; the lowest index wins a tie (torch.topk does not say)."""
    if not 1 <= k <= logits.shape[-1]:
        raise ArgumentError(f"moa: top-k routing needs 1 <= k <= {logits.shape[-1]} adapters, got k={k}")
    order = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :k], True)


def mixture(x: torch.Tensor, adapters: AdapterStack, gates: Gates, activation: str) -> torch.Tensor:
    """sum_e scale_e * G_e (.) (up_e act(down_e x + down_bias_e) + up_bias_e) for x [T, D], in the dtype of x."""
    act = ACTIVATIONS[activation]
    down, down_bias, up, up_bias = (weight.to(x.dtype) for weight in adapters[:4])
    adapters = AdapterStack(down, down_bias, up, up_bias, adapters.scale)
    num_adapters, rank, _ = adapters.down.shape
    per_block = max(1, DENSE_COLUMNS // rank)
    if isinstance(gates, TaskVectors):
        return _channel_gated(x, adapters, gates, act, per_block)
    weights = scalar_gates(gates, num_adapters)
    scaled = (weights * adapters.scale).to(x.dtype)
    total = scaled @ adapters.up_bias
    for first in range(0, num_adapters, per_block):
        block = slice(first, first + per_block)
        # Zero is selected out, not multiplied: an overflow in an adapter that a token does not use cannot reach it.
        used = (weights[:, block] != 0)[..., None]
        hidden = act(torch.where(used, _down(x, adapters, block), 0.0)) * scaled[:, block, None]
        total = torch.addmm(total, hidden.flatten(1), adapters.up[block].transpose(1, 2).flatten(0, 1))
    return total


def _down(x: torch.Tensor, adapters: AdapterStack, block: slice) -> torch.Tensor:
    """Pre-activations [T, E', r] of a block of adapters, as one matrix product."""
    down, bias = adapters.down[block], adapters.down_bias[block]
    return torch.addmm(bias.flatten(), x, down.flatten(0, 1).T).unflatten(-1, bias.shape)


def _channel_gated(
    x: torch.Tensor,
    adapters: AdapterStack,
    gates: TaskVectors,
    act: Callable[[torch.Tensor], torch.Tensor],
    per_block: int,
) -> torch.Tensor:
    """A gate per channel acts after the up projection, so outputs [T, D] of the adapters are formed one by one."""
    total = torch.zeros_like(x)
    in_task = (gates.task_ids >= 0)[:, None]
    rows = gates.task_ids.clamp(min=0)
    for first in range(0, adapters.down.shape[0], per_block):
        hidden = act(_down(x, adapters, slice(first, first + per_block)))
        for e in range(first, first + hidden.shape[1]):
            output = torch.addmm(adapters.up_bias[e], hidden[:, e - first], adapters.up[e].T)
            vectors = (gates.vectors[:, e] * adapters.scale[e]).to(x.dtype)
            total = total + torch.where(in_task, vectors[rows] * output, 0.0)
    return total


def load_balance_loss(logits: torch.Tensor, k: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """E * sum_e f_e * p_e: 1 when routing is even, up to E / k when the same k adapters take every token.

    f_e: share of all selections that fall on adapter e (no gradient); p_e: mean softmax probability. The auxiliary
    loss of Fedus et al., Switch Transformers, 2021 (eq. 4), divided by k. logits [T, E]; mask bool[T], False for
    tokens that do not count. Zero, with a gradient of zero, when none counts.
    """
    logits = logits.to(wide(logits.dtype))
    counted = torch.ones_like(logits[:, 0]) if mask is None else mask.to(logits.dtype)
    number = counted.sum().clamp(min=1.0)
    share = (top_k_mask(logits, k) * counted[:, None]).sum(0) / (number * k)
    probability = (logits.softmax(-1) * counted[:, None]).sum(0) / number
    return logits.shape[-1] * (share * probability).sum()
