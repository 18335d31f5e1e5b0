"""`eventlens compare RUN_A RUN_B`: only what differs between two runs: how they ended, capsule, settings, losses.

In: two run folders. Out: lines of "where: A -> B", none when nothing differs but times.
Decision: what always differs (times, speed, memory, the attempt) is left out, so that an empty answer means something.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eventlens_ds.errors import UserError
from eventlens_ds.train.metrics import read_log

ALWAYS = ("tokens_per_s", "step_time", "data_wait", "mfu", "memory")
"""Fields of log.jsonl that no two runs have in common."""
RUN_ITS_OWN = ("io.run",)


def differences(a: Path, b: Path) -> list[str]:
    """Lines for people. UserError: a folder is no run."""
    for run in (a, b):
        if not (run / "log.jsonl").exists():
            raise UserError(f"{run}: no run folder, it has no log.jsonl")
    lines = list(
        _entries("outcome", *(_json(run / "outcome.json", ("state", "reason", "code", "step")) for run in (a, b)))
    )
    lines += _entries("capsule", *(_json(run / "capsule.json") for run in (a, b)))
    settings = [_settings(run / "config.yaml") for run in (a, b)]
    lines += _entries("config", *settings)
    skipped = [_lines(run / "skipped.jsonl") for run in (a, b)]
    if skipped[0] != skipped[1]:
        lines.append(
            f"skipped: {len(skipped[0])} -> {len(skipped[1])} samples, {len(skipped[0] ^ skipped[1])} not in both"
        )
    return lines + list(_losses(read_log(a / "log.jsonl"), read_log(b / "log.jsonl")))


def _json(path: Path, names: tuple[str, ...] = ()) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: content.get(name) for name in names} if names else content


def _lines(path: Path) -> set[str]:
    return set(path.read_text().splitlines()) if path.exists() else set()


def _settings(path: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from eventlens_ds.config.load import load

    return asdict(load(str(path), [])) if path.exists() else {}


def _entries(where: str, a: Any, b: Any) -> Iterator[str]:
    """ "where.key: A -> B" of every leaf that differs."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            name = f"{where}.{key}"
            if name.removeprefix("config.") not in RUN_ITS_OWN:
                yield from _entries(name, a.get(key), b.get(key))
    elif a != b:
        yield f"{where}: {a} -> {b}"


def _losses(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Iterator[str]:
    """One line per field of log.jsonl that differs: from which step on, in how many, by how much at most."""
    ours, others = ({row["step"]: row for row in rows} for rows in (a, b))
    if ours.keys() != others.keys():
        yield f"log: {len(ours)} -> {len(others)} steps, the last {max(ours, default=0)} -> {max(others, default=0)}"
    common = sorted(ours.keys() & others.keys())
    fields = sorted({name for step in common for name in {*ours[step], *others[step]}} - {*ALWAYS})
    for name in fields:
        pairs = [(step, ours[step].get(name), others[step].get(name)) for step in common]
        differ = [(step, x, y) for step, x, y in pairs if x != y]
        if not differ:
            continue
        step, x, y = differ[0]
        numbers = [abs(p - q) for _, p, q in differ if isinstance(p, float) and isinstance(q, float)]
        most = f", by at most {max(numbers):.3g}" if numbers else ""
        yield f"log.{name}: differs in {len(differ)} of {len(common)} steps, first in step {step}: {x} -> {y}{most}"


def text(a: Path, b: Path) -> str:
    """What the command prints."""
    lines = differences(a, b)
    return "\n".join(lines) if lines else "no difference but times, speed and memory"
