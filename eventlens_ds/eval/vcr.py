"""Visual Commonsense Reasoning from prediction rows: Q->A, QA->R, Q->AR, subsets, leaderboard file.

In: rows {"id", "task": "vcr_answer" | "vcr_rationale", "annot_id", "image", "key", "label": int or null, "scores":
[length-normalised log-likelihood per candidate], "tokens", "flags": {"which_person", "held_out"}, "candidates",
"question"}; a rationale row may add "given_answer", the answer its question was conditioned on; the control
permute_regions adds the flag "permuted", whether regions of the image could trade places. Out: plain dicts.
Decision: numbers come from rows alone, so every reported number can be recomputed by someone without the model.
The protocol (Zellers et al. 2019): QA->R is conditioned on the correct answer, Q->AR is both right; ties go to the
lowest index.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eventlens_ds.errors import DataError
from eventlens_ds.eval.intervals import Difference, bootstrap_mean, paired_difference, wilson

ANSWER, RATIONALE = "vcr_answer", "vcr_rationale"
METRICS = ("q2a", "qa2r", "q2ar")
CHOICES = 4
COLUMNS: tuple[str, ...] = (
    "annot_id",
    *(f"answer_{a}" for a in range(CHOICES)),
    *(f"rationale_conditioned_on_a{a}_{r}" for a in range(CHOICES) for r in range(CHOICES)),
)
"""The 21 columns of visualcommonsense.com/leaderboard, in its order."""

Row = Mapping[str, Any]


@dataclass
class Question:
    """What the rows say about one annot_id. `rationales` maps the answer conditioned on (None: unnamed) to a row."""

    annot_id: str
    image: str
    answer: Row | None = None
    rationales: dict[int | None, Row] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)

    def rows(self) -> list[Row]:
        return [row for row in (self.answer, *self.rationales.values()) if row is not None]

    def rationale(self) -> Row | None:
        """The row conditioned on the correct answer: the unnamed one, else the one naming the answer's label."""
        if None in self.rationales:
            return self.rationales[None]
        label = self.answer["label"] if self.answer is not None else None
        return None if label is None else self.rationales.get(int(label))

    def hits(self) -> dict[str, bool | None]:
        """metric -> right or wrong, None where it has no label or no row."""
        q2a, qa2r = _hit(self.answer), _hit(self.rationale())
        both = None if q2a is None or qa2r is None else q2a and qa2r
        return {"q2a": q2a, "qa2r": qa2r, "q2ar": both}


def score(rows: Iterable[Row], *, seed: int = 0, resamples: int = 1000) -> dict[str, Any]:
    """The three numbers with intervals, for all questions and for the subsets which_person, held_out and seen.

    Each block holds q2a, qa2r, q2ar (None without a labelled row), "counts" per metric, "n" (questions with any
    labelled row) and "intervals" ("wilson" over questions, "bootstrap" over images). The top level adds "blind"
    (rows without a label, which get no accuracy), "other_answers" (rationale rows conditioned on a wrong answer, not
    part of QA->R) and "incomplete" (questions that lack a part, counted and named, so not in q2ar). Rows of the control
    permute_regions add the subsets "permuted" and "permuted_which_person" (questions on images whose regions could
    trade places) and "not_permuted" (the others, counted and named).
    A question belongs to a subset when any of its rows carries the flag. Raises DataError naming a bad row.
    """
    questions = by_question(rows)
    result = _block(questions, seed, resamples)
    for name in ("which_person", "held_out"):
        result[name] = _block([q for q in questions if name in q.flags], seed, resamples)
    if any("permuted" in row.get("flags", {}) for q in questions for row in q.rows()):
        result |= _permuted(questions, seed, resamples)
    result["seen"] = _block([q for q in questions if "held_out" not in q.flags], seed, resamples)
    every = [row for q in questions for row in q.rows()]
    result["blind"] = sum(r["label"] is None for r in every)
    result["other_answers"] = sum(
        r is not q.rationale() for q in questions if q.rationale() is not None for r in q.rationales.values()
    )
    result["incomplete"] = {
        "answer": _named(q.annot_id for q in questions if q.answer is None),
        "rationale": _named(q.annot_id for q in questions if not q.rationales),
    }
    return result


def _permuted(questions: Sequence[Question], seed: int, resamples: int) -> dict[str, Any]:
    moved = [q for q in questions if "permuted" in q.flags]
    return {
        "permuted": _block(moved, seed, resamples),
        "permuted_which_person": _block([q for q in moved if "which_person" in q.flags], seed, resamples),
        "not_permuted": _named(q.annot_id for q in questions if "permuted" not in q.flags),
    }


def compare(first: Sequence[Iterable[Row]], second: Sequence[Iterable[Row]], metric: str) -> Difference:
    """Paired bootstrap over images of metric(first) - metric(second).

    Each side is a list of runs (training seeds), one collection of rows per run; run i is paired with run i. Every
    run must score the same questions, else DataError says how many differ and names one.
    """
    tables = [[_hits_of(by_question(run), metric) for run in side] for side in (first, second)]
    if len(tables[0]) != len(tables[1]) or not tables[0]:
        raise DataError(f"paired comparison of {metric}: {len(tables[0])} runs against {len(tables[1])}")
    ids = sorted(tables[0][0])
    for table in tables[0] + tables[1]:
        if unlike := set(ids) ^ set(table):
            raise DataError(f"paired comparison of {metric}: {len(unlike)} questions not in both, e.g. {min(unlike)}")
    values = [np.array([[table[i][0] for i in ids] for table in side], dtype=np.float64) for side in tables]
    return paired_difference(values[0], values[1], [tables[0][0][i][1] for i in ids])


def leaderboard_csv(rows: Iterable[Row], path: str | os.PathLike[str], *, temperature: float = 1.0) -> int:
    """Write the 21-column leaderboard file (probabilities: softmax of scores / temperature); return its lines.

    One line per annot_id in the order of first appearance. Raises DataError naming the annot_id when the answer row
    or one of the four rationale rows ("given_answer" 0..3) is missing, or a row has not four scores.
    """
    lines = []
    for q in by_question(rows):
        if q.answer is None:
            raise DataError(f"leaderboard file: {q.annot_id} has no {ANSWER} row")
        if missing := [a for a in range(CHOICES) if a not in q.rationales]:
            raise DataError(f"leaderboard file: {q.annot_id} has no {RATIONALE} row with given_answer {missing[0]}")
        parts = [q.answer, *(q.rationales[a] for a in range(CHOICES))]
        lines.append([q.annot_id, *(f"{p:.8f}" for row in parts for p in _probabilities(row, temperature))])
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(lines)
    os.replace(partial, target)
    return len(lines)


def by_question(rows: Iterable[Row]) -> list[Question]:
    """Rows gathered per annot_id, in the order of first appearance. Raises DataError naming a bad or repeated row."""
    questions: dict[str, Question] = {}
    for row in rows:
        check_row(row)
        q = questions.setdefault(row["annot_id"], Question(row["annot_id"], row["image"]))
        if row["image"] != q.image:
            raise DataError(f"{row['id']}: image {row['image']}, but {q.annot_id} was on {q.image} before")
        q.flags.update(name for name, on in row.get("flags", {}).items() if on)
        if row["task"] == ANSWER:
            if q.answer is not None:
                raise DataError(f"{row['id']}: {q.annot_id} has two {ANSWER} rows")
            q.answer = row
        else:
            given = row.get("given_answer")
            if given in q.rationales:
                raise DataError(f"{row['id']}: {q.annot_id} has two {RATIONALE} rows with given_answer {given}")
            q.rationales[given] = row
    return list(questions.values())


def check_row(row: Row) -> None:
    """Raise DataError naming the row and the key when a row cannot be scored."""
    name = row.get("id", "row without id")
    if lacking := [k for k in ("id", "task", "annot_id", "image", "label", "scores") if k not in row]:
        raise DataError(f"{name}: key {lacking[0]} is missing")
    if row["task"] not in (ANSWER, RATIONALE):
        raise DataError(f"{name}: task {row['task']} is not {ANSWER} or {RATIONALE}")
    scores, label = row["scores"], row["label"]
    if len(scores) < 2 or not all(isinstance(s, int | float) and math.isfinite(s) for s in scores):
        raise DataError(f"{name}: scores must be two or more finite numbers, got {scores}")
    if label is not None and not 0 <= label < len(scores):
        raise DataError(f"{name}: label {label} outside 0..{len(scores) - 1}")
    given = row.get("given_answer")
    if given is not None and not 0 <= given < CHOICES:
        raise DataError(f"{name}: given_answer {given} outside 0..{CHOICES - 1}")


def predicted(row: Row) -> int:
    """Index of the highest score; the lowest index of a tie."""
    return int(np.argmax(row["scores"]))


def _hit(row: Row | None) -> bool | None:
    return None if row is None or row["label"] is None else predicted(row) == row["label"]


def _hits_of(questions: Sequence[Question], metric: str) -> dict[str, tuple[bool, str]]:
    if metric not in METRICS:
        raise DataError(f"metric {metric} is not one of {', '.join(METRICS)}")
    pairs = ((q, q.hits()[metric]) for q in questions)
    return {q.annot_id: (hit, q.image) for q, hit in pairs if hit is not None}


def _block(questions: Sequence[Question], seed: int, resamples: int) -> dict[str, Any]:
    block: dict[str, Any] = {"n": sum(any(h is not None for h in q.hits().values()) for q in questions)}
    block |= {"counts": {}, "intervals": {}}
    for metric in METRICS:
        hits = list(_hits_of(questions, metric).values())
        block["counts"][metric] = len(hits)
        if not hits:
            block[metric], block["intervals"][metric] = None, None
            continue
        values, images = [float(h) for h, _ in hits], [image for _, image in hits]
        interval = bootstrap_mean(values, images, seed=seed, resamples=resamples)
        block[metric] = interval.estimate
        block["intervals"][metric] = {
            "wilson": list(wilson(int(sum(values)), len(values))),
            "bootstrap": interval.as_list(),
            "images": interval.images,
        }
    return block


def _named(ids: Iterable[str], shown: int = 20) -> dict[str, Any]:
    names = list(ids)
    return {"count": len(names), "first": names[:shown]}


def _probabilities(row: Row, temperature: float) -> list[float]:
    if len(row["scores"]) != CHOICES:
        raise DataError(f"{row['id']}: the leaderboard needs {CHOICES} scores, got {len(row['scores'])}")
    logits = np.asarray(row["scores"], dtype=np.float64) / temperature
    weights = np.exp(logits - logits.max())
    return [float(w) for w in weights / weights.sum()]
