"""Controls: batches from which something the model should need was taken away.

In: a batch and the name of a control. Out: the batch as the control shows it. A number that a control does not lower
was not earned by what the control removes. Decision: tokens, segments and lengths stay what they are, so a control
runs the same forwards as the evaluation it is compared with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from eventlens_ds.data.records import Batch

Control = Literal["none", "blank", "permute_regions", "blank_demos", "released_splice"]
"""none: as is. blank: grey pixels, no region reaches the text, and every token of a tag is the same one, as tags come
from the picture too; how many tokens they take stays, as object names stay. permute_regions: the boxes of every image
trade places, so each mention is linked to the feature of another region; an image with one region stays as it is (see
`permutable`). blank_demos: of a sample with several images (an episode) all but the last are grey. released_splice:
their visual tokens stay the embedding of the placeholder, as in the released code of LCL, whose loop over the images
keeps the last alone."""

CONTROLS: tuple[Control, ...] = ("none", "blank", "permute_regions")
"""Those that say something about samples of one image, and are offered for every task."""


def apply_control(batch: Batch, control: Control) -> Batch:
    """A batch as a control sees it; the tokens stay what they are."""
    if control == "blank":
        return replace(
            batch,
            input_ids=_without_tags(batch),
            pixel_values=torch.zeros_like(batch.pixel_values),
            region_slots=torch.full_like(batch.region_slots, -1),
            regions_used=0,
            regions_unused=batch.regions_used + batch.regions_unused,
        )
    if control == "permute_regions":
        return replace(batch, boxes=_permuted(batch))
    if control == "blank_demos":
        keep = last_images(batch).to(batch.pixel_values.dtype)
        return replace(batch, pixel_values=batch.pixel_values * keep[:, None, None, None])
    if control == "released_splice":
        return replace(batch, image_slots=_last_slots(batch))
    return batch


def last_images(batch: Batch) -> torch.Tensor:
    """bool[N]: the last image of every group, for an episode the one that is asked about."""
    count = batch.pixel_values.shape[0]
    firsts = sorted(set(batch.sample_image))
    keep = torch.zeros(count, dtype=torch.bool, device=batch.pixel_values.device)
    keep[[first - 1 for first in (*firsts[1:], count)] if firsts else []] = True
    return keep


def _last_slots(batch: Batch) -> torch.Tensor:
    """Image slots without those of any but the last image of a group."""
    count = batch.pixel_values.shape[0]
    if not count:
        return batch.image_slots
    tokens = (int(batch.image_slots.max()) + 1) // count
    image = batch.image_slots.clamp(min=0) // tokens
    return torch.where(last_images(batch)[image], batch.image_slots, -1)


def _without_tags(batch: Batch) -> torch.Tensor:
    """input_ids with the token of the soft prompt, which stands for nothing, in place of the tags behind it."""
    if not batch.soft_slots.any():
        return batch.input_ids
    if batch.tag_slots is None or batch.tag_slots.shape != batch.soft_slots.shape:
        raise ValueError("the row lists tags and does not say where: blank cannot hide them")
    nothing = batch.input_ids[0, batch.soft_slots][0]
    return torch.where(batch.tag_slots[None], nothing, batch.input_ids)


def _permuted(batch: Batch) -> torch.Tensor:
    boxes = batch.boxes.clone()
    for start, end in zip(batch.box_offsets[:-1].tolist(), batch.box_offsets[1:].tolist()):
        boxes[start:end] = batch.boxes[start:end].roll(1, 0)
    return boxes


def permutable(batch: Batch) -> list[bool]:
    """Per image of a batch as it was read: whether permute_regions changes anything in it. It does not where fewer
    than two regions reach the model, nor where all of them have the same box."""
    moved = (_permuted(batch) != batch.boxes).any(1)
    return [bool(moved[s:e].any()) for s, e in zip(batch.box_offsets[:-1].tolist(), batch.box_offsets[1:].tolist())]
