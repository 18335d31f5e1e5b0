"""Referring expression comprehension from rows: accuracy at IoU 0.5, why answers are no box, and a floor.

In: rows {"id", "image", "split", "answer": generated text, "box": [x1, y1, x2, y2] in pixels of the original image,
"width", "height"}, one per expression. Out: plain dicts of fractions and counts.
Decision: an answer counts when it prints exactly one box, read by data/boxes.py alone (P1); every other answer is
wrong and counted under its reason, as in Shikra's metric, which also asks for one box and IoU above 0.5. The floor is
the best single box, in shares of the image, chosen with the gold boxes of the same rows in hand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eventlens_ds.data import boxes
from eventlens_ds.data.records import Box
from eventlens_ds.errors import DataError
from eventlens_ds.eval.intervals import bootstrap_mean

THRESHOLD = 0.5
SEVERAL = "several boxes"
"""Reason of an answer that prints more than one box: which one was meant is not for the metric to choose."""

CHUNK = 256
"""Candidates compared at a time, so that the floor over 10,000 rows takes tens of MB."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One scored answer: its IoU with the gold box in 0..1 (0 without a box), and why it is no box, or None."""

    id: str
    image: str
    split: str
    iou: float
    reason: str | None
    gold: tuple[float, float, float, float]
    """The gold box as shares of width and height."""

    @property
    def hit(self) -> bool:
        return self.iou > THRESHOLD


def score(rows: Iterable[Row], *, seed: int = 0) -> dict[str, Any]:
    """Accuracy at IoU 0.5 over all rows, and the same block for each split under "splits".

    A block holds "accuracy" (share of rows with IoU > 0.5), "mean_iou", "n", "images", "interval" (bootstrap over
    images, 95 %), "unparsable" {reason: rows} and "floor" {"box": shares of the image, "accuracy"}. Values are None
    without rows. Raises DataError naming the row whose keys, size or gold box are unusable or whose id repeats.
    """
    outcomes = [judge(row) for row in rows]
    names = Counter(o.id for o in outcomes)
    if repeated := [name for name, times in names.items() if times > 1]:
        raise DataError(f"{repeated[0]}: {names[repeated[0]]} rows with this id")
    result = _block(outcomes, seed)
    splits = sorted({o.split for o in outcomes})
    result["splits"] = {name: _block([o for o in outcomes if o.split == name], seed) for name in splits}
    return result


def judge(row: Row) -> Outcome:
    """One row as an `Outcome`. IoU is taken in float64 over boxes in pixels. Raises DataError as `score`."""
    name = str(row.get("id", "row without id"))
    if lacking := [k for k in ("id", "image", "split", "answer", "box", "width", "height") if k not in row]:
        raise DataError(f"{name}: key {lacking[0]} is missing")
    if not isinstance(row["answer"], str):
        raise DataError(f"{name}: 'answer' wants a string, got {type(row['answer']).__name__}")
    width, height = row["width"], row["height"]
    for key, value in (("width", width), ("height", height)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise DataError(f"{name}: {key!r} wants a positive number, got {ascii(value)[:40]}")
    try:
        gold = boxes.from_xyxy(row["box"])
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    if fault := boxes.problem(gold, width, height):
        raise DataError(f"{name}: gold box {list(gold)} on {width} x {height}: {fault}")
    found = boxes.parse_boxes(row["answer"], width, height)
    reason = SEVERAL if len(found.boxes) > 1 else found.reason
    overlap = 0.0 if reason else boxes.iou(found.boxes[0], gold)
    x1, y1, x2, y2 = boxes.normalise(np.asarray([gold], np.float64), width, height)[0].tolist()
    return Outcome(name, str(row["image"]), str(row["split"]), overlap, reason, (x1, y1, x2, y2))


def constant_floor(golds: Sequence[Sequence[float]]) -> tuple[Box, float]:
    """The best constant answer for gold boxes given as shares of their images, and its accuracy.

    Every gold box is tried on all rows, so it is a floor that has seen the answers: a model below it has learned
    less than one fixed box. IoU does not change when x and y are scaled, so shares give the IoU of pixels. Equal
    boxes are tried once; of equally good ones the first wins. Raises DataError when there is no box.
    """
    table = np.asarray(golds, np.float64).reshape(-1, 4)
    if not len(table):
        raise DataError("the best constant box of no rows was asked for")
    candidates = table[np.sort(np.unique(table, axis=0, return_index=True)[1])]
    hits = np.concatenate(
        [
            (boxes.pairwise_iou(candidates[i : i + CHUNK], table) > THRESHOLD).sum(axis=1)
            for i in range(0, len(candidates), CHUNK)
        ]
    )
    best = int(hits.argmax())
    return Box(*candidates[best].tolist()), float(hits[best] / len(table))


def _block(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    unparsable = Counter(o.reason for o in outcomes if o.reason)
    block: dict[str, Any] = {"n": len(outcomes), "images": len({o.image for o in outcomes})}
    block |= dict.fromkeys(("accuracy", "mean_iou", "interval", "floor"))
    block["unparsable"] = dict(sorted(unparsable.items()))
    if outcomes:
        interval = bootstrap_mean([float(o.hit) for o in outcomes], [o.image for o in outcomes], seed=seed)
        box, floor = constant_floor([o.gold for o in outcomes])
        block |= {"accuracy": interval.estimate, "interval": interval.as_list()}
        block["mean_iou"] = sum(o.iou for o in outcomes) / len(outcomes)
        block["floor"] = {"box": [round(v, 4) for v in box], "accuracy": floor}
    return block
