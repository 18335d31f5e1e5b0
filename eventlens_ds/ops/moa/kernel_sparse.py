"""Triton kernels for rows grouped by adapter: stable counting sort, projections of a group's rows, and backward.

In: rows as in grouped.py. Group g is order[offsets[g]:offsets[g + 1]], all with adapter experts[g]; a program finds the
tile it owns from the offsets, so no size goes through the host. Out: pre-activations in the order of the groups, the
mixture, gradients.
Decision: no [T, k, D] buffer and no atomics. A slot holds each token once, so the up projection runs slot by slot and
adds to what the slot before wrote. Sums over tokens are split over a fixed number of float32 partials, added in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eventlens_ds.ops.moa.kernel_dense import activate, activate_slope


@triton.jit
def count_kernel(keys_ptr, counts_ptr, N, TILES, G, B: tl.constexpr, G2: tl.constexpr):
    """counts[g, tile]: how many of the tile's B keys are g."""
    tile = tl.program_id(0)
    at = tile * B + tl.arange(0, B)
    keys = tl.load(keys_ptr + at, mask=at < N, other=G2)
    groups = tl.arange(0, G2)
    counts = tl.sum((keys[:, None] == groups[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + groups * TILES + tile, counts, mask=groups < G)


@triton.jit
def place_kernel(keys_ptr, ends_ptr, counts_ptr, order_ptr, N, TILES, G, B: tl.constexpr, G2: tl.constexpr):
    """order[position] = index of each key; ends is the running sum of counts over groups, then tiles."""
    tile = tl.program_id(0)
    at = tile * B + tl.arange(0, B)
    keys = tl.load(keys_ptr + at, mask=at < N, other=G2)
    groups = tl.arange(0, G2)
    mine = (keys[:, None] == groups[None, :]).to(tl.int32)
    cell = groups * TILES + tile
    begin = tl.load(ends_ptr + cell, mask=groups < G, other=0) - tl.load(counts_ptr + cell, mask=groups < G, other=0)
    position = tl.sum(mine * (begin[None, :] + tl.cumsum(mine, 0) - 1), 1)
    tl.store(order_ptr + position, at, mask=at < N)


@triton.jit
def find_tile(tile, offsets_ptr, first, last, BM: tl.constexpr, G2: tl.constexpr):
    """The tile-th tile of BM rows of groups first..last-1: (group, its first row, the group's end).

    A group is last or beyond when there are fewer tiles.
    """
    groups = tl.arange(0, G2)
    mine = (groups >= first) & (groups < last)
    start = tl.load(offsets_ptr + groups, mask=mine, other=0)
    end = tl.load(offsets_ptr + groups + 1, mask=mine, other=0)
    tiles = (end - start + BM - 1) // BM
    until = tl.cumsum(tiles, 0)
    group = tl.sum((until <= tile).to(tl.int32), 0)
    here = groups == group
    row = tl.sum(tl.where(here, start + (tile - until + tiles) * BM, 0), 0)
    return group, row, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def down_kernel(
    x_ptr,
    order_ptr,
    offsets_ptr,
    experts_ptr,
    down_ptr,
    bias_ptr,
    hidden_ptr,
    D,
    R,
    G,
    slots,
    stride_e,
    stride_r,
    stride_be,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    G2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden[row] = down_e x[token of row] + down_bias_e, rows in the order of the groups."""
    group, first, end = find_tile(tl.program_id(0), offsets_ptr, 0, G, BM, G2)
    if group < G:
        expert = tl.load(experts_ptr + group).to(tl.int64)
        if expert >= 0:
            rows = first + tl.arange(0, BM)
            inside = rows < end
            tokens = tl.load(order_ptr + rows, mask=inside, other=0).to(tl.int64) // slots
            n = tl.program_id(1) * BN + tl.arange(0, BN)
            d = tl.arange(0, BK)
            weight = down_ptr + expert * stride_e + n[None, :] * stride_r
            acc = tl.zeros((BM, BN), tl.float32)
            for k in range(0, D, BK):
                ok = k + d < D
                a = tl.load(x_ptr + tokens[:, None] * D + k + d[None, :], mask=inside[:, None] & ok[None, :], other=0.0)
                b = tl.load(weight + k + d[:, None], mask=ok[:, None] & (n[None, :] < R), other=0.0)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
            acc += tl.load(bias_ptr + expert * stride_be + n, mask=n < R, other=0.0).to(tl.float32)[None, :]
            out = hidden_ptr + rows[:, None].to(tl.int64) * R + n[None, :]
            tl.store(out, acc.to(hidden_ptr.dtype.element_ty), mask=inside[:, None] & (n[None, :] < R))


@triton.jit
def up_kernel(
    hidden_ptr,
    weights_ptr,
    order_ptr,
    offsets_ptr,
    experts_ptr,
    scale_ptr,
    up_ptr,
    bias_ptr,
    base_ptr,
    out_ptr,
    D,
    R,
    first_group,
    last_group,
    slots,
    stride_e,
    stride_d,
    stride_r,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BASE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    G2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[token] = base[token] + up_e (gate * act(hidden[row])) + gate * up_bias_e for the rows of one slot.

    Without GATED: out[token] = base[token] + up_e hidden[row], which with the down weights is the gradient of x.
    Rows without an adapter copy base. Programs next to each other share a tile of hidden in cache.
    """
    blocks = tl.cdiv(D, BN)
    group, first, end = find_tile(tl.program_id(0) // blocks, offsets_ptr, first_group, last_group, BM, G2)
    if group < last_group:
        expert = tl.load(experts_ptr + group).to(tl.int64)
        rows = first + tl.arange(0, BM)
        inside = rows < end
        flat = tl.load(order_ptr + rows, mask=inside, other=0).to(tl.int64)
        n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
        r = tl.arange(0, BK)
        acc = tl.zeros((BM, BN), tl.float32)
        if expert >= 0:
            if GATED:
                gate = tl.load(weights_ptr + flat, mask=inside, other=0.0) * tl.load(scale_ptr + expert)
            weight = up_ptr + expert * stride_e + n[None, :] * stride_d
            for k in range(0, R, BK):
                ok = k + r < R
                at = hidden_ptr + rows[:, None].to(tl.int64) * R + k + r[None, :]
                a = tl.load(at, mask=inside[:, None] & ok[None, :], other=0.0)
                if GATED:
                    a = (activate(a.to(tl.float32), ACT) * gate[:, None]).to(hidden_ptr.dtype.element_ty)
                b = tl.load(weight + (k + r[:, None]) * stride_r, mask=ok[:, None] & (n[None, :] < D), other=0.0)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
            if GATED:
                bias = tl.load(bias_ptr + expert * D + n, mask=n < D, other=0.0).to(tl.float32)
                acc += gate[:, None] * bias[None, :]
        at = (flat // slots)[:, None] * D + n[None, :]
        mask = inside[:, None] & (n[None, :] < D)
        if BASE:
            acc += tl.load(base_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def hidden_backward_kernel(
    grad_ptr,
    hidden_ptr,
    weights_ptr,
    order_ptr,
    offsets_ptr,
    experts_ptr,
    scale_ptr,
    up_ptr,
    bias_ptr,
    dhidden_ptr,
    dgate_ptr,
    dweight_ptr,
    N,
    D,
    R,
    G,
    slots,
    stride_e,
    stride_d,
    stride_r,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    G2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dhidden[row] (all groups), and per column block the gradient of gate * scale_e (by row) and of gate (by flat)."""
    group, first, end = find_tile(tl.program_id(0), offsets_ptr, 0, G, BM, G2)
    if group < G:
        expert = tl.load(experts_ptr + group).to(tl.int64)
        if expert >= 0:
            block = tl.program_id(1).to(tl.int64)
            rows = first + tl.arange(0, BM)
            inside = rows < end
            flat = tl.load(order_ptr + rows, mask=inside, other=0).to(tl.int64)
            tokens = flat // slots
            n = block * BN + tl.arange(0, BN)
            d = tl.arange(0, BK)
            weight = up_ptr + expert * stride_e + n[None, :] * stride_r
            acc = tl.zeros((BM, BN), tl.float32)
            along_bias = tl.zeros((BM,), tl.float32)
            for k in range(0, D, BK):
                ok = k + d < D
                a = tl.load(
                    grad_ptr + tokens[:, None] * D + k + d[None, :], mask=inside[:, None] & ok[None, :], other=0.0
                )
                b = tl.load(weight + (k + d[:, None]) * stride_d, mask=ok[:, None] & (n[None, :] < R), other=0.0)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
                if block == 0:
                    bias = tl.load(bias_ptr + expert * D + k + d, mask=ok, other=0.0).to(tl.float32)
                    along_bias += tl.sum(a.to(tl.float32) * bias[None, :], 1)
            at = rows[:, None].to(tl.int64) * R + n[None, :]
            mask = inside[:, None] & (n[None, :] < R)
            h = tl.load(hidden_ptr + at, mask=mask, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + expert)
            gate = tl.load(weights_ptr + flat, mask=inside, other=0.0) * scale
            slope = acc * activate_slope(h, ACT) * gate[:, None]
            tl.store(dhidden_ptr + at, slope.to(dhidden_ptr.dtype.element_ty), mask=mask)
            dgate = tl.sum(tl.where(mask, acc * activate(h, ACT), 0.0), 1) + along_bias
            tl.store(dgate_ptr + block * N + rows, dgate, mask=inside)
            tl.store(dweight_ptr + block * N + flat, dgate * scale, mask=inside)


@triton.jit
def sum_rows_kernel(
    left_ptr,
    right_ptr,
    weights_ptr,
    dgate_ptr,
    order_ptr,
    offsets_ptr,
    experts_ptr,
    scale_ptr,
    product_ptr,
    bias_ptr,
    dscale_ptr,
    D,
    R,
    G,
    slots,
    parts,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """product[part, e, j, d]: left[row, j] * right[token, d] summed over every parts-th chunk of an adapter's rows.

    GATED: left is hidden, activated and gated here, right the gradient; bias [part, e, d] sums gate * gradient and
    dscale [part, e] weight * dgate. Otherwise left is dhidden, right x, and bias [part, e, j] sums left.
    """
    blocks = tl.cdiv(D, BN)
    j = (tl.program_id(0) // blocks) * BM + tl.arange(0, BM)
    d = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    expert = tl.program_id(1)
    part = tl.program_id(2)
    chunk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    side = tl.zeros((BN if GATED else BM,), tl.float32)
    dscale = 0.0
    # A few groups after a sort, up to KERNEL_GROUPS segments: those of other adapters cost one cached load each.
    for group in range(0, G):
        if tl.load(experts_ptr + group) == expert:
            begin = tl.load(offsets_ptr + group)
            end = tl.load(offsets_ptr + group + 1)
            for first in range(begin + part * BK, end, parts * BK):
                rows = first + chunk
                inside = rows < end
                flat = tl.load(order_ptr + rows, mask=inside, other=0).to(tl.int64)
                mask = inside[:, None] & (j[None, :] < R)
                a = tl.load(left_ptr + rows[:, None].to(tl.int64) * R + j[None, :], mask=mask, other=0.0)
                at = right_ptr + (flat // slots)[:, None] * D + d[None, :]
                b = tl.load(at, mask=inside[:, None] & (d[None, :] < D), other=0.0)
                if GATED:
                    weight = tl.load(weights_ptr + flat, mask=inside, other=0.0)
                    gate = weight * tl.load(scale_ptr + expert)
                    a = (activate(a.to(tl.float32), ACT) * gate[:, None]).to(left_ptr.dtype.element_ty)
                    side += tl.sum(gate[:, None] * b.to(tl.float32), 0)
                    dscale += tl.sum(weight * tl.load(dgate_ptr + rows, mask=inside, other=0.0), 0)
                else:
                    side += tl.sum(a.to(tl.float32), 0)
                acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    cell = part.to(tl.int64) * tl.num_programs(1) + expert
    at = product_ptr + (cell * R + j[:, None]) * D + d[None, :]
    tl.store(at, acc, mask=(j[:, None] < R) & (d[None, :] < D))
    if GATED:
        if tl.program_id(0) // blocks == 0:
            tl.store(bias_ptr + cell * D + d, side, mask=d < D)
        if tl.program_id(0) == 0:
            tl.store(dscale_ptr + cell, dscale)
    else:
        if tl.program_id(0) % blocks == 0:
            tl.store(bias_ptr + cell * R + j, side, mask=j < R)
