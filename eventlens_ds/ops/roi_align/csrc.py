"""RoI-align by the compiled extension: the C++ kernels on a CPU, the CUDA C++ kernels on a GPU.

In: what kernel.py takes. Out: the same, so that the two are independent checks of each other. No autograd here.
Decision: boxes of float64 give a plan of float64, which the float64 tests compare with a literal loop; features may
have any floating dtype with either plan. Channels must be dense; anything else is copied once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eventlens_ds.ops import extension

Plan = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def plan(
    boxes: torch.Tensor,
    grid_hw: tuple[int, int],
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    mean: bool,
) -> Plan:
    """Interpolation weights of boxes [R, 4] (float32 or float64, xyxy) on a grid of H x W cells.

    Returns wy [R, P, H] and wx [R, Q, W] in the dtype of boxes, with P = Q = 1 for mean=True, and window int32[R, 4]:
    the half-open rows i0, i1 and columns j0, j1 that have a weight.
    """
    extension.require(boxes.device)
    return torch.ops.eventlens_csrc.roi_align_plan(
        boxes.contiguous(), *grid_hw, *output_size, spatial_scale, sampling_ratio, aligned, mean
    )


def forward(
    levels: Sequence[torch.Tensor],
    wy: torch.Tensor,
    wx: torch.Tensor,
    window: torch.Tensor,
    offsets: torch.Tensor,
    grid_hw: tuple[int, int],
    num_prefix_tokens: int,
) -> torch.Tensor:
    """[R, P, Q, C]: the mean over levels [B, n + H * W, C] of the planned sums, accumulated in float32 (float64 for
    float64 levels) and rounded once. offsets int64[B + 1] on any device. Cells outside a window are never read.
    """
    extension.require(wy.device)
    wy, wx = _tables(levels[0].dtype, wy, wx)
    dense = [level if level.stride(-1) == 1 else level.contiguous() for level in levels]
    offsets = offsets.to(wy.device, non_blocking=True)
    return torch.ops.eventlens_csrc.roi_align_forward(dense, wy, wx, window, offsets, *grid_hw, num_prefix_tokens)


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
    """[B, n + H * W, C], the gradient of each level for grad [R, P, Q, C], in its dtype; prefix rows are zero.

    Every row is written once, by one thread, summing over boxes in their order: no atomics, the same bits each time.
    """
    extension.require(wy.device)
    wy, wx = _tables(grad.dtype, wy, wx)
    offsets = offsets.to(wy.device, non_blocking=True)
    return torch.ops.eventlens_csrc.roi_align_backward(
        grad.contiguous(), wy, wx, window, offsets, *grid_hw, num_prefix_tokens, batch, num_levels
    )


def _tables(dtype: torch.dtype, wy: torch.Tensor, wx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables in the type that sums of features of `dtype` run in."""
    wide = torch.promote_types(dtype, torch.float32)
    return wy.to(wide), wx.to(wide)
