"""Position embeddings of a vision tower that is trained from scratch: they start as sines of row and column.

In: the tower of a RegionVLM whose weights come from no file. Out: its position embeddings, written in place.
Decision: [ours] noise of the patch weights' spread, as CLIP draws it, hides the position under the content of a patch,
and boxes as text are then learned late; fixed sines are what plain ViT baselines start from (Beyer et al. 2022,
"Better plain ViT baselines for ImageNet-1k"). They stay trainable, and published weights replace them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from eventlens_ds.model.weights import gathered, rank_and_size

WAVELENGTH = 100.0
"""The longest wavelength, in patches and in units of 2 pi; the shortest is one."""


def sines(rows: int, columns: int, width: int) -> torch.Tensor:
    """float32[rows * columns, width]: sine and cosine of row, then of column, in width / 4 frequencies.

    Raises ValueError for a width that 4 does not divide."""
    if width % 4:
        raise ValueError(f"width {width}: sines of rows and columns need a multiple of 4")
    count = width // 4
    frequency = torch.exp(torch.arange(count) / count * -math.log(WAVELENGTH))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (row, column)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)


def start_from_sines(tower: Any) -> None:
    """Write them behind the prefix tokens of a tower with a square grid, where 4 divides its width; a tower without
    learned position embeddings stays as it is. A collective under ZeRO-3."""
    found = [m for m in tower.modules() if isinstance(getattr(m, "position_embedding", None), nn.Embedding)]
    for module in found:
        weight = module.position_embedding.weight
        with torch.no_grad(), gathered([weight]):
            # Partitioned parameters take rank 0's values.
            if hasattr(weight, "ds_id") and rank_and_size()[0] != 0:
                continue
            side = math.isqrt(weight.shape[0])
            if weight.shape[1] % 4 or side < 1:
                continue
            prefix = weight.shape[0] - side * side
            weight[:prefix] = 0.0
            weight[prefix:] = sines(side, side, weight.shape[1]).to(weight)
