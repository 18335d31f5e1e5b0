"""The creatures of the embedded world on disk, in the released forms of Link-Context Learning.

In: a seed, numbers of classes, a size. Out: images/creatures/<split>/<class>/<n>.png, lcl/train_pairs.jsonl (form
neighbours), lcl/val.jsonl (pairs) and lcl/isekai.jsonl (isekai, the queries of val), regions/captions.jsonl.
Decision: `LclSource` and `CaptionSource` read them as they read anybody's files, so nothing here may know how; the
neighbours of a training class are the classes that differ from it in the fewest features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from eventlens_ds.data.sources import world_creature
from eventlens_ds.data.sources.lcl import write_rows
from eventlens_ds.data.sources.world_creature import Creature, draw_creature
from eventlens_ds.data.sources.world_scene import scene_rng
from eventlens_ds.errors import UserError

SAMPLES = 17
"""Pictures of a training class: 16 shots and a query."""
CONTEXT, TEST = 16, 12
"""Pictures of a test class to show, and to ask about."""
NEIGHBOURS = 36
"""Neighbours listed per class, as in the released file."""
MIN_SIZE, MAX_SIZE = 32, 448


def image_name(creature: Creature, index: int) -> str:
    """Path below images/."""
    return f"creatures/{creature.split}/{creature.key}/{index:02d}.png"


def neighbour_rows(classes: Sequence[Creature], seed: int) -> list[dict[str, Any]]:
    """Rows of train_pairs.jsonl."""
    number = {creature.key: str(i) for i, creature in enumerate(classes, start=1)}
    rows = []
    for creature in classes:
        rng = scene_rng(seed, creature.key, 0, "neighbours")
        near = world_creature.neighbours(classes, creature, rng)[:NEIGHBOURS]
        listed = [[number[c.key], c.name, image_name(c, int(rng.integers(SAMPLES)))] for c in near]
        samples = [image_name(creature, i) for i in range(SAMPLES)]
        rows.append(
            {"class_id": number[creature.key], "class_name": creature.name, "samples": samples, "neighbors": listed}
        )
    return rows


def pair_rows(classes: Sequence[Creature], first: int) -> list[dict[str, Any]]:
    """Rows of val.jsonl; class ids count on from `first`."""
    return [
        {
            "class_id": str(first + i),
            "class_name": creature.name,
            "context_samples": [image_name(creature, n) for n in range(CONTEXT)],
            "test_samples": [image_name(creature, n) for n in range(CONTEXT, CONTEXT + TEST)],
        }
        for i, creature in enumerate(classes)
    ]


def isekai_rows(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The queries of `pairs` as ISEKAI asks them: both lists of images and both names in every row."""
    rows = []
    for positive, negative in zip(pairs[::2], pairs[1::2]):
        for asked in (positive, negative):
            rows += [
                {
                    "image_name": image,
                    "positive_list": positive["context_samples"],
                    "negative_list": negative["context_samples"],
                    "positive_promt": positive["class_name"],
                    "negative_promt": negative["class_name"],
                    "label_name": asked["class_name"],
                }
                for image in asked["test_samples"]
            ]
    return rows


def _draw_class(creature: Creature, *, out: Path, seed: int, size: int) -> None:
    for index in range(SAMPLES if creature.split == "train" else CONTEXT + TEST):
        path = out / "images" / image_name(creature, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_creature(creature, seed, index, size).save(path, compress_level=1)


def render_creatures(out: Path, *, seed: int, train: int, test: int, image_size: int, workers: int = 1) -> None:
    """Write `train` and `test` classes below `out`; the files depend on all arguments but `workers`.

    Raises UserError for sizes and numbers out of range.
    """
    if not MIN_SIZE <= image_size <= MAX_SIZE:
        raise UserError(f"image_size {image_size}: creatures are drawn at {MIN_SIZE} to {MAX_SIZE} pixels")
    if train < 2 or test < 2 or test % 2:
        raise UserError(f"{train} training and {test} test classes: at least 2 each, test classes in pairs")
    try:
        learned, unseen = world_creature.creatures(seed, train, test)
    except ValueError as error:
        raise UserError(f"creatures: {error}") from None
    job = partial(_draw_class, out=out, seed=seed, size=image_size)
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            for _ in pool.map(job, [*learned, *unseen], chunksize=8):
                pass
    else:
        for creature in (*learned, *unseen):
            job(creature)
    pairs = pair_rows(unseen, train + 1)
    write_rows(out / "lcl" / "train_pairs.jsonl", neighbour_rows(learned, seed))
    write_rows(out / "lcl" / "val.jsonl", pairs)
    write_rows(out / "lcl" / "isekai.jsonl", isekai_rows(pairs))
    (out / "regions").mkdir(parents=True, exist_ok=True)
    with open(out / "regions" / "captions.jsonl", "w") as captions:
        for creature in learned:
            caption = world_creature.describe(creature)
            for index in range(SAMPLES):
                captions.write(json.dumps({"img_path": image_name(creature, index), "caption": caption}) + "\n")
