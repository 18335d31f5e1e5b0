"""Shikra's REC rows: one record per box, a rec sample per expression and one reg sample, held-out pictures, faults."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.data import boxes
from eventlens_ds.data.lint import lint
from eventlens_ds.data.sources import samples
from eventlens_ds.data.sources.expressions import ExpressionSource
from eventlens_ds.errors import DataError, UserError
from tests.data.conftest import paint, write_rows

BOX = [0.1, 0.2, 0.5, 0.8]


def row(text: str, box: list[float] | None = None, name: str = "a.jpg", **more: Any) -> dict[str, Any]:
    return {"img_path": name, "expression": text, "bbox": box or BOX, "width": 20, "height": 10, **more}


def write(root: Path, rows: list[Any]) -> Path:
    return write_rows(root / "regions" / "rec.jsonl", rows)


def hold_out(root: Path, number: int) -> None:
    """Refs files of the three sets; picture `number` is in testA of refcoco, 99 in train of all."""
    for dataset, variant in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        refs = [
            {"ref_id": i, "ann_id": i, "image_id": image, "split": split, "sentences": [{"sent": "x", "sent_id": i}]}
            for i, (image, split) in enumerate([(99, "train")] + [(number, "testA")] * (dataset == "refcoco"))
        ]
        (root / dataset).mkdir(exist_ok=True)
        (root / dataset / f"refs({variant}).p").write_bytes(pickle.dumps(refs))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(
        tmp_path, [row("a  dog"), row("a cat", [0, 0, 0.5, 0.5]), row("the dog"), row("a dog"), row("x", name="b.jpg")]
    )
    return paint(tmp_path, "a.jpg", "b.jpg")


@pytest.mark.P1
def test_samples(root: Path) -> None:
    first, second = ExpressionSource(root).images("train")
    assert [len(r["rows"]) for r in first.records] == [3, 1] and len(second.records) == 1
    made = samples(first.records[0], first.image)
    assert [s.task for s in made] == ["rec", "rec", "rec", "reg"]
    text = "[0.100,0.200,0.500,0.800]"
    said = [("expression", "a dog"), ("expression", "the dog"), ("expression", "a dog"), ("box", text)]
    assert [s.turns for s in made] == [((role, (words,)),) for role, words in said]
    assert all(s.targets == ((text,),) for s in made[:3]) and made[3].targets == (("a dog",), ("the dog",))
    key = first.image.key
    assert [s.id for s in made] == [f"{key}#rec-1/rec", f"{key}#rec-3/rec", f"{key}#rec-4/rec", f"{key}#rec-1/reg"]
    assert {s.field("box") for s in made} == {"[2.0, 2.0, 10.0, 8.0]"}
    assert boxes.to_text(boxes.from_xyxy(json.loads(made[0].field("box"))), 20, 10) == text
    assert first.records[0]["rows"][0]["expression"] == "a  dog", "the record keeps the source's text"


def test_metadata_gives_the_regions_and_must_agree_on_the_size(root: Path) -> None:
    meta = {"boxes": [[1, 2, 3, 4, 0.5]], "segms": [[]], "names": ["cat"], "width": 20, "height": 10}
    (root / "images" / "a.json").write_text(json.dumps(meta))
    assert [len(item.image.regions) for item in ExpressionSource(root).images("train")] == [1, 0]
    (root / "images" / "a.json").write_text(json.dumps(meta | {"height": 11}))
    with pytest.raises(DataError, match="rec.jsonl:1: size 20 x 10, the metadata says 20 x 11"):
        list(ExpressionSource(root).images("train"))


def test_size_of_a_row_without_one_is_that_of_the_picture(root: Path) -> None:
    write(root, [{"img_path": "a.jpg", "expression": "x", "bbox": BOX}])
    item = next(iter(ExpressionSource(root).images("train")))
    assert (item.image.width, item.image.height) == (20, 10) and item.records[0]["box"] == [2, 2, 10, 8]


@pytest.mark.P1
def test_unusable_boxes_are_counted_with_a_reason(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(
        root, [row("a"), row("b", [0.5, 0.2, 0.1, 0.8]), row("c", [0.5, 0.2, 0.5, 0.8]), row("d", [-1, 0, -0.5, 1])]
    )
    found = list(ExpressionSource(root).images("train"))
    assert [len(r["rows"]) for item in found for r in item.records] == [1]
    assert "3 rows left out: box inverted 1, box outside the image 1, box zero area 1" in caplog.text
    assert [(f.code, f.where) for f in lint(ExpressionSource(root), "train")] == [
        ("box", f"{path}:{n}") for n in (2, 3, 4)
    ]


NUMBERED = "train2014/COCO_train2014_000000000007.jpg"


@pytest.mark.parametrize("place", [".", "refer"])
def test_pictures_that_refcoco_holds_out_are_not_trained_on(
    root: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    other = NUMBERED.replace("7.jpg", "8.jpg")
    paint(root, NUMBERED, other)
    write(
        root,
        [row("a", name=NUMBERED), row("b", name=other), row("c", name="a.jpg"), row("d", name=NUMBERED, split="val")],
    )
    assert len(list(ExpressionSource(root).images("train"))) == 3, "control: without refs files nothing is held out"
    assert "nothing is checked" in caplog.text
    (root / place).mkdir(exist_ok=True)
    hold_out(root / place, 7)
    source = ExpressionSource(root)
    assert [item.image.img_fn for item in source.images("train")] == [other]
    assert "2 rows left out: held out by refcoco/unc/testA 1, no COCO number to check against RefCOCO 1" in caplog.text
    assert [item.image.img_fn for item in source.images("val")] == [NUMBERED]
    assert [f.code for f in lint(source, "train")] == ["split-overlap"] * 3
    (root / place / "refcoco+" / "refs(unc).p").unlink()
    with pytest.raises(UserError, match=r"no refs file of refcoco\+"):
        ExpressionSource(root)


def test_splits_follow_the_image(root: Path) -> None:
    write_rows(root / "vcr" / "val.jsonl", [{"img_fn": "b.jpg"}])
    source = ExpressionSource(root)
    assert source.splits() == ("train", "val")
    assert [item.image.img_fn for item in source.images("val")] == ["b.jpg"]
    (root / "vcr" / "val.jsonl").unlink()
    assert ExpressionSource(root).splits() == ("train",)


def test_released_rows(shared: Path, tmp_path: Path) -> None:
    """Shikra's own rows are shares of the picture; sizes are theirs, so the pictures may be stand-ins."""
    text = (shared / "data" / "refcoco" / "refcoco_rec_sample_excerpt.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    for made in rows:
        paint(tmp_path, made["img_path"], size=(made["width"], made["height"]))
    write(tmp_path, rows)
    found = [s for i in ExpressionSource(tmp_path).images("train") for r in i.records for s in samples(r, i.image)]
    assert sum(s.task == "rec" for s in found) == len(rows) == 11
    wanted = {"[" + ",".join(f"{v:.3f}" for v in made["bbox"]) + "]" for made in rows}
    assert {s.targets[0][0] for s in found if s.task == "rec"} == wanted


def test_photos(shared: Path) -> None:
    source = ExpressionSource(shared / "data" / "photos")
    items = [item for split in source.splits() for item in source.images(split)]
    assert sum(len(r["rows"]) for item in items for r in item.records) == 46 and len(items) == 14
    assert all(lint(source, split) == [] for split in source.splits())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({k: v for k, v in row("x").items() if k != "bbox"}, "'bbox': a box wants four numbers"),
        (row("x", [1, 2, 10, 8]), "no share of the image; is the file in pixels"),
        (row(""), "'expression' wants a string"),
        (row("x", name="../a.jpg"), "leaves the image folder"),
        (row("x", name="none.jpg"), "no image"),
        (row("x") | {"width": "20"}, "'width' wants a positive integer"),
        ({k: v for k, v in row("x").items() if k != "width"}, "one of 'width' and 'height'"),
        (3, "expected a JSON object"),
    ],
)
def test_faults_name_file_and_line(root: Path, bad: Any, message: str) -> None:
    path = write(root, [row("fine"), bad])
    with pytest.raises(DataError, match=f"{path}:2: .*{message}"):
        list(ExpressionSource(root).images("train"))
    assert {f.where for f in lint(ExpressionSource(root), "train")} == {f"{path}:2"}


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rec; expected .*rec.jsonl"):
        ExpressionSource(tmp_path)
