"""skipped.jsonl: every sample that was not used, once, with the reason.

In: (id, reason) pairs on rank 0, in the order of the plan. Out: one JSON line each: {"step", "id", "reason"}; step is
that of log.jsonl in which the sample was first missed, null for one that no row can hold.
Decision: ranks send what they skipped to rank 0 in the step in which it happens, so the file is one, in the order of
the plan whatever the number of ranks, complete at any kill; a resumed run repeats steps and finds their ids listed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.data.records import Batch
from eventlens_ds.errors import UserError
from eventlens_ds.runtime.commit import atomic_write
from eventlens_ds.runtime.distributed import World, gather_objects

FILE = "skipped.jsonl"


class SkippedLog:
    """RUN/skipped.jsonl, on rank 0. UserError naming the file when it cannot be read or written."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE
        self._listed: set[str] = set()
        try:
            whole = self.path.read_bytes() if self.path.exists() else b""
            lines = [line for line in whole.splitlines(keepends=True) if line.endswith(b"\n")]
            self._listed = {json.loads(line)["id"] for line in lines}
            if sum(map(len, lines)) < len(whole):
                atomic_write(self.path, b"".join(lines))  # a last line torn by a kill
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: cannot be continued: {error}") from None

    def add(self, step: int | None, entries: Iterable[Sequence[str]]) -> int:
        """List (id, reason) pairs whose id is not listed yet, through to the disk; returns how many."""
        lines = []
        for name, reason in entries:
            if name not in self._listed:
                self._listed.add(name)
                lines.append(json.dumps({"step": step, "id": name, "reason": reason}) + "\n")
        if lines:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write("".join(lines))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        return len(lines)


def gather_skipped(rows: Sequence[Batch], world: World) -> list[Any]:
    """[id, reason] of the samples that the rows of a step could not use, of all ranks, in the order of the plan.

    rows: those of this rank, which takes every `world.size`-th row of the step. A collective.
    """
    own = [[turn * world.size + world.rank, name, why] for turn, row in enumerate(rows) for name, why in row.skipped]
    every = [entry for part in gather_objects(own) for entry in part]
    return [entry[1:] for entry in sorted(every, key=lambda entry: entry[0])]


def gather_refused(rows: Sequence[Batch], reason: str, world: World) -> list[Any]:
    """[id, reason] of all samples of a step that was skipped, of all ranks, in the order of the plan. A collective."""
    own = [[turn * world.size + world.rank, name] for turn, row in enumerate(rows) for name in row.sample_ids]
    every = sorted((entry for part in gather_objects(own) for entry in part), key=lambda entry: entry[0])
    return [[name, f"its step was skipped: {reason}"] for _, name in every]
