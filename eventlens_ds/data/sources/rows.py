"""What the sources of rows about one picture each share: captions, expressions, questions, statements, tags.

In: a folder with images/ (or vcr1images/) and JSON lines that name a picture. Out: images with the records of their
rows; a metadata json beside the image gives regions when it exists, else the row or the header of the image gives its
size. Decision: these formats say nothing about splits. A row without "split" follows its picture: the VCR or
VisualCOMET split of the same folder that names it, so rows of held-out images stay out of training, else the split of
its file. A row with an unusable box or a held-out picture is left out and counted with a reason; any other fault is a
DataError.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from eventlens_ds.data.records import ImageRecord
from eventlens_ds.data.sources import Record, SourceImage, visualcomet
from eventlens_ds.data.sources.layout import (
    Problem,
    existing_root,
    find_images,
    image_file,
    image_key,
    image_record,
    inside,
    lines,
    parse_object,
    raise_first,
    read_metadata,
    shown,
    text_problems,
)
from eventlens_ds.data.transforms import displayed_size
from eventlens_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

COCO_FOLDERS = ("train2014", "val2014", "test2015", "train2017", "val2017", "mscoco/images/train2014")
"""Where below the image folder a bare COCO file name is looked for."""


class Entry(NamedTuple):
    """A row with its place, or the fault that keeps it from being read."""

    where: str
    number: int
    row: dict[str, Any]
    fault: DataError | None = None
    split: str = ""
    """Split of its file, "" when the file has none."""


class RowSource:
    """Base of a source of rows. Raises UserError when `root` holds none of its files or no image folder."""

    name: str
    kind: str
    """Kind of its records (see `sources.samples`)."""
    places: tuple[str, ...]
    """Its file, relative to the root: the first of these that exists."""
    follows = True

    def __init__(self, root: str | Path, split: str = "train") -> None:
        self.root = existing_root(root)
        self.files = self.find_files()
        if not self.files:
            raise UserError(f"{self.root}: no {self.name}; expected {self.root / self.places[0]}")
        self.image_dir = find_images(self.root, self.root)
        self.default_split = split
        self.pictures: dict[str, ImageRecord] | None = None
        """Pictures by name, where several sources share them so that each is read once; None reads every time."""
        self._image_splits: dict[str, str] | None = None
        self._located: dict[str, str] = {}

    def find_files(self) -> list[Path]:
        """The files of this source below the root, [] when there are none."""
        return [p for p in (self.root / place for place in self.places) if p.is_file()][:1]

    def splits(self) -> tuple[str, ...]:
        """Splits named by the rows, in order of appearance; a broken row names none, `images` reports it.

        Raises DataError when no row can be read.
        """
        found: dict[str, None] = {}
        for entry in self.entries():
            if entry.fault is None and next(iter(self.row_problems(entry.row)), None) is None:
                found[self.split_of(entry)] = None
        if not found:
            found = dict.fromkeys(self.split_of(entry) for entry in self.checked())
        return tuple(found)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Images in the order of their first row. Raises DataError "file:line: ..." on the first fault."""
        entries_of: dict[str, list[Entry]] = {}
        refused: Counter[str] = Counter()
        for entry in self.checked():
            if self.split_of(entry) != split:
                continue
            if reason := self.refusal(entry.row, split):
                refused[reason] += 1
            else:
                entries_of.setdefault(entry.row["img_path"], []).append(entry)
        if refused:
            listed = ", ".join(f"{reason} {count}" for reason, count in sorted(refused.items()))
            log.warning("%s, split %s: %d rows left out: %s", self.name, split, refused.total(), listed)
        for img_fn, entries in entries_of.items():
            where = entries[0].where
            path = image_file(self.image_dir, img_fn, where)
            image = self.picture(path, img_fn, split, where, self.size_of(entries[0].row))
            yield SourceImage(self.described(image, entries), path, tuple(self.records(image, entries)))

    def picture(self, path: Path, img_fn: str, split: str, where: str, size: tuple[int, int] | None) -> ImageRecord:
        """`read_image`, or what another source of the same company has read."""
        if self.pictures is None:
            return read_image(path, img_fn, split, where, size)
        known = self.pictures.get(img_fn)
        if known is None or size not in (None, (known.width, known.height)):
            known = self.pictures[img_fn] = read_image(path, img_fn, split, where, size)
        return replace(known, split=split)

    def checked(self) -> Iterator[Entry]:
        """Rows in file order, checked. Raises DataError on the first fault."""
        for entry in self.entries():
            if entry.fault is not None:
                raise entry.fault
            raise_first(self.row_problems(entry.row), entry.where)
            yield entry

    def entries(self) -> Iterator[Entry]:
        """Rows of all files in file order, in the canonical form, unchecked; a line that is no row has a fault."""
        for path in self.files:
            yield from self.entries_of(path)

    def entries_of(self, path: Path) -> Iterator[Entry]:
        split = self.split_of_file(path)
        for number, _, raw in lines(path):
            where = f"{path}:{number}"
            try:
                yield Entry(where, number, self.canonical(parse_object(raw, where), path), split=split)
            except DataError as fault:
                yield Entry(where, number, {}, fault)

    def split_of(self, entry: Entry) -> str:
        """Split of a checked row."""
        if self._image_splits is None:
            self._image_splits = _splits_of_images(self.root)
        known = self._image_splits.get(entry.row["img_path"])
        return str(entry.row.get("split") or known or entry.split or self.default_split)

    def split_of_file(self, path: Path) -> str:
        """The split that the name of a file gives its rows, "" for none."""
        return ""

    def canonical(self, row: dict[str, Any], path: Path) -> dict[str, Any]:
        """A row of `path` with the names of this project for its fields; what it lacks stays absent."""
        return row

    def row_problems(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        """Faults of one row; a source adds its own."""
        yield from text_problems(row, ("img_path",))
        if isinstance(row.get("img_path"), str) and row["img_path"].strip():
            try:
                inside(Path(), row["img_path"])
            except DataError:
                yield Problem("field", f"'img_path' {shown(row['img_path'])} leaves the image folder")
        if not isinstance(row.get("split", ""), str):
            yield Problem("field", f"'split' wants a string, got {shown(row['split'])}")

    def refusal(self, row: Mapping[str, Any], split: str) -> str | None:
        """Why a checked row is left out of `split`, or None."""
        return None

    def identity(self, row: Mapping[str, Any]) -> Hashable:
        """What occurs once in a file: `data lint` reports the second row with the same."""
        raise NotImplementedError

    def size_of(self, row: Mapping[str, Any]) -> tuple[int, int] | None:
        """(width, height) of the picture as a row gives it."""
        return None

    def described(self, image: ImageRecord, entries: Sequence[Entry]) -> ImageRecord:
        """The image with what its rows say about the picture as a whole."""
        return image

    def records(self, image: ImageRecord, entries: Sequence[Entry]) -> Iterable[Record]:
        """Records of one image; here one per row."""
        return ({**entry.row, "kind": self.kind, "line": entry.number} for entry in entries)

    def locate(self, name: object) -> Any:
        """A bare COCO file name as a path below the image folder, where one of COCO's folders holds it."""
        if not isinstance(name, str) or "/" in name:
            return name
        if name not in self._located:
            self._located[name] = find_coco(self.image_dir, name)
        return self._located[name]


def find_coco(folder: Path, name: str) -> str:
    """`name`, with the COCO folder below `folder` that holds it; `name` itself when none does or it is no file name."""
    try:
        inside(folder, name)
    except DataError:
        return name
    found = (f"{place}/{name}" for place in COCO_FOLDERS if (folder / place / name).is_file())
    return name if (folder / name).is_file() else next(found, name)


def _splits_of_images(root: Path) -> dict[str, str]:
    """img_fn -> split for the images that VCR or VisualCOMET annotations of the same folder name."""
    split_of: dict[str, str] = {}
    for split in ("train", "val", "test"):
        for path in (root / "vcr" / f"{split}.jsonl", root / f"{split}.jsonl"):
            if path.is_file():
                named = (parse_object(raw, f"{path}:{number}").get("img_fn") for number, _, raw in lines(path))
                split_of |= {name: split for name in named if isinstance(name, str)}
        for path in (root / "visualcomet" / f"{split}_annots.json", root / f"{split}_annots.json"):
            if path.is_file():
                named = (row.get("img_fn") for _, _, row in visualcomet.rows_in(visualcomet.read_text(path), path))
                split_of |= {name: split for name in named if isinstance(name, str)}
    return split_of


def read_image(path: Path, img_fn: str, split: str, where: str, size: tuple[int, int] | None = None) -> ImageRecord:
    """Record of an image: its metadata json when there is one, else `size` or the size it is shown at, no regions.

    Raises DataError when the metadata gives another size than the row.
    """
    beside = path.with_suffix(".json")
    if beside.is_file():
        made = image_record(img_fn, read_metadata(beside, where), "", split)
        if size is not None and size != (made.width, made.height):
            raise DataError(f"{where}: size {size[0]} x {size[1]}, the metadata says {made.width} x {made.height}")
        return made
    try:
        width, height = size or displayed_size(path.read_bytes())
    except DataError as error:
        raise DataError(f"{where}: image {path}: {error}") from None
    return ImageRecord(image_key(img_fn), img_fn, width, height, (), split=split)


def one_line(text: str) -> str:
    """A text with its runs of blanks as single spaces."""
    return " ".join(text.split())
