"""Tag noise for training: some tags of an image give way to tags of other images, so that a model learns to doubt them.

In: a group of the plan and the seed of its row. Out: the group with noisy tags.
Decision: a tag is replaced by one of as many tokens, at the head of the list or not, so every length that the plan has
counted stays (P4) and the list is cut at the same place. Other tags come from a fixed sample of the images, the same
on every rank; which are drawn follows from (seed of the row, image), so from seed, step and place in it alone (P3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eventlens_ds.data.plan import generator
from eventlens_ds.data.records import Group, ImageRecord
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.data.tokenizer import PieceTokenizer

POOL_IMAGES = 512
"""Images per folder, spread evenly, whose tags are the others."""


class TagNoise:
    """Replaces each tag with probability `share`. A tag stays when the pool has no other of its length."""

    def __init__(self, share: float, shards: Sequence[ShardSet], tokenizer: PieceTokenizer) -> None:
        self.share, self.tokenizer = share, tokenizer
        found: dict[str, None] = {}
        for folder in shards:
            every = max(1, -(-folder.num_images // POOL_IMAGES))
            for number in range(0, folder.num_images, every):
                found |= dict.fromkeys(folder.image(number, outlines=False).tags)
        self.pool: dict[tuple[int, int], list[str]] = {}
        for tag in sorted(found):
            self.pool.setdefault(self._lengths(tag), []).append(tag)

    def __call__(self, group: Group, seed: int) -> Group:
        """The group with noisy tags of its images; `seed` is the row's."""
        images = tuple(replace(image, tags=self.noisy(image, seed)) for image in group.images)
        return replace(group, images=images)

    def noisy(self, image: ImageRecord, seed: int) -> tuple[str, ...]:
        """Tags of an image, as many and as long as before."""
        chance: np.random.Generator = generator(seed, 0, image.key, "tag_noise")
        tags, taken = list(image.tags), set(image.tags)
        for place in np.flatnonzero(chance.random(len(tags)) < self.share):
            others = [tag for tag in self.pool.get(self._lengths(tags[place]), ()) if tag not in taken]
            if others:
                tags[place] = others[int(chance.integers(len(others)))]
                taken.add(tags[place])
        return tuple(tags)

    def _lengths(self, tag: str) -> tuple[int, int]:
        """Tokens of a tag at the head of the list and behind another."""
        return len(self.tokenizer.ids(tag)), len(self.tokenizer.ids(f", {tag}"))
