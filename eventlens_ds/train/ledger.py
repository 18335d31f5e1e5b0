"""ledger-rank*.jsonl: which sample was seen in which step and micro-step, by which attempt.

In: the rows of every step. Out: one JSON line per sample; `effective` gives what the committed history of a run saw,
which is what an uninterrupted run would have seen (launch/prove.py compares them).
Decision: lines are appended and never taken back. An attempt supersedes what attempts before it did from its first
step on, so the file also shows which work was lost to a kill.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.data.records import Batch
from eventlens_ds.runtime.commit import atomic_write


class Ledger:
    """The ledger of one rank; a last line torn by a kill is cut off."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.path = run_dir / f"ledger-rank{rank}.jsonl"
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            atomic_write(self.path, b"".join(lines[:-1]))
        self.attempt = 1 + max((entry["attempt"] for entry in read(self.path)), default=-1)

    def write(self, step: int, rows: Sequence[Batch]) -> None:
        entries = [
            {"attempt": self.attempt, "step": step, "micro_step": micro, "id": sample}
            for micro, row in enumerate(rows)
            for sample in row.sample_ids
        ]
        with self.path.open("a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))


def read(path: Path) -> list[dict[str, Any]]:
    """Entries of a ledger; a torn last line is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def effective(path: Path) -> dict[tuple[int, int], list[str]]:
    """(step, micro-step) -> sample ids, of the last attempt that did the step."""
    found: dict[tuple[int, int], list[str]] = {}
    attempt = -1
    for entry in read(path):
        if entry["attempt"] != attempt:
            attempt = entry["attempt"]
            found = {key: ids for key, ids in found.items() if key[0] < entry["step"]}
        found.setdefault((entry["step"], entry["micro_step"]), []).append(entry["id"])
    return found
