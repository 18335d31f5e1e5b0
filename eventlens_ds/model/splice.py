"""Splice: put visual tokens and region features into the text embeddings of a row.

T tokens, N images, P visual tokens per image, R regions, D model width. Decision: a slot array names for every
token what stands there, and `where` selects it. Nothing is counted or cut here: a row without images or regions runs
the same operations on a dummy that no token selects, so every rank has the same graph (P5, P6).
"""

from __future__ import annotations

import torch


def splice_images(embeds_TD: torch.Tensor, visual_NPD: torch.Tensor, image_slots_T: torch.Tensor) -> torch.Tensor:
    """Tokens with a slot >= 0 become that visual token (image-major index into N * P)."""
    visual = visual_NPD.flatten(0, 1)[image_slots_T.clamp(min=0)]
    return torch.where((image_slots_T >= 0)[:, None], visual, embeds_TD)


def splice_hint(embeds_TD: torch.Tensor, hint_D: torch.Tensor, soft_slots_T: torch.Tensor) -> torch.Tensor:
    """Tokens with a soft slot become the learned vector. By slot and not by token id: text that spells a placeholder
    stays text, and the embedding table is not written to, both unlike the released code of LION."""
    return torch.where(soft_slots_T[:, None], hint_D.to(embeds_TD.dtype), embeds_TD)


def link_regions(
    embeds_TD: torch.Tensor, regions_RD: torch.Tensor, region_slots_T: torch.Tensor, linking: str
) -> torch.Tensor:
    """add: embedding + feature on every token of a mention. insert: the slot after the mention is the feature."""
    feature = regions_RD[region_slots_T.clamp(min=0)]
    linked = feature if linking == "insert" else embeds_TD + feature
    return torch.where((region_slots_T >= 0)[:, None], linked, embeds_TD)
