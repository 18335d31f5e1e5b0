"""The metrics of the tasks that are answered in words, and the lines of the table that show them.

In: rows of eval/language_rows.py of one task; the numbers of its metric. Out: the numbers; lines and notes for
eval/report.py. Decision: a floor stands beside every number it belongs to, because most of these tasks have an answer
that is right often without a look at the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eventlens_ds.eval import captions, lcl, rec, vqa

TASKS = ("caption", "reg", "rec", "vqa", "vsr", "pope", "lcl")

Line = tuple[str, float | None, list[float | None] | None, int]
"""(metric, value, interval, n)."""


def score(task: str, rows: Sequence[Mapping[str, Any]], java: bool | None) -> dict[str, Any]:
    """The metric of a task. Raises DataError naming a row that cannot be scored."""
    if task in ("caption", "reg"):
        return captions.score(rows, java=java)
    return {"rec": rec.score, "vqa": vqa.score_vqa, "vsr": vqa.score_vsr, "pope": vqa.score_pope, "lcl": lcl.score}[
        task
    ](rows)


def lines(task: str, values: Mapping[str, Any]) -> list[Line]:
    if task in ("caption", "reg"):
        return _caption_lines(values)
    if task == "lcl":
        return _episode_lines(values)
    n = values["n"]
    made: list[Line] = [("accuracy", values["accuracy"], values["interval"], n)]
    if task == "rec":
        made += [("accuracy floor", values["floor"] and values["floor"]["accuracy"], None, n)]
        made += [("mean IoU", values["mean_iou"], None, n)]
        if len(values["splits"]) > 1:
            made += [(f"accuracy {k}", b["accuracy"], b["interval"], b["n"]) for k, b in values["splits"].items()]
    elif task == "vqa":
        made += [("accuracy floor", values["floor"] and values["floor"]["accuracy"], None, n)]
        made += [("accuracy released", values["released"], None, n)]
        made += [(f"accuracy {name}", b["accuracy"], None, b["n"]) for name, b in values["types"].items()]
    elif task == "vsr":
        made += [("accuracy floor", values["floor"], None, n), ("yes ratio", values["yes_ratio"], None, n)]
    else:
        made += _pope_lines(values)
        for name, block in values["splits"].items() if len(values["splits"]) > 1 else ():
            made += [(f"accuracy {name}", block["accuracy"], block["interval"], block["n"])]
            made += [(f"f1 {name}", block["f1"], None, block["n"])]
    return made


def _episode_lines(values: Mapping[str, Any]) -> list[Line]:
    made: list[Line] = []
    for shots, block in values["shots"].items():
        made.append((f"{shots} shots", block["accuracy"], block["interval"], block["n"]))
        if "answered" in block:
            made += [(f"{shots} shots {rule}", block[rule], None, block["answered"]) for rule in _RELEASED]
    return made


_RELEASED = ("released", "released_any_case")


def _pope_lines(values: Mapping[str, Any]) -> list[Line]:
    n, floor = values["n"], values["floor"]
    made: list[Line] = [("accuracy floor", floor["accuracy"], None, n)]
    made += [(name, values[name], None, n) for name in ("f1", "precision", "recall")]
    return [*made, ("f1 floor", floor["f1"], None, n), ("yes ratio", values["yes_ratio"], None, n)]


def _caption_lines(values: Mapping[str, Any]) -> list[Line]:
    made: list[Line] = []
    for name in (*captions.METRICS, "distinct"):
        made.append((name, values[name], values["intervals"].get(name), values["n"]))
        if values["floor"] and name in values["floor"]:
            made.append((f"{name} floor", values["floor"][name], None, values["n"]))
    return made


def notes(task: str, values: Mapping[str, Any]) -> list[str]:
    """What the numbers alone do not say."""
    if task in ("caption", "reg"):
        floor = values["floor"]
        made = [f"tokenizer: {values['tokenizer']}", *(f"{k}: {why}" for k, why in values["reasons"].items())]
        made += [f"floor, from {floor['from']}: {ascii(floor['caption'])[:60]}"] if floor else []
        return made + [f"{values[name]} rows {what}" for name, what in _EMPTY.items() if values[name]]
    if task == "lcl":
        return [f"chance {values['chance']}; intervals over pairs of classes"]
    unfit = values["unparsable"] if task == "rec" else values["unfit"]
    made = [f"{count} answers: {reason}" for reason, count in unfit.items()]
    if task == "vqa" and values["annotators"] == 1:
        made.append("one answer per question: exact match")
    return made


_EMPTY = {"blind": "without a reference", "empty": "without a word"}
