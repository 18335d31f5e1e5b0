"""Tags: they reach the image record, survive a shard, and leave shards without them as they were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.data import build
from eventlens_ds.data.lint import lint
from eventlens_ds.data.records import ImageRecord
from eventlens_ds.data.shards import ShardSet, canonical_json, image_from_json, image_to_json
from eventlens_ds.data.sources.combined import open_source
from eventlens_ds.data.sources.tags import TagSource
from eventlens_ds.errors import DataError, UserError
from tests.data.conftest import paint, write_rows

ROW = {"img_path": "a.jpg", "tags": ["dog", " golden  retriever"], "wrong_tag": "cat"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_rows(tmp_path / "regions" / "tags.jsonl", [ROW])
    write_rows(tmp_path / "regions" / "captions.jsonl", [{"img_path": n, "caption": "x"} for n in ("a.jpg", "b.jpg")])
    return paint(tmp_path, "a.jpg", "b.jpg")


def test_an_image_without_records(root: Path) -> None:
    (item,) = TagSource(root).images("train")
    assert item.image.tags == ("dog", "golden retriever") and item.records == ()


def test_two_rows_of_one_picture_are_joined_and_reported(root: Path) -> None:
    path = write_rows(root / "regions" / "tags.jsonl", [ROW, ROW | {"tags": ["park", "dog"]}])
    (item,) = TagSource(root).images("train")
    assert item.image.tags == ("dog", "golden retriever", "park")
    assert [(f.code, f.where) for f in lint(TagSource(root), "train")] == [("duplicate-id", f"{path}:2")]


def test_tags_travel_through_shards(root: Path, tmp_path: Path) -> None:
    build.build(open_source("captions,tags", root), tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out", "train")
    assert [shards.image(i).tags for i in range(2)] == [("dog", "golden retriever"), ()]
    assert shards.num_records == 2
    build.build(open_source("captions", root), tmp_path / "without")
    assert [ShardSet.open(tmp_path / "without", "train").image(i).tags for i in range(2)] == [(), ()]


def test_metadata_written_before_there_were_tags_reads_as_ever() -> None:
    image = ImageRecord("key", "a.jpg", 20, 10, (), movie="m", split="train")
    old = {"key": "key", "img_fn": "a.jpg", "width": 20, "height": 10, "regions": [], "movie": "m", "split": "train"}
    assert canonical_json(image_to_json(image)) == canonical_json(old), "no tags: the bytes of an old shard"
    assert image_from_json(old) == image
    tagged = replace(image, tags=("a", "b"))
    assert image_from_json(json.loads(canonical_json(image_to_json(tagged)))) == tagged
    assert canonical_json(image_to_json(tagged)) != canonical_json(old)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"img_path": "a.jpg"}, "'tags' wants a list of strings"),
        (ROW | {"tags": "dog"}, "'tags' wants a list of strings"),
        (ROW | {"tags": ["dog", " "]}, "'tags' wants a list of strings"),
        (ROW | {"img_path": "none.jpg"}, "no image"),
        (3, "expected a JSON object"),
    ],
)
def test_faults_name_file_and_line(root: Path, bad: Any, message: str) -> None:
    path = write_rows(root / "regions" / "tags.jsonl", [ROW, bad])
    with pytest.raises(DataError, match=f"{path}:2: .*{message}"):
        list(TagSource(root).images("train"))
    assert {f.where for f in lint(TagSource(root), "train")} == {f"{path}:2"}


def test_photos(shared: Path) -> None:
    source = TagSource(shared / "data" / "photos")
    found = {i.image.img_fn: i.image.tags for split in source.splits() for i in source.images(split)}
    assert len(found) == 14
    words = set((shared / "data" / "tags" / "ram_tag_list.txt").read_text().splitlines())
    assert {tag for tags in found.values() for tag in tags} <= words


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tags; expected .*tags.jsonl"):
        TagSource(tmp_path)
