"""Rows of the tasks that are answered in words: gold, order, packing, controls, floors.

In: the six images of tests/eval/language_world.py and a small model. Out: assertions on rows and metrics. Decision: an
oracle that answers with the gold of a row must be right everywhere, and one that answers for the next row must not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eventlens_ds.data import boxes
from eventlens_ds.data.records import Box
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.eval import language_lines, language_rows, report
from eventlens_ds.eval.request import NEW_TOKENS, Decoding
from eventlens_ds.eval.score import Ranks, eval_data
from tests.eval.language_world import ANSWERS, TASKS, build_language
from tests.eval.test_generate import Counted
from tests.small_world import SmallRun, small_config, small_run

ALONE = Ranks(0, 1, "cpu", 4)
SHORT = Decoding(max_new_tokens=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRun]:
    with pytest.MonkeyPatch.context() as patch:
        folder = build_language(tmp_path_factory.mktemp("language"), patch)
        yield small_run(folder, small_config(folder))


@pytest.fixture(scope="module")
def forward(run: SmallRun) -> Counted:
    """A model whose layers say more than its tied embeddings, which would repeat the last token of every prompt."""
    model = run.model()
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "v_proj.weight")):
                parameter.mul_(30)
    return Counted(model)


def data_of(run: SmallRun, task: str, row_tokens: int = 512, **data: Any) -> Any:
    config = replace(run.config, data=replace(run.config.data, row_tokens=row_tokens, **data))
    return eval_data(config, run.tokenizer, run.spec, run.config.data.train[0], "val", tasks=[task])


def rows_of(run: SmallRun, forward: Any, task: str, decoding: Decoding = SHORT, **more: Any) -> list[dict[str, Any]]:
    data = data_of(run, task)
    found, without = language_rows.questions(data, task)
    scored = language_rows.answer_rows(forward, data, found, ALONE, decoding, **more)
    assert not scored.skipped and not without
    return scored.rows


@pytest.mark.parametrize("task", TASKS)
def test_a_row_holds_what_its_metric_reads(run: SmallRun, forward: Counted, task: str) -> None:
    rows = rows_of(run, forward, task)
    numbers = [0, 0, 1, 2, 3, 4, 5] if task == "vqa" else range(6)
    assert [row["image"] for row in rows] == [f"val{n}.png" for n in numbers]
    assert len({row["id"] for row in rows}) == len(rows)
    assert [(row["task"], row["key"]) for row in rows] == [(task, f"val-{n:08d}") for n in numbers]
    first, said = rows[0], "caption" if task in ("caption", "reg") else "answer"
    assert isinstance(first[said], str) and first["question"].endswith("Answer:")
    gold = {
        "caption": {"references": ["a dog and a cat", "a dog, picture 0"]},
        "reg": {"references": ["the dog", "dog on the left"]},
        "rec": {"box": [0, 0, 30, 20], "width": 60, "height": 40, "split": "val"},
        "vqa": {"answers": ANSWERS, "answer_type": "other"},
        "vsr": {"label": 1},
        "pope": {"label": "yes", "split": "random"},
    }[task]
    assert {k: v for k, v in first.items() if k not in ("id", "task", "image", "key", "question", said)} == gold
    assert report.kind_of(first) == task and language_lines.score(task, rows, False)["n"] == len(rows)


def answered(row: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The row with the right answer to the row `like`."""
    if row["task"] in ("caption", "reg"):
        return row | {"caption": like["references"][-1]}
    if row["task"] == "rec":
        return row | {"answer": boxes.to_text(Box(*like["box"]), like["width"], like["height"])}
    gold = like["answers"][0] if row["task"] == "vqa" else {1: "yes", 0: "no"}.get(like["label"], like["label"])
    return row | {"answer": gold}


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_is_right_and_one_for_the_next_row_is_not(run: SmallRun, forward: Counted, task: str) -> None:
    rows = rows_of(run, forward, task)
    for i, row in enumerate(rows):
        # The gold of these tasks is the same on all images: here that of every second one differs.
        if i % 2 and task in ("reg", "rec", "vqa"):
            row |= {
                "reg": {"references": ["the cat"]},
                "rec": {"box": [30, 20, 60, 40]},
                "vqa": {"answers": ["4"] * 10},
            }[task]
    metric = "rouge_l" if task in ("caption", "reg") else "accuracy"
    right = language_lines.score(task, [answered(row, row) for row in rows], False)
    wrong = language_lines.score(task, [answered(row, rows[i - 1]) for i, row in enumerate(rows)], False)
    assert right[metric] == pytest.approx(1.0) and wrong[metric] < 0.9
    lines = {name: value for name, value, _, _ in language_lines.lines(task, right)}
    assert lines[metric] == right[metric] and lines[f"{metric} floor"] < 1.0


@pytest.mark.P4
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_do_not_depend_on_how_rows_are_packed(run: SmallRun, forward: Counted, beams: int) -> None:
    decoding = SHORT._replace(beams=beams)
    for task in ("vqa", "pope"):
        whole = rows_of(run, forward, task, decoding)
        data = data_of(run, task)
        pieces = language_rows._pieces(data, language_rows.questions(data, task)[0], beams * 3)
        narrow = data_of(run, task, max(p.tokens for p in pieces if len(p.group.samples) == 1))
        found, _ = language_rows.questions(narrow, task)
        assert len(pieces) == 6 and len(language_rows._pieces(narrow, found, beams * 3)) == len(found)
        assert language_rows.answer_rows(forward, narrow, found, ALONE, decoding).rows == whole
        assert len({row["answer"] for row in whole}) > 1, "answers that are all alike could not show a mix-up"


def test_pieces_leave_room_for_answers(run: SmallRun) -> None:
    data = data_of(run, "vqa", 64)
    found, _ = language_rows.questions(data, "vqa")
    roomy = language_rows._pieces(data, found, 0)
    assert len(roomy) == 6 and max(p.tokens for p in roomy) <= 64
    # An answer that may be longer than a row is no reason to refuse a prompt that fits.
    assert [p.tokens for p in language_rows._pieces(data, found, 1000)] == [64] * 7
    with pytest.raises(UserError, match="data set vqa: none of its 7 groups fits a row of 16 tokens"):
        language_rows.answer_rows(None, data_of(run, "vqa", 16), found, ALONE, SHORT)  # type: ignore[arg-type]


def test_questions_that_fit_no_row_are_listed(run: SmallRun, forward: Counted) -> None:
    data = data_of(run, "vsr")
    found, _ = language_rows.questions(data, "vsr")
    turns = (("statement", ("The dog is left of the cat. " * 90,)),)
    long = found[1]._replace(sample=replace(found[1].sample, turns=turns))
    scored = language_rows.answer_rows(forward, data, [found[0], long, *found[2:]], ALONE, SHORT)
    assert [row["id"] for row in scored.rows] == [q.sample.id for q in found if q is not found[1]]
    ((name, reason),) = scored.skipped
    assert name == long.sample.id and "a row holds 512" in reason


@pytest.mark.P5
def test_a_row_ends_with_its_longest_answer(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Counted(run.model())
    data = data_of(run, "vsr")
    found, _ = language_rows.questions(data, "vsr")
    asked: list[bool] = []
    monkeypatch.setattr(language_rows, "all_agree", lambda done: bool(asked.append(done)))
    language_rows.answer_rows(forward, data, found[:1], ALONE, Decoding(max_new_tokens=5))
    assert len(forward.images) == 5 and len(asked) == 4, "no rank stops before all have agreed"
    monkeypatch.setattr(language_rows, "all_agree", lambda done: True)
    language_rows.answer_rows(forward, data, found[:1], ALONE, Decoding(max_new_tokens=5))
    assert len(forward.images) == 6


def test_controls_reach_the_answers(run: SmallRun, forward: Counted) -> None:
    seen: list[Any] = []

    def watched(batch: Any, calls: int, **options: Any) -> Any:
        seen.append(batch)
        return forward(batch, calls, **options)

    rows = rows_of(run, watched, "rec", control="permute_regions")
    assert [row["permuted"] for row in rows] == [True] * 5 + [False]
    assert bool((seen[0].region_slots >= 0).any()) and bool(seen[0].pixel_values.any())
    seen.clear()
    assert all("permuted" not in row for row in rows_of(run, watched, "rec", control="blank"))
    assert all(not bool((b.region_slots >= 0).any()) and not bool(b.pixel_values.any()) for b in seen)
    # A run that was trained blind is evaluated blind.
    seen.clear()
    data = data_of(run, "rec", control="blank")
    found, _ = language_rows.questions(data, "rec")
    language_rows.answer_rows(watched, data, found, ALONE, SHORT)
    assert all(not bool((b.region_slots >= 0).any()) and not bool(b.pixel_values.any()) for b in seen)


def test_a_name_that_is_generated_fetches_no_region_of_a_blank_row(
    run: SmallRun, forward: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    usual = language_rows.continue_row
    monkeypatch.setattr(language_rows, "continue_row", lambda *a, **k: seen.append(k["linking"]) or usual(*a, **k))
    assert run.spec.linking == "add"
    for control, linking in (("none", "add"), ("blank", "none"), ("permute_regions", "add")):
        seen.clear()
        rows_of(run, forward, "rec", control=control)
        assert set(seen) == {linking}, control


def test_an_image_that_cannot_be_read_is_listed(
    run: SmallRun, forward: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(run, "vsr")
    found, _ = language_rows.questions(data, "vsr")
    usual = data._image

    def broken(group: Any, *where: Any, **how: Any) -> Any:
        if group.images[0].key == found[2].image.key:
            raise DataError("cannot be decoded")
        return usual(group, *where, **how)

    monkeypatch.setattr(data, "_image", broken)
    scored = language_rows.answer_rows(forward, data, found, ALONE, SHORT)
    assert scored.skipped == [(found[2].sample.id, "cannot be decoded")]
    assert [row["id"] for row in scored.rows] == [q.sample.id for q in found if q is not found[2]]


def test_samples_without_gold_are_listed(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(run, "vqa")
    usual = data.group

    def blind(table: int, number: int, until: int = 3) -> Any:
        group = usual(table, number)
        fields = (("answers", ""),) if number < until else group.samples[0].fields
        return replace(group, samples=tuple(replace(s, fields=fields) for s in group.samples))

    monkeypatch.setattr(data, "group", blind)
    found, without = language_rows.questions(data, "vqa")
    assert len(found) == 3 and [why for _, why in without] == ["field answers is empty"] * 4
    monkeypatch.setattr(data, "group", lambda table, number: blind(table, number, 100))
    with pytest.raises(
        DataError, match="no sample of vqa can be scored, e.g. val-00000000#3/vqa: field answers is empty"
    ):
        language_rows.questions(data, "vqa")
    broken = replace(usual(0, 0).samples[0], fields=(("answers", "red"),))
    monkeypatch.setattr(data, "group", lambda table, number: replace(usual(0, 0), samples=(broken,)))
    with pytest.raises(DataError, match="val-00000000#3/vqa: field answers is no JSON: 'red'"):
        language_rows.questions(data, "vqa")


def test_the_floor_is_the_most_frequent_training_text(run: SmallRun) -> None:
    folders = [run.config.data.train[0]]
    style = run.spec.style
    assert language_rows.training_floor(folders, "train", "caption", style) == ("a dog and a cat", "")
    assert language_rows.training_floor(folders, "train", "reg", style) == ("dog on the left", "")
    assert language_rows.training_floor(folders, "train", "event", style)[1].endswith("hold no event")
    constant, reason = language_rows.training_floor([*folders, "/nowhere"], "train", "caption", style)
    assert constant is None and "/nowhere: no such folder" in reason


def test_boxes_fit_the_tokens_of_an_answer(run: SmallRun) -> None:
    """The longest box, with the token that ends it."""
    longest = boxes.to_text(Box(7.404, 2.064, 39.183, 38.652), *(60, 40))
    assert len(run.tokenizer.ids(f" {longest}")) + 1 <= NEW_TOKENS["rec"]


def test_notes_name_what_numbers_do_not_say(run: SmallRun, tmp_path: Path) -> None:
    base = {"id": "a", "image": "a.png", "key": "a"}
    rows = [
        base | {"task": "rec", "answer": "left", "box": [0, 0, 3, 3], "width": 9, "height": 9, "split": "val"},
        base | {"task": "vqa", "answer": "", "answers": ["red"]},
        base | {"task": "vsr", "answer": "perhaps", "label": 0},
        base | {"task": "pope", "answer": "perhaps", "label": "no"},
        base | {"task": "caption", "caption": "", "references": ["a dog"], "floor": "a cat"},
    ]
    (tmp_path / "predictions").mkdir()
    for row in rows:
        (tmp_path / "predictions" / f"{row['task']}.jsonl").write_text(json.dumps(row) + "\n")
    report.write_report(tmp_path, java=False)
    assert report.differences(tmp_path, java=False) == []
    text = (tmp_path / "metrics" / "table.txt").read_text()
    for part in (
        "1 answers: no box", "1 answers: empty answer", "1 answers: neither yes nor no", "one answer per question",
        "1 rows without a word", "floor, from train: 'a cat'", "rouge_l floor", "accuracy floor", "f1 floor",
    ):  # fmt: skip
        assert part in text, part
