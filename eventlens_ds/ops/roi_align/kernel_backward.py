"""Triton kernels of RoI-align, backward (K2): a gather by the owner of each row of cells, without atomics.

In: grad [R, P, Q, C] and the plan's tables. Out: the gradient of one level, [B, n + H * W, C].
Decision: a program owns a piece of one row of one image and adds its RoIs in their order, so each element is written
once, prefix rows included, and the bits do not depend on scheduling. An image with many more RoIs than the others is
cut into jobs of a fixed number of RoIs, whose float32 parts are added in order by a second kernel: one hot image does
not keep a few programs busy while the rest of the chip waits.
The products are tf32 for half precision: the bf16 store that follows loses four times as much.
"""

import triton
import triton.language as tl

from eventlens_ds.ops.roi_align.kernel_forward import nonzero_range


@triton.jit
def rois_of(image, offsets_ptr, R, mask):
    """Half-open range of the RoIs of an image, inside [0, R) also when the offsets, unchecked on a GPU, are wrong."""
    begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + image, mask=mask, other=0), 0), R)
    return begin, tl.minimum(tl.load(offsets_ptr + image + 1, mask=mask, other=0), R)


@triton.jit(do_not_specialize=("B", "R", "chunk", "extra"))
def schedule_kernel(offsets_ptr, jobs_ptr, parts_ptr, B, R, chunk, extra, BLOCK: tl.constexpr):
    """One program. jobs[B + extra, 4] = image, first RoI, end, part (-1: the job is the whole image); the first job of
    image b is jobs[b], the later ones follow from jobs[B]. parts[B, 2] = first part of an image, how many."""
    jobs_before = 0
    parts_before = 0
    for b0 in range(0, B, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        begin, end = rois_of(b, offsets_ptr, R, b < B)
        later = (tl.maximum(end - begin - 1, 0) // chunk).to(tl.int32)
        # Never with offsets that tile the RoIs; others must not write beyond the jobs.
        later = tl.where(jobs_before + tl.cumsum(later, 0) <= extra, later, 0)
        parts = tl.where(later > 0, later + 1, 0)
        job = B + jobs_before + tl.cumsum(later, 0) - later
        part = parts_before + tl.cumsum(parts, 0) - parts
        tl.store(parts_ptr + b * 2, part.to(tl.int64), mask=b < B)
        tl.store(parts_ptr + b * 2 + 1, parts.to(tl.int64), mask=b < B)
        for k in range(0, tl.max(later) + 1):
            row = tl.where(k == 0, b, job + k - 1).to(tl.int64)
            mask = (b < B) & (k <= later) & (row < B + extra)
            tl.store(jobs_ptr + row * 4, b.to(tl.int64), mask=mask)
            tl.store(jobs_ptr + row * 4 + 1, begin + k * chunk, mask=mask)
            tl.store(jobs_ptr + row * 4 + 2, tl.minimum(begin + (k + 1) * chunk, end), mask=mask)
            tl.store(jobs_ptr + row * 4 + 3, tl.where(later > 0, part + k, -1).to(tl.int64), mask=mask)
        jobs_before += tl.sum(later)
        parts_before += tl.sum(parts)
    for e0 in range(jobs_before, extra, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        tl.store(jobs_ptr + (B + e) * 4, tl.zeros((BLOCK,), tl.int64) - 1, mask=e < extra)


@triton.jit(do_not_specialize=("R", "H", "W", "P", "Q", "prefix"))
def backward_kernel(
    grad_ptr,
    wy_ptr,
    wx_ptr,
    window_ptr,
    offsets_ptr,
    jobs_ptr,
    parts_ptr,
    out_ptr,
    R,
    C,
    H,
    W,
    P,
    Q,
    prefix,
    share,
    SPLIT: tl.constexpr,
    MEAN: tl.constexpr,
    EXACT: tl.constexpr,
    BQ: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
):
    """out[image, prefix + i * W + j, c] = share * sum over RoIs, p, q of wy[p, i] wx[q, j] grad[roi, p, q, c].

    Grid: channel block fastest, then BJ columns, row, job. parts_ptr: float32 [parts, H * W, C], for SPLIT only.
    """
    blocks, pieces = tl.cdiv(C, BC), tl.cdiv(W, BJ)
    pid = tl.program_id(0)
    c = (pid % blocks) * BC + tl.arange(0, BC)
    js = (pid // blocks % pieces) * BJ
    row = pid // (blocks * pieces) % H
    job = (pid // (blocks * pieces * H)).to(tl.int64)
    if SPLIT:
        image = tl.load(jobs_ptr + job * 4)
        begin = tl.where(image < 0, 0, tl.load(jobs_ptr + job * 4 + 1))
        end = tl.where(image < 0, 0, tl.load(jobs_ptr + job * 4 + 2))
        part = tl.load(jobs_ptr + job * 4 + 3)
    else:
        image = job
        begin, end = rois_of(job, offsets_ptr, R, True)
        part = -1
    j = js + tl.arange(0, BJ)
    acc = tl.zeros((BJ, BC), tl.float32)
    for roi in range(begin, end):
        i0, i1 = tl.load(window_ptr + roi * 4), tl.load(window_ptr + roi * 4 + 1)
        j0, j1 = tl.load(window_ptr + roi * 4 + 2), tl.load(window_ptr + roi * 4 + 3)
        if (row >= i0) & (row < i1) & (js < j1) & (js + BJ > j0):
            if MEAN:
                columns = tl.load(wx_ptr + roi * W + j, mask=j < W, other=0.0)
                bins = tl.load(grad_ptr + roi * C + c, mask=c < C, other=0.0).to(tl.float32)
                acc += (tl.load(wy_ptr + roi * H + row) * columns)[:, None] * bins[None, :]
            else:
                low, high = nonzero_range(wy_ptr + roi * P * H + row, 0, P, H, 32)
                for q0 in range(0, Q, BQ):
                    q = q0 + tl.arange(0, BQ)
                    mask = (q < Q)[:, None] & (c < C)[None, :]
                    strip = tl.zeros((BQ, BC), tl.float32)
                    # As in the forward pass: int64 for the scalar offset, 32 bits inside a row of bins.
                    place = q[:, None] * C + c[None, :]
                    for p in range(low, high):
                        bins_ptr = grad_ptr + (roi * P + p) * Q * C
                        bins = tl.load(bins_ptr + place, mask=mask, other=0.0).to(tl.float32)  # [BQ, BC]
                        strip += tl.load(wy_ptr + (roi * P + p) * H + row) * bins
                    columns = tl.load(
                        wx_ptr + roi * Q * W + (q[None, :] * W + j[:, None]),
                        mask=(q < Q)[None, :] & (j < W)[:, None],
                        other=0.0,
                    )  # [BJ, BQ]
                    if EXACT:
                        acc = tl.dot(columns, strip, acc, input_precision="ieee")
                    else:
                        acc = tl.dot(columns, strip, acc, input_precision="tf32")
    mask = (j < W)[:, None] & (c < C)[None, :] & (image >= 0)
    place = j[:, None] * C + c[None, :]
    if part >= 0:
        tl.store(parts_ptr + (part * H + row) * W * C + place, acc, mask=mask)
    else:
        first = image * (prefix + H * W) + prefix + row * W
        tl.store(out_ptr + first * C + place, (acc * share).to(out_ptr.dtype.element_ty), mask=mask)
    if (row == 0) & (js == 0):
        # The first job of every image is jobs[image], whether it is the whole image or not.
        first = image * (prefix + H * W)
        for t in range(0, tl.where(job == image, prefix, 0)):
            nothing = tl.zeros((BC,), out_ptr.dtype.element_ty)
            tl.store(out_ptr + (first + t) * C + c, nothing, mask=c < C)


@triton.jit(do_not_specialize=("cells", "prefix"))
def add_parts_kernel(sums_ptr, parts_ptr, out_ptr, C, cells, prefix, share, BI: tl.constexpr, BC: tl.constexpr):
    """Adds the parts of images that were cut, in order; sums_ptr is schedule_kernel's parts. Grid: channel block, BI
    cells, image. Other images are left as they are."""
    blocks, pieces = tl.cdiv(C, BC), tl.cdiv(cells, BI)
    pid = tl.program_id(0)
    c = (pid % blocks) * BC + tl.arange(0, BC)
    cell = (pid // blocks % pieces) * BI + tl.arange(0, BI)
    image = (pid // (blocks * pieces)).to(tl.int64)
    first, count = tl.load(sums_ptr + image * 2), tl.load(sums_ptr + image * 2 + 1)
    mask = (cell < cells)[:, None] & (c < C)[None, :]
    acc = tl.zeros((BI, BC), tl.float32)
    for part in range(first, first + count):
        acc += tl.load(parts_ptr + (part * cells + cell[:, None]) * C + c[None, :], mask=mask, other=0.0)
    place = (image * (prefix + cells) + prefix + cell[:, None]) * C + c[None, :]
    tl.store(out_ptr + place, (acc * share).to(out_ptr.dtype.element_ty), mask=mask & (count > 0))
