"""REC accuracy by hand, on real boxes of the photo set, and against metrics that would flatter a model.

In: rows made here and referring expressions of 14 photographs. Out: nothing but the verdicts.
Decision: the controls are the two mistakes that public code makes: taking the best of several boxes, and leaving
answers without a box out of the denominator.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eventlens_ds.data import boxes
from eventlens_ds.data.records import Box
from eventlens_ds.errors import DataError
from eventlens_ds.eval import rec


def row(number: int, answer: str, box: tuple[float, ...] = (0, 0, 50, 40), **more: Any) -> dict[str, Any]:
    base = {"id": f"r{number}", "image": f"{number}.jpg", "split": "val", "answer": answer, "box": list(box)}
    return base | {"width": 100, "height": 80} | more


def test_threshold_is_above_one_half() -> None:
    # Gold is 50 x 40 px; the answers have IoU 1, 0.5 exactly, 0.52 and 0.
    answers = ["[0,0,0.5,0.5]", "[0,0,0.25,0.5]", "[0,0,0.26,0.5]", "[0.6,0.6,0.9,0.9]"]
    outcomes = [rec.judge(row(i, a)) for i, a in enumerate(answers)]
    assert [o.iou for o in outcomes] == pytest.approx([1.0, 0.5, 0.52, 0.0])
    assert [o.hit for o in outcomes] == [True, False, True, False]
    found = rec.score([row(i, a) for i, a in enumerate(answers)])
    assert (found["accuracy"], found["n"], found["mean_iou"]) == (0.5, 4, pytest.approx(2.02 / 4))
    assert found["interval"][0] < 0.5 < found["interval"][1]


def test_unparsable_answers_are_wrong_and_counted() -> None:
    answers = ["[0,0,0.5,0.5]", "", "left", "[0,0,50,40]", "[0.5,0.5,0,0]", "[0,0,0.5,0.5] [0.5,0.5,1,1]"]
    found = rec.score(row(i, a) for i, a in enumerate(answers))
    assert found["accuracy"] == pytest.approx(1 / 6)  # Over the parsable rows alone it would read 1.0.
    counted = {"above 1": 1, "empty answer": 1, "inverted": 1, "no box": 1, "several boxes": 1}
    assert found["unparsable"] == counted


def test_other_boxes_of_an_answer_are_not_ignored() -> None:
    # A model that prints every box of the image: a metric that looks at the first, or the best, calls it right.
    listing = row(0, "[0,0,0.5,0.5] [0.5,0,1,0.5] [0,0.5,0.5,1]")
    first = boxes.from_text(listing["answer"], 100, 80)
    assert first is not None and boxes.iou(first, Box(*listing["box"])) == 1.0
    assert (rec.judge(listing).hit, rec.judge(listing).reason) == (False, "several boxes")


def test_splits_are_scored_apart() -> None:
    rows = [row(i, "[0,0,0.5,0.5]", split="testA") for i in range(3)] + [row(3, "none", split="testB")]
    found = rec.score(rows)
    assert {k: (v["accuracy"], v["n"]) for k, v in found["splits"].items()} == {"testA": (1.0, 3), "testB": (0.0, 1)}
    assert found["splits"]["testB"]["interval"] == [None, None]
    assert (rec.score([])["accuracy"], rec.score([])["splits"], rec.score([])["n"]) == (None, {}, 0)


def test_constant_floor_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 0.4, (300, 2))
    golds = np.concatenate([corner, corner + rng.uniform(0.2, 0.6, (300, 2))], axis=1)
    box, accuracy = rec.constant_floor(golds.tolist())
    hits = [sum(boxes.iou(Box(*a), Box(*b)) > 0.5 for b in golds) for a in golds[:40]]
    assert accuracy * 300 >= max(hits)
    assert accuracy == sum(boxes.iou(box, Box(*b)) > 0.5 for b in golds) / 300
    assert rec.constant_floor([[0, 0, 1, 1], [0, 0, 0.9, 1], [0.9, 0.9, 1, 1]]) == (Box(0, 0, 1, 1), 2 / 3)
    with pytest.raises(DataError, match="no rows"):
        rec.constant_floor([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": [1, 2, 3]}, "r0: a box wants four numbers"),
        ({"box": [50, 40, 0, 0]}, "r0: gold box .* inverted"),
        ({"box": [200, 0, 300, 40]}, "r0: gold box .* outside the image"),
        ({"width": 0}, "r0: 'width' wants a positive number, got 0"),
        ({"height": "80"}, "r0: 'height' wants a positive number"),
        ({"answer": None}, "r0: 'answer' wants a string, got NoneType"),
    ],
)
def test_bad_rows_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rec.score([row(0, "[0,0,1,1]") | change])


def test_missing_keys_and_repeated_ids() -> None:
    with pytest.raises(DataError, match="r0: key split is missing"):
        rec.score([{k: v for k, v in row(0, "x").items() if k != "split"}])
    with pytest.raises(DataError, match="r0: 2 rows with this id"):
        rec.score([row(0, "x"), row(0, "y")])


def photo_rows(shared: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate((shared / "data/photos/regions/rec.jsonl").open()):
        source = json.loads(line)
        size = source["width"], source["height"]
        box = boxes.from_normalised(source["bbox"], *size)
        rows.append(
            row(number, f"Answer: {boxes.to_text(box, *size)}", tuple(box), width=size[0], height=size[1])
            | {"image": source["img_path"]}
        )
    return rows


def test_photos_oracle_floor_and_swapped_answers(shared: Path) -> None:
    rows = photo_rows(shared)
    found = rec.score(rows)
    assert (found["accuracy"], found["n"], found["images"], found["unparsable"]) == (1.0, 46, 14, {})
    box, floor = found["floor"]["box"], found["floor"]["accuracy"]
    assert 1 / 46 <= floor < 0.5
    constant = "[" + ",".join(f"{v:.3f}" for v in box) + "]"
    assert rec.score([r | {"answer": constant} for r in rows])["accuracy"] == pytest.approx(floor, abs=1 / 46)
    # Each answer given to the next expression: another object, often of the same image.
    swapped = [r | {"answer": rows[(i + 1) % len(rows)]["answer"]} for i, r in enumerate(rows)]
    assert rec.score(swapped)["accuracy"] < 0.2
