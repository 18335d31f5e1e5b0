"""Whether the images of a run have tags, and how many lists are longer than their budget.

In: shards, tokenizer and data.tag_tokens of a run with a soft prompt. Out: one log line per folder, or one error.
Decision: up to 512 images per folder are looked at, spread evenly; that is exact for a small folder, and a large one
without any tag is found without reading all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from eventlens_ds.data.shards import ShardSet
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.errors import UserError

log = logging.getLogger(__name__)

LOOKED_AT = 512


class TagCounts(NamedTuple):
    """Images looked at, those with tags, those whose list is cut, and tags left out of all tags of them."""

    images: int
    tagged: int
    cut: int
    tags: int
    left_out: int


def count_tags(shards: ShardSet, tokenizer: PieceTokenizer, budget: int) -> TagCounts:
    """Counts over a folder; `budget` in tokens, as `prompts.shorten_tags` spends it."""
    images = tagged = cut = total = left = 0
    for number in range(0, shards.num_images, max(1, -(-shards.num_images // LOOKED_AT))):
        tags = shards.image(number, outlines=False).tags
        spent = accumulate(len(tokenizer.ids(f", {tag}" if i else tag)) for i, tag in enumerate(tags))
        beyond = sum(tokens > budget for tokens in spent)
        images, tagged, cut = images + 1, tagged + bool(tags), cut + bool(beyond)
        total, left = total + len(tags), left + beyond
    return TagCounts(images, tagged, cut, total, left)


def require_tags(folders: Sequence[str], shards: Sequence[ShardSet], tokenizer: PieceTokenizer, budget: int) -> None:
    """Log the counts of every folder. UserError when no image of any has tags: the soft prompt would never be shown."""
    found = {folder: count_tags(one, tokenizer, budget) for folder, one in zip(folders, shards)}
    for folder, counts in found.items():
        log.info(
            "%s: %d of %d images looked at have tags; %d lists are longer than data.tag_tokens %d, %d of %d tags cut",
            folder,
            counts.tagged,
            counts.images,
            counts.cut,
            budget,
            counts.left_out,
            counts.tags,
        )
    if not any(counts.tagged for counts in found.values()):
        raise UserError(
            f"model.soft_prompt: none of the {sum(c.images for c in found.values())} images looked at in "
            f"{', '.join(folders)} has tags; build with --source ...,tags or --tagger MODULE:FUNCTION"
        )
