"""Mixture of adapters: the typed front door.

In: what the adapters read, the residual stream, stacked adapter weights and a gate per token or per segment. Out:
residual + sum_e scale_e * G_e (.) (up_e act(down_e x + down_bias_e) + up_bias_e).
Decision: routing arrives as tensors in the gate, never as module state, so recomputation and mixed rows see the
gates of their own forward pass (P7). Nothing here reads a value from an accelerator, so nothing waits for it.
Backends: see ops/dispatch.py. Paths (dense, sparse, segments): see paths.py.
"""

from __future__ import annotations

import torch

from eventlens_ds.errors import ArgumentError
from eventlens_ds.ops.moa import op, paths
from eventlens_ds.ops.moa.gates import (
    AdapterStack,
    Gates,
    SoftMixture,
    TaskOneHot,
    TaskVectors,
    TopKRouter,
    check_adapters,
    check_gates,
    fold_vectors,
    gate_rows,
    spread,
)
from eventlens_ds.ops.moa.grouped import Rows
from eventlens_ds.ops.moa.reference import ACTIVATIONS, load_balance_loss, mixture, wide

__all__ = [
    "AdapterStack",
    "Gates",
    "SoftMixture",
    "TaskOneHot",
    "TaskVectors",
    "TopKRouter",
    "load_balance_loss",
    "moa",
]


def moa(
    x: torch.Tensor,
    residual: torch.Tensor,
    adapters: AdapterStack,
    gates: Gates,
    segments: torch.Tensor | None = None,
    *,
    activation: str = "relu",
    backend: str | None = None,
    path: str | None = None,
) -> torch.Tensor:
    """Add a gated mixture of bottleneck adapters to the residual (LION, Chen et al., 2023; Houlsby et al., 2019).

    x, residual   [..., D], the same shape; flattened to T tokens. The adapters run in the dtype of x, or of autocast
    adapters      weights of E adapters, see AdapterStack; cast to the dtype of x
    gates         one of TaskVectors, TaskOneHot, TopKRouter, SoftMixture, with one row per token
    segments      int64[N + 1] from 0 to T: the gate then has one row per segment and its tokens share it
    activation    relu, gelu, silu or identity
    backend       reference, triton or csrc; None takes the best that runs on the device
    path          dense, sparse or segments; None takes what suits the sizes, and logs why

    Returns [..., D] in the dtype of residual. Bitwise repeatable, forward and backward. An unused adapter whose hidden
    units overflow never reaches other tokens; infinite weights or features of one do so on path dense, where they are
    multiplied by zero. Raises ArgumentError when shapes, activation, backend or path do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"moa: no activation {activation!r}; activations: {', '.join(ACTIVATIONS)}")
    _check_features(x, residual)
    check_adapters(adapters, x)
    tokens = x.reshape(-1, x.shape[-1])
    check_gates(gates, segments, tokens, *adapters.up_bias.shape)
    # Meta tensors, from which `eventlens plan` reads sizes, have no autocast.
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
    name, chosen = paths.choose(_sizes(tokens, adapters, gates, segments), backend, path)
    if chosen == "dense":
        if segments is not None:
            gates = spread(gates, segments, tokens.shape[0])
        if name == "reference":
            return residual + mixture(tokens, adapters, gates, activation).view(x.shape).to(residual.dtype)
    if isinstance(gates, TaskVectors):
        adapters, gates = fold_vectors(adapters, gates)
    down, down_bias, up, up_bias = (weight.to(tokens.dtype) for weight in adapters[:4])
    stack = AdapterStack(down, down_bias, up, up_bias, adapters.scale.to(wide(tokens.dtype)))
    base = residual.reshape(tokens.shape)
    if chosen == "dense":
        out = op.dense(tokens, base, stack, *_dense_routing(gates), activation)
    else:
        by_segment = segments if chosen == "segments" else None
        if segments is not None and by_segment is None:
            gates = spread(gates, segments, tokens.shape[0])
        out = op.grouped(tokens, base, stack, _rows(gates, by_segment, tokens, len(down), name), activation, name)
    return out.view(residual.shape)


def _check_features(x: torch.Tensor, residual: torch.Tensor) -> None:
    if x.shape != residual.shape:
        raise ArgumentError(f"moa: x is {list(x.shape)} but residual is {list(residual.shape)}")
    if x.device != residual.device:
        raise ArgumentError(f"moa: x is on {x.device} but residual is on {residual.device}")
    if not (x.dtype.is_floating_point and residual.dtype.is_floating_point):
        raise ArgumentError(f"moa: x is {x.dtype} and residual {residual.dtype}, both must be floating point")


def _sizes(x: torch.Tensor, adapters: AdapterStack, gates: Gates, segments: torch.Tensor | None) -> paths.Sizes:
    count, rank, _ = adapters.down.shape
    used = 1
    if isinstance(gates, TaskVectors):
        count, rank = gates.vectors.shape[0], count * rank
    elif isinstance(gates, TopKRouter | SoftMixture):
        used = gates.k if isinstance(gates, TopKRouter) else count
    groups = None if segments is None else segments.shape[0] - 1
    return paths.Sizes(x.device.type, str(x.dtype).removeprefix("torch."), count, rank, used, groups)


def _dense_routing(gates: TaskOneHot | TopKRouter | SoftMixture) -> tuple[torch.Tensor, str, int]:
    """Routing tensor, mode and k as op.dense takes them."""
    if isinstance(gates, TaskOneHot):
        return gates.task_ids, "tasks", 1
    logits = gates.logits.float()
    if isinstance(gates, SoftMixture):
        return logits, "soft", logits.shape[-1]
    return logits, "top_k" if gates.renormalise else "top_k_leaky", gates.k


def _rows(
    gates: TaskOneHot | TopKRouter | SoftMixture,
    segments: torch.Tensor | None,
    x: torch.Tensor,
    num_adapters: int,
    backend: str,
) -> Rows:
    """Route every token or segment, and group the rows by adapter: by the segments, or by a stable counting sort."""
    rows = gate_rows(gates)
    if isinstance(gates, TaskOneHot):
        inside = (rows >= 0) & (rows < num_adapters)
        experts = torch.where(inside, rows, -1).int()[:, None]
        weights = torch.ones(experts.shape, dtype=wide(x.dtype), device=x.device)
    else:
        k = gates.k if isinstance(gates, TopKRouter) else num_adapters
        logits = gates.logits.to(wide(gates.logits.dtype)) if backend == "reference" else gates.logits.float()
        weights, experts = op.route(logits, k, isinstance(gates, SoftMixture) or gates.renormalise, backend)
        weights = weights.to(wide(x.dtype))
    slots = experts.shape[1]
    if segments is not None:
        return _segment_rows(weights, experts, segments, x.shape[0])
    # Slots are sorted apart: a group then holds a token once at most, and slots can be added one after the other.
    per_slot = num_adapters + 1
    first = torch.arange(0, slots * per_slot, per_slot, dtype=torch.int32, device=x.device)
    keys = torch.where(experts < 0, num_adapters, experts) + first
    order, offsets = op.sort_rows(keys, slots * per_slot, backend)
    group = torch.arange(per_slot, dtype=torch.int32, device=x.device)
    return Rows(weights, order, offsets, torch.where(group < num_adapters, group, -1).repeat(slots))


def _segment_rows(weights: torch.Tensor, experts: torch.Tensor, segments: torch.Tensor, num_tokens: int) -> Rows:
    """Rows of gates per segment [N, k]: group (slot, segment) holds the segment's tokens in order."""
    slots = experts.shape[1]
    slot = torch.arange(slots, dtype=torch.int32, device=weights.device)[:, None]
    order = torch.arange(num_tokens, dtype=torch.int32, device=weights.device) * slots + slot
    bounds = segments.to(weights.device, torch.int32)
    offsets = torch.cat([(bounds[:-1] + slot * num_tokens).flatten(), bounds[-1:] * slots])
    spread_weights = torch.repeat_interleave(weights, bounds.diff(), dim=0, output_size=num_tokens)
    return Rows(spread_weights, order.flatten(), offsets, experts.T.flatten().contiguous())
