"""The RefCOCO source: a train split that no set holds out, a split per set for scoring, missing files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.data.sources import refcoco, samples
from eventlens_ds.data.sources.combined import open_source
from eventlens_ds.data.sources.refcoco_source import VARIANTS, RefCocoSource
from eventlens_ds.errors import DataError, UserError
from tests.data.conftest import paint, write_rows

IMAGES = range(1, 6)


def name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


def write(root: Path, dataset: str, refs: list[tuple[int, str]]) -> None:
    """A set whose refs are (image, split), two sentences each; annotation n is on image n."""
    rows: list[Any] = [
        {"ref_id": i, "ann_id": image, "image_id": image, "split": split,
         "sentences": [{"sent": f"{dataset} {i} {k}", "sent_id": 2 * i + k} for k in range(2)]}
        for i, (image, split) in enumerate(refs)
    ]  # fmt: skip
    (root / dataset).mkdir(exist_ok=True)
    (root / dataset / f"refs({VARIANTS[dataset]}).p").write_bytes(pickle.dumps(rows))
    images = [{"id": n, "file_name": name(n), "width": 20, "height": 10} for n in IMAGES]
    annotations = [{"id": n, "image_id": n, "bbox": [2, 1, 4, 5]} for n in IMAGES]
    (root / dataset / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Picture 1 is in train of all, 2 in testA of refcoco, 3 in val of refcoco+, 4 in test of refcocog."""
    write(tmp_path, "refcoco", [(1, "train"), (2, "testA"), (3, "train"), (4, "train")])
    write(tmp_path, "refcoco+", [(1, "train"), (2, "train"), (3, "val")])
    write(tmp_path, "refcocog", [(5, "train"), (4, "test")])
    return paint(tmp_path, *(f"train2014/{name(n)}" for n in IMAGES))


def images(source: Any, split: str) -> list[str]:
    return [item.image.img_fn for item in source.images(split)]


def test_train_holds_no_picture_that_a_set_holds_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = RefCocoSource(root)
    assert images(source, "train") == [f"train2014/{name(n)}" for n in (1, 5)]
    assert "refcoco, train: 4 expressions left out" in caplog.text and "refcoco+/unc/val 2" in caplog.text
    plain = {e.image for d, v in VARIANTS.items() for e in refcoco.read_refs(root, d, v, ("train",))}
    assert plain == {name(n) for n in IMAGES}, "control: the train splits by themselves hold every picture"
    assert images(source, "refcoco_testA") == [f"train2014/{name(2)}"]
    assert images(source, "refcocoplus_val") == [f"train2014/{name(3)}"]
    assert images(source, "refcocog_test") == [f"train2014/{name(4)}"]


@pytest.mark.P1
def test_samples(root: Path) -> None:
    item = next(iter(RefCocoSource(root).images("train")))
    (record,) = item.records
    made = samples(record, item.image)
    assert [s.task for s in made] == ["rec"] * 4 + ["reg"] and len({s.id for s in made}) == 5
    assert made[0].source == "refcoco" and made[0].field("box") == "[2.0, 1.0, 6.0, 6.0]"
    assert {s.targets for s in made[:4]} == {(("[0.100,0.100,0.300,0.600]",),)}
    assert made[4].targets == (("refcoco 0 0",), ("refcoco 0 1",), ("refcoco+ 0 0",), ("refcoco+ 0 1",))


def test_rows_without_splits_follow_it(root: Path) -> None:
    """A VQA question on a picture of testA is no training data in this company."""
    rows = [{"img_path": f"train2014/{name(n)}", "question": "x?", "answer": "y"} for n in (1, 2)]
    write_rows(root / "vqa.jsonl", rows)
    source = open_source("refcoco,vqa", root)
    assert images(source, "train") == [f"train2014/{name(n)}" for n in (1, 5)]
    kinds = [record["kind"] for item in source.images("refcoco_testA") for record in item.records]
    assert kinds == ["expression", "vqa"]
    assert images(open_source("vqa", root), "train") == [f"train2014/{name(n)}" for n in (1, 2)]


def test_missing_files(root: Path) -> None:
    (root / "images" / "train2014" / name(1)).unlink()
    with pytest.raises(DataError, match=r"refs\(unc\).p: ref_id 0: no image"):
        list(RefCocoSource(root).images("train"))
    (root / "refcocog" / "refs(umd).p").unlink()
    with pytest.raises(UserError, match="all three sets are needed"):
        RefCocoSource(root)
    with pytest.raises(UserError, match="no refcoco; expected"):
        RefCocoSource(root / "images")
