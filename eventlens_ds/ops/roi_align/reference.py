"""RoI-align in plain torch: the specification that every other backend is tested against.

In: levels [B, n + H * W, C] and boxes sorted by image. Out: a plan of the boxes, pooled features, and their gradient.
Decision: the operation is separable, also with border clamping and the out-of-range rule, because both act on each
axis alone: out[p, q] = sum_ij wy[p, i] wx[q, j] F[i, j]. A plan (wy, wx: no gradient, shared by all levels of a grid)
is made first. Its products are a sparse matrix from cells to bins, so forward is one sum over a few weighted rows per
bin and backward the same sum with the matrix transposed: cells without weight are never read, every row of the result
is written once, and the order of each sum is fixed. Accumulation is float32 (float64 for float64), rounded once.
He et al., Mask R-CNN, 2017; constants and corner cases follow torchvision.ops.roi_align. The separable form is also
used by google-research/scenic (which pads with zeros instead).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

TERMS_AT_ONCE = 2**15
"""Products of weights that are formed at a time: they stay in cache, and torch starts no threads for so few."""


class RoIPlan(NamedTuple):
    """Interpolation weights of R boxes on a grid of H x W cells, in the dtype of the boxes.

    wy [R, P, H] and wx [R, Q, W]: the share of each row and column in each bin; P = Q = 1 for the mean over bins.
    window int32[R, 4]: half-open rows i0, i1 and columns j0, j1 that have a weight (0, 0 when none has).
    """

    wy: torch.Tensor
    wx: torch.Tensor
    window: torch.Tensor


def plan(
    boxes: torch.Tensor,
    grid_hw: tuple[int, int],
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    mean: bool,
) -> RoIPlan:
    """The plan of boxes [R, 4] (xyxy, float32 or float64) for output_size = (P, Q) bins.

    spatial_scale turns box units into cells; sampling_ratio <= 0 takes ceil(bin size) samples per bin and axis.
    The mean over bins is a plan of its own, since the mean of products over all (p, q) has rank one.
    """
    corners = boxes * spatial_scale - (0.5 if aligned else 0.0)
    x1, y1, x2, y2 = corners.unbind(-1)
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = width.clamp(min=1.0), height.clamp(min=1.0)
    wy = _axis_weights(y1, height, output_size[0], grid_hw[0], sampling_ratio)
    wx = _axis_weights(x1, width, output_size[1], grid_hw[1], sampling_ratio)
    if mean:
        wy, wx = wy.mean(1, keepdim=True), wx.mean(1, keepdim=True)
    return RoIPlan(wy, wx, torch.cat([_support(wy), _support(wx)], 1))


def forward(
    levels: Sequence[torch.Tensor],
    wy: torch.Tensor,
    wx: torch.Tensor,
    window: torch.Tensor,
    offsets: torch.Tensor,
    grid_hw: tuple[int, int],
    num_prefix_tokens: int,
) -> torch.Tensor:
    """[R, P, Q, C] in the dtype of levels: the mean over levels [B, n + H * W, C] of the planned sums."""
    batch, tokens, channels = levels[0].shape
    dtype = torch.promote_types(levels[0].dtype, torch.float32)
    bins, cells, weights = _terms(wy.to(dtype), wx.to(dtype), offsets, grid_hw, num_prefix_tokens)
    # Pooling is linear: averaging the levels first costs one application for all of them.
    features = levels[0].to(dtype)
    for level in levels[1:]:
        features = features + level
    shape = (wy.shape[0], wy.shape[1], wx.shape[1])
    pooled = _weighted_sums(
        features.reshape(batch * tokens, channels), bins, cells, weights / len(levels), shape[0] * shape[1] * shape[2]
    )
    return pooled.view(*shape, channels).to(levels[0].dtype)


def backward(
    grad: torch.Tensor,
    wy: torch.Tensor,
    wx: torch.Tensor,
    window: torch.Tensor,
    offsets: torch.Tensor,
    grid_hw: tuple[int, int],
    num_prefix_tokens: int,
    batch: int,
    num_levels: int,
) -> torch.Tensor:
    """[B, n + H * W, C], the gradient of each level for grad [R, P, Q, C], in its dtype; prefix rows are zero."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    bins, cells, weights = _terms(wy.to(dtype), wx.to(dtype), offsets, grid_hw, num_prefix_tokens)
    # Stable: the terms of a cell stay in the order of the boxes, whatever else is in the batch.
    order = torch.argsort(cells, stable=True)
    tokens, channels = num_prefix_tokens + grid_hw[0] * grid_hw[1], grad.shape[-1]
    flat = grad.to(dtype).reshape(-1, channels)
    cells, bins, weights = _select(order, cells, bins, weights)
    spread = _weighted_sums(flat, cells, bins, weights / num_levels, batch * tokens)
    return spread.view(batch, tokens, channels).to(grad.dtype)


def _axis_weights(
    start: torch.Tensor, length: torch.Tensor, bins: int, cells: int, sampling_ratio: int
) -> torch.Tensor:
    """[R, bins, cells] weights along one axis for intervals [start, start + length) in cells.

    A sample outside [-1, cells] weighs nothing (both ends count as inside); a sample inside is clamped to the
    border and shared between the two nearest cells. Comparisons with NaN are false, so a NaN box gives zeros.
    """
    bin_size = (length / bins)[:, None, None]
    first = start[:, None, None] + torch.arange(bins, device=start.device, dtype=start.dtype)[None, :, None] * bin_size
    if sampling_ratio > 0:
        grid = torch.full_like(bin_size, float(sampling_ratio))
        index = torch.arange(sampling_ratio, device=start.device, dtype=start.dtype)[None, None, :]
    else:
        grid = torch.ceil(bin_size)
        index = _adaptive_indices(first, bin_size, grid, cells)
    samples = first + (index + 0.5) * bin_size / grid
    valid = (samples >= -1.0) & (samples <= float(cells)) & (index < grid)
    centre = torch.arange(cells, device=start.device, dtype=start.dtype)
    hat = (1.0 - (samples.clamp(0.0, cells - 1.0)[..., None] - centre).abs()).clamp(min=0.0)
    total = torch.where(valid[..., None], hat, 0.0).sum(2)
    return torch.where(grid > 0, total / grid.clamp(min=1.0), 0.0)


def _adaptive_indices(first: torch.Tensor, bin_size: torch.Tensor, grid: torch.Tensor, cells: int) -> torch.Tensor:
    """[R, bins, N] indices of the samples that can fall on the grid, for `grid` = ceil(bin_size) samples per bin.

    Samples lie more than half a cell apart when a bin has several, so at most 2 * (cells + 1) + 1 of them are in
    range: N stays bounded however large a box is.
    """
    finite = torch.isfinite(grid) & (grid > 0)
    largest = int(torch.where(finite, grid, 0.0).amax().item()) if grid.numel() else 0
    count = min(largest, 2 * (cells + 1) + 4)
    step = torch.where(finite, bin_size / grid, 1.0)
    lowest = torch.floor((-1.0 - first) / step - 0.5) - 1.0
    lowest = torch.where(finite & torch.isfinite(lowest), lowest, 0.0).clamp(min=0.0)
    return lowest + torch.arange(count, device=first.device, dtype=first.dtype)


def _support(table: torch.Tensor) -> torch.Tensor:
    """int32[R, 2]: the half-open range of cells of table [R, bins, cells] that has a weight."""
    cells = table.shape[2]
    if not table.numel():
        return torch.zeros(table.shape[0], 2, dtype=torch.int32, device=table.device)
    used = (table != 0).any(1)
    cell = torch.arange(cells, device=table.device, dtype=torch.int32)
    begin = torch.where(used, cell, cells).amin(1)
    end = torch.where(used, cell + 1, 0).amax(1)
    return torch.stack([begin.clamp(max=end), end], 1)


def _terms(
    wy: torch.Tensor, wx: torch.Tensor, offsets: torch.Tensor, grid_hw: tuple[int, int], num_prefix_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nonzero entries (bin, cell, weight) of the matrix from flat tokens to flat bins, ordered by bin, then cell.

    Flat: bins count over [R, P, Q], cells over [B, n + H * W].
    """
    device, (height, width) = wy.device, grid_hw
    tokens = num_prefix_tokens + height * width
    image = torch.searchsorted(offsets[1:].to(device), torch.arange(len(wy), device=device), right=True)
    first = image * tokens + num_prefix_tokens
    rows, wy = _nonzero_first(wy)
    columns, wx = _nonzero_first(wx)
    box_bins, most = wy.shape[1] * wx.shape[1], max(1, wy.shape[2] * wx.shape[2])
    step = max(1, TERMS_AT_ONCE // (box_bins * most))
    found = []
    for begin in range(0, max(1, len(wy)), step):
        part = slice(begin, begin + step)
        weights = wy[part, :, None, :, None] * wx[part, None, :, None, :]
        cells = (first[part, None, None] + rows[part] * width)[:, :, None, :, None] + columns[part, None, :, None, :]
        kept = weights.flatten().nonzero()[:, 0]
        found.append((kept // most + begin * box_bins, *_select(kept, cells.flatten(), weights.flatten())))
    bins, cells, weights = (torch.cat(parts) for parts in zip(*found))
    return bins, cells, weights


def _select(index: torch.Tensor, *lists: torch.Tensor) -> list[torch.Tensor]:
    """Entries of one-dimensional lists; index_select needs no threads for that, unlike list[index]."""
    return [entries.index_select(0, index) for entries in lists]


def _nonzero_first(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cells, weights) [R, bins, most]: per bin its nonzero cells in order, then zeros up to the longest bin."""
    used = table != 0
    most = int(used.sum(-1).amax()) if table.numel() else 0
    cells = torch.argsort((~used).to(torch.uint8), dim=-1, stable=True)[..., :most]
    return cells, table.gather(-1, cells)


def _weighted_sums(
    x: torch.Tensor, rows: torch.Tensor, sources: torch.Tensor, weights: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """[num_rows, C]: sum of weights * x[sources] over the terms of each row; rows int64[N] are ascending.

    embedding_bag adds the terms of a bag in order, whichever thread has it, and never holds them all at once.
    """
    if not num_rows or not len(rows):
        return x.new_zeros(num_rows, x.shape[1])
    counts = torch.bincount(rows, minlength=num_rows)
    starts = counts.cumsum(0) - counts
    return F.embedding_bag(sources, x.detach(), starts, mode="sum", per_sample_weights=weights)
