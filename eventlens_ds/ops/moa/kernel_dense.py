"""Triton kernels for gates: routing, activation and gating between the two products of path dense, and backward.

In: pre-activations [T, E * r] and task ids or float32 logits. Out: what the up projection multiplies, [T, W]: gated
activations, then one column per adapter with its gate (the up biases are rows of the same product), then zeros.
Decision: the products themselves are cuBLAS. A Triton product with this as its epilogue moves the same bytes (x has to
be read again for the residual in any case) and spills at the tile sizes that would make it fast; everything between
the products, forward and backward, is one kernel each. Statistics in float32; sums over tokens as ordered partials.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(h, ACT: tl.constexpr):
    """relu, gelu (erf), silu or identity of a float32 tile; NaN stays NaN."""
    if ACT == "relu":
        return tl.where(h <= 0, 0.0, h)
    elif ACT == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACT == "silu":
        return h * tl.sigmoid(h)
    else:
        return h


@triton.jit
def activate_slope(h, ACT: tl.constexpr):
    """Derivative of `activate`."""
    if ACT == "relu":
        return tl.where(h <= 0, 0.0, 1.0)
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
    elif ACT == "silu":
        s = tl.sigmoid(h)
        return s * (1.0 + h * (1.0 - s))
    else:
        return tl.full(h.shape, 1.0, tl.float32)


@triton.jit
def ranks(logits_ptr, tokens, inside, logits, E, E2: tl.constexpr):
    """int32[BM, E2]: how many logits of the row come before each one, lower index first among equals."""
    columns = tl.arange(0, E2)[None, :]
    rank = tl.zeros(logits.shape, tl.int32)
    for e in range(0, E):
        other = tl.load(logits_ptr + tokens * E + e, mask=inside, other=0.0)[:, None]
        rank += ((other > logits) | ((other == logits) & (e < columns))).to(tl.int32)
    return rank


@triton.jit
def softmax_of(logits, chosen):
    """Softmax over the chosen columns of each row, zero elsewhere."""
    top = tl.max(tl.where(chosen, logits, float("-inf")), 1)[:, None]
    power = tl.where(chosen, tl.exp(logits - top), 0.0)
    return power / tl.sum(power, 1)[:, None]


@triton.jit
def gates_of(routing_ptr, tokens, inside, E, k, MODE: tl.constexpr, E2: tl.constexpr):
    """Gates float32[BM, E2] of a tile of tokens, zero for adapters not used; with them the softmax they came from."""
    columns = tl.arange(0, E2)[None, :]
    exists = inside[:, None] & (columns < E)
    if MODE == "tasks":
        task = tl.load(routing_ptr + tokens, mask=inside, other=-1)
        gates = (exists & (task[:, None] == columns)).to(tl.float32)
        return gates, gates
    else:
        # Rows beyond the last token get one finite logit, so that their softmax is not 0 / 0.
        logits = tl.load(routing_ptr + tokens[:, None] * E + columns, mask=exists, other=float("-inf"))
        logits = tl.where(inside[:, None], logits, 0.0)
        if MODE == "soft":
            soft = softmax_of(logits, columns < E)
            return soft, soft
        else:
            chosen = (ranks(routing_ptr, tokens, inside, logits, E, E2) < k) & (columns < E)
            if MODE == "top_k":
                soft = softmax_of(logits, chosen)
                return soft, soft
            else:
                soft = softmax_of(logits, columns < E)
                return tl.where(chosen, soft, 0.0), soft


@triton.jit
def gate_kernel(
    hidden_ptr,
    routing_ptr,
    scale_ptr,
    gated_ptr,
    T,
    E,
    R,
    W,
    k,
    MODE: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    E2: tl.constexpr,
):
    """gated[t, e * R + j] = gate * scale_e * act(hidden), gated[t, E * R + e] = gate * scale_e, zeros up to W."""
    # Pointers move to the tile in 64 bits; within it 32 bits do, at half the registers.
    begin = tl.program_id(0).to(tl.int64) * BM
    tokens = tl.arange(0, BM)
    inside = tokens < T - begin
    hidden_ptr += begin * (E * R)
    gated_ptr += begin * W
    routing_ptr += begin * (1 if MODE == "tasks" else E)
    columns = tl.arange(0, E2)[None, :]
    gates, _ = gates_of(routing_ptr, tokens, inside, E, k, MODE, E2)
    scale = tl.load(scale_ptr + columns, mask=columns < E, other=0.0)
    out = gated_ptr + tokens[:, None] * W
    for e in range(0, E):
        gate = tl.sum(tl.where(columns == e, gates, 0.0), 1)[:, None]
        scaled = gate * tl.load(scale_ptr + e)
        for first in range(0, R, BR):
            j = first + tl.arange(0, BR)[None, :]
            mask = inside[:, None] & (j < R)
            h = tl.load(hidden_ptr + tokens[:, None] * (E * R) + e * R + j, mask=mask, other=0.0).to(tl.float32)
            # Selected, not multiplied: an overflow in an adapter that a token does not use cannot reach it.
            value = tl.where(gate != 0, activate(h, ACT) * scaled, 0.0)
            tl.store(out + e * R + j, value.to(gated_ptr.dtype.element_ty), mask=mask)
    # E2 covers the padding as well: there gates are zero.
    tail = inside[:, None] & (columns < W - E * R)
    tl.store(out + E * R + columns, (gates * scale).to(gated_ptr.dtype.element_ty), mask=tail)


@triton.jit
def gate_backward_kernel(
    dgated_ptr,
    hidden_ptr,
    routing_ptr,
    scale_ptr,
    dhidden_ptr,
    gated_ptr,
    drouting_ptr,
    dbias_ptr,
    dscale_ptr,
    T,
    E,
    R,
    W,
    k,
    MODE: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    E2: tl.constexpr,
):
    """From dgated [T, W]: dhidden, the gated activations once more (for the gradient of up), dlogits, and one partial
    sum per program for the down biases [programs, E * R] and the scales [programs, E]."""
    tile = tl.program_id(0).to(tl.int64)
    begin = tile * BM
    tokens = tl.arange(0, BM)
    inside = tokens < T - begin
    hidden_ptr += begin * (E * R)
    dhidden_ptr += begin * (E * R)
    dgated_ptr += begin * W
    gated_ptr += begin * W
    routing_ptr += begin * (1 if MODE == "tasks" else E)
    drouting_ptr += begin * (0 if MODE == "tasks" else E)
    dbias_ptr += tile * (E * R)
    dscale_ptr += tile * E
    columns = tl.arange(0, E2)[None, :]
    gates, soft = gates_of(routing_ptr, tokens, inside, E, k, MODE, E2)
    scales = tl.load(scale_ptr + columns, mask=columns < E, other=0.0)
    at = tokens[:, None] * W
    tail = inside[:, None] & (columns < W - E * R)
    tl.store(gated_ptr + at + E * R + columns, (gates * scales).to(gated_ptr.dtype.element_ty), mask=tail)
    # The column of a gate carries the up bias; what the activations add is gathered adapter by adapter.
    used = gates != 0
    draw = tl.where(used, tl.load(dgated_ptr + at + E * R + columns, mask=tail, other=0.0).to(tl.float32), 0.0)
    for e in range(0, E):
        gate = tl.sum(tl.where(columns == e, gates, 0.0), 1)[:, None]
        scaled = gate * tl.load(scale_ptr + e)
        product = tl.zeros((BM,), tl.float32)
        for first in range(0, R, BR):
            j = first + tl.arange(0, BR)[None, :]
            mask = inside[:, None] & (j < R)
            h = tl.load(hidden_ptr + tokens[:, None] * (E * R) + e * R + j, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(dgated_ptr + at + e * R + j, mask=mask, other=0.0).to(tl.float32)
            active = tl.where(gate != 0, activate(h, ACT), 0.0)
            slope = tl.where(gate != 0, grad * activate_slope(h, ACT) * scaled, 0.0)
            tl.store(
                dhidden_ptr + tokens[:, None] * (E * R) + e * R + j, slope.to(dhidden_ptr.dtype.element_ty), mask=mask
            )
            tl.store(gated_ptr + at + e * R + j, (active * scaled).to(gated_ptr.dtype.element_ty), mask=mask)
            tl.store(dbias_ptr + e * R + j, tl.sum(slope, 0)[None, :], mask=j < R)
            product += tl.sum(tl.where(gate != 0, grad * active, 0.0), 1)
        draw += tl.where(columns == e, product[:, None], 0.0)
    tl.store(dscale_ptr + columns, tl.sum(gates * draw, 0)[None, :], mask=columns < E)
    if MODE != "tasks":
        dgate = tl.where(used, draw * scales, 0.0)
        dlogits = soft * (dgate - tl.sum(gates * dgate, 1)[:, None])
        tl.store(drouting_ptr + tokens[:, None] * E + columns, dlogits, mask=inside[:, None] & (columns < E))


@triton.jit
def route_kernel(
    logits_ptr, weights_ptr, experts_ptr, T, E, k, RENORMALISE: tl.constexpr, BM: tl.constexpr, E2: tl.constexpr
):
    """The k largest logits of each row in order: weights [T, k] and experts int32[T, k]."""
    begin = tl.program_id(0).to(tl.int64) * BM
    tokens = tl.arange(0, BM)
    inside = tokens < T - begin
    logits_ptr += begin * E
    weights_ptr += begin * k
    experts_ptr += begin * k
    columns = tl.arange(0, E2)[None, :]
    exists = inside[:, None] & (columns < E)
    logits = tl.load(logits_ptr + tokens[:, None] * E + columns, mask=exists, other=float("-inf"))
    logits = tl.where(inside[:, None], logits, 0.0)
    rank = tl.where(columns < E, ranks(logits_ptr, tokens, inside, logits, E, E2), E)
    if RENORMALISE:
        soft = softmax_of(logits, rank < k)
    else:
        soft = softmax_of(logits, columns < E)
    for slot in range(0, k):
        here = rank == slot
        # Logits of NaN have no order: the clamp keeps the index inside, the weight is NaN as it should be.
        expert = tl.minimum(tl.sum(tl.where(here, columns, 0), 1), E - 1)
        tl.store(experts_ptr + tokens * k + slot, expert, mask=inside)
        tl.store(
            weights_ptr + tokens * k + slot, tl.sum(tl.where(columns == expert[:, None], soft, 0.0), 1), mask=inside
        )


@triton.jit
def route_backward_kernel(
    grad_ptr,
    logits_ptr,
    weights_ptr,
    experts_ptr,
    dlogits_ptr,
    T,
    E,
    k,
    RENORMALISE: tl.constexpr,
    BM: tl.constexpr,
    E2: tl.constexpr,
):
    """dlogits [T, E] of `route_kernel`; every element is written, zero where nothing arrives."""
    begin = tl.program_id(0).to(tl.int64) * BM
    tokens = tl.arange(0, BM)
    inside = tokens < T - begin
    logits_ptr += begin * E
    dlogits_ptr += begin * E
    grad_ptr += begin * k
    weights_ptr += begin * k
    experts_ptr += begin * k
    columns = tl.arange(0, E2)[None, :]
    exists = inside[:, None] & (columns < E)
    dgate = tl.zeros((BM, E2), tl.float32)
    soft = tl.zeros((BM, E2), tl.float32)
    inner = tl.zeros((BM,), tl.float32)
    for slot in range(0, k):
        expert = tl.load(experts_ptr + tokens * k + slot, mask=inside, other=0)[:, None]
        weight = tl.load(weights_ptr + tokens * k + slot, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + tokens * k + slot, mask=inside, other=0.0)
        inner += weight * grad
        dgate += tl.where(columns == expert, grad[:, None], 0.0)
        soft += tl.where(columns == expert, weight[:, None], 0.0)
    if not RENORMALISE:
        logits = tl.load(logits_ptr + tokens[:, None] * E + columns, mask=exists, other=float("-inf"))
        soft = softmax_of(tl.where(inside[:, None], logits, 0.0), columns < E)
    tl.store(dlogits_ptr + tokens[:, None] * E + columns, soft * (dgate - inner[:, None]), mask=exists)
