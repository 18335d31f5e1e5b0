"""Reader of VisualCOMET (Park et al., ECCV 2020): {train,val,test}_annots.json over the images of VCR.

In: a folder with the annotations (root/ or root/visualcomet/) and the images and metadata of VCR. Out: images with
their events as canonical records (kind "event"): place, event, intent, before and after as token lists of words and
0-based [index] lists, the source strings beside them as `*_orig`; `samples` makes up to five samples of one.
Decision: a number in the text becomes a person, once and here (P2), only by the rule in `person_tokens`; every other
number stays text and `data lint` shows it. Training on images of VCR's val or test split is refused.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.data.records import ImageRecord, Sample, Tokens
from eventlens_ds.data.sources import Record, SourceImage
from eventlens_ds.data.sources.layout import (
    Problem,
    existing_root,
    find_dir,
    find_images,
    image_file,
    image_record,
    inside,
    lines,
    parse_object,
    raise_first,
    read_metadata,
    shown,
    text_problems,
)
from eventlens_ds.data.sources.vcr import detokenise, references
from eventlens_ds.errors import DataError, UserError

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
RELATIONS = ("intent", "before", "after")
HELD_OUT = ("val", "test")
"""Splits of VCR whose images must not be trained on."""

_UNITS = re.compile(
    r"(second|minute|hour|day|week|month|year|decade|dollar|cent|mile|meter|yard|degree|percent|o'clock|[ap]m)"
)
_COUNTS = re.compile(
    r"(seconds|minutes|hours|days|weeks|months|years|decades|dollars|cents|bucks|miles|meters|yards|feet|degrees|percent"
    r"|o'clock|[ap]m|people|persons|men|women|kids|children|guys|girls|boys|others|cars|chairs|drinks|times)"
)
"""A bare number is a quantity before these: 1 before a unit, 2 and more before a plural. Plurals that are also
third-person verbs of people (points, steps, books, pounds) are left out: "2 points at 3" is a person."""

_SHARE = ("them", "the", "those", "these", "us", "his", "her", "their")
_NUMBERED = ("number", "room", "page", "chapter", "channel", "age", "apartment")
"""Words that, right before a number that ends the text, make it a name or an age ("wait in room 2")."""

_MENTION = re.compile(r"""^([("\[]*)(\d{1,2}(?:[,&]\d{1,2})*)('s|')?([.,;:!?)"\]]*)$""")


class VisualCometSource:
    """VisualCOMET on disk.

    vcr_root         folder of VCR when its images or jsonl files are not below `root`
    allow_unchecked  build the train split although no VCR files are there to check it against
    Raises UserError when annotations or images are missing.
    """

    name = "visualcomet"
    follows = False

    def __init__(
        self,
        root: str | Path,
        vcr_root: str | Path | None = None,
        splits: Sequence[str] = SPLITS,
        allow_unchecked: bool = False,
    ) -> None:
        self.root = existing_root(root)
        self.vcr_root = existing_root(vcr_root) if vcr_root is not None else self.root
        self.allow_unchecked = allow_unchecked
        holds = [f"{s}_annots.json" for s in splits]
        folder = find_dir(self.root, ("visualcomet", "."), lambda d: any((d / name).is_file() for name in holds))
        if folder is None:
            raise UserError(f"{self.root}: no VisualCOMET annotations; expected one of {' '.join(holds)} here or below")
        self.annotations = folder
        self.image_dir = find_images(self.vcr_root, folder)
        self._splits = tuple(s for s in splits if self.file(s).is_file())

    def file(self, split: str) -> Path:
        return self.annotations / f"{split}_annots.json"

    def splits(self) -> tuple[str, ...]:
        return self._splits

    def img_fns(self, split: str) -> Iterable[str]:
        return self._index(self.file(split), read_text(self.file(split)), split)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Images in the order of their first row, each with its events in file order.

        Raises DataError "file:line: ..." on the first fault, also for a train image that VCR holds out, and
        UserError when there is no VCR file to check the train split against.
        """
        path = self.file(split)
        text = read_text(path)
        for img_fn, places in self._index(path, text, split).items():
            rows = [json.JSONDecoder().raw_decode(text, start)[0] for _, _, start in places]
            where = f"{path}:{places[0][1]}"
            meta = read_metadata(inside(self.image_dir, rows[0]["metadata_fn"]), where)
            image = image_record(img_fn, meta, str(rows[0].get("movie", "")), split)
            records = tuple(canonical(row, number, line, meta["names"]) for row, (number, line, _) in zip(rows, places))
            yield SourceImage(image, image_file(self.image_dir, img_fn, where), records)

    def _index(self, path: Path, text: str, split: str) -> dict[str, list[tuple[int, int, int]]]:
        """(number of the row, its line, its offset) of the rows of every image; checks each row on the way."""
        held_out = self.held_out_images() if split == "train" else {}
        rows_of: dict[str, list[tuple[int, int, int]]] = {}
        for number, (line, start, row) in enumerate(rows_in(text, path)):
            where = f"{path}:{line}"
            raise_first(row_problems(row), where)
            if row["img_fn"] in held_out:
                raise DataError(f"{where}: image {row['img_fn']} is in VCR's {held_out[row['img_fn']]} split")
            rows_of.setdefault(row["img_fn"], []).append((number, line, start))
        return rows_of

    def held_out_images(self) -> dict[str, str]:
        """img_fn -> split of every image that VCR's val and test hold out. Raises UserError when VCR is absent."""
        folder = find_dir(self.vcr_root, ("vcr", "."), lambda d: any((d / f"{s}.jsonl").is_file() for s in HELD_OUT))
        if folder is None:
            if not self.allow_unchecked:
                raise UserError(
                    f"{self.vcr_root}: no val.jsonl or test.jsonl of VCR to check the train split for held-out images; "
                    "give vcr_root, or allow_unchecked"
                )
            logger.warning("%s: train images are not checked against VCR's val and test splits", self.root)
            return {}
        held_out: dict[str, str] = {}
        for split in HELD_OUT:
            path = folder / f"{split}.jsonl"
            if not path.is_file():
                logger.warning("%s is absent: train images are not checked against VCR's %s split", path, split)
                continue
            for number, _, raw in lines(path):
                row = parse_object(raw, f"{path}:{number}")
                raise_first(text_problems(row, ("img_fn",)), f"{path}:{number}")
                held_out[row["img_fn"]] = split
        return held_out


def read_text(path: Path) -> str:
    """The annotation file as text. Raises UserError when it cannot be opened, DataError for broken UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:1: not UTF-8: {error}") from None


def rows_in(text: str, path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(1-based line, offset, row) of every object in a JSON list, one at a time, so that only one lives in memory.

    Raises DataError "file:line: ..." for broken JSON and for entries that are not objects.
    """
    blank = re.compile(r"\s*")
    decoder = json.JSONDecoder()
    line, counted = 1, 0

    def skip(position: int) -> int:
        found = blank.match(text, position)
        return found.end() if found else position

    def line_at(position: int) -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, position), position
        return line

    at = skip(0)
    if text[at : at + 1] != "[":
        raise DataError(f"{path}:{line_at(at)}: expected a JSON list of events")
    at = skip(at + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        where = f"{path}:{line_at(at)}"
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: broken JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
        yield line, at, row
        at = skip(end)
        if text[at : at + 1] == "]":
            return
        if text[at : at + 1] != ",":
            raise DataError(f"{path}:{line_at(at)}: broken JSON: expected ',' or ']' after an event")
        at = skip(at + 1)


def row_problems(row: Mapping[str, Any]) -> Iterator[Problem]:
    """Faults of one row that need no other file. A relation may be absent; what is there must be strings."""
    yield from text_problems(row, ("img_fn", "metadata_fn", "place", "event"))
    for key in ("img_fn", "metadata_fn"):
        if isinstance(row.get(key), str) and row[key].strip():
            try:
                inside(Path(), row[key])
            except DataError:
                yield Problem("field", f"{key!r} {shown(row[key])} leaves the image folder")
    for key in RELATIONS:
        if key in row and (not isinstance(row[key], list) or not all(isinstance(t, str) for t in row[key])):
            yield Problem("field", f"{key!r} wants a list of strings, got {shown(row[key])}")


def canonical(row: Mapping[str, Any], number: int, line: int, names: Sequence[str]) -> Record:
    """Canonical record of a row: token lists with 0-based indices; the strings stay under `*_orig`."""
    record: Record = {**row, "kind": "event", "row": number, "line": line}
    for key in ("place", "event"):
        record[f"{key}_orig"] = row[key]
        record[key] = person_tokens(row[key], names)
    for key in RELATIONS:
        if key in row:
            record[f"{key}_orig"] = list(row[key])
            record[key] = [person_tokens(text, names) for text in row[key]]
    return record


def person_tokens(text: str, names: Sequence[str]) -> list[str | list[int]]:
    """Words of a text with its 1-based person numbers as 0-based lists: "talk to 3." -> ["talk", "to", [2], "."].

    A number is a person when it stands alone ("3", "3,", "3's", "1,2" for two), is at most the number of objects,
    names an object of class person, and is no quantity ("2 minutes", "1 of them") or name ("in room 2" at the end);
    a possessive is always a person. 0 means the whole image, which has no box: it becomes the
    words "the image". Anything else stays text.
    """
    words = text.split()
    out: list[str | list[int]] = []
    for n, word in enumerate(words):
        found = _MENTION.match(word)
        numbers = [int(i) for i in re.split("[,&]", found[2])] if found else []
        if not found or _is_quantity(words, n, found[3]) or not _name_persons(numbers, names):
            out.append(word)
            continue
        out += [found[1]] if found[1] else []
        out += ["the", "image"] if numbers == [0] else [[i - 1 for i in numbers]]
        out += [found[3]] if found[3] else []
        out += list(found[4])
    return out


def numbers_left(text: str, names: Sequence[str]) -> Iterator[Problem]:
    """Numbers that look like tags but stay text by `person_tokens`, each with the reason."""
    words = text.split()
    for n, word in enumerate(words):
        found = _MENTION.match(word)
        numbers = [int(i) for i in re.split("[,&]", found[2])] if found else []
        if not found or numbers == [0]:
            continue
        quantity = _is_quantity(words, n, found[3])
        for i in numbers:
            if i < 1 or i > len(names):
                if not quantity:
                    yield Problem("number-range", f"{i} names none of the {len(names)} objects: {shown(text)}")
            elif names[i - 1] != "person":
                if not quantity:
                    yield Problem("number-class", f"{i} names object {i - 1}, a {names[i - 1]}: {shown(text)}")
            elif quantity:
                yield Problem("number-doubt", f"{i} is read as a quantity, not as person {i}: {shown(text)}")


def _name_persons(numbers: Sequence[int], names: Sequence[str]) -> bool:
    return numbers == [0] or all(1 <= i <= len(names) and names[i - 1] == "person" for i in numbers)


def _is_quantity(words: Sequence[str], n: int, possessive: str | None) -> bool:
    if possessive:
        return False
    ended = not words[n][-1].isdigit()
    after = [w.strip(".,;:!?\"'").lower() for w in words[n + 1 : n + 3]] + ["", ""]
    if ended or n + 1 == len(words):
        # Punctuation ends the phrase, so that "give it to 2, people watch" keeps its person.
        return n + 1 == len(words) and words[n - 1].lower() in _NUMBERED if n else False
    if after[0] == "of" and after[1] in _SHARE:
        return True
    counted = _UNITS if words[n].lstrip('(["') == "1" else _COUNTS
    return counted.fullmatch(after[0]) is not None


def samples(record: Mapping[str, Any], image: ImageRecord) -> tuple[Sample, ...]:
    """Up to five samples, "<image key>#<row>/place|event|intent|before|after", all of task "event".

    Place and event are asked of the image alone, the relations given event and place (papers: VisualCOMET). The
    alternatives of a relation are the targets of one sample; a relation without any makes no sample.
    Raises DataError when a tag names no region of the image.
    """
    where = f"{image.key}#{record['row']}"

    def tokens(value: Sequence[str | list[int]]) -> Tokens:
        return detokenise(references(value, image, where))

    place, event = tokens(record["place"]), tokens(record["event"])
    context = (("event", event), ("place", place))
    targets: dict[str, tuple[Tokens, ...]] = {"place": (place,), "event": (event,)}
    targets |= {r: tuple(t for v in record.get(r, ()) if (t := tokens(v))) for r in RELATIONS}
    return tuple(
        Sample(
            id=f"{where}/{relation}",
            source="visualcomet",
            task="event",
            images=(image.key,),
            turns=(*(context if relation in RELATIONS else ()), ("relation", (relation,))),
            targets=answers,
            fields=(("relation", relation), ("row", str(record["row"]))),
        )
        for relation, answers in targets.items()
        if answers
    )
