"""Projector: visual tokens to the width of the language model (LLaVA-1.5: two linear layers with GELU).

B images, P patches, V vision width, D model width. Decision: submodules carry the names linear_1 and linear_2 of
the LLaVA-1.5 layout, so its tensors load by a plain name map (model/folders.py).
"""

from __future__ import annotations

import math

import torch
from torch import nn


class Projector(nn.Module):
    """[B, P, V] -> [B, P, D]."""

    def __init__(self, vision_width: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, width)
        self.linear_2 = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BPV: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear_2(nn.functional.gelu(self.linear_1(tokens_BPV))))


def pool_patches(tokens_BPV: torch.Tensor, grid: tuple[int, int], pool: int) -> torch.Tensor:
    """Average pool x pool patches: [B, H*W, V] -> [B, (H/pool)*(W/pool), V]; pool 1 changes nothing."""
    if pool == 1:
        return tokens_BPV
    batch, _, width = tokens_BPV.shape
    rows, columns = grid[0] // pool, grid[1] // pool
    return tokens_BPV.view(batch, rows, pool, columns, pool, width).mean((2, 4)).reshape(batch, rows * columns, width)


def grid_code(side: int, width: int, device: torch.device) -> torch.Tensor:
    """Fixed sine-cosine code of a square grid, float32[side * side, width], row by row; width a multiple of 4.

    A quarter of the channels each: sine and cosine of the column, sine and cosine of the row, with wavelengths from 4
    patches up to 8 times the side (after Vaswani et al., 2017, in two dimensions as in MAE).
    """
    steps = torch.arange(width // 4, device=device, dtype=torch.float32) / (width // 4)
    at = torch.arange(side, device=device, dtype=torch.float32)[:, None] * (math.pi / 2) * (2.0 * side) ** -steps
    column, row = at.repeat(side, 1), at.repeat_interleave(side, 0)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)
