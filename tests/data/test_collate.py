"""Collation: groups end to end without touching each other, flat rows that repeat paths, the missing row (P4, P5, P6).

In: encoded groups of the small world. Out: a Batch, compared with the groups it was made of. Decision: a supervised
token is followed to the token that predicts it, through the tree, because that is where packing goes wrong.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from eventlens_ds.data.collate import collate, flatten, positions
from eventlens_ds.data.controls import apply_control
from eventlens_ds.data.encode import encode
from eventlens_ds.data.prompts import mentions, render
from eventlens_ds.data.records import Batch, EncodedGroup
from eventlens_ds.model.attention import tree_positions
from tests.small_world import SmallRun

TASKS_USED = ("caption", "vcr_answer", "event")


def groups(small: SmallRun) -> list[EncodedGroup]:
    made = []
    for task in TASKS_USED:
        table, number = small.groups_of(task)[1]
        group = small.data.group(table, number)
        made.append(encode(group, small.tokenizer, small.spec, partial(small.data._image, group, table, number)))
    return made


def lay(small: SmallRun, made: list[EncodedGroup], **options: Any) -> Batch:
    vision = small.spec.vision
    return collate(made, visual_tokens=vision.tokens, image_size=vision.image_size, seed=5, **options)


def path_to(parents: np.ndarray, bounds: np.ndarray, segment: int) -> list[int]:
    """Tokens of a segment and its ancestors, root first."""
    tokens: list[int] = []
    while segment >= 0:
        tokens = [*range(*bounds[segment]), *tokens]
        segment = int(parents[segment])
    return tokens


@pytest.mark.P4
@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_every_target_is_predicted_by_the_token_before_it_on_its_path(small: SmallRun, layout: str) -> None:
    batch = lay(small, groups(small), layout=layout)
    parents, bounds = batch.parents.numpy(), batch.bounds.numpy()
    ids = batch.input_ids[0].tolist()
    segment_of = np.searchsorted(bounds[:, 1], np.arange(len(ids)), side="right")
    leaves = sorted(set(range(len(parents))) - set(parents.tolist()))
    wanted = []
    for leaf in leaves:
        path = path_to(parents, bounds, leaf)
        for at in range(int(bounds[leaf, 0]), int(bounds[leaf, 1])):
            wanted.append((path[path.index(at) - 1], ids[at]))
            assert segment_of[at] == leaf
    assert list(zip(batch.target_from.tolist(), batch.target_ids.tolist())) == wanted


@pytest.mark.P4
def test_flat_repeats_every_path_and_nothing_else(small: SmallRun) -> None:
    for group in groups(small):
        flat = flatten(group)
        assert len(flat.parents) == 2 * len(group.leaf_segment)
        for leaf, old in zip(flat.leaf_segment, group.leaf_segment):
            own = path_to(flat.parents, flat.bounds, int(leaf))
            before = path_to(group.parents, group.bounds, int(old))
            for name in ("input_ids", "image_slots", "region_slots"):
                assert np.array_equal(getattr(flat, name)[own], getattr(group, name)[before])


@pytest.mark.P4
def test_positions_follow_the_tree_and_equal_the_attention_form(small: SmallRun) -> None:
    batch = lay(small, groups(small))
    assert torch.equal(batch.position_ids[0], tree_positions(batch.parents, batch.bounds))
    simple = positions(np.array([-1, 0, 0, -1]), np.array([[0, 3], [3, 5], [5, 6], [6, 8]]))
    assert simple.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]


@pytest.mark.P6
def test_indices_are_shifted_group_by_group(small: SmallRun) -> None:
    made, visual = groups(small), small.spec.vision.tokens
    batch = lay(small, made)
    token = image = region = leaf = sample = 0
    for group in made:
        here = slice(token, token + group.num_tokens)
        assert np.array_equal(batch.input_ids[0, here].numpy(), group.input_ids)
        assert set(batch.task_ids[here].tolist()) == {group.task_id}
        slots = batch.image_slots[here].numpy()
        assert np.array_equal(slots[slots >= 0] - image * visual, group.image_slots[group.image_slots >= 0])
        slots = batch.region_slots[here].numpy()
        assert np.array_equal(slots[slots >= 0] - region, group.region_slots[group.region_slots >= 0])
        boxes = batch.boxes[batch.box_offsets[image] : batch.box_offsets[image + 1]]
        assert np.array_equal(boxes.numpy(), group.boxes[0])
        leaf_sample = batch.leaf_sample[leaf : leaf + len(group.leaf_weight)].numpy()
        assert np.array_equal(leaf_sample - sample, group.leaf_sample)
        token, image, region = token + group.num_tokens, image + 1, region + len(group.boxes[0])
        leaf, sample = leaf + len(group.leaf_weight), sample + len(group.sample_ids)
    assert batch.real_tokens == token and batch.sample_image == [0] * 2 + [1] * 4 + [2] * (sample - 6)
    questions = len(made[1].choices)
    assert batch.choice_leaves.shape == (questions, 4) and batch.choice_weight.tolist() == [1.0] * questions
    assert batch.choice_leaves.min() == len(made[0].leaf_weight) and set(batch.choice_task.tolist()) == {2}


@pytest.mark.P6
def test_regions_that_nothing_refers_to_are_counted(small: SmallRun) -> None:
    """By hand from the group: its regions, and those that the texts mention or the prefix lists."""
    for task in TASKS_USED:
        table, number = small.groups_of(task)[1]
        group = small.data.group(table, number)
        total = len(group.images[0].regions)
        mentioned = {ref.box for sample in group.samples for ref in mentions(sample)}
        for listed in (True, False):
            spec = replace(small.spec, style=small.spec.style._replace(list_objects=listed))
            used = total if listed else len(mentioned)
            for linking in ("add", "insert", "none"):
                load = partial(small.data._image, group, table, number)
                made = encode(group, small.tokenizer, replace(spec, linking=linking), load)
                for layout in ("tree", "flat"):
                    batch = lay(small, [made, made], layout=layout)
                    reached = 0 if linking == "none" else used
                    assert (batch.regions_used, batch.regions_unused) == (2 * reached, 2 * (total - reached)), task
    blank = apply_control(batch, "blank")
    assert (blank.regions_used, blank.regions_unused) == (0, 2 * total)


@pytest.mark.P6
def test_images_and_regions_that_do_not_match_raise_with_both_numbers(small: SmallRun) -> None:
    """Negative controls of P6: a group that lost a picture, a list of boxes, a box, or gained one."""
    group = groups(small)[1]
    count, visual = len(group.boxes[0]), small.spec.vision.tokens
    assert count > 1 and group.region_slots.max() == count - 1
    broken = {
        f"{visual} image slots for 0 visual tokens": {"pixel_values": [], "boxes": []},
        "boxes of 0 images for 1 images": {"boxes": []},
        f"region slot {count - 1} of {count - 1} regions": {"boxes": [group.boxes[0][:-1]]},
        f"{count} boxes, its images have {count - 1} regions": {"regions_annotated": count - 1},
    }
    for message, change in broken.items():
        with pytest.raises(ValueError, match=message):
            lay(small, [replace(group, **change)])
    lay(small, [group])


@pytest.mark.P6
def test_a_mention_without_a_slot_raises_with_both_numbers(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a tokenizer that yields nothing for the name of one region."""
    table, number = small.groups_of("vcr_answer")[0]
    group = small.data.group(table, number)
    names = [piece.text.strip() for piece in render(group).prefix if piece.region >= 0]
    usual = small.tokenizer.ids
    monkeypatch.setattr(small.tokenizer, "ids", lambda text: [] if text.strip() == names[0] else usual(text))
    message = f"{len(names)} regions mentioned, {len(names) - 1} have a region slot"
    with pytest.raises(ValueError, match=message):
        encode(group, small.tokenizer, small.spec, partial(small.data._image, group, table, number))


def test_padding_is_no_part_of_the_row(small: SmallRun) -> None:
    batch = lay(small, groups(small), pad_to=64)
    plain = lay(small, groups(small))
    total, real = batch.input_ids.shape[1], plain.real_tokens
    assert total % 64 == 0 and batch.real_tokens == real and int(batch.bounds[-1, 1]) == real
    assert (batch.image_slots[real:] == -1).all() and (batch.region_slots[real:] == -1).all()
    model = small.model().eval()
    with torch.no_grad():
        assert torch.allclose(model(batch), model(plain), atol=1e-5)


@pytest.mark.P5
def test_the_missing_row_has_one_token_and_no_work(small: SmallRun) -> None:
    batch = small.batch((), seed=9)
    assert batch.input_ids.shape == (1, 1) and batch.real_tokens == 0 and batch.seed == 9
    assert batch.pixel_values.shape[0] == 0 == len(batch.boxes) and batch.target_ids.numel() == 0
    assert torch.isfinite(small.model()(batch)).all()


def test_questions_of_one_row_have_as_many_candidates(small: SmallRun) -> None:
    made = groups(small)[1]
    short = replace(made, choices=[(made.choices[0][0][:2], 0, 0), *made.choices[1:]])
    with pytest.raises(ValueError, match=f"{made.sample_ids[0]}: 2 candidates in a row of 4"):
        lay(small, [short])


def test_questions_of_an_injured_sample_and_blind_ones_weigh_nothing(small: SmallRun) -> None:
    made = groups(small)[1]
    injured = replace(made, skipped=[(made.sample_ids[0], "truncated")])
    leaves, _, sample = made.choices[1]
    blind = replace(injured, choices=[made.choices[0], (leaves, -1, sample), *made.choices[2:]])
    assert lay(small, [blind]).choice_weight.tolist() == [0.0, 0.0, *[1.0] * (len(made.choices) - 2)]


def test_to_keeps_shape_data_on_the_cpu(small: SmallRun) -> None:
    moved = lay(small, groups(small)).to("meta")
    assert moved.input_ids.device.type == "meta" and moved.pixel_values.device.type == "meta"
    assert {moved.parents.device.type, moved.bounds.device.type, moved.box_offsets.device.type} == {"cpu"}
