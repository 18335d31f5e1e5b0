"""Encoded groups -> Batch: the groups of a row end to end, as one forest of segments.

In: the `EncodedGroup`s of a row, the layout and the dropout seed. Out: one `Batch`. Decision: a supervised token
names the position that predicts it (`target_from`), because in a tree the token before the first token of a leaf is
the last one of its parent; the head then runs on supervised positions alone. `flat` repeats the path of every leaf
as a chain of its own; it is the reference that `tree` must equal (P4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from eventlens_ds.data.records import Batch, EncodedGroup


def flatten(group: EncodedGroup) -> EncodedGroup:
    """Every leaf with a copy of its whole path as a segment of its own; a leaf stays a separate child segment."""
    per_token = ("input_ids", "image_slots", "region_slots", "soft_slots", "start_slots")
    tags = _tag_slots(group)
    kept: list[np.ndarray] = []
    bounds: list[tuple[int, int]] = []
    leaves: list[int] = []
    parents: list[int] = []
    position = 0
    for leaf in group.leaf_segment:
        path = []
        node = int(group.parents[leaf])
        while node >= 0:
            path.append(node)
            node = int(group.parents[node])
        index = np.concatenate([np.arange(*group.bounds[node]) for node in reversed(path)])
        tail = np.arange(*group.bounds[leaf])
        for part, parent in ((index, -1), (tail, len(parents))):
            kept.append(part)
            parents.append(parent)
            bounds.append((position, position + len(part)))
            position += len(part)
        leaves.append(len(parents) - 1)
    every = np.concatenate(kept)
    return EncodedGroup(
        **{
            **vars(group),
            **{name: getattr(group, name)[every] for name in per_token},
            "tag_slots": tags[every],
            "parents": np.asarray(parents, np.int32),
            "bounds": np.asarray(bounds, np.int32),
            "leaf_segment": np.asarray(leaves, np.int32),
        }
    )


def positions(parents: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Position ids int64[T]: a segment goes on where its parent ended."""
    starts = np.zeros(len(parents), np.int64)
    out = np.zeros(int(bounds[-1, 1]) if len(bounds) else 0, np.int64)
    for s, parent in enumerate(parents):
        if parent >= 0:
            starts[s] = starts[parent] + (bounds[parent, 1] - bounds[parent, 0])
        out[bounds[s, 0] : bounds[s, 1]] = starts[s] + np.arange(bounds[s, 1] - bounds[s, 0])
    return out


class _Row:
    """Arrays of a row, filled group by group with shifted indices."""

    def __init__(self) -> None:
        self.arrays: dict[str, list[np.ndarray]] = {}
        self.choices: list[tuple[np.ndarray, int, int, float, int]] = []
        self.instructions: list[np.ndarray] = []
        self.sample_ids: list[str] = []
        self.image_keys: list[str] = []
        self.sample_image: list[int] = []
        self.skipped: list[tuple[str, str]] = []
        self.tokens = self.segments = self.images = self.regions = self.leaves = 0
        self.used = self.annotated = 0

    def put(self, **arrays: np.ndarray) -> None:
        for name, value in arrays.items():
            self.arrays.setdefault(name, []).append(value)

    def add(self, group: EncodedGroup, visual_tokens: int) -> None:
        self.used += _check_slots(group, visual_tokens)
        self.annotated += group.regions_annotated
        predicted_from, target, leaf = _targets(group)
        shift = np.where
        self.put(
            input_ids=group.input_ids,
            parents=shift(group.parents >= 0, group.parents + self.segments, -1).astype(np.int32),
            bounds=group.bounds + self.tokens,
            task_ids=np.full(group.num_tokens, group.task_id, np.int64),
            image_slots=shift(group.image_slots >= 0, group.image_slots + self.images * visual_tokens, -1),
            region_slots=shift(group.region_slots >= 0, group.region_slots + self.regions, -1),
            soft_slots=group.soft_slots,
            tag_slots=_tag_slots(group),
            start_slots=group.start_slots,
            target_from=predicted_from + self.tokens,
            target_ids=target,
            target_leaf=leaf + self.leaves,
            leaf_weight=group.leaf_weight,
            leaf_task=np.full(len(group.leaf_weight), group.task_id, np.int64),
            leaf_sample=group.leaf_sample + len(self.sample_ids),
            box_counts=np.asarray([len(b) for b in group.boxes], np.int64),
            boxes=np.concatenate([*group.boxes, np.zeros((0, 4), np.float32)]).astype(np.float32),
            pixel_values=_stacked(group.pixel_values),
        )
        dead = {sample_id for sample_id, _ in group.skipped}
        for leaves, label, sample in group.choices:
            weight = 0.0 if label < 0 or group.sample_ids[sample] in dead else 1.0
            self.choices.append((leaves + self.leaves, label, len(self.sample_ids) + sample, weight, group.task_id))
        self.instructions += [group.instruction] * len(group.pixel_values)
        self.sample_image += [self.images] * len(group.sample_ids)
        self.sample_ids += group.sample_ids
        self.skipped += group.skipped
        self.tokens += group.num_tokens
        self.segments += len(group.parents)
        self.images += len(group.pixel_values)
        self.regions += sum(len(b) for b in group.boxes)
        self.leaves += len(group.leaf_weight)


def _tag_slots(group: EncodedGroup) -> np.ndarray:
    """Tokens of tags, bool[T]; a group without a soft prompt lists none. ValueError where tags may be unmarked."""
    if group.tag_slots is not None:
        return group.tag_slots
    if group.soft_slots.any():
        raise ValueError(f"group of {group.sample_ids[:1]}: lists tags and does not say where")
    return np.zeros(group.num_tokens, np.bool_)


def _stacked(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """float32[N, 3, H, W]. One image, the usual case, is not copied: it will be, when the row is joined."""
    if len(pixels) == 1:
        return pixels[0][None]
    return np.stack(pixels) if pixels else np.zeros((0, 3, 1, 1), np.float32)


def _check_slots(group: EncodedGroup, visual_tokens: int) -> int:
    """Image slots match visual tokens one to one (up to copies of a flat layout), boxes belong to images, region slots
    to boxes (P6). Returns the number of regions that slots name."""
    if len(group.boxes) != len(group.pixel_values):
        raise ValueError(
            f"group of {group.sample_ids[:1]}: boxes of {len(group.boxes)} images for {len(group.pixel_values)} images"
        )
    wanted = len(group.pixel_values) * visual_tokens
    present = np.unique(group.image_slots[group.image_slots >= 0])
    if len(present) != wanted or (wanted and present[-1] != wanted - 1):
        raise ValueError(f"group of {group.sample_ids[:1]}: {len(present)} image slots for {wanted} visual tokens")
    regions = sum(len(b) for b in group.boxes)
    if group.region_slots.size and group.region_slots.max() >= regions:
        raise ValueError(
            f"group of {group.sample_ids[:1]}: region slot {group.region_slots.max()} of {regions} regions"
        )
    if regions > group.regions_annotated:
        raise ValueError(
            f"group of {group.sample_ids[:1]}: {regions} boxes, its images have {group.regions_annotated} regions"
        )
    return len(np.unique(group.region_slots[group.region_slots >= 0]))


def _targets(group: EncodedGroup) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position that predicts, token, leaf) of every token of every leaf."""
    predicted_from, target, leaf = [], [], []
    for i, segment in enumerate(group.leaf_segment):
        start, end = group.bounds[segment]
        before = np.arange(start - 1, end - 1)
        before[0] = group.bounds[group.parents[segment], 1] - 1
        predicted_from.append(before)
        target.append(group.input_ids[start:end])
        leaf.append(np.full(end - start, i))
    empty = np.zeros(0, np.int64)
    join = lambda parts: np.concatenate([empty, *parts]).astype(np.int64)  # noqa: E731
    return join(predicted_from), join(target), join(leaf)


def collate(
    groups: Sequence[EncodedGroup],
    *,
    visual_tokens: int,
    image_size: int,
    seed: int,
    layout: Literal["tree", "flat"] = "tree",
    pad_to: int = 1,
    pad_id: int = 0,
) -> Batch:
    """Lay groups end to end. No groups gives the missing row: one token, weight zero, the same modules run (P5)."""
    row = _Row()
    for group in groups:
        row.add(flatten(group) if layout == "flat" else group, visual_tokens)
    if not groups:
        return _missing_row(image_size, seed, pad_id)
    a = {name: np.concatenate(parts) for name, parts in row.arrays.items()}
    padding = -row.tokens % pad_to

    def padded(array: np.ndarray, value: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([array, np.full(padding, value, np.int64)]))

    instruction_ids, instruction_mask = _instructions(row.instructions, pad_id)
    width = max((len(c[0]) for c in row.choices), default=1)
    for leaves, _, sample, _, _ in row.choices:
        if len(leaves) != width:
            raise ValueError(f"sample {row.sample_ids[sample]}: {len(leaves)} candidates in a row of {width}")
    return Batch(
        input_ids=padded(a["input_ids"], pad_id)[None],
        position_ids=padded(positions(a["parents"], a["bounds"]), 0)[None],
        parents=torch.from_numpy(a["parents"]),
        bounds=torch.from_numpy(a["bounds"].astype(np.int32)),
        task_ids=padded(a["task_ids"], int(a["task_ids"][-1])),
        pixel_values=torch.from_numpy(a["pixel_values"]),
        boxes=torch.from_numpy(a["boxes"]),
        box_offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(a["box_counts"])]).astype(np.int64)),
        image_slots=padded(a["image_slots"], -1),
        region_slots=padded(a["region_slots"], -1),
        soft_slots=padded(a["soft_slots"], 0).bool(),
        tag_slots=padded(a["tag_slots"], 0).bool(),
        start_slots=padded(a["start_slots"], 0).bool(),
        instruction_ids=instruction_ids,
        instruction_mask=instruction_mask,
        target_from=torch.from_numpy(a["target_from"]),
        target_ids=torch.from_numpy(a["target_ids"]),
        target_leaf=torch.from_numpy(a["target_leaf"]),
        leaf_weight=torch.from_numpy(a["leaf_weight"]),
        leaf_task=torch.from_numpy(a["leaf_task"]),
        leaf_sample=torch.from_numpy(a["leaf_sample"].astype(np.int64)),
        choice_leaves=torch.from_numpy(
            np.stack([c[0] for c in row.choices]) if row.choices else np.zeros((0, width), np.int64)
        ),
        choice_labels=torch.tensor([c[1] for c in row.choices], dtype=torch.int64),
        choice_weight=torch.tensor([c[3] for c in row.choices], dtype=torch.float32),
        choice_task=torch.tensor([c[4] for c in row.choices], dtype=torch.int64),
        choice_sample=torch.tensor([c[2] for c in row.choices], dtype=torch.int64),
        seed=seed,
        sample_ids=row.sample_ids,
        image_keys=row.image_keys,
        sample_image=row.sample_image,
        skipped=row.skipped,
        real_tokens=row.tokens,
        regions_used=row.used,
        regions_unused=row.annotated - row.used,
    )


def _instructions(given: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Instructions int64[N, L'] of the images of a row, padded at the end, and their mask."""
    lengths = torch.tensor([len(ids) for ids in given], dtype=torch.int64)
    width = int(lengths.max()) if len(given) else 0
    padded = [np.pad(ids, (0, width - len(ids)), constant_values=pad_id) for ids in given]
    ids = torch.from_numpy(np.stack(padded)) if given else torch.zeros((0, 0), dtype=torch.int64)
    return ids, torch.arange(width)[None] < lengths[:, None]


def _missing_row(image_size: int, seed: int, pad_id: int) -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        input_ids=torch.full((1, 1), pad_id),
        position_ids=torch.zeros((1, 1), dtype=torch.int64),
        parents=torch.tensor([-1], dtype=torch.int32),
        bounds=torch.tensor([[0, 1]], dtype=torch.int32),
        task_ids=torch.zeros(1, dtype=torch.int64),
        pixel_values=torch.zeros((0, 3, image_size, image_size)),
        boxes=torch.zeros((0, 4)),
        box_offsets=torch.zeros(1, dtype=torch.int64),
        image_slots=torch.full((1,), -1),
        region_slots=torch.full((1,), -1),
        soft_slots=torch.zeros(1, dtype=torch.bool),
        tag_slots=torch.zeros(1, dtype=torch.bool),
        # An encoder-decoder encodes this token and decodes from it; a decoder alone does not ask.
        start_slots=torch.ones(1, dtype=torch.bool),
        instruction_ids=torch.zeros((0, 0), dtype=torch.int64),
        instruction_mask=torch.zeros((0, 0), dtype=torch.bool),
        target_from=none,
        target_ids=none,
        target_leaf=none,
        leaf_weight=torch.zeros(0),
        leaf_task=none,
        leaf_sample=none,
        choice_leaves=torch.zeros((0, 1), dtype=torch.int64),
        choice_labels=none,
        choice_weight=torch.zeros(0),
        choice_task=none,
        choice_sample=none,
        seed=seed,
        sample_ids=[],
        image_keys=[],
        sample_image=[],
    )
