"""VQA, VSR and POPE by hand: each rule with the case that shows it, floors, and answers that fit no rule.

In: rows made here and the questions and statements of 14 photographs. Out: nothing but the verdicts.
Decision: the reference of the leave-one-out average is written here as the released loops are, over annotators and
the other nine, so that the short form in the package is checked against the long one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.errors import DataError
from eventlens_ds.eval import vqa
from eventlens_ds.eval.vqa_text import CONTRACTIONS, normalise


def row(number: int, answer: str, **more: Any) -> dict[str, Any]:
    return {"id": f"q{number}", "image": f"{number // 2}.jpg", "answer": answer, **more}


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("The dog.", "dog"),
        ("a an the", ""),
        ("Two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("DONT", "don't"),
        ("im", "im"),
        ("somebody'd", "somebodyd"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("red, blue", "red blue"),
        ("1,000", "1000"),
        ("well-known", "well known"),
        ("$1,000-2,000 (left)", "$10002000 left"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("St. Mary", "st mary"),
        ("yes!\n", "yes"),
        ("it's: ok", "it's: ok"),
        ("." * 40, "." * 8),
    ],
)
def test_normalisation(answer: str, form: str) -> None:
    assert normalise(answer) == form


def test_contractions_are_lower_case_and_single_words() -> None:
    assert len(CONTRACTIONS) > 100
    assert all(k == k.lower() and k.split() == [k] and v.split() == [v] for k, v in CONTRACTIONS.items())
    # Putting an apostrophe back changes nothing else, but for the one entry that takes it away.
    assert all(k.replace("'", "") == v.replace("'", "") for k, v in CONTRACTIONS.items())


def test_leave_one_out_by_the_released_loops() -> None:
    rng = random.Random(0)
    for _ in range(200):
        answers = [rng.choice("abc") + "x" for _ in range(10)]
        said = rng.choice("abcd") + "x"
        shares = []
        for i in range(10):
            others = [answers[j] for j in range(10) if j != i]
            shares.append(min(1.0, sum(o == said for o in others) / 3))
        assert vqa.vqa_accuracy(said, answers) == pytest.approx(sum(shares) / 10)
    table = {n: vqa.vqa_accuracy("yes", ["yes"] * n + ["no"] * (10 - n)) for n in range(6)}
    assert table == pytest.approx({0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0, 5: 1.0})
    # min(matches / 3, 1) over all ten, as often written, is another metric.
    assert table[1] != pytest.approx(1 / 3)
    assert (vqa.vqa_accuracy("A dog", ["dog"]), vqa.vqa_accuracy("cat", ["dog"])) == (1.0, 0.0)
    with pytest.raises(DataError, match="wants 10 answers, or one, got 3"):
        vqa.vqa_accuracy("a", ["a"] * 3)


def test_score_vqa_types_floor_and_released_rule() -> None:
    rows = [
        row(0, "Yes.", answers=["yes"] * 10, answer_type="yes/no"),
        row(1, "two", answers=["2"] * 3 + ["3"] * 7, answer_type="number"),
        row(2, "the", answers=["yes"] * 9 + ["no"], answer_type="yes/no"),
    ]
    found = vqa.score_vqa(rows)
    assert (found["accuracy"], found["n"], found["annotators"]) == (pytest.approx((1 + 0.9 + 0) / 3), 3, 10)
    assert found["released"] == found["accuracy"]
    assert found["unfit"] == {"empty answer": 1}
    assert found["types"]["number"] == {"accuracy": pytest.approx(0.9), "n": 1}
    assert found["floor"] == {"answer": "yes", "accuracy": pytest.approx(2 / 3)}
    constant = vqa.score_vqa([r | {"answer": "yes"} for r in rows])
    assert constant["accuracy"] == constant["floor"]["accuracy"]
    assert vqa.score_vqa([])["accuracy"] is None and vqa.score_vqa([])["floor"] is None


@pytest.mark.parametrize(
    ("answer", "answers", "accuracy", "released"),
    [
        ("Yes.", ["yes"] * 10, 1.0, 1.0),
        # Unanimous annotators are left as they wrote, the answer is not.
        ("the dog", ["the dog"] * 10, 1.0, 0.0),
        ("yes!", ["yes!"] * 10, 1.0, 0.0),
        # Else they lose their punctuation, and keep articles, number words and capitals.
        ("yes", ["yes."] * 9 + ["no"], 1.0, 1.0),
        # The blank that stands for a mark stays at the end.
        ("yes", ["yes!"] * 9 + ["no"], 1.0, 0.0),
        ("two", ["two"] * 9 + ["three"], 1.0, 0.0),
        ("dog", ["Dog"] * 9 + ["cat"], 1.0, 0.0),
    ],
)
def test_the_released_script_treats_annotators_otherwise(
    answer: str, answers: list[str], accuracy: float, released: float
) -> None:
    found = vqa.score_vqa([row(0, answer, answers=answers)])
    assert (found["accuracy"], found["released"]) == (accuracy, released)


def test_vqa_rows_are_checked() -> None:
    with pytest.raises(DataError, match="questions with 1 and with 10 answers"):
        vqa.score_vqa([row(0, "a", answers=["a"]), row(1, "a", answers=["a"] * 10)])
    with pytest.raises(DataError, match="q0: VQA accuracy wants 10 answers, or one, got 9"):
        vqa.score_vqa([row(0, "a", answers=["a"] * 9)])
    with pytest.raises(DataError, match="q0: 'answers' wants a list of strings"):
        vqa.score_vqa([row(0, "a", answers="yes")])
    with pytest.raises(DataError, match="q0: a second row"):
        vqa.score_vqa([row(0, "a", answers=["a"]), row(0, "b", answers=["a"])])
    with pytest.raises(DataError, match="q0: key answers is missing"):
        vqa.score_vqa([row(0, "a")])
    with pytest.raises(DataError, match="q0: 'answer' wants a string, got int"):
        vqa.score_vqa([row(0, "a", answers=["a"]) | {"answer": 3}])


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", (True, None)),
        ("true.", (True, None)),
        ("No, it is not.", (False, None)),
        ("The statement is false", (False, None)),
        ("this is not true", (False, None)),
        ("it isn't true", (False, None)),
        ("it isn\u2019t false", (True, None)),
        ("yes, there is no dog", (True, None)),
        ("it says yes and no", (None, vqa.BOTH)),
        ("the dog sits on a mat", (None, vqa.NEITHER)),
        ("I know nothing", (None, vqa.NEITHER)),
        (" ?", (None, vqa.EMPTY)),
    ],
)
def test_verdict(answer: str, read: tuple[bool | None, str | None]) -> None:
    assert vqa.verdict(answer) == read


def test_vsr_counts_what_fits_no_rule_as_wrong() -> None:
    rows = [row(0, "yes", label=1), row(1, "false", label=0), row(2, "left", label=1), row(3, "", label=0)]
    found = vqa.score_vsr(rows)
    assert (found["accuracy"], found["yes_ratio"], found["floor"]) == (0.5, 0.25, 0.5)
    assert found["unfit"] == {"empty answer": 1, "neither yes nor no": 1}
    with pytest.raises(DataError, match="q0: 'label' wants 0 or 1, got 'yes'"):
        vqa.score_vsr([row(0, "yes", label="yes")])
    assert vqa.score_vsr([])["floor"] is None


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is a dog.", True),
        ("No.", False),
        ("no, there is", False),
        ("There is not a dog", False),
        ("Yes. No dog is seen", True),
        # The three quirks of the released rule: silence, shouting and a line break are yes.
        ("", True),
        ("NO", True),
        ("no\n", True),
    ],
)
def test_pope_released_rule(answer: str, yes: bool) -> None:
    assert vqa.pope_says_yes(answer) is yes


def test_pope_block_by_hand() -> None:
    # tp 2, fn 1, fp 1, tn 1.
    table = [("yes", "yes"), ("yes", "Yes."), ("yes", "no"), ("no", "a dog"), ("no", "no")]
    rows = [row(i, said, label=gold, split="popular") for i, (gold, said) in enumerate(table)]
    found = vqa.score_pope([*rows, row(9, "no", label="no", split="random")])
    popular = found["splits"]["popular"]
    assert (popular["accuracy"], popular["yes_ratio"], popular["n"]) == (pytest.approx(3 / 5), pytest.approx(3 / 5), 5)
    assert (popular["precision"], popular["recall"], popular["f1"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert popular["unfit"] == {"neither yes nor no": 1}
    assert popular["floor"] == {"accuracy": pytest.approx(3 / 5), "f1": pytest.approx(3 / 4)}
    assert (found["splits"]["random"]["precision"], found["splits"]["random"]["f1"]) == (None, None)
    assert (found["n"], found["accuracy"]) == (6, pytest.approx(4 / 6))
    with pytest.raises(DataError, match="q0: 'label' wants 'yes' or 'no', got 1"):
        vqa.score_pope([row(0, "yes", label=1)])
    assert vqa.score_pope([])["accuracy"] is None


def test_f1_agrees_with_precision_and_recall() -> None:
    rng = random.Random(1)
    rows = [row(i, rng.choice(["yes", "no"]), label=rng.choice(["yes", "no"])) for i in range(100)]
    found = vqa.score_pope(rows)
    p, r = found["precision"], found["recall"]
    assert found["f1"] == pytest.approx(2 * p * r / (p + r))
    assert found["splits"] == {}


def test_photo_questions_and_statements(shared: Path) -> None:
    regions = shared / "data/photos/regions"
    questions = [json.loads(line) for line in (regions / "vqa.jsonl").open()]
    rows = [row(i, q["answer"], answers=[q["answer"]], image=q["img_path"]) for i, q in enumerate(questions)]
    found = vqa.score_vqa(rows)
    assert (found["accuracy"], found["n"], found["images"], found["annotators"]) == (1.0, 42, 14, 1)
    assert found["floor"]["accuracy"] < 0.5
    moved = [r | {"answer": rows[(i + 1) % 42]["answer"]} for i, r in enumerate(rows)]
    assert vqa.score_vqa(moved)["accuracy"] < 0.5
    statements = [json.loads(line) for line in (regions / "vsr.jsonl").open()]
    spoken = [
        row(i, "Yes" if s["label"] else "No", label=s["label"], image=s["img_path"]) for i, s in enumerate(statements)
    ]
    vsr = vqa.score_vsr(spoken)
    assert (vsr["accuracy"], vsr["floor"], vsr["n"]) == (1.0, 23 / 42, 42)
    assert vqa.score_vsr([r | {"answer": "yes"} for r in spoken])["accuracy"] == pytest.approx(23 / 42)
    turned = [r | {"answer": "no" if r["label"] else "yes"} for r in spoken]
    assert vqa.score_vsr(turned)["accuracy"] == 0.0
