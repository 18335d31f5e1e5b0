"""`eventlens data lint`: faults of annotations and pictures, all of them, each with its place.

In: a source and a split. Out: `Finding`s (severity, code, "file:line", message), ordered by file and line.
Decision: a reader stops at the first fault that would make a sample wrong; lint goes on, and also reports what a
reader accepts but a person should look at: doubtful numbers, suspected off-by-one tags, leaking answers. `CODES`
names every code; "error" means training on the data would be wrong or impossible.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from eventlens_ds.data import boxes as box_ops
from eventlens_ds.data.records import ImageRecord
from eventlens_ds.data.sources import Source, vcr, visualcomet
from eventlens_ds.data.sources.layout import Problem, image_file, inside, lines, parse_object, read_metadata
from eventlens_ds.data.sources.layout import image_record as image_record_of
from eventlens_ds.data.sources.rows import RowSource
from eventlens_ds.data.sources.vcr import VcrSource
from eventlens_ds.data.sources.visualcomet import RELATIONS, VisualCometSource
from eventlens_ds.data.transforms import decode_image
from eventlens_ds.errors import DataError, UserError

Severity = Literal["error", "warning", "info"]

CODES: dict[str, tuple[Severity, str]] = {
    "json": ("error", "a line that is not a JSON object"),
    "field": ("error", "a field that is absent, empty or of another type"),
    "metadata": ("error", "metadata of an image absent or malformed"),
    "tag-range": ("error", "a tag beyond the objects of the row"),
    "tag-no-box": ("error", "objects of the row and boxes of the metadata differ in number"),
    "object-name": ("error", "an object's class differs from the metadata"),
    "box": ("error", "a box that cannot be used: not finite, inverted, zero area, outside"),
    "box-overhang": ("warning", "a box that sticks out of the image by more than a pixel; it is clipped"),
    "tag-twice": ("warning", "one mention names an object twice"),
    "off-by-one": ("warning", "tags that look 1-based, or strings that look 0-based"),
    "orig-numbers": ("warning", "numbers of a *_orig string differ from the tags of its tokens + 1"),
    "number-range": ("warning", "a number in an event that could be a tag, but names no object"),
    "number-class": ("warning", "a number in an event that names an object which is not a person"),
    "number-doubt": ("info", "a number in an event taken as a quantity, though it names a person"),
    "relation-missing": ("info", "an event without one of intent, before, after"),
    "empty-text": ("warning", "an empty string among the answers of a relation"),
    "leak-duplicate": ("error", "a wrong choice equal to the correct one"),
    "leak-question": ("warning", "the correct choice is contained in the question, and no other is"),
    "leak-label": ("warning", "one position holds the correct choice far too often"),
    "duplicate-id": ("error", "an annot_id, event or caption that occurs twice"),
    "image-missing": ("error", "an image file that is not there"),
    "image-broken": ("error", "a picture that cannot be decoded, or not in the size of its metadata"),
    "unchecked": ("warning", "no VCR files to check a train split of VisualCOMET for held-out images"),
    "split-overlap": ("error", "an image of this split that another split holds too, or that VCR or RefCOCO holds out"),
}

MIN_LABELS = 20
"""Labels (or tags) needed before their distribution is judged."""


class Finding(NamedTuple):
    severity: Severity
    code: str
    where: str
    """file:line"""
    message: str


class _Row(NamedTuple):
    where: str
    row: dict[str, Any]


def lint(source: Source, split: str, *, decode: bool = True) -> list[Finding]:
    """Check a split of one source of `data build`. `decode=False` leaves out the decoding of pictures.

    Raises UserError when the split has no file or the source is of another kind.
    """
    if isinstance(source, VcrSource):
        found = _lint_vcr(source, split, decode)
    elif isinstance(source, VisualCometSource):
        found = _lint_visualcomet(source, split, decode)
    elif isinstance(source, RowSource):
        found = _lint_rows(source, split, decode)
    else:
        raise UserError(f"lint knows vcr, visualcomet, captions, rec, vg, vqa, vsr, pope and tags, not {source.name!r}")
    return sorted(found, key=_place)


def _place(finding: Finding) -> tuple[str, int]:
    file, _, line = finding.where.rpartition(":")
    return file, int(line) if line.isdigit() else 0


def _finding(code: str, where: str, message: str) -> Finding:
    return Finding(CODES[code][0], code, where, message)


def _findings(problems: Iterable[Problem], where: str) -> Iterator[Finding]:
    return (_finding(p.code, where, p.message) for p in problems)


def _lint_vcr(source: VcrSource, split: str, decode: bool) -> Iterator[Finding]:
    path = source.file(split)
    pictures, repeats, bias = _Pictures(source.image_dir, decode), _Repeats(), _Bias()
    overlap = _Overlap({s: _images_in(source, s) for s in source.splits() if s != split})
    for entry in _json_lines(path):
        if isinstance(entry, Finding):
            yield entry
            continue
        where, row = entry
        problems = list(vcr.row_problems(row))
        yield from _findings(problems, where)
        if problems:
            continue
        bias.add(row)
        yield from repeats.check(where, row["annot_id"])
        yield from _findings(_vcr_text_problems(row), where)
        names = yield from pictures.check(where, row["img_fn"], row["metadata_fn"])
        if names is not None:
            yield from _findings(vcr.region_problems(row, names), where)
        yield from overlap.check(where, row["img_fn"])
    yield from _findings(bias.problems(), f"{path}:1")


def _lint_visualcomet(source: VisualCometSource, split: str, decode: bool) -> Iterator[Finding]:
    path = source.file(split)
    pictures, repeats = _Pictures(source.image_dir, decode), _Repeats()
    others = {s: _images_in(source, s) for s in source.splits() if s != split}
    try:
        for img_fn, held in (source.held_out_images() if split == "train" else {}).items():
            others.setdefault(f"VCR {held}", set()).add(img_fn)
    except DataError as error:
        yield _located("json", error)
    except UserError as error:
        yield _finding("unchecked", f"{path}:1", str(error))
    overlap = _Overlap(others)
    try:
        for line, _, row in visualcomet.rows_in(visualcomet.read_text(path), path):
            where = f"{path}:{line}"
            problems = list(visualcomet.row_problems(row))
            yield from _findings(problems, where)
            if problems:
                continue
            yield from repeats.check(where, (row["img_fn"], row["place"], row["event"]))
            names = yield from pictures.check(where, row["img_fn"], row["metadata_fn"])
            yield from _findings(_event_problems(row, names, blind=split == "test"), where)
            yield from overlap.check(where, row["img_fn"])
    except DataError as error:
        # Beyond broken JSON nothing of a list can be read.
        yield _located("json", error)


def _lint_rows(source: RowSource, split: str, decode: bool) -> Iterator[Finding]:
    pictures, repeats = _Pictures(source.image_dir, decode), _Repeats()
    others: dict[str, set[str]] = {}
    mine: dict[str, str] = {}
    for entry in source.entries():
        where, row = entry.where, entry.row
        problems = [] if entry.fault is not None else list(source.row_problems(row))
        if entry.fault is not None:
            yield _located("json", entry.fault)
        yield from _findings(problems, where)
        if problems or entry.fault is not None:
            continue
        name = row["img_path"]
        if (chosen := source.split_of(entry)) != split:
            others.setdefault(chosen, set()).add(name)
            continue
        mine.setdefault(name, where)
        if reason := source.refusal(row, split):
            yield _finding("box" if reason.startswith("box ") else "split-overlap", where, reason)
        yield from repeats.check(where, source.identity(row))
        beside = str(Path(name).with_suffix(".json"))
        yield from pictures.check(where, name, beside if (source.image_dir / beside).is_file() else None)
    overlap = _Overlap(others)
    for name, where in mine.items():
        yield from overlap.check(where, name)


def _json_lines(path: Path) -> Iterator[_Row | Finding]:
    for number, _, raw in lines(path):
        where = f"{path}:{number}"
        try:
            yield _Row(where, parse_object(raw, where))
        except DataError as error:
            yield _located("json", error)


def _located(code: str, error: DataError) -> Finding:
    """A finding from a message that starts with "file:line: "."""
    found = re.match(r"(.*?:\d+): (.*)", str(error), re.DOTALL)
    return _finding(code, found[1], found[2]) if found else _finding(code, "", str(error))


class _Pictures:
    """Checks every image and its metadata once, at the first row that names it, and remembers its object names."""

    def __init__(self, folder: Path, decode: bool) -> None:
        self.folder, self.decode = folder, decode
        self.seen: dict[str, tuple[str, ...] | None] = {}

    def check(
        self, where: str, img_fn: str, metadata_fn: str | None
    ) -> Generator[Finding, None, tuple[str, ...] | None]:
        """Yield findings; return the names of the objects, None where metadata is absent or broken."""
        if img_fn in self.seen:
            return self.seen[img_fn]
        image: ImageRecord | None = None
        if metadata_fn is not None:
            try:
                meta = read_metadata(inside(self.folder, metadata_fn), where)
                image = image_record_of(img_fn, meta, "", "")
                yield from _box_findings(image, where)
            except DataError as error:
                text = str(error).removeprefix(f"{where}: ")
                code = "tag-no-box" if re.search(r"\d+ names but \d+ boxes", text) else "metadata"
                yield _finding(code, where, text)
        names = None if image is None else tuple(sys.intern(region.name) for region in image.regions)
        self.seen[img_fn] = names
        try:
            path = image_file(self.folder, img_fn, where)
        except DataError as error:
            yield _finding("image-missing", where, str(error).removeprefix(f"{where}: "))
            return names
        if self.decode:
            try:
                frame = (image.width, image.height) if image is not None and image.regions else None
                decode_image(path.read_bytes(), frame=frame)
            except (DataError, OSError) as error:
                yield _finding("image-broken", where, f"{path}: {error}")
        return names


def _box_findings(image: ImageRecord, where: str) -> Iterator[Finding]:
    for i, region in enumerate(image.regions):
        reason = box_ops.problem(region.box, image.width, image.height)
        label = f"{image.img_fn}: object {i} ({region.name}) {tuple(region.box)} in {image.width}x{image.height}"
        if reason:
            yield _finding("box", where, f"{label}: {reason}")
        elif (out := box_ops.overhang(region.box, image.width, image.height)) > 1:
            yield _finding("box-overhang", where, f"{label}: {out:.1f} px outside")


def _vcr_text_problems(row: Mapping[str, Any]) -> Iterator[Problem]:
    annot_id = row["annot_id"]
    pairs = [("question", row["question"])]
    for kind in ("answer", "rationale"):
        choices, label = row[f"{kind}_choices"], row.get(f"{kind}_label")
        for k, tokens in enumerate(choices):
            if any(isinstance(t, list) and len(set(t)) < len(t) for t in tokens):
                yield Problem("tag-twice", f"{annot_id}: {kind} {k} names an object twice in one mention")
        if label is None:
            continue
        pairs.append((kind, choices[label]))
        same = [k for k, tokens in enumerate(choices) if k != label and _plain(tokens) == _plain(choices[label])]
        if same:
            yield Problem("leak-duplicate", f"{annot_id}: {kind} choices {same} equal the correct one, {label}")
        question = _plain(row["question"])
        held = [k for k, tokens in enumerate(choices) if f" {_plain(tokens)} " in f" {question} "]
        if held == [label]:
            yield Problem("leak-question", f"{annot_id}: the question contains the correct {kind}")
    for kind, tokens in pairs:
        orig = row.get(f"{kind}_orig")
        if isinstance(orig, str):
            yield from _orig_problems(kind, orig, tokens, annot_id)


def _orig_problems(kind: str, orig: str, tokens: Sequence[Any], annot_id: str) -> Iterator[Problem]:
    """Numbers of a 1-based string against the 0-based tags of its tokens. Their order inside a mention is free."""
    got = sorted(int(d) for d in re.findall(r"\d+", orig))
    words = [int(d) for t in tokens if isinstance(t, str) for d in re.findall(r"\d+", t)]
    tags = [i for t in tokens if isinstance(t, list) for i in t]
    if got == sorted(words + [i + 1 for i in tags]):
        return
    if tags and got == sorted(words + tags):
        yield Problem("off-by-one", f"{annot_id}: '{kind}_orig' has the 0-based numbers {got} of its tokens: {orig!r}")
    elif tags and got == sorted(words + [i + 2 for i in tags]):
        yield Problem("off-by-one", f"{annot_id}: tags {tags} of {kind} are two below '{kind}_orig': {orig!r}")
    else:
        yield Problem("orig-numbers", f"{annot_id}: '{kind}_orig' has numbers {got}, its tokens tags {tags}: {orig!r}")


def _plain(tokens: Sequence[Any]) -> str:
    """Tokens as lower-case words without punctuation, tags as numbers, for comparison."""
    words = (f"#{'+'.join(map(str, t))}" if isinstance(t, list) else t.lower() for t in tokens)
    return " ".join(w for w in words if re.search(r"\w", w))


class _Bias:
    """What only the rows of a split together can show: positions of the correct choice, the base of the tags."""

    def __init__(self) -> None:
        self.labels: dict[str, Counter[int]] = {"answer": Counter(), "rationale": Counter()}
        self.tags = 0
        self.lowest = sys.maxsize

    def add(self, row: Mapping[str, Any]) -> None:
        for kind, labels in self.labels.items():
            if row.get(f"{kind}_label") is not None:
                labels[row[f"{kind}_label"]] += 1
        tags = [i for tokens in _token_lists(row) for t in tokens if isinstance(t, list) for i in t]
        self.tags += len(tags)
        self.lowest = min([self.lowest, *tags])

    def problems(self) -> Iterator[Problem]:
        for kind, labels in self.labels.items():
            total = sum(labels.values())
            if total < MIN_LABELS:
                continue
            label, count = labels.most_common(1)[0]
            # Six standard deviations above a quarter: a false alarm is rarer than one in a million.
            if count > 0.25 * total + 6 * (total * 0.25 * 0.75) ** 0.5:
                yield Problem("leak-label", f"{kind}_label is {label} in {count} of {total} rows")
        if self.tags >= MIN_LABELS and self.lowest > 0:
            yield Problem("off-by-one", f"none of {self.tags} tags is 0: the lists look 1-based")


def _token_lists(row: Mapping[str, Any]) -> list[list[Any]]:
    return [row["question"], *row["answer_choices"], *row["rationale_choices"]]


def _event_problems(row: Mapping[str, Any], names: Sequence[str] | None, blind: bool) -> Iterator[Problem]:
    label = f"{row['img_fn']}: "
    for relation in RELATIONS:
        if relation not in row and not blind:
            yield Problem("relation-missing", f"{label}no {relation!r}")
        if any(not text.strip() for text in row.get(relation, ())):
            yield Problem("empty-text", f"{label}an empty string in {relation!r}")
    for text in (row["place"], row["event"], *(t for r in RELATIONS for t in row.get(r, ()))):
        for number in visualcomet.numbers_left(text, names) if names is not None else ():
            yield Problem(number.code, f"{label}{number.message}")


class _Repeats:
    """Reports what occurs a second time."""

    def __init__(self) -> None:
        self.first: dict[Hashable, str] = {}

    def check(self, where: str, identity: Hashable) -> Iterator[Finding]:
        if identity in self.first:
            yield _finding("duplicate-id", where, f"{identity!r} repeats {self.first[identity]}")
        self.first.setdefault(identity, where)


def _images_in(source: VcrSource | VisualCometSource, split: str) -> set[str]:
    """Images that the readable rows of another split name; its faults are reported when it is linted itself."""
    path = source.file(split)
    found: set[str] = set()
    try:
        if isinstance(source, VcrSource):
            found.update(e.row["img_fn"] for e in _json_lines(path) if isinstance(e, _Row) and _names_image(e.row))
        else:
            events = visualcomet.rows_in(visualcomet.read_text(path), path)
            found.update(row["img_fn"] for _, _, row in events if _names_image(row))
    except DataError:
        # set.update has kept what came before the fault.
        return found
    return found


def _names_image(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("img_fn"), str)


class _Overlap:
    """Reports every image of this split that other splits hold too, once."""

    def __init__(self, others: Mapping[str, set[str]]) -> None:
        self.others = others
        self.reported: set[str] = set()

    def check(self, where: str, name: str) -> Iterator[Finding]:
        held = [split for split, images in self.others.items() if name in images]
        if held and name not in self.reported:
            self.reported.add(name)
            yield _finding("split-overlap", where, f"image {name} is also in {', '.join(held)}")
