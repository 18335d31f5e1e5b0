"""Triton kernels of RoI-align, forward: the plan of the boxes (K0), bins (K1, K1L) and their mean (K1m).

In: boxes, then levels [B, n + H * W, C] with the plan's tables. Out: wy, wx, window; pooled features [R, P, Q, C].
Decision: a program owns one RoI and a block of channels, walks only the rows and columns with a weight, and adds all
levels before it rounds once. Neighbouring programs share the RoI, then the image, so features are read from L2.
Products run on tensor cores without losing the weights: a weight is split into a high and a low half of the features'
dtype, two half products cost what one tf32 product does (half the depth per instruction), features are used as they
lie in memory, and 16 bits of every weight count (tf32 keeps 11). Float32 features use float32 products.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("H", "W", "P", "Q", "sampling"))
def plan_kernel(
    boxes_ptr,
    wy_ptr,
    wx_ptr,
    window_ptr,
    H,
    W,
    P,
    Q,
    scale,
    sampling,
    ALIGNED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    MEAN: tl.constexpr,
    BP: tl.constexpr,
    BI: tl.constexpr,
):
    """Tables of one axis of one RoI; the grid is 2 * R, rows (y) first. Must be compiled without fused multiply-add:
    ceil(bin) and the edges at -1 and the number of cells are knife edges that one rounding can cross."""
    roi = (tl.program_id(0) // 2).to(tl.int64)
    axis = tl.program_id(0) % 2
    cells = tl.where(axis == 0, H, W)
    bins = tl.where(axis == 0, P, Q)
    shift = 0.5 if ALIGNED else 0.0
    start = tl.load(boxes_ptr + roi * 4 + 1 - axis) * scale - shift
    length = tl.load(boxes_ptr + roi * 4 + 3 - axis) * scale - shift - start
    if not ALIGNED:
        # Not tl.maximum, which would turn a NaN into 1.
        length = tl.where(length < 1.0, 1.0, length)
    size = tl.div_rn(length, bins.to(tl.float32))
    if ADAPTIVE:
        samples = tl.ceil(size)
        finite = (samples > 0.0) & (samples < float("inf"))
        samples = tl.where(finite, samples, 1.0)
        step = tl.div_rn(size, samples)
        # Adaptive samples are more than half a cell apart, so only so many of a huge box can fall on the grid.
        count = tl.where(finite, tl.minimum(samples, 2.0 * (cells + 1) + 4.0), 0.0).to(tl.int32)
    else:
        samples = sampling.to(tl.float32)
        count = sampling
    first_cell = cells
    last_cell = 0
    for i0 in range(0, cells, BI):
        cell = i0 + tl.arange(0, BI)
        mean = tl.zeros((BI,), tl.float32)
        for p0 in range(0, bins, BP):
            p = p0 + tl.arange(0, BP)
            first = start + p.to(tl.float32) * size
            table = tl.zeros((BP, BI), tl.float32)
            if ADAPTIVE:
                lowest = tl.floor(tl.div_rn(-1.0 - first, tl.zeros_like(first) + step) - 0.5) - 1.0
                lowest = tl.where((lowest > 0.0) & (lowest < float("inf")), lowest, 0.0)
            else:
                lowest = tl.zeros_like(first)
            for k in range(0, count):
                index = lowest + k
                sample = first + tl.div_rn((index + 0.5) * size, tl.zeros_like(first) + samples)
                valid = (sample >= -1.0) & (sample <= cells) & (index < samples) & (p < bins)
                at = tl.minimum(tl.maximum(sample, 0.0), cells - 1.0)
                hat = tl.maximum(1.0 - tl.abs(at[:, None] - cell[None, :]), 0.0)
                table += tl.where(valid[:, None] & (cell < cells)[None, :], hat, 0.0)
            table = tl.div_rn(table, tl.zeros_like(table) + samples)
            if MEAN:
                mean += tl.sum(table, 0)
            else:
                place = (roi * bins + p[:, None]) * cells + cell[None, :]
                mask = (p < bins)[:, None] & (cell < cells)[None, :]
                tl.store(wy_ptr + place, table, mask=mask & (axis == 0))
                tl.store(wx_ptr + place, table, mask=mask & (axis == 1))
            used = tl.max(table, 0) > 0.0
            first_cell = tl.minimum(first_cell, tl.min(tl.where(used, cell, cells)))
            last_cell = tl.maximum(last_cell, tl.max(tl.where(used, cell + 1, 0)))
        if MEAN:
            mean = tl.div_rn(mean, tl.zeros_like(mean) + bins)
            tl.store(wy_ptr + roi * cells + cell, mean, mask=(cell < cells) & (axis == 0))
            tl.store(wx_ptr + roi * cells + cell, mean, mask=(cell < cells) & (axis == 1))
    tl.store(window_ptr + roi * 4 + axis * 2, tl.minimum(first_cell, last_cell))
    tl.store(window_ptr + roi * 4 + axis * 2 + 1, last_cell)


@triton.jit
def image_of(roi, offsets_ptr, B, BLOCK: tl.constexpr):
    """The image of a RoI: how many images end at or before it."""
    found = 0
    for b0 in range(0, B, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        ends = tl.load(offsets_ptr + 1 + b, mask=b < B, other=9223372036854775807)
        found += tl.sum((ends <= roi).to(tl.int32))
    # Offsets on a GPU are not checked: one that ends early must not lead outside the features.
    return tl.minimum(found, B - 1).to(tl.int64)


@triton.jit
def nonzero_range(table_ptr, begin, end, stride, BLOCK: tl.constexpr):
    """Half-open range of the nonzero entries of table[begin:end]; (end, begin) when there is none."""
    low = end
    high = begin
    for s in range(begin, end, BLOCK):
        at = s + tl.arange(0, BLOCK)
        used = tl.load(table_ptr + at * stride, mask=at < end, other=0.0) != 0.0
        low = tl.minimum(low, tl.min(tl.where(used, at, end)))
        high = tl.maximum(high, tl.max(tl.where(used, at + 1, begin)))
    return low, high


@triton.jit
def times(weights, features, acc, EXACT: tl.constexpr):
    """acc + weights (float32) @ features; see the head of the file for the two halves."""
    if EXACT:
        return tl.dot(weights, features, acc, input_precision="ieee")
    high = weights.to(features.dtype)
    low = (weights - high.to(tl.float32)).to(features.dtype)
    return tl.dot(low, features, tl.dot(high, features, acc))


# Sizes that do not bear on alignment are compiled alike when they are 1 or a multiple of 16, so that the compile gate
# lists every variant that a launch can need.
@triton.jit(do_not_specialize=("B", "H", "W", "P", "Q", "prefix"))
def forward_kernel(
    x0_ptr,
    x1_ptr,
    x2_ptr,
    x3_ptr,
    wy_ptr,
    wx_ptr,
    window_ptr,
    offsets_ptr,
    out_ptr,
    B,
    C,
    H,
    W,
    P,
    Q,
    prefix,
    stride_b,
    stride_t,
    share,
    LEVELS: tl.constexpr,
    EXACT: tl.constexpr,
    BQ: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
):
    """out[roi, p, q, c] = share * sum over levels, rows i, columns j of wy[p, i] wx[q, j] x[image, i, j, c]."""
    blocks = tl.cdiv(C, BC)
    roi = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    i0, i1 = tl.load(window_ptr + roi * 4), tl.load(window_ptr + roi * 4 + 1)
    j0, j1 = tl.load(window_ptr + roi * 4 + 2), tl.load(window_ptr + roi * 4 + 3)
    start = image_of(roi, offsets_ptr, B, 128) * stride_b
    for p in range(P):
        rows_ptr = wy_ptr + (roi * P + p) * H
        low, high = nonzero_range(rows_ptr, i0, i1, 1, 32)
        for q0 in range(0, Q, BQ):
            q = q0 + tl.arange(0, BQ)
            acc = tl.zeros((BQ, BC), tl.float32)
            for js in range(j0, j1, BJ):
                j = js + tl.arange(0, BJ)
                columns = tl.load(
                    wx_ptr + roi * Q * W + (q[:, None] * W + j[None, :]),
                    mask=(q < Q)[:, None] & (j < j1)[None, :],
                    other=0.0,
                )  # [BQ, BJ]
                mask = (j < j1)[:, None] & (c < C)[None, :]
                # The offset of a row is int64 and scalar; inside a row 32 bits are enough and take half the registers.
                place = j[:, None] * stride_t + c[None, :]  # [BJ, BC]
                for i in range(low, high):
                    row = start + (prefix + i * W).to(tl.int64) * stride_t
                    cells = tl.load(x0_ptr + row + place, mask=mask, other=0.0)
                    strip = times(columns, cells, tl.zeros((BQ, BC), tl.float32), EXACT)
                    if LEVELS > 1:
                        cells = tl.load(x1_ptr + row + place, mask=mask, other=0.0)
                        strip = times(columns, cells, strip, EXACT)
                    if LEVELS > 2:
                        cells = tl.load(x2_ptr + row + place, mask=mask, other=0.0)
                        strip = times(columns, cells, strip, EXACT)
                    if LEVELS > 3:
                        cells = tl.load(x3_ptr + row + place, mask=mask, other=0.0)
                        strip = times(columns, cells, strip, EXACT)
                    acc += tl.load(rows_ptr + i) * strip
            out = (acc * share).to(out_ptr.dtype.element_ty)
            place = q[:, None] * C + c[None, :]
            tl.store(out_ptr + (roi * P + p) * Q * C + place, out, mask=(q < Q)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=("B", "H", "W", "prefix"))
def mean_kernel(
    x0_ptr,
    x1_ptr,
    x2_ptr,
    x3_ptr,
    wy_ptr,
    wx_ptr,
    window_ptr,
    offsets_ptr,
    out_ptr,
    B,
    C,
    H,
    W,
    prefix,
    stride_b,
    stride_t,
    share,
    LEVELS: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
):
    """out[roi, c] = share * sum over levels, i, j of wy[i] wx[j] x[image, i, j, c]: one bin, every cell read once."""
    blocks = tl.cdiv(C, BC)
    roi = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    i0, i1 = tl.load(window_ptr + roi * 4), tl.load(window_ptr + roi * 4 + 1)
    j0, j1 = tl.load(window_ptr + roi * 4 + 2), tl.load(window_ptr + roi * 4 + 3)
    start = image_of(roi, offsets_ptr, B, 128) * stride_b
    acc = tl.zeros((BJ, BC), tl.float32)
    for js in range(j0, j1, BJ):
        j = js + tl.arange(0, BJ)
        columns = tl.load(wx_ptr + roi * W + j, mask=j < j1, other=0.0)[:, None]
        mask = (j < j1)[:, None] & (c < C)[None, :]
        place = j[:, None] * stride_t + c[None, :]
        for i in range(i0, i1):
            row = start + (prefix + i * W).to(tl.int64) * stride_t
            cell = tl.load(x0_ptr + row + place, mask=mask, other=0.0).to(tl.float32)
            if LEVELS > 1:
                cell += tl.load(x1_ptr + row + place, mask=mask, other=0.0).to(tl.float32)
            if LEVELS > 2:
                cell += tl.load(x2_ptr + row + place, mask=mask, other=0.0).to(tl.float32)
            if LEVELS > 3:
                cell += tl.load(x3_ptr + row + place, mask=mask, other=0.0).to(tl.float32)
            acc += (tl.load(wy_ptr + roi * H + i) * columns) * cell
    pooled = tl.sum(acc, 0) * share
    tl.store(out_ptr + roi * C + c, pooled.to(out_ptr.dtype.element_ty), mask=c < C)
