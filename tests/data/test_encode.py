"""Encoding: segments, slots and targets of a group say what the sample says (P2, P4, P6).

In: groups of the small world, three ways of linking. Out: token arrays, decoded again. Decision: what is supervised is
decoded and compared with the answer as text, so a shift by one token cannot pass.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from eventlens_ds.data.encode import EncodeSpec, encode, group_lengths
from eventlens_ds.data.prompts import render, text_of
from eventlens_ds.data.records import TASKS, EncodedGroup, Group, RegionRef
from eventlens_ds.data.transforms import Resized
from eventlens_ds.errors import DataError
from tests.small_world import SmallRun, small_run

LINKING = ("add", "insert", "none")


def encoded(small: SmallRun, group: Group, spec: EncodeSpec | None = None, number: int = 0) -> EncodedGroup:
    return encode(group, small.tokenizer, spec or small.spec, partial(small.data._image, group, 0, number))


def segment_text(small: SmallRun, made: EncodedGroup, segment: int) -> str:
    start, end = made.bounds[segment]
    keep = [i for i in range(start, end) if made.image_slots[i] < 0]
    return small.tokenizer.decode(made.input_ids[keep].tolist())


@pytest.fixture(scope="module")
def every_task(world_folder: Path) -> SmallRun:
    return small_run(world_folder, tasks=TASKS)


@pytest.mark.P4
@pytest.mark.parametrize("task", [task for task in TASKS if task != "lcl"])
@pytest.mark.parametrize("linking", LINKING)
def test_supervised_tokens_decode_to_the_answers(every_task: SmallRun, task: str, linking: str) -> None:
    small = every_task
    _, number = small.groups_of(task)[0]
    group = small.data.group(0, number)
    made = encoded(small, group, replace(small.spec, linking=linking), number)
    leaves = [text_of(leaf) for text in render(group).samples for leaf in text.leaves]
    assert [segment_text(small, made, int(s)) for s in made.leaf_segment] == leaves
    stems = [text_of(text.stem) for text in render(group).samples]
    assert [segment_text(small, made, s) for s in np.flatnonzero(made.parents == 0)] == stems
    for segment in made.leaf_segment:
        assert made.input_ids[made.bounds[segment, 1] - 1] == small.tokenizer.eos
    assert made.task_id == TASKS.index(task) and made.parents[0] == -1


def test_a_shift_by_one_is_seen(small: SmallRun) -> None:
    """Negative control of the test above."""
    _, number = small.groups_of("event")[0]
    group = small.data.group(0, number)
    made = encoded(small, group, number=number)
    shifted = replace(made, bounds=made.bounds + 1)
    leaves = [text_of(leaf) for text in render(group).samples for leaf in text.leaves]
    assert [segment_text(small, shifted, int(s)) for s in made.leaf_segment[:-1]] != leaves[:-1]


@pytest.mark.P4
@pytest.mark.parametrize("linking", LINKING)
def test_lengths_are_those_of_the_arithmetic(small: SmallRun, linking: str) -> None:
    spec = replace(small.spec, linking=linking)
    for number in range(0, len(small.data.groups[0]), 7):
        group = small.data.group(0, number)
        prefix, samples = group_lengths(render(group), small.tokenizer, spec)
        made = encoded(small, group, spec, number)
        assert made.num_tokens == prefix + sum(s.stem + s.leaves for s in samples)
        assert int(made.bounds[0, 1]) == prefix


@pytest.mark.P2
@pytest.mark.P6
def test_linking_marks_every_token_of_a_mention_or_one_slot_after_it_or_nothing(small: SmallRun) -> None:
    _, number = small.groups_of("vcr_answer")[0]
    group = small.data.group(0, number)
    regions = [p.region for p in render(group).prefix if p.region >= 0]
    added, inserted, nothing = (encoded(small, group, replace(small.spec, linking=way), number) for way in LINKING)
    assert (nothing.region_slots == -1).all()
    in_prefix = inserted.region_slots[: inserted.bounds[0, 1]]
    assert in_prefix[in_prefix >= 0].tolist() == regions
    assert inserted.num_tokens - added.num_tokens == int((inserted.region_slots >= 0).sum())
    for slot in regions:
        marked = np.flatnonzero(added.region_slots[: added.bounds[0, 1]] == slot)
        record = group.images[0].regions[slot]
        assert small.tokenizer.decode(added.input_ids[marked].tolist()) == f"{record.name}{slot + 1}"
    kept = inserted.region_slots < 0
    assert np.array_equal(inserted.input_ids[kept], nothing.input_ids)


@pytest.mark.P6
def test_image_slots_are_the_visual_tokens_one_to_one(small: SmallRun) -> None:
    made = encoded(small, small.data.group(0, 0))
    assert made.image_slots[made.image_slots >= 0].tolist() == list(range(small.spec.vision.tokens))
    assert len(made.pixel_values) == len(made.boxes) == 1
    assert len(made.boxes[0]) == len(small.data.group(0, 0).images[0].regions)


def test_a_choice_weighs_by_its_question_and_a_target_by_its_tokens(small: SmallRun) -> None:
    for task, weight in (("vcr_answer", 0.0), ("event", 1.0)):
        _, number = small.groups_of(task)[0]
        group = small.data.group(0, number)
        made = encoded(small, group, number=number)
        assert set(made.leaf_weight.tolist()) == {weight}
        assert [(label, sample) for _, label, sample in made.choices] == (
            [(s.label, i) for i, s in enumerate(group.samples)] if task == "vcr_answer" else []
        )


def test_a_broken_picture_keeps_the_layout_and_weighs_nothing(small: SmallRun) -> None:
    _, number = small.groups_of("event")[0]
    group = small.data.group(0, number)

    def broken(_: int) -> Resized:
        raise DataError("key: truncated")

    whole, made = encoded(small, group, number=number), encode(group, small.tokenizer, small.spec, broken)
    assert np.array_equal(whole.input_ids, made.input_ids) and not made.leaf_weight.any()
    assert made.skipped == [(sample.id, "key: truncated") for sample in group.samples]
    assert not made.pixel_values[0].any() and made.boxes[0].shape == whole.boxes[0].shape


def test_only_samples_that_mention_an_unusable_box_are_left_out(small: SmallRun) -> None:
    _, number = small.groups_of("vcr_answer")[0]
    group = small.data.group(0, number)
    used = [
        {t.box for part in (*s.candidates, *(t for _, t in s.turns)) for t in part if isinstance(t, RegionRef)}
        for s in group.samples
    ]
    bad = max(set().union(*used), key=lambda box: -sum(box in boxes for boxes in used))

    def injured(m: int) -> Resized:
        return small.data._image(group, 0, number, m)._replace(invalid={bad: "zero area"})

    made = encode(group, small.tokenizer, small.spec, injured)
    assert [i for i, _ in made.skipped] == [s.id for s, boxes in zip(group.samples, used) if bad in boxes]
    assert all(f"region {bad}: zero area" in why for _, why in made.skipped) and made.skipped
