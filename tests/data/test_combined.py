"""combined: records of several sources meet at their image, and what has no split follows its picture."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds import cli_data
from eventlens_ds.data.records import TASKS, Box, ImageRecord, Region
from eventlens_ds.data.sources import SourceImage, rows, samples
from eventlens_ds.data.sources import combined as combining
from eventlens_ds.data.sources.combined import CombinedSource
from eventlens_ds.errors import DataError, UserError


@dataclass
class Listed:
    """A source that is a list: split -> names of images."""

    name: str
    content: dict[str, list[str]]
    width: int = 64
    tags: tuple[str, ...] = ()

    @property
    def follows(self) -> bool:
        return self.name in ("captions", "vqa", "tags")

    def splits(self) -> tuple[str, ...]:
        return tuple(self.content)

    def images(self, split: str) -> Iterator[SourceImage]:
        for name in self.content[split]:
            regions = () if self.follows else (Region("person", Box(0, 0, 9, 9)),)
            image = ImageRecord(name, f"{name}.jpg", self.width, 64, regions, split=split, tags=self.tags)
            yield SourceImage(image, Path(f"{name}.jpg"), () if self.tags else ({"kind": self.name},))


def merged(source: CombinedSource, split: str) -> dict[str, list[str]]:
    return {item.image.key: [record["kind"] for record in item.records] for item in source.images(split)}


def test_records_meet_at_their_image_in_the_order_of_the_first_source() -> None:
    vcr = Listed("vcr", {"train": ["a", "b"], "val": ["c"]})
    events = Listed("visualcomet", {"train": ["d", "b"], "val": ["c"], "test": ["e"]})
    source = CombinedSource("x", [vcr, events])
    assert source.splits() == ("train", "val", "test")
    assert merged(source, "train") == {"a": ["vcr"], "b": ["vcr", "visualcomet"], "d": ["visualcomet"]}
    assert list(merged(source, "train")) == ["a", "b", "d"]
    assert merged(source, "val") == {"c": ["vcr", "visualcomet"]}
    assert merged(source, "test") == {"e": ["visualcomet"]}


def test_captions_follow_their_picture() -> None:
    """All captions say "train"; that of the validation picture c must not be there."""
    vcr = Listed("vcr", {"train": ["a"], "val": ["c"]})
    source = CombinedSource("x", [vcr, Listed("captions", {"train": ["a", "c", "z"]})])
    assert merged(source, "train") == {"a": ["vcr", "captions"], "z": ["captions"]}
    assert merged(source, "val") == {"c": ["vcr", "captions"]}


def test_without_the_rule_the_caption_leaks() -> None:
    """Negative control: the caption source by itself puts the validation picture into train."""
    captions = Listed("captions", {"train": ["a", "c"]})
    assert [item.image.key for item in captions.images("train")] == ["a", "c"]


def test_an_image_in_two_splits_keeps_its_caption_in_both() -> None:
    source = CombinedSource("x", [Listed("vcr", {"train": ["a"], "val": ["a"]}), Listed("captions", {"train": ["a"]})])
    assert merged(source, "train") == merged(source, "val") == {"a": ["vcr", "captions"]}


def test_rows_of_two_splits_that_meet_at_a_picture_are_all_kept() -> None:
    asked = Listed("vqa", {"train": ["a"], "test": ["a"]})
    assert merged(CombinedSource("x", [Listed("vcr", {"val": ["a"]}), asked]), "val") == {"a": ["vcr", "vqa", "vqa"]}


def test_captions_alone_make_their_own_split() -> None:
    source = CombinedSource("x", [Listed("vcr", {"val": ["a"]}), Listed("captions", {"train": ["z"]})])
    assert source.splits() == ("val", "train")
    assert merged(source, "train") == {"z": ["captions"]}


def test_every_follower_follows_and_tags_go_wherever_the_picture_is() -> None:
    """POPE-like rows say "val", tags say "train"; the picture says where they belong, tags follow even a follower."""
    vcr = Listed("vcr", {"train": ["a"], "val": ["c"]})
    asked = Listed("vqa", {"val": ["a", "z"]})
    tags = Listed("tags", {"train": ["a", "c", "z"]}, tags=("dog", "park"))
    for order in ([vcr, asked, tags], [vcr, tags, asked]):
        source = CombinedSource("x", order)
        assert merged(source, "train") == {"a": ["vcr", "vqa"]}
        assert merged(source, "val") == {"c": ["vcr"], "z": ["vqa"]}
        found = [item.image.tags for split in ("train", "val") for item in source.images(split)]
        assert found == [("dog", "park")] * 3
    without = CombinedSource("x", [vcr, asked])
    assert {item.image.tags for item in without.images("train")} == {()}


def test_a_picture_that_only_tags_name_is_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    source = CombinedSource("x", [Listed("vcr", {"train": ["a"]}), Listed("tags", {"train": ["a", "q"]}, tags=("b",))])
    assert merged(source, "train") == {"a": ["vcr"]}
    assert "train: 1 images that only tags name are left out" in caplog.text
    caplog.clear()
    assert merged(CombinedSource("x", [Listed("vcr", {"train": ["a"]})]), "train") and not caplog.text


def test_sources_that_describe_an_image_differently_are_refused() -> None:
    other = Listed("visualcomet", {"train": ["a"]}, width=65)
    source = CombinedSource("x", [Listed("vcr", {"train": ["a"]}), other])
    with pytest.raises(DataError, match="a.jpg: vcr and visualcomet"):
        list(source.images("train"))
    fine = CombinedSource("x", [Listed("vcr", {"train": ["a"]}), dataclasses.replace(other, width=64)])
    assert len(list(fine.images("train"))) == 1


def test_names() -> None:
    assert f"any of {', '.join(combining.NAMES)}" == cli_data.SOURCES
    with pytest.raises(UserError, match="vcrr: unknown"):
        combining.open_source("vcr,vcrr", ".")
    with pytest.raises(UserError, match="twice"):
        combining.open_source("vcr,vcr", ".")


def test_tags_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "tags.jsonl").write_text("")
    with pytest.raises(UserError, match="tags are no samples"):
        combining.open_source("tags", tmp_path)
    (tmp_path / "captions.jsonl").write_text("")
    assert combining.open_source("captions,tags", tmp_path).name == "captions+tags"


def test_followers_in_company_read_a_picture_once(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()

    def counted(path: Path, img_fn: str, *more: Any) -> ImageRecord:
        read[img_fn] += 1
        return plain(path, img_fn, *more)

    plain = rows.read_image
    monkeypatch.setattr(rows, "read_image", counted)
    root = shared / "data" / "photos"
    source = combining.open_source("captions,vqa,rec", root)
    together = {i.image for s in ("train", "val") for i in source.images(s)}
    assert set(read.values()) == {1} and len(read) == 14
    alone = combining.open_source("captions", root)
    assert together == {i.image for s in ("train", "val") for i in alone.images(s)}
    assert set(read.values()) == {2}, "control: by itself a source reads its pictures again"


def test_photos_with_every_source(shared: Path) -> None:
    """Every photograph is held out by VCR or VisualCOMET or in train, with all its rows and its tags."""
    names = "vcr,visualcomet,captions,rec,vqa,vsr,tags"
    source = combining.open_source(names, shared / "data" / "photos")
    held, rest = list(source.images("val")), list(source.images("train"))
    assert len(held) == 10 and len(rest) == 4 and all(item.image.tags for item in (*held, *rest))
    kinds = Counter(record["kind"] for item in (*held, *rest) for record in item.records)
    assert {k: kinds[k] for k in ("vcr", "event", "caption", "vqa", "vsr")} == {
        "vcr": 24, "event": 15, "caption": 28, "vqa": 42, "vsr": 42,
    }  # fmt: skip
    said = [row for item in (*held, *rest) for r in item.records if r["kind"] == "expression" for row in r["rows"]]
    assert len(said) == 46
    found = [s for item in (*held, *rest) for r in item.records for s in samples(r, item.image)]
    assert len({sample.id for sample in found}) == len(found)
    assert {s.task for s in found} == set(TASKS) - {"pope", "lcl"}


def test_world_is_drawn_once_and_continued_after_a_kill(tmp_path: Path) -> None:
    arguments = {"seed": 1, "num_images": 3, "image_size": 64, "val_images": 1}
    root = tmp_path / "raw"
    source = combining.draw_world(root, **arguments)
    assert source.name == "world" and source.splits() == ("train", "val")
    assert sum(1 for _ in source.images("train")) == 3
    picture = next(root.glob("images/*/*.jpg"))
    before = picture.stat().st_mtime_ns
    combining.draw_world(root, **arguments)
    assert picture.stat().st_mtime_ns == before
    for path in (root / "regions" / "pope").iterdir():
        path.unlink()
    (root / "regions" / "pope").rmdir()
    assert len(list(combining.draw_world(root, **arguments).images("train"))) == 3, "an older world is completed"
    before = picture.stat().st_mtime_ns
    with pytest.raises(UserError, match="'seed': 1"):
        combining.draw_world(root, **{**arguments, "seed": 2})
    (root / combining.WORLD_MARK).rename(root / f".{combining.WORLD_MARK}")
    combining.draw_world(root, **arguments)
    assert picture.stat().st_mtime_ns != before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        combining.draw_world(tmp_path, seed=0, num_images=1, image_size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
