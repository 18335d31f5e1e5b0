"""RefCOCO pickles and Shikra lines: what is read, what is refused, and that nothing in a pickle runs (P11).

In: a small RefCOCO tree written here, eleven published lines, 46 expressions of the photo set. Out: the verdicts.
Decision: each evil pickle is first run by plain `pickle.load`, so that the test shows the file it creates, and then
read by the reader, which must not create it.
"""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.data import boxes
from eventlens_ds.data.records import Box
from eventlens_ds.data.sources import refcoco
from eventlens_ds.errors import DataError, UserError


def ref(number: int, split: str, image: int) -> dict[str, Any]:
    sentences = [
        {"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 2 * number, "sent": "the  lady"},
        {"tokens": ["blue"], "raw": "Blue!", "sent_id": 2 * number + 1, "sent": "blue"},
    ]
    named = {"file_name": f"COCO_train2014_{image:012d}_{number}.jpg", "category_id": 1, "sent_ids": []}
    ids = {"ref_id": number, "ann_id": 100 + number, "image_id": image}
    return ids | named | {"split": split, "sentences": sentences}


def write(root: Path, dataset: str, variant: str, refs: list[Any], protocol: int = 2) -> Path:
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"refs({variant}).p"
    path.write_bytes(pickle.dumps(refs, protocol))
    images = [
        {"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "width": 100, "height": 80}
        for n in sorted({r["image_id"] for r in refs})
    ]
    annotations = [{"id": r["ann_id"], "image_id": r["image_id"], "bbox": [10, 20, 30, 40.5]} for r in refs]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path, "refcoco", "unc", [ref(0, "train", 1), ref(1, "val", 2), ref(2, "testA", 3)])
    write(tmp_path, "refcoco+", "unc", [ref(0, "testB", 1), ref(1, "train", 4)])
    write(tmp_path, "refcocog", "umd", [ref(0, "test", 5), ref(1, "train", 2)])
    return tmp_path


@pytest.mark.P1
@pytest.mark.parametrize("protocol", range(5))
def test_refs_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    write(tmp_path, "refcoco", "unc", [ref(0, "train", 7), ref(1, "testA", 8)], protocol)
    found = list(refcoco.read_refs(tmp_path, "refcoco", "unc"))
    first = refcoco.Expression(
        text="the lady",
        box=Box(10.0, 20.0, 40.0, 60.5),
        image="COCO_train2014_000000000007.jpg",
        width=100,
        height=80,
        split="train",
        ref_id=0,
        sentence_id=0,
        dataset="refcoco",
        variant="unc",
    )
    assert found[0] == first
    assert [(e.ref_id, e.sentence_id, e.split) for e in found] == [
        (0, 0, "train"),
        (0, 1, "train"),
        (1, 2, "testA"),
        (1, 3, "testA"),
    ]
    only = list(refcoco.read_refs(tmp_path, "refcoco", "unc", ("testA",)))
    assert [e.text for e in only] == ["the lady", "blue"] and {e.split for e in only} == {"testA"}


def test_texts_of_python_2_are_utf8(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"(lp0\nS'caf\\xc3\\xa9'\np1\naVcaf\\u00e9\np2\naI3\na.")
    assert refcoco.load_refs(path) == ["caf\u00e9", "caf\u00e9", 3]


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def evil_pickles(mark: Path) -> dict[str, tuple[bytes, str]]:
    """name -> (pickle that makes a folder `mark`, the global that the error must name)."""
    module = os.mkdir.__module__
    made = {f"protocol {p}": (pickle.dumps([Touch(mark)], p), f"{module}.mkdir") for p in range(6)}
    made["INST"] = (f"(S'{mark}'\nios\nmkdir\n.".encode(), "os.mkdir")
    made["late"] = (pickle.dumps([*range(3000), Touch(mark)], 2), f"{module}.mkdir")
    made["eval"] = (f'cbuiltins\neval\n(S\'__import__("os").mkdir("{mark}")\'\ntR.'.encode(), "builtins.eval")
    return made


@pytest.mark.P11
@pytest.mark.parametrize("name", [*(f"protocol {p}" for p in range(6)), "INST", "late", "eval"])
def test_no_pickle_runs(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    data, named = evil_pickles(mark)[name]
    pickle.loads(data)
    assert mark.is_dir()  # Plain pickle runs it.
    mark.rmdir()
    path = tmp_path / "refcoco" / "refs(unc).p"
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: the pickle names the global") as caught:
        refcoco.load_refs(path)
    assert named in str(caught.value)
    assert not mark.exists()
    (tmp_path / "refcoco" / "instances.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(DataError, match="names the global"):
        list(refcoco.read_refs(tmp_path, "refcoco", "unc"))
    assert not mark.exists()


@pytest.mark.P11
def test_an_extension_code_is_a_global_too(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\x02\x82\xf0)R.")
    copyreg.add_extension("subprocess", "Popen", 0xF0)
    try:
        with pytest.raises(DataError, match="the global subprocess.Popen"):
            refcoco.load_refs(path)
    finally:
        copyreg.remove_extension("subprocess", "Popen", 0xF0)
    assert subprocess.Popen is not None


@pytest.mark.P11
def test_harmless_globals_are_refused_as_well(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    for value in ([Path("x")], [{1, 2}.__class__], [complex(1, 2)]):
        path.write_bytes(pickle.dumps(value, 2))
        with pytest.raises(DataError, match="names the global"):
            refcoco.load_refs(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "broken pickle: EOFError"),
        (b"hello", "broken pickle"),
        (b"](tR.", "broken pickle: TypeError"),
        (b"]}b.", "broken pickle"),
        (b"Pthing\n.", "the pickle names the persistent id 'thing'"),
        (b"(lp0\nS'\\xff'\na.", "broken pickle: UnicodeDecodeError"),
        (pickle.dumps({"refs": []}), "expected a list of refs, got dict"),
    ],
)
def test_broken_pickles(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        refcoco.load_refs(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "testC"}, r"refs\(unc\)\.p: ref 1: 'split' wants one of train val testA testB, got 'testC'"),
        ({"ref_id": "7"}, "ref 1: 'ref_id' wants an integer"),
        ({"sentences": []}, "ref 1: 'sentences' wants a list that is not empty"),
        ({"sentences": [{"sent": " ", "sent_id": 0}]}, "ref 1: 'sent' wants a string"),
        ({"sentences": [{"sent": "a"}]}, "ref 1: 'sent_id' wants an integer"),
    ],
)
def test_broken_refs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, "refcoco", "unc", [ref(0, "train", 1), ref(1, "val", 2) | change])
    with pytest.raises(DataError, match=message):
        list(refcoco.read_refs(tmp_path, "refcoco", "unc"))


def test_broken_joins(tree: Path) -> None:
    path = tree / "refcoco" / "instances.json"
    good = json.loads(path.read_text())

    def read(images: Any, annotations: Any) -> None:
        path.write_text(json.dumps({"images": images, "annotations": annotations}))
        list(refcoco.read_refs(tree, "refcoco", "unc"))

    images, annotations = good["images"], good["annotations"]
    with pytest.raises(DataError, match=r"ref_id 0: image 1 is not in .*instances.json"):
        read(images[1:], annotations)
    with pytest.raises(DataError, match="ref_id 0: annotation 100 is not in"):
        read(images, annotations[1:])
    with pytest.raises(DataError, match="annotation 100 is of image 2"):
        read(images, [annotations[0] | {"image_id": 2}, *annotations[1:]])
    with pytest.raises(DataError, match="annotation 100: box .* zero area"):
        read(images, [annotations[0] | {"bbox": [1, 1, 0, 5]}, *annotations[1:]])
    with pytest.raises(DataError, match="is not a path inside"):
        read([images[0] | {"file_name": "../x.jpg"}, *images[1:]], annotations)
    with pytest.raises(DataError, match="'images' wants a list"):
        read(None, annotations)
    path.write_text('{"images": [}')
    with pytest.raises(DataError, match="instances.json:1: broken JSON"):
        list(refcoco.read_refs(tree, "refcoco", "unc"))


def test_unknown_names_and_missing_files(tree: Path) -> None:
    with pytest.raises(UserError, match="no refcoco/umd; there are refcoco/unc"):
        list(refcoco.read_refs(tree, "refcoco", "umd"))
    with pytest.raises(UserError, match="refcocog/umd has no split 'testA'; it has train val test"):
        list(refcoco.read_refs(tree, "refcocog", "umd", ("testA",)))
    with pytest.raises(UserError, match="No such file"):
        list(refcoco.read_refs(tree, "refcoco", "google"))


def test_held_out_images_cross_the_data_sets(tree: Path) -> None:
    held_out = refcoco.val_test_images(tree)
    assert held_out == {1: "refcoco+/unc/testB", 2: "refcoco/unc/val", 3: "refcoco/unc/testA", 5: "refcocog/umd/test"}
    train = list(refcoco.read_refs(tree, "refcoco", "unc", ("train",)))
    # RefCOCO's own splits would keep its training image 1, which RefCOCO+ tests on.
    own = {n for n, split in held_out.items() if split.startswith("refcoco/")}
    assert [refcoco.coco_number(e.image) in own for e in train] == [False, False]
    assert refcoco.without_held_out(train, held_out) == ([], {"refcoco+/unc/testB": 2})
    plus = list(refcoco.read_refs(tree, "refcoco+", "unc", ("train",)))
    assert refcoco.without_held_out(plus, held_out) == (plus, {})
    (tree / "refcocog" / "refs(umd).p").unlink()
    with pytest.raises(UserError, match="no refs file of refcocog"):
        refcoco.val_test_images(tree)
    with pytest.raises(UserError, match="no refs file of refcoco. refcocog"):
        refcoco.val_test_images(tree, [("refcoco", "unc")])


def test_coco_number_and_names_without_one() -> None:
    names = ["train2014/COCO_train2014_000000581857.jpg", "COCO_train2014_000000581857_16.jpg", "000000581857.jpg"]
    assert [refcoco.coco_number(n) for n in names] == [581857] * 3
    assert [refcoco.coco_number(n) for n in ("12.jpg", "VG_100K/2345.jpg", "000000581857.png")] == [None] * 3
    stranger = refcoco.Expression("a", Box(0, 0, 1, 1), "dog.jpg", 2, 2, "train", None, 1)
    with pytest.raises(DataError, match="'dog.jpg': no COCO number"):
        refcoco.without_held_out([stranger], {})


@pytest.mark.P1
def test_published_lines(shared: Path) -> None:
    path = shared / "data/refcoco/refcoco_rec_sample_excerpt.jsonl"
    found = list(refcoco.read_lines(path, split="train"))
    assert len(found) == 11
    assert (found[0].text, found[3].text) == ("guy wihtout cap", "second cup left botto")
    assert found[0].box == pytest.approx((0.389 * 375, 0.388 * 500, 0.816 * 375, 0.918 * 500))
    assert {e.dataset for e in found} == {"refcoco", "refcoco+", "refcocog"}
    assert refcoco.coco_number(found[0].image) == 549256
    assert [e.sentence_id for e in found] == list(range(1, 12)) and {e.ref_id for e in found} == {None}
    kept, dropped = refcoco.without_held_out(found, {549256: "refcoco+/unc/val"})
    assert (len(kept), dropped) == (10, {"refcoco+/unc/val": 1})


@pytest.mark.P1
def test_photo_lines_with_and_without_size(shared: Path, tmp_path: Path) -> None:
    photos = shared / "data/photos"
    path = photos / "regions/rec.jsonl"
    found = list(refcoco.read_lines(path, split="val"))
    assert len(found) == 46 and len({e.image for e in found}) == 14
    bare = tmp_path / "bare.jsonl"
    rows = [json.loads(line) for line in path.open()]
    sizes = ("width", "height")
    bare.write_text("".join(json.dumps({k: v for k, v in r.items() if k not in sizes}) + "\n" for r in rows))
    assert list(refcoco.read_lines(bare, split="val", images=photos / "images")) == found
    with pytest.raises(DataError, match="bare.jsonl:1: no 'width' and 'height', and no image folder"):
        list(refcoco.read_lines(bare, split="val"))
    in_pixels = tmp_path / "pixels.jsonl"
    in_pixels.write_text("".join(json.dumps(r | {"bbox": list(e.box)}) + "\n" for r, e in zip(rows, found)))
    assert list(refcoco.read_lines(in_pixels, split="val", pixels=True)) == found
    with pytest.raises(DataError, match="pixels.jsonl:1: 'bbox' .* is no share of the image; is the file in pixels"):
        list(refcoco.read_lines(in_pixels, split="val"))
    for expression in found:
        # Shares of 0..1 lie inside the picture; read as pixels, or by the wrong size, they would not.
        assert boxes.overhang(expression.box, expression.width, expression.height) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "broken JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"expression": ""}, "'expression' wants a string"),
        ({"img_path": "../x.jpg"}, "'img_path' '../x.jpg' leaves the image folder"),
        ({"bbox": [0.1, 0.2, 0.3]}, "'bbox': a box wants four numbers"),
        ({"bbox": [0.1, 0.2, 0.3, 0.4, 0.5]}, "'bbox' wants four numbers, got 5"),
        ({"bbox": [0.5, 0.2, 0.3, 0.4]}, "bbox .* on 10 x 10: inverted"),
        ({"bbox": [0.1, 0.2, 0.1, 0.4]}, "zero area"),
        ({"width": 0}, "'width' wants a positive integer, got 0"),
        ({"split": 3}, "'split' wants a string, got 3"),
        ({"expression": None}, "'expression' wants a string, got None"),
    ],
)
def test_broken_lines_name_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    good = {"img_path": "a.jpg", "expression": "dog", "bbox": [0, 0, 0.5, 1], "width": 10, "height": 10}
    path = tmp_path / "rec.jsonl"
    text = line if isinstance(line, str) else json.dumps(good | line)
    path.write_text(json.dumps(good | {"split": "val"}) + "\n\n" + text + "\n")
    reader = refcoco.read_lines(path, split="train")
    assert next(reader).split == "val"
    with pytest.raises(DataError, match=f"rec.jsonl:3: .*{message}"):
        next(reader)
