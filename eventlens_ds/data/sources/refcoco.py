"""Reader of referring expressions: RefCOCO, RefCOCO+ and RefCOCOg as distributed, and lines in the Shikra form.

In: a folder with refcoco/, refcoco+/ and refcocog/, each with refs(<variant>).p and instances.json (Yu et al. 2016, the
REFER layout), or a jsonl file {"img_path", "expression", "bbox"}. Out: `Expression`s with boxes in pixels (P1).
Decision: refs(*).p is a pickle, so it is read by an unpickler that refuses every global: what is left can build lists,
dicts, strings and numbers and call nothing (P11). Images of any val or test split are listed by COCO number,
because the splits of the three sets cut across each other: a training image of one is a test image of another.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from eventlens_ds.data import boxes
from eventlens_ds.data.records import Box
from eventlens_ds.data.sources.layout import (
    Problem,
    image_file,
    inside,
    lines,
    open_binary,
    parse_object,
    raise_first,
    shown,
    text_problems,
)
from eventlens_ds.data.transforms import displayed_size
from eventlens_ds.errors import DataError, UserError

SPLITS: dict[tuple[str, str], tuple[str, ...]] = {
    ("refcoco", "unc"): ("train", "val", "testA", "testB"),
    ("refcoco", "google"): ("train", "val", "test"),
    ("refcoco+", "unc"): ("train", "val", "testA", "testB"),
    ("refcocog", "umd"): ("train", "val", "test"),
    ("refcocog", "google"): ("train", "val"),
}
"""(data set, variant) -> its splits. refcocog/google was cut by object, so its train and val share images."""

SETS = ("refcoco", "refcoco+", "refcocog")

_COCO = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})(?:_\d+)?\.jpg")


@dataclass(frozen=True)
class Expression:
    """One sentence that refers to one object.

    `box` is in pixels of the image, `image` its file name as the source gives it (RefCOCO: from instances.json).
    `ref_id` names the object's annotation and is None in the Shikra form, where `sentence_id` is the line number.
    """

    text: str
    box: Box
    image: str
    width: int
    height: int
    split: str
    ref_id: int | None
    sentence_id: int
    dataset: str = ""
    variant: str = ""


def read_lines(path: Path, *, split: str, images: Path | None = None, pixels: bool = False) -> Iterator[Expression]:
    """Expressions of a Shikra-form jsonl file in file order; a row's own "split" goes before `split`.

    bbox is [x1, y1, x2, y2] as shares of the image, or in pixels with `pixels`; which of the two a file holds it does
    not say, so shares above 1 are refused. Size comes from "width" and "height", else from the image below `images`.
    Texts are kept as written, typos included. Raises DataError "file:line: ..." on the first fault, UserError when the
    file cannot be opened.
    """
    for number, _, raw in lines(path):
        where = f"{path}:{number}"
        row = parse_object(raw, where)
        raise_first(line_problems(row, pixels=pixels), where)
        width, height = _size(row, images, where)
        box = boxes.from_xyxy(row["bbox"]) if pixels else boxes.from_normalised(row["bbox"], width, height)
        if fault := boxes.problem(box, width, height):
            raise DataError(f"{where}: bbox {shown(row['bbox'])} on {width} x {height}: {fault}")
        yield Expression(
            text=" ".join(row["expression"].split()),
            box=box,
            image=row["img_path"],
            width=width,
            height=height,
            split=row.get("split", split),
            ref_id=None,
            sentence_id=number,
            dataset=row.get("dataset_name", ""),
        )


def line_problems(row: Mapping[str, Any], *, pixels: bool = False) -> Iterator[Problem]:
    """Faults of one Shikra-form row that need no image."""
    yield from text_problems(row, ("img_path", "expression", *(k for k in ("split", "dataset_name") if k in row)))
    if isinstance(row.get("img_path"), str) and row["img_path"].strip():
        try:
            inside(Path(), row["img_path"])
        except DataError:
            yield Problem("field", f"'img_path' {shown(row['img_path'])} leaves the image folder")
    values = row.get("bbox")
    try:
        box = boxes.from_xyxy(values)  # type: ignore[arg-type]
    except DataError as error:
        yield Problem("field", f"'bbox': {error}")
        return
    if isinstance(values, list) and len(values) != 4:
        yield Problem("field", f"'bbox' wants four numbers, got {len(values)}")
    if not pixels and max(box) > 1:
        yield Problem("field", f"'bbox' {shown(values)} is no share of the image; is the file in pixels?")
    for key in ("width", "height"):
        if key in row and (isinstance(row[key], bool) or not isinstance(row[key], int) or row[key] < 1):
            yield Problem("field", f"{key!r} wants a positive integer, got {shown(row[key])}")


def read_refs(root: Path, dataset: str, variant: str, splits: Sequence[str] = ()) -> Iterator[Expression]:
    """Expressions of root/<dataset>/refs(<variant>).p joined with its instances.json, in file order.

    One per sentence ("sent", the cleaned form, not "raw"); `splits` keeps only these, () all. Raises UserError for a
    data set, variant or split that does not exist or a missing file, DataError naming the file and the ref or global.
    """
    known = _splits_of(dataset, variant)
    if unknown := [s for s in splits if s not in known]:
        raise UserError(f"{dataset}/{variant} has no split {unknown[0]!r}; it has {' '.join(known)}")
    path = refs_file(root, dataset, variant)
    instances = root / dataset / "instances.json"
    images, annotations = _instances(instances)
    for number, ref in enumerate(load_refs(path)):
        where = f"{path}: ref {number}"
        raise_first(ref_problems(ref, known), where)
        if splits and ref["split"] not in splits:
            continue
        where = f"{path}: ref_id {ref['ref_id']}"
        image, annotation = images.get(ref["image_id"]), annotations.get(ref["ann_id"])
        if image is None or annotation is None:
            absent = f"image {ref['image_id']}" if image is None else f"annotation {ref['ann_id']}"
            raise DataError(f"{where}: {absent} is not in {instances}")
        name, width, height, box = _joined(image, annotation, ref, f"{where}: {instances}")
        for sentence in ref["sentences"]:
            text = " ".join(sentence["sent"].split())
            ids = {"ref_id": ref["ref_id"], "sentence_id": sentence["sent_id"]}
            yield Expression(text, box, name, width, height, ref["split"], **ids, dataset=dataset, variant=variant)


def refs_file(root: Path, dataset: str, variant: str) -> Path:
    """root/<dataset>/refs(<variant>).p. Raises UserError for a variant that the data set does not have."""
    _splits_of(dataset, variant)
    return root / dataset / f"refs({variant}).p"


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, strings and numbers. Everything else of the format starts with a global or a persistent id,
    and both are refused before anything is imported."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(f"the pickle names the global {module}.{name}; refs hold plain lists, dicts, texts and numbers")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise DataError(f"the pickle names the persistent id {shown(pid)}; refs hold none")


def load_refs(path: Path) -> list[Any]:
    """The list in a refs(*).p file, read without running anything from it (P11).

    Texts written by Python 2 are read as UTF-8. Raises UserError when the file cannot be opened, DataError naming the
    file when it names a global, is broken, or holds no list.
    """
    with open_binary(path) as file:
        try:
            value = _PlainUnpickler(file, encoding="utf-8").load()
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        # A broken pickle raises whatever its opcodes run into, so no list of types would be complete.
        except Exception as error:
            raise DataError(f"{path}: broken pickle: {type(error).__name__}: {error}") from None
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of refs, got {type(value).__name__}")
    return value


def ref_problems(ref: Any, splits: Sequence[str]) -> Iterator[Problem]:
    """Faults of one ref that need no other file."""
    if not isinstance(ref, dict):
        yield Problem("field", f"expected a dict, got {type(ref).__name__}")
        return
    for key in ("ref_id", "ann_id", "image_id"):
        if isinstance(ref.get(key), bool) or not isinstance(ref.get(key), int):
            yield Problem("field", f"{key!r} wants an integer, got {shown(ref.get(key))}")
    if ref.get("split") not in splits:
        yield Problem("field", f"'split' wants one of {' '.join(splits)}, got {shown(ref.get('split'))}")
    sentences = ref.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        yield Problem("field", f"'sentences' wants a list that is not empty, got {shown(sentences)}")
        return
    for sentence in sentences:
        if not isinstance(sentence, dict):
            yield Problem("field", f"a sentence wants a dict, got {shown(sentence)}")
            continue
        yield from text_problems(sentence, ("sent",))
        if isinstance(sentence.get("sent_id"), bool) or not isinstance(sentence.get("sent_id"), int):
            yield Problem("field", f"'sent_id' wants an integer, got {shown(sentence.get('sent_id'))}")


def val_test_images(root: Path, variants: Iterable[tuple[str, str]] | None = None) -> dict[int, str]:
    """COCO number -> "dataset/variant/split" of every image in a split other than train, of all three data sets.

    `variants` None takes every refs file below `root`. Training on refcocog/google, which shares images between its
    own train and val, needs them named without it. Raises UserError when one of RefCOCO, RefCOCO+ and RefCOCOg has no
    refs file, since a list that lacks a data set would let its images through, and DataError as `read_refs`.
    """
    chosen = [k for k in SPLITS if refs_file(root, *k).is_file()] if variants is None else list(variants)
    if missing := [name for name in SETS if name not in {dataset for dataset, _ in chosen}]:
        raise UserError(f"{root}: no refs file of {' '.join(missing)}; held-out images cannot be listed without it")
    held_out: dict[int, str] = {}
    for dataset, variant in chosen:
        path = refs_file(root, dataset, variant)
        for number, ref in enumerate(load_refs(path)):
            raise_first(ref_problems(ref, _splits_of(dataset, variant)), f"{path}: ref {number}")
            if ref["split"] != "train":
                held_out.setdefault(ref["image_id"], f"{dataset}/{variant}/{ref['split']}")
    return held_out


def coco_number(name: str) -> int | None:
    """The image id in a COCO file name of 2014 or 2017 or of a ref ("..._000000581857_16.jpg"), None for others."""
    found = _COCO.fullmatch(name.replace("\\", "/").rsplit("/", 1)[-1])
    return int(found[1]) if found else None


def without_held_out(
    expressions: Iterable[Expression], held_out: Mapping[int, str]
) -> tuple[list[Expression], dict[str, int]]:
    """Expressions that may be trained on, and how many were left out, by the split that holds their image.

    Raises DataError for an image whose name has no COCO number: it cannot be checked.
    """
    kept: list[Expression] = []
    dropped: Counter[str] = Counter()
    for expression in expressions:
        number = coco_number(expression.image)
        if number is None:
            raise DataError(f"{shown(expression.image)}: no COCO number to check against the val and test splits")
        if number in held_out:
            dropped[held_out[number]] += 1
        else:
            kept.append(expression)
    return kept, dict(dropped)


def _splits_of(dataset: str, variant: str) -> tuple[str, ...]:
    if (dataset, variant) not in SPLITS:
        raise UserError(f"no {dataset}/{variant}; there are {' '.join('/'.join(k) for k in SPLITS)}")
    return SPLITS[dataset, variant]


def _size(row: Mapping[str, Any], images: Path | None, where: str) -> tuple[int, int]:
    if "width" in row and "height" in row:
        return row["width"], row["height"]
    if images is None:
        raise DataError(f"{where}: no 'width' and 'height', and no image folder to read them from")
    path = image_file(images, row["img_path"], where)
    try:
        return displayed_size(path.read_bytes())
    except DataError as error:
        raise DataError(f"{where}: image {path}: {error}") from None


def _instances(path: Path) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """Images and annotations of a COCO file by id."""
    with open_binary(path) as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{getattr(error, 'lineno', 1)}: broken JSON: {error}") from None
    tables: list[dict[int, dict[str, Any]]] = []
    for key in ("images", "annotations"):
        entries = value.get(key) if isinstance(value, dict) else None
        if not isinstance(entries, list):
            raise DataError(f"{path}: {key!r} wants a list, got {shown(entries)}")
        if unlike := [e for e in entries if not isinstance(e, dict) or not isinstance(e.get("id"), int)]:
            raise DataError(f"{path}: an entry of {key!r} has no integer 'id': {shown(unlike[0])}")
        tables.append({e["id"]: e for e in entries})
    return tables[0], tables[1]


def _joined(
    image: Mapping[str, Any], annotation: Mapping[str, Any], ref: Mapping[str, Any], where: str
) -> tuple[str, int, int, Box]:
    """File name, width, height and box of a ref, checked."""
    raise_first(text_problems(image, ("file_name",)), f"{where}: image {image['id']}")
    try:
        inside(Path(), image["file_name"])
        box = boxes.from_xywh(annotation.get("bbox"))  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    width, height = image.get("width"), image.get("height")
    if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in (width, height)):
        raise DataError(f"{where}: image {image['id']} has size {shown([width, height])}")
    if annotation.get("image_id") != ref["image_id"]:
        raise DataError(f"{where}: annotation {ref['ann_id']} is of image {shown(annotation.get('image_id'))}")
    if fault := boxes.problem(box, width, height):  # type: ignore[arg-type]
        raise DataError(f"{where}: annotation {ref['ann_id']}: box {list(box)} on {width} x {height}: {fault}")
    return image["file_name"], width, height, box  # type: ignore[return-value]
