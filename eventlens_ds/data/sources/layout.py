"""What the readers share: folder layout, lines with their numbers, image files, and VCR metadata.

In: a root folder and the names that annotations give to images. Out: parsed JSON objects with "file:line", checked
paths, `ImageRecord`s. Decision: every check is a generator of `Problem`s. A reader raises the first one as
DataError, `data lint` collects all of them, so both judge by the same rules.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from eventlens_ds.data import boxes
from eventlens_ds.data.records import ImageRecord, Region
from eventlens_ds.errors import DataError, UserError


class Problem(NamedTuple):
    """Something wrong with a row or its metadata. `code` is one of those listed in data/lint.py."""

    code: str
    message: str


def raise_first(problems: Iterable[Problem], where: str) -> None:
    """Raise DataError "where: message" for the first problem, if there is one."""
    for problem in problems:
        raise DataError(f"{where}: {problem.message}")


def find_dir(root: Path, places: Sequence[str], holds: Callable[[Path], bool]) -> Path | None:
    """The first of root/place for which `holds` is true; the place "." is the root itself."""
    return next((root / place for place in places if (root / place).is_dir() and holds(root / place)), None)


def existing_root(root: str | Path) -> Path:
    """`root` as a Path. Raises UserError when it is not a folder."""
    path = Path(root)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return path


def find_images(root: Path, beside: Path) -> Path:
    """The folder that img_fn is relative to: vcr1images (as released) or images, in the root or beside the rows."""
    for folder in (root / "vcr1images", root / "images", beside / "vcr1images", beside / "images"):
        if folder.is_dir():
            return folder
    raise UserError(f"{root}: no image folder; expected {root / 'vcr1images'} or {root / 'images'}")


def image_key(img_fn: str) -> str:
    """Key of an image: a readable tail of its name and 10 hex digits of sha1(img_fn), 64 characters at most.

    A pure function of the name, so VCR and VisualCOMET give one image one key. Dots and '@' are replaced because
    webdataset cuts keys at the first dot; the digest keeps names apart that become equal by it.
    """
    stem = re.sub(r"\.[A-Za-z0-9]+$", "", img_fn.rsplit("/", 1)[-1])
    tail = re.sub(r"[^A-Za-z0-9]+", "_", stem)[-53:].strip("_") or "image"
    return f"{tail}-{hashlib.sha1(img_fn.encode()).hexdigest()[:10]}"


def inside(folder: Path, name: str) -> Path:
    """folder/name. Raises DataError when the name could leave the folder (P11)."""
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or name.startswith(("/", "~")) or ".." in parts or ":" in parts[0]:
        raise DataError(f"{ascii(name[:80])} is not a path inside {folder}")
    return folder / name


class Line(NamedTuple):
    """A line of a JSON lines file: its 1-based number, its byte offset and its text."""

    number: int
    offset: int
    raw: bytes


def lines(path: Path) -> Iterator[Line]:
    """Lines of a file that are not blank. Raises UserError when the file cannot be opened."""
    with open_binary(path) as file:
        offset = 0
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield Line(number, offset, raw)
            offset += len(raw)


def open_binary(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """One JSON object. Raises DataError "where: ..." for broken JSON, other types and broken UTF-8."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def text_problems(row: Mapping[str, Any], keys: Iterable[str]) -> Iterator[Problem]:
    """Keys that are absent, not strings, or empty."""
    for key in keys:
        if key not in row:
            yield Problem("field", f"no {key!r}")
        elif not isinstance(row[key], str) or not row[key].strip():
            yield Problem("field", f"{key!r} wants a string, got {shown(row[key])}")


def shown(value: object) -> str:
    """A value for an error message, short and ASCII."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def metadata_problems(meta: Mapping[str, Any]) -> Iterator[Problem]:
    """Faults in the structure of a metadata file (boxes, segms, names, width, height); geometry is not judged."""
    for key in ("width", "height"):
        value = meta.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield Problem("metadata", f"{key!r} wants a positive integer, got {shown(value)}")
    names, found = meta.get("names"), meta.get("boxes")
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        yield Problem("metadata", f"'names' wants a list of strings, got {shown(names)}")
        return
    if not isinstance(found, list):
        yield Problem("metadata", f"'boxes' wants a list, got {shown(found)}")
        return
    if len(found) != len(names):
        yield Problem("tag-no-box", f"{len(names)} names but {len(found)} boxes")
    for i, values in enumerate(found):
        try:
            boxes.from_xyxy(values)
        except DataError as error:
            yield Problem("metadata", f"object {i}: {error}")
        if isinstance(values, list) and len(values) > 4 and not _is_number(values[4]):
            yield Problem("metadata", f"object {i}: score {shown(values[4])} is not a number")
    segms = meta.get("segms")
    if segms is None:
        return
    if not isinstance(segms, list) or len(segms) != len(names):
        yield Problem("metadata", f"'segms' wants a list of {len(names)} outlines, got {shown(segms)}")
        return
    for i, polygons in enumerate(segms):
        if not isinstance(polygons, list) or not all(_is_polygon(p) for p in polygons):
            yield Problem("metadata", f"object {i}: an outline wants a list of polygons of [x, y]")


def read_metadata(path: Path, where: str) -> Mapping[str, Any]:
    """A metadata file of VCR as a checked dict, to be read only. Raises DataError naming the row that asked for it."""
    try:
        file = path.stat()
        return _metadata(path, (file.st_ino, file.st_mtime_ns, file.st_size))
    except OSError as error:
        raise DataError(f"{where}: metadata {path}: {error.strerror or error}") from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


@lru_cache(maxsize=4096)
def _metadata(path: Path, version: tuple[int, ...]) -> Mapping[str, Any]:
    """`read_metadata` of one version of a file: several sources, and every pass over them, ask for the same files."""
    meta = parse_object(path.read_bytes(), f"metadata {path}")
    raise_first(metadata_problems(meta), f"metadata {path}")
    return meta


def image_record(img_fn: str, meta: Mapping[str, Any], movie: str, split: str) -> ImageRecord:
    """ImageRecord of checked metadata. Unusable boxes are kept as they are: transforms count them with a reason."""
    names, found = meta["names"], meta["boxes"]
    segms = meta.get("segms") or [[] for _ in names]
    regions = tuple(
        Region(
            name=name,
            box=boxes.from_xyxy(box),
            score=float(box[4]) if len(box) > 4 else 1.0,
            polygons=tuple(tuple((float(x), float(y)) for x, y in polygon) for polygon in polygons),
        )
        for name, box, polygons in zip(names, found, segms)
    )
    return ImageRecord(image_key(img_fn), img_fn, meta["width"], meta["height"], regions, movie=movie, split=split)


def image_file(folder: Path, img_fn: str, where: str) -> Path:
    """Path of an image that exists. Raises DataError naming the row that asked for it."""
    try:
        path = inside(folder, img_fn)
    except DataError as error:
        raise DataError(f"{where}: img_fn {error}") from None
    try:
        exists = path.is_file()
    except OSError:
        exists = False
    if not exists:
        raise DataError(f"{where}: no image {path}")
    return path


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def _is_polygon(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(p, list) and len(p) == 2 and _is_number(p[0]) and _is_number(p[1]) for p in value
    )
