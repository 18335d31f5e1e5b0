"""Short answers from rows: VQAv2 accuracy, VSR (true or false) and POPE (yes or no), each with a constant floor.

In: rows {"id", "image", "answer": generated text} with "answers": [10 annotators, or one] (VQA), "label": 1 | 0 (VSR)
or "label": "yes" | "no" (POPE); "answer_type" (VQA) and "split" (POPE: random, popular, adversarial) are optional
names to break down by. Out: plain dicts of fractions and counts.
Decision: where the released scripts guess (POPE calls everything without a "no" a yes) the released rule gives the
number, so that it compares, and what fits no rule is counted beside it, so that it is seen. The rules of VQA's
released normalisation are in eval/vqa_text.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eventlens_ds.errors import DataError
from eventlens_ds.eval.intervals import bootstrap_mean
from eventlens_ds.eval.vqa_text import normalise, punctuation

ANNOTATORS = 10
ENOUGH = 3
"""Matching annotators that make an answer fully right (Antol et al. 2015)."""

EMPTY, NEITHER, BOTH = "empty answer", "neither yes nor no", "both yes and no"
_TRUE, _FALSE = frozenset({"yes", "true", "yeah", "yep"}), frozenset({"no", "false", "nope"})
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")

Row = Mapping[str, Any]


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """VQAv2 accuracy of one answer in 0..1, both sides normalised.

    Ten answers: for each annotator min(matches among the other 9 / 3, 1), then the mean over annotators (the released
    evaluation; equal to 0, .3, .6, .9, 1 for 0, 1, 2, 3, 4 and more matches). One answer (sets without ten
    annotators): 1 when equal, else 0. Raises DataError for any other number of answers.
    """
    said, gold = normalise(answer), [normalise(a) for a in answers]
    return _leave_one_out(said, gold)


def score_vqa(rows: Iterable[Row], *, seed: int = 0) -> dict[str, Any]:
    """VQA accuracy with an interval over images, by answer type, and the best constant answer as floor.

    "accuracy" normalises answers and annotators alike. "released" is what the released script gives: it normalises the
    answer, but of the annotators only the punctuation, and not even that where all wrote the same string (there "the
    dog" is wrong for ten times "the dog"). "unfit" counts answers that are
    empty, or empty once articles and punctuation are gone. "annotators" is 10 or 1: the two are different metrics, so
    rows that mix them are refused. Raises DataError naming the row.
    """
    values: list[float] = []
    released: list[float] = []
    checked = _checked(rows, ("answers",))
    gold = [_answers(row) for row in checked]
    if len(sizes := sorted({len(g) for g in gold})) > 1:
        raise DataError(
            f"questions with {sizes[0]} and with {sizes[1]} answers: score them apart, they differ in metric"
        )
    forms = [[normalise(a) for a in answers] for answers in gold]
    unfit: Counter[str] = Counter()
    for row, answers, form in zip(checked, gold, forms, strict=True):
        said = normalise(row["answer"])
        unfit[EMPTY] += not said
        values.append(_leave_one_out(said, form))
        raw = answers if len(set(answers)) == 1 else [punctuation(a) for a in answers]
        released.append(_leave_one_out(said, raw))
    result = _mean(values, checked, seed) | {"annotators": sizes[0] if sizes else None, "unfit": _positive(unfit)}
    result["released"] = sum(released) / len(released) if released else None
    result["types"] = _by(checked, "answer_type", values)
    result["floor"] = _constant_answer(forms)
    return result


def verdict(answer: str) -> tuple[bool | None, str | None]:
    """(True | False, None) for an answer that decides, else (None, why it does not) [ours, for VSR].

    Words that decide: yes, yeah, yep, true; no, nope, false. "not" or "n't" right before true or false turns it
    over. The first word decides when it is one of them ("Yes, there is no dog"); else all that occur must agree.
    """
    words = _WORD.findall(answer.lower().replace("\u2019", "'"))
    if not words:
        return None, EMPTY
    found: list[bool] = []
    for i, word in enumerate(words):
        if word in _TRUE | _FALSE:
            turned = i > 0 and word in ("true", "false") and (words[i - 1] == "not" or words[i - 1].endswith("n't"))
            found.append((word in _TRUE) != turned)
    if not found:
        return None, NEITHER
    if words[0] in _TRUE | _FALSE or len(set(found)) == 1:
        return found[0], None
    return None, BOTH


def score_vsr(rows: Iterable[Row], *, seed: int = 0) -> dict[str, Any]:
    """Accuracy of yes/no/true/false answers against labels 1 (true) and 0, in 0..1, with an interval over images.

    Answers that `verdict` cannot read are wrong and counted in "unfit" by reason. "yes_ratio" is the share of true
    among all answers, "floor" the accuracy of the better constant. Raises DataError naming a bad row.
    """
    checked = _checked(rows, ("label",))
    for row in checked:
        if row["label"] not in (0, 1):
            raise DataError(f"{row['id']}: 'label' wants 0 or 1, got {ascii(row['label'])[:40]}")
    verdicts = [verdict(row["answer"]) for row in checked]
    hits = [
        float(said is not None and said == bool(r["label"])) for (said, _), r in zip(verdicts, checked, strict=True)
    ]
    result = _mean(hits, checked, seed)
    result["unfit"] = _positive(Counter(reason for _, reason in verdicts if reason))
    true = sum(row["label"] == 1 for row in checked)
    result["yes_ratio"] = sum(said is True for said, _ in verdicts) / len(checked) if checked else None
    result["floor"] = max(true, len(checked) - true) / len(checked) if checked else None
    return result


def pope_says_yes(answer: str) -> bool:
    """POPE's released rule (Li et al. 2023): of the first sentence (up to the first "."), commas dropped and split at
    blanks, the words No, no and not mean no; everything else is yes, an empty answer too."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def score_pope(rows: Iterable[Row], *, seed: int = 0) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 (yes is positive) and yes-ratio, over all rows and per "split" under "splits".

    A value whose denominator is 0 is None. "unfit" counts answers in which `verdict` reads nothing, though the
    released rule calls them yes or no; "floor" is always yes. Labels "yes" and "no". Raises DataError naming a bad row.
    """
    checked = _checked(rows, ("label",))
    for row in checked:
        if row["label"] not in ("yes", "no"):
            raise DataError(f"{row['id']}: 'label' wants 'yes' or 'no', got {ascii(row['label'])[:40]}")
    result = _pope_block(checked, seed)
    names = sorted({str(row["split"]) for row in checked if "split" in row})
    result["splits"] = {
        n: _pope_block([r for r in checked if "split" in r and str(r["split"]) == n], seed) for n in names
    }
    return result


def _pope_block(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    said = [pope_says_yes(row["answer"]) for row in rows]
    gold = [row["label"] == "yes" for row in rows]
    hits = [float(s == g) for s, g in zip(said, gold, strict=True)]
    block = _mean(hits, rows, seed) | _binary(said, gold)
    block["unfit"] = _positive(Counter(reason for _, reason in map(verdict, (r["answer"] for r in rows)) if reason))
    always = _binary([True] * len(gold), gold)
    block["floor"] = {"accuracy": sum(gold) / len(gold) if gold else None, "f1": always["f1"]}
    return block


def _binary(said: Sequence[bool], gold: Sequence[bool]) -> dict[str, float | None]:
    both = sum(s and g for s, g in zip(said, gold, strict=True))
    # 2 tp / (2 tp + fp + fn) is the harmonic mean of precision and recall, and 0 when nothing was found.
    f1 = 2 * both / (sum(said) + sum(gold)) if any(said) and any(gold) else None
    return {
        "precision": both / sum(said) if any(said) else None,
        "recall": both / sum(gold) if any(gold) else None,
        "f1": f1,
        "yes_ratio": sum(said) / len(said) if said else None,
    }


def _leave_one_out(said: str, gold: Sequence[str]) -> float:
    if len(gold) == 1:
        return float(said == gold[0])
    if len(gold) != ANNOTATORS:
        raise DataError(f"VQA accuracy wants {ANNOTATORS} answers, or one, got {len(gold)}")
    matches = sum(g == said for g in gold)
    return sum(min((matches - (g == said)) / ENOUGH, 1.0) for g in gold) / len(gold)


def _constant_answer(forms: Sequence[Sequence[str]]) -> dict[str, Any] | None:
    """The one answer that scores best on these questions, chosen with their answers in hand, and its accuracy."""
    totals: dict[str, float] = {}
    for gold in forms:
        for form in set(gold):
            totals[form] = totals.get(form, 0.0) + _leave_one_out(form, gold)
    if not totals:
        return None
    best = min(totals, key=lambda form: (-totals[form], form))
    return {"answer": best, "accuracy": totals[best] / len(forms)}


def _answers(row: Row) -> list[str]:
    answers = row["answers"]
    if not isinstance(answers, (list, tuple)) or not all(isinstance(a, str) for a in answers):
        raise DataError(f"{row['id']}: 'answers' wants a list of strings, got {ascii(answers)[:60]}")
    if len(answers) not in (1, ANNOTATORS):
        raise DataError(f"{row['id']}: VQA accuracy wants {ANNOTATORS} answers, or one, got {len(answers)}")
    return list(answers)


def _checked(rows: Iterable[Row], keys: Sequence[str]) -> list[Row]:
    out: list[Row] = []
    seen: set[str] = set()
    for row in rows:
        name = str(row.get("id", "row without id"))
        if lacking := [k for k in ("id", "image", "answer", *keys) if k not in row]:
            raise DataError(f"{name}: key {lacking[0]} is missing")
        if not isinstance(row["answer"], str):
            raise DataError(f"{name}: 'answer' wants a string, got {type(row['answer']).__name__}")
        if name in seen:
            raise DataError(f"{name}: a second row with this id")
        seen.add(name)
        out.append(row)
    return out


def _mean(values: Sequence[float], rows: Sequence[Row], seed: int) -> dict[str, Any]:
    if not values:
        return {"accuracy": None, "n": 0, "images": 0, "interval": None}
    found = bootstrap_mean(values, [str(row["image"]) for row in rows], seed=seed)
    return {"accuracy": found.estimate, "n": found.n, "images": found.images, "interval": found.as_list()}


def _by(rows: Sequence[Row], key: str, values: Sequence[float]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        if key in row:
            groups.setdefault(str(row[key]), []).append(value)
    return {name: {"accuracy": sum(v) / len(v), "n": len(v)} for name, v in sorted(groups.items())}


def _positive(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items()) if count}
