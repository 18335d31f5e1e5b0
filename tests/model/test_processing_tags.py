"""Tags that a user gives with a picture: they stand in the prompt as those of a shard do, or are refused."""

from __future__ import annotations

import numpy as np
import pytest

from eventlens_ds.data.encode import EncodeSpec, VisionSpec, rendered_group
from eventlens_ds.data.prompts import PromptStyle, text_of
from eventlens_ds.errors import UserError
from eventlens_ds.model.processing import RegionVLMProcessor
from tests.small_world import embedded_tokenizer

PICTURE = np.zeros((32, 48, 3), np.uint8)


def processor(tag_tokens: int) -> RegionVLMProcessor:
    vision = VisionSpec(24, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return RegionVLMProcessor.from_spec(
        embedded_tokenizer(), EncodeSpec(vision, "add", PromptStyle(tag_tokens=tag_tokens))
    )


def test_tags_stand_in_the_prompt() -> None:
    made = processor(64)
    group = made.group(PICTURE, question="Why?", tags=["dog", "park"])
    assert "following tags: [dog, park]" in text_of(rendered_group(group, made.pieces, made.spec).prefix)
    with_tags, without = (made(PICTURE, question="Why?", tags=tags) for tags in (["dog", "park"], []))
    assert int(with_tags.soft_slots.sum()) == 1 and not without.soft_slots.any()
    assert made.tags_left_out(["dog", "park"]) == 0


def test_tags_beyond_the_budget_are_counted() -> None:
    made = processor(6)
    many = ["dog"] * 10
    left = made.tags_left_out(many)
    batch = made(PICTURE, question="Why?", tags=many)
    assert 0 < left < 10 and batch.tag_slots is not None and 0 < int(batch.tag_slots.sum()) <= 6


def test_tags_without_a_soft_prompt_are_refused() -> None:
    made = processor(-1)
    with pytest.raises(UserError, match="tags dog: the model was trained without a soft prompt"):
        made(PICTURE, question="Why?", tags=["dog"])
    assert made(PICTURE, question="Why?").tag_slots is not None and made.tags_left_out([]) == 0
