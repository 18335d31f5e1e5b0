"""Reader of visual questions: regions/vqa.jsonl, and the released pairs of files of VQAv2 (Goyal et al. 2017).

In: rows {"img_path", "question"} with "answer" or "answers" (a list, ten in VQAv2) and optionally "answer_type"; or
v2_OpenEnded_mscoco_<part>_questions.json with v2_mscoco_<part>_annotations.json in the root, in vqa/ or in regions/.
Out: images with one record (kind "vqa") per question. Decision: the target is the most frequent answer, the first in
file order among equals; all answers stay in the record, since VQA accuracy counts them.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eventlens_ds.data.records import ImageRecord, Sample
from eventlens_ds.data.sources.layout import Problem, open_binary, shown, text_problems
from eventlens_ds.data.sources.rows import Entry, RowSource, one_line
from eventlens_ds.errors import DataError

log = logging.getLogger(__name__)

_QUESTIONS = "v2_OpenEnded_mscoco_*_questions.json"


class QuestionSource(RowSource):
    """Questions on disk. Raises UserError when `root` holds neither form or no image folder.

    A questions file without its annotations (the test splits) is left out with a line in the log.
    """

    name = "vqa"
    kind = "vqa"
    places = ("regions/vqa.jsonl", "vqa.jsonl")

    def find_files(self) -> list[Path]:
        released = []
        for folder in (self.root, self.root / "vqa", self.root / "regions"):
            for path in sorted(folder.glob(_QUESTIONS)):
                if annotations_of(path).is_file():
                    released.append(path)
                else:
                    log.warning("%s: left out, there is no %s", path, annotations_of(path).name)
        return [*super().find_files(), *released]

    def entries_of(self, path: Path) -> Iterator[Entry]:
        return self._released(path) if path.suffix == ".json" else super().entries_of(path)

    def _released(self, path: Path) -> Iterator[Entry]:
        """Questions of a released pair, joined by question_id. A file that is no JSON ends it with one fault."""
        part = path.name.split("_")[3]
        try:
            asked, answered = _listed(path, "questions"), _listed(annotations_of(path), "annotations")
        except DataError as fault:
            yield Entry(f"{path}:1", 1, {}, fault)
            return
        answers = {row.get("question_id"): row for row in answered if _is_id(row.get("question_id"))}
        for row in asked:
            number, image = row.get("question_id"), row.get("image_id")
            where = f"{path}: question {shown(number)}"
            found = answers.get(number) if _is_id(number) else None
            if found is None or not _is_id(image):
                cause = "no integer 'image_id'" if found is not None else f"not in {annotations_of(path).name}"
                yield Entry(where, 0, {}, DataError(f"{where}: {cause}"))
                continue
            joined: dict[str, Any] = {
                "img_path": self.locate(f"COCO_{part}_{image:012d}.jpg"),
                "question": row.get("question"),
                "question_id": number,
                "answers": [a.get("answer") if isinstance(a, dict) else a for a in _as_list(found.get("answers"))],
                **{key: found[key] for key in ("answer_type", "question_type") if key in found},
            }
            yield Entry(where, int(str(number)), joined, split=part.rstrip("0123456789"))

    def row_problems(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().row_problems(row)
        yield from text_problems(row, ("question", *(key for key in ("answer", "answer_type") if key in row)))
        answers = row.get("answers")
        if "answers" in row and (not isinstance(answers, list) or not all(isinstance(a, str) for a in answers)):
            yield Problem("field", f"'answers' wants a list of strings, got {shown(answers)}")
        elif "answer" not in row and not any(answer.strip() for answer in answers or ()):
            yield Problem("field", "no 'answer', and no 'answers' with a word in them")

    def identity(self, row: Mapping[str, Any]) -> Hashable:
        return row.get("question_id") or (row["img_path"], row["question"])


def annotations_of(questions: Path) -> Path:
    """The annotations file of a VQAv2 questions file."""
    name = questions.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    return questions.with_name(name)


def most_frequent(answers: list[str]) -> str:
    """The answer given most often, the first of the list among equals."""
    return Counter(answers).most_common(1)[0][0]


def samples(record: Mapping[str, Any], image: ImageRecord) -> tuple[Sample, ...]:
    """One sample: id "<image key>#<line>/vqa", of VQAv2 "#q<question_id>/vqa"."""
    given = [one_line(a) for a in record.get("answers") or (record["answer"],)]
    answers = [answer for answer in given if answer]
    number = f"q{record['question_id']}" if "question_id" in record else str(record["line"])
    sample = Sample(
        id=f"{image.key}#{number}/vqa",
        source="vqa",
        task="vqa",
        images=(image.key,),
        turns=(("question", (one_line(record["question"]),)),),
        targets=((most_frequent(answers),),),
        fields=(("answers", json.dumps(answers)), ("answer_type", str(record.get("answer_type", "")))),
    )
    return (sample,)


def _listed(path: Path, key: str) -> list[dict[str, Any]]:
    """The list of objects under `key` of a JSON file. Raises DataError naming the file and, if known, the line."""
    with open_binary(path) as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{getattr(error, 'lineno', 1)}: broken JSON: {error}") from None
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f"{path}:1: {key!r} wants a list of objects, got {shown(found)}")
    return found


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]
