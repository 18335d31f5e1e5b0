"""Launches of the mixture's Triton kernels, with cuBLAS for the plain products of path dense.

In: contiguous features [T, D], adapter weights of the same dtype, routing as tensors. Out: what op.py registers.
Decision: nothing here reads a value from the device; grids are upper bounds and programs beyond the last tile return.
What a launch asks kernel_config.py for is what kernel_cases.py lists for the compile gate.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton

from eventlens_ds.ops.moa import kernel_config as config
from eventlens_ds.ops.moa import kernel_dense, kernel_sparse
from eventlens_ds.ops.moa.gates import AdapterStack
from eventlens_ds.ops.moa.grouped import Rows
from eventlens_ds.ops.moa.kernel_cases import compile_cases

__all__ = [
    "compile_cases",
    "dense_backward",
    "dense_forward",
    "grouped_backward",
    "grouped_forward",
    "route",
    "route_backward",
    "sort_rows",
]

ALIGNMENT = 16
"""Columns of a cuBLAS operand come in multiples of this."""


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _capability(tensor: torch.Tensor) -> int:
    """Compute capability as 80 or 90; the interpreter takes the tiles of 80."""
    return 90 if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0) else 80


def _precision(tensor: torch.Tensor) -> str:
    """float32 products follow torch's own switch; narrower types are exact in any case."""
    return "tf32" if tensor.dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tiles(cfg: config.Config) -> dict[str, int]:
    return {**cfg._asdict()}


def _stacked_up(adapters: AdapterStack) -> torch.Tensor:
    """[W, D]: the up projections [E * r, D], the up biases [E, D], and zeros up to a multiple of ALIGNMENT."""
    count, width, rank = adapters.up.shape
    columns = count * rank + count
    padding = adapters.up.new_zeros(-columns % ALIGNMENT, width)
    return torch.cat([adapters.up.transpose(1, 2).reshape(count * rank, width), adapters.up_bias, padding])


def dense_forward(
    x: torch.Tensor, residual: torch.Tensor, adapters: AdapterStack, routing: torch.Tensor, mode: str, k: int, act: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + mixture [T, D] and pre-activations [T, E * r]: product, gate kernel, product."""
    count, rank, _ = adapters.down.shape
    hidden = torch.addmm(adapters.down_bias.flatten(), x, adapters.down.flatten(0, 1).T)
    up = _stacked_up(adapters)
    gated = hidden.new_empty(len(x), len(up))
    tile = config.gate_tile(len(up) - count * rank)
    with _on(x):
        kernel_dense.gate_kernel[(triton.cdiv(len(x), tile["BM"]),)](
            hidden, routing.contiguous(), adapters.scale.contiguous(), gated, len(x), count, rank, len(up), k,
            MODE=mode, ACT=act, num_warps=config.GATE_WARPS, **tile,
        )  # fmt: skip
    if residual.dtype == x.dtype:
        return torch.addmm(residual, gated, up), hidden
    return residual + torch.mm(gated, up).to(residual.dtype), hidden


def dense_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    adapters: AdapterStack,
    routing: torch.Tensor,
    hidden: torch.Tensor,
    mode: str,
    k: int,
    act: str,
) -> tuple[torch.Tensor, AdapterStack, torch.Tensor]:
    """Gradients for x, the adapters and the logits (empty for tasks) from grad [T, D]."""
    count, rank, width = adapters.down.shape
    columns = count * rank
    up = _stacked_up(adapters)
    tile = config.gate_tile(len(up) - columns)
    programs = triton.cdiv(len(x), tile["BM"])
    dgated = torch.mm(grad, up.T)
    dhidden, gated = torch.empty_like(hidden), torch.empty_like(dgated)
    drouting = routing.new_empty(0 if mode == "tasks" else routing.shape, dtype=torch.float32)
    dbias = hidden.new_empty(programs, columns, dtype=torch.float32)
    dscale = hidden.new_empty(programs, count, dtype=torch.float32)
    with _on(x):
        kernel_dense.gate_backward_kernel[(programs,)](
            dgated, hidden, routing.contiguous(), adapters.scale.contiguous(), dhidden, gated, drouting, dbias, dscale,
            len(x), count, rank, len(up), k, MODE=mode, ACT=act, num_warps=config.GATE_WARPS, **tile,
        )  # fmt: skip
    dup = torch.mm(gated.T, grad)
    gradients = AdapterStack(
        torch.mm(dhidden.T, x).view(count, rank, width),
        dbias.sum(0).view(count, rank).to(x.dtype),
        dup[:columns].view(count, rank, width).transpose(1, 2).contiguous(),
        dup[columns : columns + count].clone(),
        dscale.sum(0),
    )
    return torch.mm(dhidden, adapters.down.flatten(0, 1)), gradients, drouting


def route(logits: torch.Tensor, k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32[T, k] and experts int32[T, k], see grouped.route."""
    count = logits.shape[1]
    tile = config.route_tile(count)
    weights = logits.new_empty(len(logits), k)
    experts = logits.new_empty(len(logits), k, dtype=torch.int32)
    with _on(logits):
        kernel_dense.route_kernel[(triton.cdiv(len(logits), tile["BM"]),)](
            logits.contiguous(), weights, experts, len(logits), count, k, RENORMALISE=renormalise, **tile
        )
    return weights, experts


def route_backward(
    grad: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, renormalise: bool
) -> torch.Tensor:
    """Gradient for logits [T, E], see grouped.route_backward."""
    count, slots = logits.shape[1], experts.shape[1]
    tile = config.route_tile(count)
    dlogits = logits.new_empty(logits.shape)
    with _on(logits):
        kernel_dense.route_backward_kernel[(triton.cdiv(len(logits), tile["BM"]),)](
            grad, logits.contiguous(), weights, experts, dlogits, len(logits), count, slots,
            RENORMALISE=renormalise, **tile,
        )  # fmt: skip
    return dlogits


def sort_rows(keys: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """order int32[N] and offsets int32[num_keys + 1] of a stable counting sort: count, running sum, place."""
    tile = config.sort_tile(num_keys)
    number = keys.numel()
    programs = max(1, triton.cdiv(number, tile["B"]))
    keys = keys.contiguous()
    counts, order = keys.new_empty(num_keys, programs), keys.new_empty(number)
    with _on(keys):
        kernel_sparse.count_kernel[(programs,)](keys, counts, number, programs, num_keys, **tile)
        ends = counts.flatten().cumsum(0, dtype=torch.int32)
        kernel_sparse.place_kernel[(programs,)](keys, ends, counts, order, number, programs, num_keys, **tile)
    return order, torch.cat([ends.new_zeros(1), ends.view(num_keys, programs)[:, -1]])


def _rows_contiguous(adapters: AdapterStack) -> AdapterStack:
    """Weights with unit stride in their last dimension; down may be one view shared by all adapters."""
    down = adapters.down if adapters.down.stride(-1) == 1 else adapters.down.contiguous()
    bias = adapters.down_bias if adapters.down_bias.stride(-1) == 1 else adapters.down_bias.contiguous()
    return AdapterStack(down, bias, *(weight.contiguous() for weight in adapters[2:]))


def grouped_forward(
    x: torch.Tensor, residual: torch.Tensor, adapters: AdapterStack, rows: Rows, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + mixture [T, D] and pre-activations [T * k, r] in the order of the groups, see grouped.forward."""
    (tokens, width), rank = x.shape, adapters.down.shape[1]
    adapters, x = _rows_contiguous(adapters), x.contiguous()
    groups, slots = rows.experts.numel(), rows.weights.shape[1]
    cfg = config.to_rank(rank, x.element_size(), _capability(x))
    hidden = x.new_empty(tokens * slots, rank)
    with _on(x):
        kernel_sparse.down_kernel[(triton.cdiv(tokens * slots, cfg.BM) + groups, triton.cdiv(rank, cfg.BN))](
            x, rows.order, rows.offsets, rows.experts, adapters.down, adapters.down_bias, hidden,
            width, rank, groups, slots, adapters.down.stride(0), adapters.down.stride(1), adapters.down_bias.stride(0),
            G2=triton.next_power_of_2(groups), PRECISION=_precision(x), **_tiles(cfg),
        )  # fmt: skip
    out = residual.new_empty(residual.shape)
    _up(hidden, rows, adapters.scale, adapters.up, adapters.up_bias, residual.contiguous(), out, activation, x)
    return out, hidden


def _up(
    hidden: torch.Tensor,
    rows: Rows,
    scale: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    x: torch.Tensor,
) -> None:
    """Slot by slot, out = base + the slot's rows; `up` is [E, D, r], with any strides. Ungated without a bias."""
    (tokens, width), rank = out.shape, hidden.shape[1]
    slots = rows.weights.shape[1]
    groups = rows.experts.numel() // slots
    cfg = config.from_rank(rank, x.element_size(), _capability(x))
    blocks = triton.cdiv(width, cfg.BN)
    for slot in range(slots):
        start = out if slot or base is None else base
        with _on(x):
            kernel_sparse.up_kernel[((triton.cdiv(tokens, cfg.BM) + groups) * blocks,)](
                hidden, rows.weights, rows.order, rows.offsets, rows.experts, scale, up,
                scale if bias is None else bias, start, out, width, rank, slot * groups, (slot + 1) * groups, slots,
                up.stride(0), up.stride(1), up.stride(2), ACT=activation, GATED=bias is not None,
                BASE=slot > 0 or base is not None, G2=triton.next_power_of_2(rows.experts.numel()),
                PRECISION=_precision(x), **_tiles(cfg),
            )  # fmt: skip


def grouped_backward(
    grad: torch.Tensor, x: torch.Tensor, adapters: AdapterStack, rows: Rows, hidden: torch.Tensor, activation: str
) -> tuple[torch.Tensor, AdapterStack, torch.Tensor]:
    """Gradients for x, the adapters and the row weights [T, k] from grad [T, D], see grouped.backward."""
    width, rank = x.shape[1], hidden.shape[1]
    adapters, x = _rows_contiguous(adapters), x.contiguous()
    groups, slots, number = rows.experts.numel(), rows.weights.shape[1], len(hidden)
    cfg = config.to_rank(rank, x.element_size(), _capability(x))
    blocks = triton.cdiv(rank, cfg.BN)
    dhidden, dgate = torch.empty_like(hidden), rows.weights.new_empty(blocks, number)
    # Rows without an adapter are not visited; the gradient of their weight is zero.
    dweights = rows.weights.new_zeros(blocks, number)
    with _on(x):
        kernel_sparse.hidden_backward_kernel[(triton.cdiv(number, cfg.BM) + groups, blocks)](
            grad, hidden, rows.weights, rows.order, rows.offsets, rows.experts, adapters.scale, adapters.up,
            adapters.up_bias, dhidden, dgate, dweights, number, width, rank, groups, slots, *adapters.up.stride(),
            ACT=activation, G2=triton.next_power_of_2(groups), PRECISION=_precision(x), **_tiles(cfg),
        )  # fmt: skip
    dx = torch.empty_like(x)
    _up(dhidden, rows, adapters.scale, adapters.down.transpose(1, 2), None, None, dx, "identity", x)
    ddown, dbias, _ = _sum_rows(dhidden, x, rows, adapters, None, activation)
    dup, dup_bias, dscale = _sum_rows(hidden, grad, rows, adapters, dgate.sum(0), activation)
    gradients = AdapterStack(
        ddown.to(x.dtype), dbias.to(x.dtype), dup.to(x.dtype).transpose(1, 2).contiguous(), dup_bias.to(x.dtype), dscale
    )
    return dx, gradients, dweights.sum(0).view(rows.weights.shape)


def _sum_rows(
    left: torch.Tensor,
    right: torch.Tensor,
    rows: Rows,
    adapters: AdapterStack,
    dgate: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over each adapter's rows, float32: products [E, r, D], and biases and scales; gated when dgate is given."""
    count, rank, width = adapters.down.shape
    groups, slots = rows.experts.numel(), rows.weights.shape[1]
    gated = dgate is not None
    cfg = config.over_rows(rank, right.element_size(), _capability(right))
    parts = config.parts_of(rank, width, count, len(left), cfg)
    blocks = triton.cdiv(rank, cfg.BM) * triton.cdiv(width, cfg.BN)
    product = rows.weights.new_empty(parts, count, rank, width)
    bias = rows.weights.new_empty(parts, count, width if gated else rank)
    dscale = rows.weights.new_empty(parts, count)
    with _on(right):
        kernel_sparse.sum_rows_kernel[(blocks, count, parts)](
            left, right, rows.weights, rows.weights if dgate is None else dgate, rows.order, rows.offsets, rows.experts,
            adapters.scale, product, bias, dscale, width, rank, groups, slots, parts,
            GATED=gated, ACT=activation, PRECISION=_precision(right), **_tiles(cfg),
        )  # fmt: skip
    return product.sum(0), bias.sum(0), dscale.sum(0)
