"""POPE: the setting from the file name, never training data by itself, faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.data.lint import lint
from eventlens_ds.data.sources import samples
from eventlens_ds.data.sources.pope import SETTINGS, PopeSource
from eventlens_ds.errors import DataError, UserError
from tests.data.conftest import paint, write_rows

IMAGE = "COCO_val2014_000000310196.jpg"
ROW = {"question_id": 1, "image": IMAGE, "text": "Is there a snowboard in the image?", "label": "yes"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for setting in SETTINGS:
        rows = [ROW, ROW | {"question_id": 2, "text": f"Is there a {setting} in the image?", "label": "no"}]
        write_rows(tmp_path / "regions" / "pope" / f"coco_pope_{setting}.json", rows)
    return paint(tmp_path, f"val2014/{IMAGE}", "a.jpg")


def test_samples(root: Path) -> None:
    source = PopeSource(root)
    assert source.splits() == ("val",), "a benchmark is no training data"
    (item,) = source.images("val")
    found = [samples(record, item.image)[0] for record in item.records]
    assert [s.field("setting") for s in found] == [
        "random",
        "random",
        "popular",
        "popular",
        "adversarial",
        "adversarial",
    ]
    assert [s.field("label") for s in found] == ["yes", "no"] * 3 and len({s.id for s in found}) == 6
    assert found[2].id == f"{item.image.key}#popular-1/pope" and found[2].task == "pope"
    assert found[0].turns == (("question", (ROW["text"],)),) and found[1].targets == (("no",),)
    assert item.image.img_fn == f"val2014/{IMAGE}" and lint(source, "val") == []


def test_it_follows_a_picture_that_something_places(root: Path) -> None:
    write_rows(root / "vcr" / "train.jsonl", [{"img_fn": f"val2014/{IMAGE}"}])
    assert PopeSource(root).splits() == ("train",)


def test_a_file_of_no_setting(root: Path) -> None:
    write_rows(root / "regions" / "pope" / "coco_pope_hard.json", [ROW])
    with pytest.raises(UserError, match="coco_pope_hard.json: its name ends with no setting"):
        PopeSource(root)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ROW | {"label": "maybe"}, "'label' wants yes or no"),
        (ROW | {"label": ["yes"]}, "'label' wants yes or no"),
        (ROW | {"text": ""}, "'text' wants a string"),
        (ROW | {"image": 3}, "'img_path' wants a string"),
        (ROW | {"image": "none.jpg"}, "no image"),
        ([], "expected a JSON object"),
    ],
)
def test_faults_name_file_and_line(root: Path, bad: Any, message: str) -> None:
    path = write_rows(root / "regions" / "pope" / "coco_pope_random.json", [ROW, bad])
    with pytest.raises(DataError, match=f"{path}:2: .*{message}"):
        list(PopeSource(root).images("val"))
    assert {f.where for f in lint(PopeSource(root), "val")} == {f"{path}:2"}


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pope; expected .*pope"):
        PopeSource(tmp_path)
