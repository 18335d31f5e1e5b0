"""RegionEncoder: a region feature e_r in the width of the language model, from RoI-align and the box itself.

B images, P patches, V vision width, R regions, D model width, S bins per side.
  e_r = MLP(pool(RoI-align(tokens, box_r))) + MLP_box(box_r in [0, 1])
Source: EventLens links reference tags to RoI features (abstract); the form of the pooling follows r2c and GPT4RoI
(RoI-align, sampling ratio 2, box embedding 4 -> 256 -> ...). Decision: all levels share one RoI plan and are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from eventlens_ds.data.boxes import normalise
from eventlens_ds.ops.roi_align import roi_align

BOX_HIDDEN = 256


class RegionEncoder(nn.Module):
    """Features of the regions of a row.

    image_size is the side in pixels of the images that boxes refer to; grid the patches per side. `backend` of the
    RoI-align (None: chosen per device) is set by RegionVLM.choose_kernels.
    """

    def __init__(
        self,
        vision_width: int,
        width: int,
        *,
        image_size: int,
        patch_size: int,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        output_size: int,
        sampling_ratio: int,
        pool: str,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        self.output_size, self.sampling_ratio, self.pool = output_size, sampling_ratio, pool
        self.backend: str | None = None
        pooled = vision_width * (output_size**2 if pool == "flatten" else 1)
        self.linear_1 = nn.Linear(pooled, width)
        self.linear_2 = nn.Linear(width, width)
        self.box_1 = nn.Linear(4, BOX_HIDDEN)
        self.box_2 = nn.Linear(BOX_HIDDEN, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, levels: Sequence[torch.Tensor], boxes_R4: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """levels: hidden states [B, cls + P, V] of the tower; boxes fp32 pixels, sorted by image; offsets
        int64[B + 1]. Returns [R, D]."""
        pooled = roi_align(
            list(levels),
            boxes_R4,
            offsets,
            self.grid,
            output_size=self.output_size,
            spatial_scale=1.0 / self.patch_size,
            sampling_ratio=self.sampling_ratio,
            pool="mean" if self.pool == "mean" else None,
            num_prefix_tokens=self.num_prefix_tokens,
            backend=self.backend,
        )
        seen = self.linear_2(nn.functional.gelu(self.linear_1(pooled.flatten(1))))
        placed = normalise(boxes_R4, self.image_size, self.image_size).to(pooled.dtype)
        return self.dropout(seen + self.box_2(nn.functional.gelu(self.box_1(placed))))
