"""Link-Context Learning's files: class pairs of ImageNet and ISEKAI rows, read, written and put into shards.

In: a folder (or its lcl/) with JSON lines in a released form, told by their keys:
  neighbours  class_id, class_name, samples[], neighbors[[class_id, name, path]]     split "train"
  pairs       class_id, class_name, context_samples[], test_samples[]               lines 2k, 2k + 1 are one pair
  isekai      image_name, positive_list[], negative_list[], positive_promt, negative_promt (sic), label_name
Out: every image once; the first usable image of a class carries its row (kind "lcl"), the image an ISEKAI row asks
about carries that row (kind "isekai"). Splits other than train are called as their file.
Decision: a row is stored as it was read, so a folder of shards gives the file back; an episode is drawn from rows when
it is needed (data/episodes.py) and never stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eventlens_ds.data.records import ImageRecord, Sample
from eventlens_ds.data.sources import Record, SourceImage
from eventlens_ds.data.sources.layout import (
    Problem,
    existing_root,
    image_key,
    inside,
    lines,
    parse_object,
    raise_first,
    shown,
    text_problems,
)
from eventlens_ds.data.transforms import displayed_size
from eventlens_ds.errors import DataError, UserError

FORMS: dict[str, tuple[str, ...]] = {
    "neighbours": ("class_id", "class_name", "samples", "neighbors"),
    "pairs": ("class_id", "class_name", "context_samples", "test_samples"),
    "isekai": ("image_name", "positive_list", "negative_list", "positive_promt", "negative_promt", "label_name"),
}
"""Keys of each form, in the order they are written."""
LISTS = ("samples", "context_samples", "test_samples", "positive_list", "negative_list")
TRAIN = "train"


class RowFile(NamedTuple):
    """A file of rows in one form."""

    path: Path
    form: str
    split: str


def read_rows(path: Path, form: str = "") -> list[dict[str, Any]]:
    """Rows of a file in one of FORMS (empty: that of its first row), checked, exactly as they stand there.

    Raises DataError "file:line: ..." for a row of another form, and for an odd number of rows that come in pairs.
    """
    rows = []
    for line in lines(path):
        where = f"{path}:{line.number}"
        row = parse_object(line.raw, where)
        form = form or form_of(row, where)
        raise_first(row_problems(row, form), where)
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: has no rows")
    if form in ("pairs", "isekai") and len(rows) % 2:
        raise DataError(f"{path}: {len(rows)} rows; {form} rows come in pairs, so their number is even")
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines as the released files are written. Reading and writing again gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def form_of(row: Mapping[str, Any], where: str) -> str:
    for form, keys in FORMS.items():
        if set(keys) <= row.keys():
            return form
    raise DataError(f"{where}: keys {', '.join(sorted(row))[:80]} are of none of the forms {', '.join(FORMS)}")


def in_file_order(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its keys in the order of its form, which the canonical JSON of a shard sorts; others follow."""
    keys = FORMS[form_of(row, "row")]
    return {key: row[key] for key in (*keys, *(key for key in row if key not in keys))}


def row_problems(row: Mapping[str, Any], form: str) -> Iterator[Problem]:
    """Faults of a row of `form`."""
    keys = FORMS[form]
    yield from text_problems(row, (key for key in keys if key not in (*LISTS, "neighbors")))
    for key in keys:
        value = row.get(key)
        if key in LISTS and not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
            yield Problem("field", f"{key!r} wants a list of image names, got {shown(value)}")
    if form == "neighbours":
        near = row.get("neighbors")
        if not isinstance(near, list) or not all(_is_neighbour(entry) for entry in near):
            yield Problem("field", f"'neighbors' wants a list of [class_id, name, image], got {shown(near)}")
    if form == "isekai":
        names = (row.get("positive_promt"), row.get("negative_promt"))
        if row.get("label_name") not in names:
            yield Problem("field", f"'label_name' {shown(row.get('label_name'))} is none of {shown(names)}")
        if names[0] == names[1]:
            yield Problem("field", f"'positive_promt' and 'negative_promt' are both {shown(names[0])}")


def _is_neighbour(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 3 and all(isinstance(part, str) and part for part in entry)


def images_of(row: Mapping[str, Any]) -> list[str]:
    """Images that a row names, the one that carries it first among equals."""
    named = [row["image_name"]] if "image_name" in row else []
    named += [name for key in LISTS for name in row.get(key, ())]
    return list(dict.fromkeys([*named, *(entry[2] for entry in row.get("neighbors", ()))]))


class LclSource:
    """The rows of a folder as images. Raises UserError when there is no file, or two for one split."""

    name = "lcl"
    follows = False

    def __init__(self, root: str | Path) -> None:
        self.root = existing_root(root)
        folder = self.root / "lcl" if (self.root / "lcl").is_dir() else self.root
        self.files = [self._file(path) for path in sorted(folder.glob("*.jsonl"))]
        if not self.files:
            raise UserError(f"{folder}: no Link-Context Learning file (*.jsonl)")
        for file in self.files:
            if sum(other.split == file.split for other in self.files) > 1:
                raise UserError(f"{folder}: two files for split {file.split!r}, e.g. {file.path.name}")
        self.image_dir = self.root / "images" if (self.root / "images").is_dir() else self.root

    def _file(self, path: Path) -> RowFile:
        first = next(iter(lines(path)), None)
        if first is None:
            raise DataError(f"{path}: has no rows")
        form = form_of(parse_object(first.raw, f"{path}:{first.number}"), f"{path}:{first.number}")
        split = TRAIN if form == "neighbours" else re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:32]
        return RowFile(path, form, split)

    def splits(self) -> tuple[str, ...]:
        return tuple(file.split for file in sorted(self.files, key=lambda file: file.split != TRAIN))

    def images(self, split: str) -> Iterator[SourceImage]:
        """Images in the order in which rows name them. An image that is missing or broken is left to the build, which
        counts it in skipped.jsonl; a row whose images are all broken raises DataError."""
        (file,) = (file for file in self.files if file.split == split)
        carried: dict[str, list[Record]] = {}
        named: dict[str, None] = {}
        for number, row in enumerate(read_rows(file.path, file.form)):
            every = images_of(row)
            kind = "isekai" if file.form == "isekai" else "lcl"
            own = every[:1] if kind == "isekai" else [name for key in LISTS for name in row.get(key, ())]
            carrier = self._first_usable(own)
            if carrier is None and kind == "lcl":
                raise DataError(
                    f"{file.path}:{number + 1}: class {row['class_name']!r}: none of its images can be read"
                )
            carried.setdefault(carrier or every[0], []).append({"kind": kind, "line": number, "row": row})
            named |= dict.fromkeys(every)
        for name in named:
            path = self._path(name, file)
            image = ImageRecord(image_key(name), name, 0, 0, (), split=split)
            yield SourceImage(image, path, tuple(carried.get(name, ())))

    def _path(self, name: str, file: RowFile) -> Path:
        try:
            return inside(self.image_dir, name)
        except DataError as error:
            raise DataError(f"{file.path}: image {error}") from None

    def _first_usable(self, names: Sequence[str]) -> str | None:
        """The first image with a readable header: it carries the row of its class."""
        for name in names:
            try:
                displayed_size(inside(self.image_dir, name).read_bytes())
            except (OSError, DataError):
                continue
            return name
        return None


def samples(_record: Mapping[str, Any], _image: ImageRecord) -> tuple[Sample, ...]:
    """None: a row is not a sample. Episodes are drawn from rows (data/episodes.py)."""
    return ()
