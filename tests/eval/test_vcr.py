"""VCR scoring: three numbers, subsets, missing and blind rows, ties, paired comparison, the 21-column file."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eventlens_ds.errors import DataError
from eventlens_ds.eval import report, vcr


def row(number: int, task: str, label: int | None, best: int, **more: Any) -> dict[str, Any]:
    scores = [-2.0] * 4
    scores[best] = -1.0
    kind = "a" if task == vcr.ANSWER else "r"
    return {
        "id": f"val-{number}/{kind}{more.get('given_answer', '')}",
        "task": task,
        "annot_id": f"val-{number}",
        "image": f"movie/{number // 2}@0.jpg",
        "key": f"{number // 2:06d}",
        "label": label,
        "scores": scores,
        "tokens": [5, 6, 7, 8],
        "flags": {"which_person": number % 2 == 0, "held_out": number % 3 == 0},
        "candidates": ["a", "b", "c", "d"],
        "question": "why?",
        **more,
    }


def pair(number: int, answer_hit: bool, rationale_hit: bool, **more: Any) -> list[dict[str, Any]]:
    return [
        row(number, vcr.ANSWER, 1, 1 if answer_hit else 2, **more),
        row(number, vcr.RATIONALE, 3, 3 if rationale_hit else 0, **more),
    ]


def test_three_numbers_by_hand() -> None:
    rows = pair(0, True, True) + pair(1, True, False) + pair(2, False, True) + pair(3, False, False)
    result = vcr.score(rows)
    assert (result["q2a"], result["qa2r"], result["q2ar"], result["n"]) == (0.5, 0.5, 0.25, 4)
    assert (result["which_person"]["n"], result["which_person"]["q2ar"]) == (2, 0.5)
    assert (result["held_out"]["n"], result["held_out"]["q2ar"]) == (2, 0.5)
    assert (result["seen"]["n"], result["seen"]["q2a"]) == (2, 0.5)
    assert result["intervals"]["q2a"]["images"] == 2
    assert result["intervals"]["q2a"]["wilson"] == pytest.approx([0.15, 0.85], abs=0.01)


def test_which_person_is_reported_on_all_and_on_permuted_questions() -> None:
    flags = lambda n, moved: {"flags": {"which_person": n < 3, "held_out": False, "permuted": moved}}  # noqa: E731
    rows = pair(0, True, True, **flags(0, False)) + pair(1, False, True, **flags(1, True))
    rows += pair(2, True, True, **flags(2, True)) + pair(3, True, True, **flags(3, True))
    result = vcr.score(rows)
    assert result["which_person"]["q2a"] == pytest.approx(2 / 3)  # as before, on all
    assert (result["permuted_which_person"]["n"], result["permuted_which_person"]["q2a"]) == (2, 0.5)
    assert (result["permuted"]["n"], result["permuted"]["q2a"]) == (3, pytest.approx(2 / 3))
    assert result["not_permuted"] == {"count": 1, "first": ["val-0"]}
    assert "not_permuted" not in vcr.score(pair(0, True, True))
    shown = report.table({"vcr-permute_regions": {"vcr": result}})
    assert "q2a permuted_which_person" in shown and "1 questions on images without two regions to permute" in shown
    assert "permuted" not in report.table({"vcr": {"vcr": vcr.score(pair(0, True, True))}})


def test_joint_is_per_question_not_a_product() -> None:
    linked = [r for i in range(40) for r in pair(i, i % 2 == 0, i % 2 == 0)]
    crossed = [r for i in range(40) for r in pair(i, i % 2 == 0, i % 2 == 1)]
    assert vcr.score(linked)["q2ar"] == 0.5
    assert vcr.score(crossed)["q2ar"] == 0.0


def test_order_of_rows_does_not_matter() -> None:
    rows = [r for i in range(12) for r in pair(i, i % 3 == 0, i % 4 != 0)]
    assert vcr.score(rows) == vcr.score(sorted(rows, key=lambda r: r["task"]))


def test_a_question_without_its_other_part_is_counted_and_named() -> None:
    rows = pair(0, True, True) + pair(1, True, True)[:1] + pair(2, True, True)[1:]
    result = vcr.score(rows)
    assert result["counts"] == {"q2a": 2, "qa2r": 2, "q2ar": 1}
    assert result["incomplete"]["rationale"] == {"count": 1, "first": ["val-1"]}
    assert result["incomplete"]["answer"] == {"count": 1, "first": ["val-2"]}


def test_blind_rows_have_no_accuracy() -> None:
    result = vcr.score([row(0, vcr.ANSWER, None, 0), row(0, vcr.RATIONALE, None, 0)])
    assert (result["q2a"], result["qa2r"], result["q2ar"], result["n"], result["blind"]) == (None, None, None, 0, 2)
    mixed = vcr.score([row(0, vcr.ANSWER, None, 0), *pair(1, True, True)])
    assert (mixed["q2a"], mixed["counts"]["q2a"], mixed["blind"]) == (1.0, 1, 1)


def test_ties_go_to_the_lowest_index() -> None:
    tied = row(0, vcr.ANSWER, 1, 1)
    tied["scores"] = [-2.0, -1.0, -1.0, -1.0]
    assert vcr.predicted(tied) == 1
    constant = [row(i, vcr.ANSWER, i % 4, 0, scores=[-1.0] * 4) for i in range(40)]
    assert vcr.score(constant)["q2a"] == 0.25


def test_rationale_conditioned_on_a_wrong_answer_is_not_qa2r() -> None:
    rows = [row(0, vcr.ANSWER, 1, 1)]
    rows += [row(0, vcr.RATIONALE, 2, 2 if given == 1 else 0, given_answer=given) for given in range(4)]
    result = vcr.score(rows)
    assert (result["qa2r"], result["counts"]["qa2r"], result["other_answers"]) == (1.0, 1, 3)
    for r in rows[1:]:
        r["given_answer"] = (r["given_answer"] + 1) % 4
    assert vcr.score(rows)["qa2r"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.0, float("nan"), 0.0, 0.0]}, "finite"),
        ({"scores": [0.0]}, "two or more"),
        ({"label": 4}, r"label 4 outside 0\.\.3"),
        ({"task": "caption"}, "task caption"),
        ({"given_answer": 4}, "given_answer 4"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"val-0/r.*{message}"):
        vcr.score([{**row(0, vcr.RATIONALE, 1, 1), **change}])


def test_missing_key_repeats_and_other_image_are_refused() -> None:
    bad = row(0, vcr.ANSWER, 1, 1)
    del bad["image"]
    with pytest.raises(DataError, match="val-0/a: key image is missing"):
        vcr.score([bad])
    with pytest.raises(DataError, match="two vcr_answer rows"):
        vcr.score([row(0, vcr.ANSWER, 1, 1)] * 2)
    with pytest.raises(DataError, match="two vcr_rationale rows"):
        vcr.score([row(0, vcr.RATIONALE, 1, 1)] * 2)
    with pytest.raises(DataError, match="was on movie/0@0.jpg"):
        vcr.score([row(0, vcr.ANSWER, 1, 1), row(0, vcr.RATIONALE, 1, 1, image="other.jpg")])


def test_no_rows() -> None:
    result = vcr.score([])
    assert (result["n"], result["q2a"], result["held_out"]["n"]) == (0, None, 0)


def _run(seed: int, accuracy: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [r for i in range(200) for r in pair(i, bool(rng.random() < accuracy), bool(rng.random() < accuracy))]


def test_paired_comparison_over_seeds() -> None:
    good, poor = [_run(s, 0.8) for s in range(3)], [_run(s + 9, 0.5) for s in range(3)]
    found = vcr.compare(good, poor, "q2ar")
    assert (found.verdict, found.seeds, found.n, found.images) == ("higher", 3, 200, 100)
    by_hand = [np.mean([vcr.score(run)["q2ar"] for run in side]) for side in (good, poor)]
    assert found.estimate == pytest.approx(by_hand[0] - by_hand[1])
    assert vcr.compare(good, good, "q2a").verdict == "no effect shown"


def test_comparison_needs_the_same_questions() -> None:
    with pytest.raises(DataError, match="1 questions not in both, e.g. val-199"):
        vcr.compare([_run(0, 0.5)], [_run(1, 0.5)[:-2]], "q2a")
    with pytest.raises(DataError, match="1 runs against 0"):
        vcr.compare([_run(0, 0.5)], [], "q2a")
    with pytest.raises(DataError, match="metric f1"):
        vcr.compare([_run(0, 0.5)], [_run(0, 0.5)], "f1")


def _leaderboard_rows(questions: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(questions):
        rows.append(row(i, vcr.ANSWER, None, 0, scores=rng.normal(size=4).tolist()))
        for given in (2, 0, 3, 1):
            rows.append(row(i, vcr.RATIONALE, None, 0, scores=rng.normal(size=4).tolist(), given_answer=given))
    return rows


def test_leaderboard_file(tmp_path: Path) -> None:
    rows = _leaderboard_rows(5, seed=0)
    assert vcr.leaderboard_csv(rows, tmp_path / "vcr.csv") == 5
    with open(tmp_path / "vcr.csv", newline="") as file:
        table = list(csv.reader(file))
    expected = ["annot_id", "answer_0", "answer_1", "answer_2", "answer_3"]
    expected += [f"rationale_conditioned_on_a{a}_{r}" for a in range(4) for r in range(4)]
    assert table[0] == expected and len(expected) == 21
    assert [line[0] for line in table[1:]] == [f"val-{i}" for i in range(5)]
    for line in table[1:]:
        for part in range(5):
            assert sum(map(float, line[1 + 4 * part : 5 + 4 * part])) == pytest.approx(1.0, abs=1e-7)
    given_3 = next(r for r in rows if r.get("given_answer") == 3)
    weights = [math.exp(s) for s in given_3["scores"]]
    assert [float(x) for x in table[1][17:21]] == pytest.approx([w / sum(weights) for w in weights], abs=1e-7)
    assert [p.name for p in tmp_path.iterdir()] == ["vcr.csv"]


def test_leaderboard_needs_every_conditioned_rationale(tmp_path: Path) -> None:
    complete = _leaderboard_rows(2, seed=0)
    cut = [r for r in complete if not (r["annot_id"] == "val-1" and r.get("given_answer") == 3)]
    with pytest.raises(DataError, match="val-1 has no vcr_rationale row with given_answer 3"):
        vcr.leaderboard_csv(cut, tmp_path / "vcr.csv")
    with pytest.raises(DataError, match="val-0 has no vcr_answer row"):
        vcr.leaderboard_csv(complete[1:], tmp_path / "vcr.csv")
    three = copy.deepcopy(complete)
    three[1]["scores"].pop()
    with pytest.raises(DataError, match="needs 4 scores, got 3"):
        vcr.leaderboard_csv(three, tmp_path / "vcr.csv")
    assert not list(tmp_path.iterdir())
