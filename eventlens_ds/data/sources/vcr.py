"""Reader of VCR (Zellers et al., CVPR 2019): {train,val,test}.jsonl, images, and one metadata json per image.

In: a folder in the released layout (root/val.jsonl, root/vcr1images/) or in ours (root/vcr/val.jsonl, root/images/).
Out: images with their questions as canonical records (every field of the row, kind "vcr"); `samples` makes Q->A and
QA->R of one record. Object tags are lists of 0-based indices and become RegionRefs here, once (P2); the 1-based
`*_orig` strings are stored but never parsed for tags. Decision: a first pass keeps the byte offsets of the rows of
every image, so an image is stored once whatever the order of its rows, and memory stays at a few words per row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.data.records import ImageRecord, RegionRef, Sample, Tokens
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
    open_binary,
    parse_object,
    raise_first,
    read_metadata,
    shown,
    text_problems,
)
from eventlens_ds.errors import DataError, UserError

SPLITS = ("train", "val", "test")
CHOICES = 4
FLAGS = ("which_person", "held_out")
"""Extra keys of a row that become fields of its samples. The embedded world keeps its rows in the exact format of VCR
and gives them per question in root/scenes.jsonl, from where they join the records."""


class VcrSource:
    """VCR on disk. Raises UserError when `root` holds no annotation file or no image folder."""

    name = "vcr"
    follows = False

    def __init__(self, root: str | Path, splits: Sequence[str] = SPLITS) -> None:
        self.root = existing_root(root)
        folder = find_dir(self.root, ("vcr", "."), lambda d: any((d / f"{s}.jsonl").is_file() for s in splits))
        if folder is None:
            wanted = " ".join(f"{s}.jsonl" for s in splits)
            raise UserError(f"{self.root}: no VCR annotations; expected one of {wanted} here or in {self.root / 'vcr'}")
        self.annotations = folder
        self.image_dir = find_images(self.root, folder)
        self._splits = tuple(s for s in splits if self.file(s).is_file())

    def file(self, split: str) -> Path:
        return self.annotations / f"{split}.jsonl"

    def splits(self) -> tuple[str, ...]:
        return self._splits

    def img_fns(self, split: str) -> Iterable[str]:
        return self._index(self.file(split))

    def images(self, split: str) -> Iterator[SourceImage]:
        """Images in the order of their first row, each with its rows in file order.

        Raises DataError "file:line: ..." on the first broken line, tag out of range, repeated annot_id, or missing
        image or metadata; nothing is yielded before the whole file has been parsed once.
        """
        path = self.file(split)
        rows_of = self._index(path)
        flags = self._flags()
        with open_binary(path) as file:
            for img_fn, places in rows_of.items():
                rows: list[Record] = []
                for number, offset in places:
                    file.seek(offset)
                    row = parse_object(file.readline(), f"{path}:{number}")
                    rows.append({**flags.get(row["annot_id"], {}), **row, "kind": "vcr", "line": number})
                where = f"{path}:{places[0][0]}"
                image = self._image(img_fn, rows, split, where)
                for row, (number, _) in zip(rows, places):
                    raise_first(region_problems(row, [region.name for region in image.regions]), f"{path}:{number}")
                yield SourceImage(image, image_file(self.image_dir, img_fn, where), tuple(rows))

    def _index(self, path: Path) -> dict[str, list[tuple[int, int]]]:
        """(line number, byte offset) of the rows of every image; checks each row on the way."""
        rows_of: dict[str, list[tuple[int, int]]] = {}
        seen: dict[str, int] = {}
        for number, offset, raw in lines(path):
            where = f"{path}:{number}"
            row = parse_object(raw, where)
            raise_first(row_problems(row), where)
            first = seen.setdefault(row["annot_id"], number)
            if first != number:
                raise DataError(f"{where}: annot_id {row['annot_id']!r} repeats line {first}")
            rows_of.setdefault(row["img_fn"], []).append((number, offset))
        return rows_of

    def _flags(self) -> dict[str, dict[str, Any]]:
        """annot_id -> FLAGS of scenes.jsonl; empty where there is no such file."""
        path = self.root / "scenes.jsonl"
        found: dict[str, dict[str, Any]] = {}
        for number, _, raw in lines(path) if path.is_file() else ():
            questions = parse_object(raw, f"{path}:{number}").get("questions", [])
            for question in questions if isinstance(questions, list) else ():
                if isinstance(question, dict) and isinstance(question.get("annot_id"), str):
                    found[question["annot_id"]] = {f: question[f] for f in FLAGS if f in question}
        return found

    def _image(self, img_fn: str, rows: Sequence[Record], split: str, where: str) -> ImageRecord:
        meta = read_metadata(inside(self.image_dir, rows[0]["metadata_fn"]), where)
        return image_record(img_fn, meta, str(rows[0].get("movie", "")), split)


def row_problems(row: Mapping[str, Any]) -> Iterator[Problem]:
    """Faults of one VCR row that need no other file. Messages name annot_id, the index and the number of objects."""
    yield from text_problems(row, ("annot_id", "img_fn", "metadata_fn"))
    for key in ("img_fn", "metadata_fn"):
        if isinstance(row.get(key), str) and row[key].strip():
            try:
                inside(Path(), row[key])
            except DataError:
                yield Problem("field", f"{key!r} {shown(row[key])} leaves the image folder")
    objects = row.get("objects")
    if not isinstance(objects, list) or not all(isinstance(o, str) and o.strip() for o in objects):
        yield Problem("field", f"'objects' wants a list of class names, got {shown(objects)}")
        return
    annot_id = row.get("annot_id")
    yield from _token_problems(row.get("question"), "question", annot_id, len(objects))
    for kind in ("answer", "rationale"):
        choices = row.get(f"{kind}_choices")
        if not isinstance(choices, list) or len(choices) != CHOICES:
            got = f"{len(choices)} entries" if isinstance(choices, list) else shown(choices)
            yield Problem("field", f"{annot_id}: '{kind}_choices' wants {CHOICES} token lists, got {got}")
            continue
        for k, tokens in enumerate(choices):
            yield from _token_problems(tokens, f"{kind}_choices[{k}]", annot_id, len(objects))
        label = row.get(f"{kind}_label")
        if label is not None and (isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < CHOICES):
            yield Problem("field", f"{annot_id}: '{kind}_label' wants 0..{CHOICES - 1}, got {shown(label)}")


def _token_problems(tokens: object, where: str, annot_id: object, num_objects: int) -> Iterator[Problem]:
    if not isinstance(tokens, list) or not tokens:
        yield Problem("field", f"{annot_id}: {where} wants a list of tokens, got {shown(tokens)}")
        return
    for token in tokens:
        if isinstance(token, str):
            continue
        if not isinstance(token, list) or not token or not all(type(i) is int for i in token):
            yield Problem("field", f"{annot_id}: {where} holds {shown(token)}, neither a word nor a list of indices")
            continue
        for i in token:
            if not 0 <= i < num_objects:
                message = f"{annot_id}: {where} names object {shown(i)}, but there are {num_objects} (0-based)"
                yield Problem("tag-range", message)


def region_problems(row: Mapping[str, Any], names: Sequence[str]) -> Iterator[Problem]:
    """Disagreement between the objects of a row and the names in the metadata of its image."""
    if len(row["objects"]) != len(names):
        counts = f"{row['annot_id']}: {len(row['objects'])} objects but {len(names)} boxes in the metadata"
        yield Problem("tag-no-box", counts)
    elif row["objects"] != list(names):
        i = next(i for i, (a, b) in enumerate(zip(row["objects"], names)) if a != b)
        message = f"{row['annot_id']}: object {i} is {row['objects'][i]!r}, in the metadata {names[i]!r}"
        yield Problem("object-name", message)


def samples(record: Mapping[str, Any], image: ImageRecord) -> tuple[Sample, ...]:
    """Q->A and QA->R of a record: ids "<annot_id>/answer" and "<annot_id>/rationale".

    QA->R is conditioned on the correct answer, as the task defines it. On a blind split it becomes four samples,
    "<annot_id>/rationale_a0" .. "_a3", one per answer it may be conditioned on (the leaderboard's 21 columns).
    Raises DataError when a tag names no region of the image.
    """
    annot_id = record["annot_id"]
    question = detokenise(references(record["question"], image, annot_id))
    answers = tuple(detokenise(references(t, image, annot_id)) for t in record["answer_choices"])
    rationales = tuple(detokenise(references(t, image, annot_id)) for t in record["rationale_choices"])
    label: int | None = record.get("answer_label")
    fields = (("annot_id", annot_id), *((f, _flag(record[f])) for f in FLAGS if f in record))

    def rationale(name: str, given: int, correct: int | None) -> Sample:
        return Sample(
            id=f"{annot_id}/{name}",
            source="vcr",
            task="vcr_rationale",
            images=(image.key,),
            turns=(("question", question), ("answer", answers[given])),
            candidates=rationales,
            label=correct,
            fields=(*fields, ("conditioned", str(given))),
        )

    answer = Sample(
        id=f"{annot_id}/answer",
        source="vcr",
        task="vcr_answer",
        images=(image.key,),
        turns=(("question", question),),
        candidates=answers,
        label=label,
        fields=fields,
    )
    if label is None:
        return (answer, *(rationale(f"rationale_a{k}", k, None) for k in range(CHOICES)))
    return (answer, rationale("rationale", label, record.get("rationale_label")))


def references(tokens: Sequence[str | list[int]], image: ImageRecord, where: str) -> Tokens:
    """Index lists become RegionRefs; several are joined as "1 and 2" or "1, 2, and 3", in their order."""
    out: list[str | RegionRef] = []
    for token in tokens:
        if isinstance(token, str):
            out.append(token)
            continue
        for k, i in enumerate(token):
            if not 0 <= i < len(image.regions):
                raise DataError(f"{where}: names region {i}, but {image.img_fn} has {len(image.regions)} (0-based)")
            if k and len(token) > 2:
                out.append(",")
            if k and k == len(token) - 1:
                out.append("and")
            out.append(RegionRef(0, i))
    return tuple(out)


def _flag(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


_REF = "\ue000"
_CONTRACTIONS = frozenset(("s", "t", "re", "ve", "ll", "d", "m"))
_CONTRACTED = re.compile(r"'(s|t|re|ve|ll|d|m)(?![A-Za-z])", re.IGNORECASE)


def detokenise(tokens: Tokens) -> Tokens:
    """Merge word tokens to strings with natural spacing, RegionRefs left between them; idempotent.

    ("What", "is", ref, "'", "s", "job", "?") -> ("What is ", ref, "'s job?"). Blanks belong to the strings, so that
    the strings and the names of the regions give the text by plain concatenation.
    """
    refs = [t for t in tokens if isinstance(t, RegionRef)]
    words = [_REF if isinstance(t, RegionRef) else " ".join(t.replace(_REF, "").split()) for t in tokens]
    words = [w for w in words if w]
    text = ""
    for n, word in enumerate(words):
        text += " " + word if _needs_blank(text, word, words[n + 1 :]) else word
    strings = text.split(_REF)
    out: list[str | RegionRef] = [strings[0]]
    for ref, string in zip(refs, strings[1:]):
        out += [ref, string]
    return tuple(t for t in out if t != "")


def _needs_blank(text: str, word: str, rest: Sequence[str]) -> bool:
    """Whether English writes a blank between the text so far and the next word or punctuation mark."""
    if not text:
        return False
    tail, head = text[-1], word[0]
    if (tail.isalnum() or tail == _REF) and (head.isalnum() or head == _REF):
        # Word after word, which is nearly always; nothing below applies but this.
        return word != "n't"
    if head in ".,!?;:)]}%" or word == "n't" or tail in "([{$#":
        return False
    if head == "'":
        return _opens_quote(text, word, rest)
    if head == '"':
        return text.count('"') % 2 == 0
    if tail == '"':
        return text.count('"') % 2 == 0
    if tail == "'":
        # After a lone mark: a contraction (it's) or an opened quotation goes on without a blank.
        return len(text) > 1 and text[-2] != " " and word not in _CONTRACTIONS
    if tail in ":," and len(text) > 1 and text[-2].isdigit() and head.isdigit():
        # 10:30 and 1,000 were cut by the tokeniser; "1, 2" was not.
        return tail == "," and not (len(word) == 3 and word.isdigit())
    if head in "-/" and _is_wordy(tail):
        return not (word[1:2].isalnum() or (len(word) == 1 and bool(rest) and _is_wordy(rest[0][0])))
    return not (tail in "-/" and len(text) > 1 and _is_wordy(text[-2]) and _is_wordy(head))


def _opens_quote(text: str, word: str, rest: Sequence[str]) -> bool:
    if _CONTRACTED.match(word) or word[1:2] == " ":
        return False
    if word != "'":
        return True
    if rest and rest[0] in _CONTRACTIONS:
        return False
    # A lone mark closes what an earlier one opened, else it ends a plural ("the dogs' food") or opens a quotation.
    if len(re.findall(r"(?:^|\s)'", text)) > len(re.findall(r"'(?=\s|$|[.,!?])(?<!\s')", text)):
        return False
    return not (text[-1] in "sS" and "'" not in rest)


def _is_wordy(char: str) -> bool:
    return char.isalnum() or char == _REF
