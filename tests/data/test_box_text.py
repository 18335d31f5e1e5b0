"""Box text: what is printed reads back, what is no box is refused with a reason (P1), on real boxes and by hand.

In: answers as models give them, and the referring expressions of the photo set. Out: nothing but the verdicts.
Decision: the negative controls are answers that a lenient reader would turn into a wrong box without a word.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eventlens_ds.data import boxes
from eventlens_ds.data.records import Box

pytestmark = pytest.mark.P1

SHARES = Box(0.44, 0.06, 0.65, 0.367)


@pytest.mark.parametrize(
    "text",
    [
        "[0.440,0.060,0.650,0.367]",
        "Answer: [0.440,0.060,0.650,0.367].",
        "the dog is at [ 0.44 , .06,\n 0.65,0.367 ] I think",
        "[[0.440,0.060,0.650,0.367]]",
        "[END EXAMPLE] [+0.440,0.060,0.650,0.367]",
    ],
)
def test_one_box_in_many_forms(text: str) -> None:
    found = boxes.parse_boxes(text, 1, 1)
    assert found.boxes == (pytest.approx(SHARES),)
    assert (found.refused, found.reason) == ((), None)
    assert boxes.parse_boxes(text, 200, 100).boxes[0] == pytest.approx((88, 6, 130, 36.7))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty answer"),
        (" \n", "empty answer"),
        ("the dog on the left", "no box"),
        ("[the dog]", "no box"),
        ("it is object 3", "no box"),
        ("0.44,0.06,0.65,0.367", "no closed brackets"),
        ("Answer: [0.440,0.060,0.650,0.367", "no closed brackets"),
        ("(0.44, 0.06, 0.65, 0.367)", "no closed brackets"),
        ("[0.440,0.060,0.650]", "not four numbers"),
        ("[0.1,0.2,0.3,0.4,0.9]", "not four numbers"),
        ("[0.1 0.2 0.3 0.4]", "not four numbers"),
        ("[0.1,0.2,0.3,1e-1]", "not four numbers"),
        ("[0.1,0.2,nan,0.4]", "not four numbers"),
        ("[44%,6%,65%,37%]", "percent"),
        ("[281,26,416,157]", "above 1"),
        ("[0.44,0.06,1.001,0.367]", "above 1"),
        ("[-0.1,0.06,0.65,0.367]", "below 0"),
        ("[" + "9" * 400 + ",0,1,1]", "above 1"),
        ("[0.650,0.367,0.440,0.060]", "inverted"),
        ("[0.440,0.367,0.650,0.060]", "inverted"),
        ("[0.440,0.060,0.440,0.367]", "zero area"),
    ],
)
def test_refused_with_a_reason(text: str, reason: str) -> None:
    found = boxes.parse_boxes(text, 640, 427)
    assert (found.boxes, found.reason) == ((), reason)
    assert boxes.from_text(text, 640, 427) is None


def test_several_boxes_and_what_is_refused_among_them() -> None:
    found = boxes.parse_boxes("[0.1,0.1,0.2,0.2;0.3,0.3,0.4,0.4] and [50%,0,1,1], [0,0,1,1]", 10, 10)
    assert found.boxes == (pytest.approx((1, 1, 2, 2)), pytest.approx((3, 3, 4, 4)), Box(0, 0, 10, 10))
    assert (found.refused, found.reason) == (("percent",), None)


def test_swapped_corners_are_not_repaired() -> None:
    swapped = "[0.650,0.367,0.440,0.060]"
    x1, y1, x2, y2 = (float(v) for v in swapped.strip("[]").split(","))
    lenient = Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    assert boxes.iou(lenient, SHARES) == pytest.approx(1.0)  # Sorting the corners would score a hit.
    assert boxes.parse_boxes(swapped, 1, 1).reason == "inverted"


def test_real_boxes_print_and_read_back(shared: Path) -> None:
    rows = [json.loads(line) for line in (shared / "data/photos/regions/rec.jsonl").open()]
    assert len(rows) == 46
    for row in rows:
        size = row["width"], row["height"]
        box = boxes.from_normalised(row["bbox"], *size)
        text = boxes.to_text(box, *size)
        assert text == "[" + ",".join(f"{v:.3f}" for v in row["bbox"]) + "]"
        assert boxes.parse_boxes(f"Answer: {text}", *size).boxes == (pytest.approx(box),)
