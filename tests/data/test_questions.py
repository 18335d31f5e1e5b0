"""Questions: rows with one answer or ten, released pairs of VQAv2, the target among several answers, faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.data.lint import lint
from eventlens_ds.data.sources import samples
from eventlens_ds.data.sources.questions import QuestionSource, most_frequent
from eventlens_ds.errors import DataError, UserError
from tests.data.conftest import paint, write_rows


def write(root: Path, rows: list[Any]) -> Path:
    return write_rows(root / "regions" / "vqa.jsonl", rows)


def released(root: Path, part: str, questions: list[Any], annotations: list[Any]) -> Path:
    (root / "vqa").mkdir(exist_ok=True)
    path = root / "vqa" / f"v2_OpenEnded_mscoco_{part}_questions.json"
    path.write_text(json.dumps({"questions": questions}))
    (root / "vqa" / f"v2_mscoco_{part}_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return path


def asked(number: int, image: int = 7) -> dict[str, Any]:
    return {"question_id": number, "image_id": image, "question": "what is it?"}


def answered(number: int, *answers: str) -> dict[str, Any]:
    given = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)]
    return {"question_id": number, "answers": given, "answer_type": "other", "question_type": "what is"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, [{"img_path": "a.jpg", "question": " what  is it?", "answer": "a dog"}])
    return paint(
        tmp_path, "a.jpg", "train2014/COCO_train2014_000000000007.jpg", "val2014/COCO_val2014_000000000008.jpg"
    )


def test_samples(root: Path) -> None:
    ten = ["red"] * 4 + ["blue"] * 5 + [" "]
    write(root, [
        {"img_path": "a.jpg", "question": " what  is it?", "answer": " a  dog"},
        {"img_path": "a.jpg", "question": "which color?", "answers": ten, "answer_type": "other"},
    ])  # fmt: skip
    item = next(iter(QuestionSource(root).images("train")))
    one, many = (samples(record, item.image)[0] for record in item.records)
    assert (one.id, one.task, one.turns) == (f"{item.image.key}#1/vqa", "vqa", (("question", ("what is it?",)),))
    assert (
        one.targets == (("a dog",),) and json.loads(one.field("answers")) == ["a dog"] and not one.field("answer_type")
    )
    assert many.targets == (("blue",),) and many.field("answer_type") == "other"
    assert json.loads(many.field("answers")) == ten[:9], "an empty answer is none"


def test_the_first_among_equals() -> None:
    assert most_frequent(["b", "a", "a", "b"]) == "b" and most_frequent(["a", "b", "b"]) == "b"


def test_released_pairs(root: Path) -> None:
    released(root, "train2014", [asked(10), asked(11)], [answered(11, "x", "y", "y"), answered(10, "z")])
    released(root, "val2014", [asked(20, 8)], [answered(20, "w")])
    source = QuestionSource(root)
    assert set(source.splits()) == {"train", "val"}
    train = {item.image.img_fn: item for item in source.images("train")}
    assert set(train) == {"a.jpg", "train2014/COCO_train2014_000000000007.jpg"}
    found = [samples(r, i.image)[0] for i in train.values() for r in i.records]
    assert [s.id.split("#")[1] for s in found] == ["1/vqa", "q10/vqa", "q11/vqa"]
    assert [s.targets[0][0] for s in found] == ["a dog", "z", "y"]
    assert [item.image.img_fn for item in source.images("val")] == ["val2014/COCO_val2014_000000000008.jpg"]
    assert lint(source, "train") == lint(source, "val") == []


def test_questions_without_annotations_are_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    released(root, "train2014", [asked(10)], [answered(10, "z")])
    (root / "vqa" / "v2_mscoco_train2014_annotations.json").unlink()
    assert sum(len(item.records) for item in QuestionSource(root).images("train")) == 1
    assert "left out, there is no v2_mscoco_train2014_annotations.json" in caplog.text


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        ([asked(10)], [], "question 10: not in v2_mscoco_train2014_annotations.json"),
        ([asked(10) | {"image_id": "x"}], [answered(10, "z")], "question 10: no integer 'image_id'"),
        ([asked(10) | {"question": ""}], [answered(10, "z")], "question 10: 'question' wants a string"),
        ([asked(10)], [answered(10)], "question 10: no 'answer', and no 'answers'"),
        ([asked(10, 12)], [answered(10, "z")], "question 10: no image"),
        ([3], [answered(10, "z")], "'questions' wants a list of objects"),
    ],
)
def test_faults_of_a_released_pair(root: Path, questions: Any, annotations: Any, message: str) -> None:
    path = released(root, "train2014", questions, annotations)
    with pytest.raises(DataError, match=f"{path}:.*{message}"):
        list(QuestionSource(root).images("train"))


def test_a_released_file_that_is_no_json(root: Path) -> None:
    path = released(root, "train2014", [], [])
    path.write_text('{"questions": [\n}')
    with pytest.raises(DataError, match=f"{path}:2: broken JSON"):
        list(QuestionSource(root).images("train"))
    assert [(f.code, f.where) for f in lint(QuestionSource(root), "train")] == [("json", f"{path}:2")]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"img_path": "a.jpg", "question": "x"}, "no 'answer', and no 'answers'"),
        ({"img_path": "a.jpg", "question": "x", "answers": []}, "no 'answer', and no 'answers'"),
        ({"img_path": "a.jpg", "question": "x", "answers": ["y", 3]}, "'answers' wants a list of strings"),
        ({"img_path": "a.jpg", "question": "x", "answer": 3}, "'answer' wants a string"),
        ({"img_path": "a.jpg", "answer": "y"}, "no 'question'"),
        ([], "expected a JSON object"),
    ],
)
def test_faults_name_file_and_line(root: Path, bad: Any, message: str) -> None:
    path = write(root, [{"img_path": "a.jpg", "question": "fine?", "answer": "yes"}, bad])
    with pytest.raises(DataError, match=f"{path}:2: .*{message}"):
        list(QuestionSource(root).images("train"))
    assert {f.where for f in lint(QuestionSource(root), "train")} == {f"{path}:2"}


def test_a_question_asked_twice_is_reported(root: Path) -> None:
    path = write(root, [{"img_path": "a.jpg", "question": "x?", "answer": "y"}] * 2)
    assert [(f.code, f.where) for f in lint(QuestionSource(root), "train")] == [("duplicate-id", f"{path}:2")]


def test_photos(shared: Path) -> None:
    source = QuestionSource(shared / "data" / "photos")
    items = [item for split in source.splits() for item in source.images(split)]
    assert len(items) == 14 and all(len(item.records) == 3 for item in items)
    assert all(lint(source, split) == [] for split in source.splits())


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no vqa; expected .*vqa.jsonl"):
        QuestionSource(tmp_path)
