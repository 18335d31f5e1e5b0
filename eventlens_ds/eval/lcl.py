"""Metrics of Link-Context Learning: which of two names the model prefers, and the released substring rule.

In: rows {"id", "task": "lcl", "shots", "names": [positive, negative], "label": 0 or 1, "scores": mean log-likelihood
per token of the answer with either name, "tokens", "pair", "image", "key"} and, where answers were generated, "answer".
Out: accuracy by shots with intervals over pairs of classes, since the queries of a pair share their demonstrations.
Decision: a tie counts one half, so a model that cannot tell two names apart scores chance and not a bias of argmax.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eventlens_ds.errors import DataError
from eventlens_ds.eval.intervals import bootstrap_mean

Row = Mapping[str, Any]

CHANCE = 0.5
_FRAME = re.compile(r'the answer is|there is|in the image|["\'.]')
"""What the released metric takes out of a target."""


def two_way(row: Row) -> float:
    """1 when the right name is the more likely one, 0.5 for a tie."""
    right, wrong = row["scores"][row["label"]], row["scores"][1 - row["label"]]
    return 0.5 if right == wrong else float(right > wrong)


def released(answer: str, name: str, other: str, *, any_case: bool = False) -> bool:
    """The released rule: the name is in the answer, and once it is taken out the other name is not.

    name is stripped of the words of the template and lowered, the answer is not lowered: a name with capitals can be
    said rightly and count as wrong. any_case lowers all three [ours].
    """
    target = _FRAME.sub("", name.lower()).strip()
    if any_case:
        answer, other = answer.lower(), other.lower()
    return target in answer and other not in answer.replace(target, "")


def score(rows: Iterable[Row], *, seed: int = 0) -> dict[str, Any]:
    """{"n", "chance", "shots": {"0": {"n", "accuracy", "interval", "pairs"}, ...}}; with answers also "answered",
    "released", "released_any_case". Raises DataError naming a bad row."""
    by_shots: dict[int, list[Row]] = {}
    for row in rows:
        _check(row)
        by_shots.setdefault(row["shots"], []).append(row)
    every = {str(shots): _block(found, seed) for shots, found in sorted(by_shots.items())}
    return {"n": max((block["n"] for block in every.values()), default=0), "chance": CHANCE, "shots": every}


def _check(row: Row) -> None:
    name = row.get("id", "a row without id")
    if not isinstance(row.get("shots"), int) or row["shots"] < 0:
        raise DataError(f"{name}: 'shots' wants a number from 0, got {ascii(row.get('shots'))[:40]}")
    for key, kind in (("names", str), ("scores", int | float)):
        value = row.get(key)
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, kind) for v in value):
            raise DataError(f"{name}: {key!r} wants two values, got {ascii(value)[:40]}")
    if row.get("label") not in (0, 1) or not all(math.isfinite(s) for s in row["scores"]):
        raise DataError(f"{name}: 'label' wants 0 or 1 and 'scores' finite numbers")


def _block(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    pairs = [str(row["pair"]) for row in rows]
    found = bootstrap_mean([two_way(row) for row in rows], pairs, seed=seed)
    block: dict[str, Any] = {"n": found.n, "accuracy": found.estimate, "interval": found.as_list()}
    block["pairs"] = found.images
    answered = [row for row in rows if "answer" in row]
    if answered:
        block["answered"] = len(answered)
        for name, any_case in (("released", False), ("released_any_case", True)):
            hits = [
                released(r["answer"], r["names"][r["label"]], r["names"][1 - r["label"]], any_case=any_case)
                for r in answered
            ]
            block[name] = sum(hits) / len(hits)
    return block
