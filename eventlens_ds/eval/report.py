"""Metrics files and a plain-text table, made from prediction files and nothing else.

In: DIR/predictions/*.jsonl, the rows described in eval/vcr.py, eval/events.py and eval/language_rows.py; one file is
one evaluated condition (both VCR tasks of a model together, its blind twin in another file). Out:
DIR/metrics/<file>.json and DIR/metrics/table.txt. Decision: what a run reports and what a reader recomputes later go
through the same function, so `differences` can hold a stored number against its rows.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError
from eventlens_ds.eval import events, language_lines, vcr
from eventlens_ds.eval.language_lines import Line

Metrics = dict[str, dict[str, Any]]
"""File stem -> kind (vcr, event_generation, event_ranking, or a task answered in words) -> the numbers of that kind."""

TABLE = "table.txt"
CONDITIONS = "conditions"
NOT_HERE = "not recomputed here"


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of one prediction file. Raises DataError with file:line on a line that is not a JSON object."""
    rows = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not a JSON line: {error.msg}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: expected an object, got {type(row).__name__}")
                rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return rows


def kind_of(row: Mapping[str, Any]) -> str:
    """vcr, event_generation, event_ranking or the task of an answer, by the keys of a row. Raises DataError on any
    other row."""
    if row.get("task") in (vcr.ANSWER, vcr.RATIONALE):
        return "vcr"
    if "generations" in row:
        return "event_generation"
    if "candidates_gold" in row:
        return "event_ranking"
    if row.get("task") in language_lines.TASKS:
        return str(row["task"])
    raise DataError(f"row {row.get('id', 'without id')}: neither a VCR, an event nor an answer row")


def recompute(folder: str | os.PathLike[str], *, java: bool | None = None) -> Metrics:
    """Every number of a run or evaluation folder, from its prediction rows.

    Raises DataError when there is no prediction file, or naming the file (and line or row) that cannot be scored.
    """
    files = sorted(Path(folder, "predictions").glob("*.jsonl"))
    if not files:
        raise DataError(f"{Path(folder, 'predictions')}: no prediction file (*.jsonl)")
    return {file.stem: _score_file(file, java) for file in files}


def write_report(
    folder: str | os.PathLike[str], *, conditions: Mapping[str, Any] | None = None, java: bool | None = None
) -> Metrics:
    """Recompute, write metrics/<file>.json (with `conditions` beside the numbers) and metrics/table.txt."""
    metrics = recompute(folder, java=java)
    target = Path(folder, "metrics")
    target.mkdir(parents=True, exist_ok=True)
    for stem, kinds in metrics.items():
        _replace(target / f"{stem}.json", json.dumps({**kinds, CONDITIONS: dict(conditions or {})}, indent=1) + "\n")
    _replace(target / TABLE, table(metrics))
    return metrics


def differences(folder: str | os.PathLike[str], *, tolerance: float = 1e-9, java: bool | None = None) -> list[str]:
    """Lines naming each stored value that its prediction rows do not give; an empty list means all agree.

    A file on one side only is a line too. A value that is None here for a stated reason (METEOR without Java) reads
    "not recomputed here".
    """
    fresh = recompute(folder, java=java)
    found = []
    stored_files = {p.stem: p for p in Path(folder, "metrics").glob("*.json")}
    for stem in sorted(set(fresh) | set(stored_files)):
        if stem not in stored_files or stem not in fresh:
            side = "metrics" if stem in fresh else "predictions"
            found.append(f"{stem}: no file in {side}/")
            continue
        stored = json.loads(stored_files[stem].read_text(encoding="utf-8"))
        stored.pop(CONDITIONS, None)
        found += _unlike(stored, json.loads(json.dumps(fresh[stem])), stem, tolerance)
    return found


def table(metrics: Metrics) -> str:
    """The numbers as fixed columns: condition, metric, value, 95 % interval over images, n."""
    lines = [f"{'condition':<28} {'metric':<22} {'value':>8}  {'95% interval':<17} {'n':>7}"]
    for stem, kinds in metrics.items():
        if not kinds:
            lines.append(f"{stem:<28} no rows")
        for kind, values in kinds.items():
            lines_of = _TABLES[kind] if kind in _TABLES else partial(language_lines.lines, kind)
            for name, value, interval, n in lines_of(values):
                shown = "-" if value is None else f"{value:.4f}"
                ends = "-" if not interval or interval[0] is None else f"{interval[0]:.4f} - {interval[1]:.4f}"
                lines.append(f"{stem:<28} {name:<22} {shown:>8}  {ends:<17} {n:>7}")
            lines += [f"{stem:<28} {note}" for note in _notes(kind, values)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _score_file(file: Path, java: bool | None) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_rows(file), 1):
        try:
            rows.setdefault(kind_of(row), []).append(row)
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from None
    result: dict[str, Any] = {}
    try:
        if "vcr" in rows:
            result["vcr"] = vcr.score(rows["vcr"])
        if "event_generation" in rows:
            result["event_generation"] = events.score_generations(rows["event_generation"], java=java)
        if "event_ranking" in rows:
            result["event_ranking"] = events.score_ranking(rows["event_ranking"])
        result |= {t: language_lines.score(t, rows[t], java) for t in language_lines.TASKS if t in rows}
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    return result


def _vcr_lines(values: Mapping[str, Any]) -> list[Line]:
    lines: list[Line] = []
    for part in ("all", "which_person", "held_out", "seen", "permuted", "permuted_which_person"):
        block = values if part == "all" else values.get(part)
        if block is None:
            continue
        for metric in vcr.METRICS:
            interval = block["intervals"][metric]
            name = metric if part == "all" else f"{metric} {part}"
            if block["counts"][metric]:
                lines.append((name, block[metric], interval["bootstrap"], block["counts"][metric]))
    return lines


def _generation_lines(values: Mapping[str, Any]) -> list[Line]:
    names = ("bleu2", "meteor", "cider", "rouge_l", "unique", "novel")
    return [(n, values[n], values["intervals"].get(n), values["n"]) for n in names]


def _ranking_lines(values: Mapping[str, Any]) -> list[Line]:
    return [
        ("acc50", values["acc50"], values["interval"], values["n"]),
        ("acc50 chance", values["chance"], None, values["n"]),
    ]


_TABLES = {"vcr": _vcr_lines, "event_generation": _generation_lines, "event_ranking": _ranking_lines}


def _notes(kind: str, values: Mapping[str, Any]) -> list[str]:
    if kind == "vcr":
        notes = [
            f"{named['count']} questions without {part} row, e.g. {named['first'][0]}"
            for part, named in values["incomplete"].items()
            if named["count"]
        ]
        still = values.get("not_permuted", {"count": 0})
        if still["count"]:
            notes.append(
                f"{still['count']} questions on images without two regions to permute, e.g. {still['first'][0]}"
            )
        return notes + ([f"{values['blind']} rows without a label: no accuracy"] if values["blind"] else [])
    if kind == "event_generation":
        return [f"tokenizer: {values['tokenizer']}", *(f"{k}: {why}" for k, why in values["reasons"].items())]
    if kind in language_lines.TASKS:
        return language_lines.notes(kind, values)
    return [f"{values['short']} rows with fewer than {events.CANDIDATES} candidates"] if values["short"] else []


def _unlike(stored: Any, fresh: Any, where: str, tolerance: float) -> list[str]:
    if isinstance(stored, dict) and isinstance(fresh, dict):
        keys = sorted(set(stored) | set(fresh))
        return [line for k in keys for line in _unlike(stored.get(k), fresh.get(k), f"{where}.{k}", tolerance)]
    if isinstance(stored, list) and isinstance(fresh, list) and len(stored) == len(fresh):
        pairs = enumerate(zip(stored, fresh, strict=True))
        return [line for i, (s, f) in pairs for line in _unlike(s, f, f"{where}[{i}]", tolerance)]
    if stored == fresh:
        return []
    if isinstance(stored, int | float) and isinstance(fresh, int | float):
        if math.isclose(stored, fresh, rel_tol=0, abs_tol=tolerance):
            return []
        return [f"{where}: stored {stored}, its rows give {fresh}"]
    return [f"{where}: stored {stored}, {NOT_HERE if fresh is None else f'its rows give {fresh}'}"]


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
