"""Statements: our rows and VSR's own, splits of released files, yes and no, faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.data.lint import lint
from eventlens_ds.data.sources import samples
from eventlens_ds.data.sources.statements import StatementSource
from eventlens_ds.errors import DataError, UserError
from tests.data.conftest import paint, write_rows

OURS = {"img_path": "a.jpg", "statement": "The cat  is on the mat.", "label": 1}
RELEASED = {
    "image": "000000085637.jpg",
    "image_link": "http://images.cocodataset.org/train2017/000000085637.jpg",
    "caption": "The bed is next to the person.",
    "label": 0,
    "relation": "next to",
    "annotator_id": 1,
    "vote_true_validator_id": [],
    "vote_false_validator_id": [2],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_rows(tmp_path / "regions" / "vsr.jsonl", [OURS])
    return paint(tmp_path, "a.jpg", "train2017/000000085637.jpg")


def test_samples(root: Path) -> None:
    write_rows(root / "regions" / "vsr.jsonl", [OURS, RELEASED])
    first, second = StatementSource(root).images("train")
    one, two = (samples(item.records[0], item.image)[0] for item in (first, second))
    assert (one.id, one.task, one.field("label")) == (f"{first.image.key}#1/vsr", "vsr", "1")
    assert one.turns == (("statement", ("The cat is on the mat.",)),) and one.targets == (("yes",),)
    assert two.targets == (("no",),) and two.field("label") == "0"
    assert second.image.img_fn == "train2017/000000085637.jpg" and second.records[0]["relation"] == "next to"


def test_released_files_name_their_split(root: Path) -> None:
    for name in ("train", "dev", "test"):
        write_rows(root / "regions" / "vsr" / f"{name}.jsonl", [RELEASED])
    source = StatementSource(root)
    assert source.splits() == ("train", "val", "test")
    ids = [s.id for p in source.splits() for i in source.images(p) for r in i.records for s in samples(r, i.image)]
    assert [i.split("#")[1] for i in ids] == ["1/vsr", "train-1/vsr", "val-1/vsr", "test-1/vsr"]
    assert "also in val, test" in lint(source, "train")[0].message, "lint sees the picture that all of them hold"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (OURS | {"label": 2}, "'label' wants 1"),
        (OURS | {"label": True}, "'label' wants 1"),
        (OURS | {"label": "1"}, "'label' wants 1"),
        ({"img_path": "a.jpg", "label": 1}, "no 'statement'"),
        ({"statement": "x", "label": 1}, "no 'img_path'"),
        (RELEASED | {"image": "000000000001.jpg"}, "no image"),
        (RELEASED | {"image": "../a.jpg"}, "leaves the image folder"),
        ("x", "expected a JSON object"),
    ],
)
def test_faults_name_file_and_line(root: Path, bad: Any, message: str) -> None:
    path = write_rows(root / "regions" / "vsr.jsonl", [OURS, bad])
    with pytest.raises(DataError, match=f"{path}:2: .*{message}"):
        list(StatementSource(root).images("train"))
    assert {f.where for f in lint(StatementSource(root), "train")} == {f"{path}:2"}


def test_photos(shared: Path) -> None:
    source = StatementSource(shared / "data" / "photos")
    items = [item for split in source.splits() for item in source.images(split)]
    labels = [samples(record, item.image)[0].field("label") for item in items for record in item.records]
    assert len(labels) == 42 and labels.count("1") == 23
    assert all(lint(source, split) == [] for split in source.splits())


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no vsr; expected .*vsr.jsonl"):
        StatementSource(tmp_path)
