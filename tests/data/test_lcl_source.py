"""Link-Context Learning's files: the real class pairs read and written without loss, faults named, images stored once.

In: the first 40 lines of the released pairs ($EVENTLENS_SHARED), creatures on disk, edge-case images. Out: rows,
shards. Decision: bytes are compared, so a key, an order or an escape that changes is seen.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from eventlens_ds.data import build
from eventlens_ds.data.episodes import Rows
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.data.sources import combined, lcl
from eventlens_ds.errors import DataError, UserError
from tests.data.conftest import paint


def pairs_row(name: str, images: list[str]) -> dict:
    return {"class_id": name, "class_name": name, "context_samples": images[:1], "test_samples": images[1:]}


def test_the_released_pairs_are_read_and_written_without_loss(shared, tmp_path):
    source = shared / "data" / "lcl" / "train_pairs_first40.jsonl"
    rows = lcl.read_rows(source)
    assert len(rows) == 40 and lcl.form_of(rows[0], "here") == "neighbours"
    assert all(len(row["samples"]) == len(row["neighbors"]) == 36 for row in rows)
    lcl.write_rows(tmp_path / "again.jsonl", rows)
    assert (tmp_path / "again.jsonl").read_bytes().rstrip(b"\n") == source.read_bytes().rstrip(b"\n")
    schema = json.loads((shared / "data" / "lcl" / "isekai_schema.json").read_text())
    assert list(lcl.FORMS["isekai"]) == schema["fields"]


def test_shards_give_the_files_back(creatures, tmp_path):
    raw = creatures.with_name(creatures.name + "-raw")
    for split, file in (("train", "train_pairs"), ("val", "val"), ("isekai", "isekai")):
        rows = Rows(ShardSet.open(creatures, split))
        lcl.write_rows(tmp_path / "back.jsonl", rows.rows)
        assert (tmp_path / "back.jsonl").read_bytes() == (raw / "lcl" / f"{file}.jsonl").read_bytes()
        named = {name for row in rows.rows for name in lcl.images_of(row)}
        assert named == set(rows.numbers), "every image that a row names is stored, once"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '{"class_id": "1", "class_name": "a", "samples": "x", "neighbors": []}',
            "'samples' wants a list of image names",
        ),
        ('{"class_id": "1", "class_name": "a", "samples": [], "neighbors": [["2", "b"]]}', "'neighbors' wants a list"),
        ('{"class_id": "1", "class_name": "", "samples": [], "neighbors": []}', "'class_name' wants a string"),
        ('{"who": 1}', "are of none of the forms"),
        ("[1]", "expected a JSON object"),
    ],
)
def test_faults_name_file_and_line(tmp_path, text, problem):
    path = tmp_path / "pairs.jsonl"
    good = json.dumps({"class_id": "0", "class_name": "z", "samples": ["a.png"], "neighbors": []})
    path.write_text(f"{good}\n{text}\n" if "who" not in text else f"{text}\n")
    with pytest.raises(DataError, match=rf"pairs.jsonl:\d+: .*{problem}"):
        lcl.read_rows(path)


def test_isekai_labels_are_checked(tmp_path):
    row = {"image_name": "q.png", "positive_list": ["a.png"], "negative_list": ["b.png"]}
    row |= {"positive_promt": "wug", "negative_promt": "dax", "label_name": "fep"}
    lcl.write_rows(tmp_path / "i.jsonl", [row, row])
    with pytest.raises(DataError, match="i.jsonl:1: 'label_name' 'fep' is none of"):
        lcl.read_rows(tmp_path / "i.jsonl")
    lcl.write_rows(tmp_path / "i.jsonl", [row | {"label_name": "wug", "negative_promt": "wug"}] * 2)
    with pytest.raises(DataError, match="'positive_promt' and 'negative_promt' are both 'wug'"):
        lcl.read_rows(tmp_path / "i.jsonl")


def test_rows_that_come_in_pairs_are_even_in_number(tmp_path):
    lcl.write_rows(tmp_path / "test.jsonl", [pairs_row("a", ["a.png", "b.png"])] * 3)
    with pytest.raises(DataError, match="3 rows; pairs rows come in pairs"):
        lcl.read_rows(tmp_path / "test.jsonl")


def built(root: Path, out: Path) -> ShardSet:
    build.build(combined.open_source("lcl", root), out)
    return ShardSet.open(out, "val")


def test_missing_images_are_counted_and_a_class_without_any_is_refused(tmp_path):
    root = paint(tmp_path, "a0.png", "a1.png", "b1.png")
    rows = [pairs_row("a", ["a0.png", "a1.png"]), pairs_row("b", ["gone.png", "b1.png"])]
    lcl.write_rows(root / "lcl" / "val.jsonl", rows)
    shards = built(root, tmp_path / "out")
    skipped = [json.loads(line) for line in (tmp_path / "out" / "val" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["img_fn"] for entry in skipped] == ["gone.png"] and "cannot read" in skipped[0]["reason"]
    assert Rows(shards).rows == rows, "the row of the class hangs on an image that is there"
    lcl.write_rows(root / "lcl" / "val.jsonl", [rows[0], pairs_row("c", ["gone.png", "lost.png"])])
    with pytest.raises(DataError, match="val.jsonl:2: class 'c': none of its images can be read"):
        built(root, tmp_path / "other")
    lcl.write_rows(root / "lcl" / "val.jsonl", [rows[0], pairs_row("d", ["../a0.png", "a1.png"])])
    with pytest.raises(DataError, match="is not a path inside"):
        built(root, tmp_path / "third")


def test_images_of_every_mode_become_the_same_rgb(creatures, tmp_path):
    """RGBA, palette and CMYK on purpose: transparency lies on white, the rest is converted."""
    from eventlens_ds.data.transforms import load

    root = tmp_path / "modes"
    (root / "images").mkdir(parents=True)
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    names = {
        "rgb.png": red,
        "rgba.png": red.convert("RGBA"),
        "p.png": red.convert("P"),
        "cmyk.jpg": red.convert("CMYK"),
    }
    names["clear.png"] = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    for name, picture in names.items():
        picture.save(root / "images" / name, **({"quality": 100} if name.endswith("jpg") else {}))
    listed = list(names)
    lcl.write_rows(root / "lcl" / "val.jsonl", [pairs_row("a", listed), pairs_row("b", listed)])
    shards = built(root, tmp_path / "out")
    pixels = {
        shards.image(i).img_fn: load(shards.image_bytes(i), shards.image(i), 8, raw=True).pixels.astype(int)
        for i in range(shards.num_images)
    }
    for name in ("rgba.png", "p.png", "cmyk.jpg"):
        assert abs(pixels[name] - pixels["rgb.png"]).max() <= 8, name
    assert (pixels["clear.png"] == 255).all()


def test_two_files_for_one_split_and_none_at_all(tmp_path):
    row = {"class_id": "1", "class_name": "a", "samples": ["a.png"], "neighbors": []}
    for name in ("one", "two"):
        lcl.write_rows(tmp_path / f"{name}.jsonl", [row])
    with pytest.raises(UserError, match="two files for split 'train'"):
        lcl.LclSource(tmp_path)
    with pytest.raises(UserError, match="no Link-Context Learning file"):
        lcl.LclSource(paint(tmp_path / "empty", "x.png"))
