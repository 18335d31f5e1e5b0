"""A tagger named on the command line: its tags reach the shards, a build that is continued asks for the rest alone, and
whatever is wrong with it is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds import cli
from eventlens_ds.data import build, taggers
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.data.sources.combined import open_source
from eventlens_ds.errors import DataError, UserError
from tests.data.conftest import paint, write_rows

CODE = """
calls = []
not_callable = 3
def sizes(pictures):
    calls.append(len(pictures))
    return [["seen", f"{p.width}  wide", "seen"] if p.mode == "RGB" else [] for p in pictures]
def short(pictures): return [["a"]]
def number(pictures): return [["a", 3] for _ in pictures]
def blank(pictures): return [["a", " "] for _ in pictures]
def text(pictures): return ["dog" for _ in pictures]
def nothing(pictures): return None
def broken(pictures): raise RuntimeError("out of memory")
"""
NAMES = [f"{i}.jpg" for i in range(6)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    taggers.load_tagger.cache_clear()
    (tmp_path / "my_tagger.py").write_text(CODE)
    (tmp_path / "bad_import.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_tagger", raising=False)
    write_rows(tmp_path / "data" / "regions" / "captions.jsonl", [{"img_path": n, "caption": "x"} for n in NAMES])
    return paint(tmp_path / "data", *NAMES)


def made(root: Path, out: Path, **more: Any) -> ShardSet:
    build.build(open_source("captions", root), out, shard_images=2, **more)
    return ShardSet.open(out, "train")


def calls() -> list[int]:
    import importlib

    return list(importlib.import_module("my_tagger").calls)


@pytest.mark.parametrize("workers", [1, 2])
def test_tags_reach_the_shards_and_the_manifest(root: Path, tmp_path: Path, workers: int) -> None:
    shards = made(root, tmp_path / "out", tagger="my_tagger:sizes", workers=workers)
    assert [shards.image(i).tags for i in range(6)] == [("seen", "20 wide")] * 6
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["arguments"]["tagger"] == "my_tagger:sizes"


def test_a_continued_build_asks_for_the_missing_shards_alone(root: Path, tmp_path: Path) -> None:
    whole = made(root, tmp_path / "out", tagger="my_tagger:sizes")
    assert calls() == [2, 2, 2]
    before = [(p.name, p.read_bytes()) for p in sorted((tmp_path / "out" / "train").glob("*.tar"))]
    (tmp_path / "out" / "journal" / "train" / "shard-000001.json").unlink()
    again = made(root, tmp_path / "out", tagger="my_tagger:sizes")
    assert calls() == [2, 2, 2, 2] and again.fingerprint == whole.fingerprint
    assert before == [(p.name, p.read_bytes()) for p in sorted((tmp_path / "out" / "train").glob("*.tar"))]


def test_a_folder_tagged_otherwise_is_refused(root: Path, tmp_path: Path) -> None:
    made(root, tmp_path / "out", tagger="my_tagger:sizes")
    for other in ("", "my_tagger:text"):
        with pytest.raises(UserError, match='was begun with tagger="my_tagger:sizes"'):
            made(root, tmp_path / "out", tagger=other)
    made(root, tmp_path / "plain")
    assert "tagger" not in json.loads((tmp_path / "plain" / "dataset.json").read_text())["arguments"]


def test_a_picture_that_cannot_be_decoded_is_not_shown(root: Path) -> None:
    items = list(open_source("captions", root).images("train"))
    items[1].path.write_bytes(b"no picture")
    tags = [item.image.tags for item in taggers.tagged(items, "my_tagger:sizes")]
    assert tags == [("seen", "20 wide")] + [()] + [("seen", "20 wide")] * 4 and calls() == [5]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_tagger", "write MODULE:FUNCTION"),
        ("no_such:tag", "no_such cannot be imported: No module named 'no_such'"),
        ("bad_import:tag", "bad_import cannot be imported: No module named 'no_such_module'"),
        ("my_tagger:none", "my_tagger has no none"),
        ("my_tagger:not_callable", "not_callable is a int, not callable"),
    ],
)
def test_a_tagger_that_cannot_be_called_is_refused_before_anything_is_written(
    root: Path, tmp_path: Path, name: str, said: str
) -> None:
    with pytest.raises(UserError, match=f"--tagger {name}: {said}"):
        made(root, tmp_path / "out", tagger=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short", "1 results for 2 pictures from 0.jpg on"),
        ("number", "0.jpg: the tag '3' .int. is not a text"),
        ("blank", "0.jpg: the tag ' ' .str. is not a text"),
        ("text", "0.jpg: 'dog' is not a list of tags"),
        ("nothing", "failed on 2 pictures from 0.jpg on: 'NoneType' object is not iterable"),
        ("broken", "failed on 2 pictures from 0.jpg on: out of memory"),
    ],
)
def test_what_a_tagger_returns_is_checked(root: Path, tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(DataError, match=f"tagger my_tagger:{name}: {said}"):
        made(root, tmp_path / "out", tagger=f"my_tagger:{name}")


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "build", f"--root={root}", f"--out={tmp_path / 'out'}", "--tagger=my_tagger:sizes"]
    assert cli.main([*command, "--source=captions"]) == 0
    assert ShardSet.open(tmp_path / "out", "train").image(0).tags[0] == "seen"
    assert cli.main([*command, "--source=captions,tags"]) == 2
    assert "reads tags from a file; choose one" in capsys.readouterr().err
