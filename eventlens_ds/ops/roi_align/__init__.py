"""RoI-align on the token grid of a vision tower: the typed front door.

In: tokens as a tower gives them (class token first or absent), boxes in pixels sorted by image, offsets per image.
Out: one feature grid per box, or its mean. Channels stay last, so nothing is transposed on the way.
Decision: the plan (interpolation weights) is computed in float32 from float32 boxes and shared by all levels;
accumulation is float32 and the result is rounded once to the dtype of the features. Arguments are checked before
anything is launched; what can only be checked by reading values is checked where that costs no device sync.
Backends: see ops/dispatch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from eventlens_ds.errors import ArgumentError
from eventlens_ds.ops.roi_align import op

__all__ = ["roi_align", "roi_align_nchw"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def roi_align(
    tokens: torch.Tensor | Sequence[torch.Tensor],
    boxes: torch.Tensor,
    offsets: torch.Tensor,
    grid_hw: tuple[int, int],
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int = 2,
    aligned: bool = True,
    pool: Literal["mean"] | None = None,
    num_prefix_tokens: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Pool the features of boxes from token grids (He et al., Mask R-CNN, 2017; semantics of torchvision).

    tokens            [B, n + H * W, C], row-major grid after n prefix tokens, or several such levels, averaged. Any
                      strides with dense channels; float32, bfloat16, float16, or float64 (not in Triton)
    boxes             [R, 4] float32 xyxy, sorted by image, in the units that spatial_scale turns into cells. Float64 is
                      taken as it is for float64 tokens and rounded otherwise
    offsets           int64[B + 1]: boxes of image b are offsets[b]:offsets[b + 1]; on the device of tokens or the CPU
    output_size       bins (P, Q); sampling_ratio: samples per bin and axis, <= 0 takes ceil(bin size)
    aligned           shift by half a cell, so that pixel centres are exact; False is the older convention
    pool              "mean" averages the bins
    backend           see ops/dispatch.py; None chooses

    Returns [R, P, Q, C], or [R, C] with pool="mean", in the dtype of tokens, also under autocast. A box with NaN gives
    zeros; samples outside the grid by more than one cell count as zero. A cell outside the smallest rectangle that
    holds all cells with a weight is not read, so a NaN or Inf there does not matter.
    Differentiable for tokens (prefix tokens get zero), not for boxes. Both passes give the same bits each time.
    Raises ArgumentError when the arguments do not fit together. The values of offsets are checked when they lie on the
    CPU and no graph is being captured; elsewhere a check would cost a device sync, and offsets that do not tile the
    boxes give wrong features, but touch no memory outside the arguments.
    """
    levels = [tokens] if isinstance(tokens, torch.Tensor) else list(tokens)
    _check_levels(levels, grid_hw, num_prefix_tokens)
    bins = (output_size, output_size) if isinstance(output_size, int) else (output_size[0], output_size[1])
    if min(*bins, *grid_hw) < 1:
        raise ArgumentError(f"roi_align: bins {bins} on a grid of {tuple(grid_hw)}: both need at least one")
    if pool not in (None, "mean"):
        raise ArgumentError(f"roi_align: pool is None or 'mean', not {pool!r}")
    _check_boxes(boxes, offsets, levels[0])
    name = op.choose(backend, levels[0])
    if levels[0].dtype != torch.float64:
        boxes = boxes.float()
    size = (grid_hw[0], grid_hw[1])
    tables = op.plan(boxes, size, bins, spatial_scale, sampling_ratio, aligned, pool == "mean", name)
    pooled = op.pool(levels, tables, offsets, size, num_prefix_tokens, name)
    return pooled.flatten(0, 2) if pool == "mean" else pooled


def roi_align_nchw(
    input: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> torch.Tensor:
    """The call of torchvision.ops.roi_align: input [N, C, H, W], boxes [K, 5] (image, x1, y1, x2, y2) or a list of
    [L, 4]; returns [K, C, P, Q] in the order of the boxes. Unlike torchvision it takes bfloat16 and boxes of another
    dtype. The input is copied to channels last unless it already is. Raises ArgumentError for an image index outside
    [0, N), which is checked where `roi_align` checks offsets.
    """
    if isinstance(boxes, torch.Tensor):
        if boxes.ndim != 2 or boxes.shape[-1] != 5:
            raise ArgumentError(f"roi_align_nchw: boxes must be [K, 5] or a list of [L, 4], got {list(boxes.shape)}")
        image, corners = boxes[:, 0].long(), boxes[:, 1:]
    else:
        image = torch.cat([torch.full((len(b),), i, dtype=torch.int64, device=b.device) for i, b in enumerate(boxes)])
        corners = torch.cat([b.reshape(-1, 4) for b in boxes])
    batch, _, height, width = input.shape
    if _readable(image) and image.numel() and not 0 <= int(image.min()) <= int(image.max()) < batch:
        raise ArgumentError(f"roi_align_nchw: images {int(image.min())} to {int(image.max())} outside [0, {batch})")
    order = torch.argsort(image, stable=True)
    pooled = roi_align(
        input.flatten(2).transpose(1, 2).contiguous(),
        corners.to(torch.promote_types(corners.dtype, torch.float32))[order],
        torch.searchsorted(image[order], torch.arange(batch + 1, device=image.device)),
        (height, width),
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    return pooled[torch.argsort(order)].permute(0, 3, 1, 2)


def _check_levels(levels: list[torch.Tensor], grid_hw: tuple[int, int], num_prefix_tokens: int) -> None:
    if not levels:
        raise ArgumentError("roi_align: at least one level of tokens is needed, got none")
    first, expected = levels[0], num_prefix_tokens + grid_hw[0] * grid_hw[1]
    for level in levels:
        if level.ndim != 3 or level.shape[1] != expected:
            raise ArgumentError(
                f"roi_align: tokens are {list(level.shape)}, expected [B, {expected}, C] for a grid of "
                f"{grid_hw[0]} x {grid_hw[1]} after {num_prefix_tokens} prefix token(s)"
            )
        if level.dtype not in DTYPES:
            raise ArgumentError(f"roi_align: tokens are {level.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if level.shape != first.shape:
            raise ArgumentError(f"roi_align: levels differ: {list(first.shape)} and {list(level.shape)}")
        if level.dtype != first.dtype or level.device != first.device:
            raise ArgumentError(
                f"roi_align: levels differ: {first.dtype} on {first.device} and {level.dtype} on {level.device}"
            )
        if level.shape[2] > 1 and level.stride(2) != 1:
            raise ArgumentError(f"roi_align: channels of tokens must be dense: stride 1, got {level.stride(2)}")


def _check_boxes(boxes: torch.Tensor, offsets: torch.Tensor, level: torch.Tensor) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ArgumentError(f"roi_align: boxes must be [R, 4], got {list(boxes.shape)}")
    if boxes.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"roi_align: boxes must be float32, got {boxes.dtype} (too coarse for pixel coordinates)")
    if boxes.device != level.device:
        raise ArgumentError(f"roi_align: boxes are on {boxes.device}, tokens on {level.device}")
    batch = level.shape[0]
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or offsets.shape[0] != batch + 1:
        raise ArgumentError(
            f"roi_align: offsets are {offsets.dtype}{list(offsets.shape)}, expected torch.int64[{batch + 1}] for "
            f"{batch} image(s)"
        )
    if offsets.device.type != "cpu" and offsets.device != level.device:
        raise ArgumentError(f"roi_align: offsets are on {offsets.device}, tokens on {level.device}")
    if _readable(offsets):
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != boxes.shape[0]:
            raise ArgumentError(
                f"roi_align: offsets run from {bounds[0]} to {bounds[-1]}, expected 0 to {boxes.shape[0]} boxes"
            )
        for start, end in zip(bounds, bounds[1:]):
            if end < start:
                raise ArgumentError(f"roi_align: offsets fall from {start} to {end}; boxes must be sorted by image")


def _readable(values: torch.Tensor) -> bool:
    """Whether values can be looked at without a device sync or a break in a captured graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
