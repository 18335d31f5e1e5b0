"""`eventlens prove elastic`: a run that goes on with other numbers of ranks, beside one that kept the first.

In: a recipe, numbers of ranks in their order. Out: a table of steps and OUT/elastic.json; exit code 3 when a step saw
other samples or its loss differs by more than TOLERANCE. The launcher is killed when the checkpoint of its part of the
run is committed, and the same command goes on with the next number of ranks.
Decision: dropout stays as the recipe has it. Samples and dropout are keyed by step and row, so what is left of a
difference is the order in which floating-point sums are taken.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError, UserError
from eventlens_ds.launch.prove import Proof, claim, data_of, reference
from eventlens_ds.train.metrics import read_log

TOLERANCE = 1e-5
"""Largest difference of a step's loss in fp32."""


def elastic(proof: Proof, order: Sequence[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Run the reference with order[0] ranks, then the same run with each number of ranks in turn; compare."""
    from eventlens_ds.config import load

    if len(order) < 2 or min(order) < 1:
        raise UserError(f"--order {','.join(map(str, order))}: at least two numbers of ranks, each at least 1")
    train = load.load(proof.recipe, list(proof.settings)).train
    if train.save_every < 1 or train.steps < train.save_every * len(order):
        raise UserError(f"prove elastic: train.steps {train.steps} holds no checkpoint for each of {len(order)} parts")
    claim(proof.out)
    data = data_of(proof)
    seconds = reference(replace(proof, ranks=order[0]), data)
    say(f"reference: {seconds:.1f} s on {order[0]} ranks")
    run = proof.out / "elastic"
    shutil.rmtree(run, ignore_errors=True)
    ends = [train.steps * (part + 1) // len(order) // train.save_every * train.save_every for part in range(len(order))]
    at = []
    for part, ranks in enumerate(order):
        last = part + 1 == len(order)
        at.append(_part(replace(proof, ranks=ranks), run, data, None if last else ends[part]))
        say(f"{ranks} ranks up to step {at[-1]}")
    rows = _rows(proof.out / "reference", run, order, at)
    result = {
        "recipe": proof.recipe,
        "order": list(order),
        "without": proof.without,
        "rows": rows,
        "same_samples": all(row["same_samples"] for row in rows),
        "largest": max(row["delta"] for row in rows),
    }
    (proof.out / "elastic.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _part(proof: Proof, run: Path, data: Sequence[Path], end: int | None) -> int:
    """Go on until the checkpoint of step `end` is committed (None: to the end); the step that is kept."""
    process = proof.start(run, data)
    while end is not None and process.poll() is None:
        if any(step >= end for step in _steps(run)):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return max(_steps(run))
        time.sleep(0.05)
    if process.wait():
        raise DataError(f"{run}: {proof.ranks} ranks ended with exit code {process.returncode}; see {run}.log")
    return max(_steps(run))


def _steps(run: Path) -> list[int]:
    from eventlens_ds.runtime import commit

    return [int(path.name.split("-")[1]) for path in commit.committed(run)]


def _rows(one: Path, other: Path, order: Sequence[int], at: Sequence[int]) -> list[dict[str, Any]]:
    found = {row["step"]: row for row in read_log(other / "log.jsonl")}
    rows = []
    for row in read_log(one / "log.jsonl"):
        step, mine = row["step"], found.get(row["step"])
        ranks = next(ranks for ranks, end in zip(order, at) if step <= end)
        same = mine is not None and mine["sample_hash"] == row["sample_hash"]
        delta = abs(mine["loss"] - row["loss"]) if mine is not None else float("inf")
        rows.append({"step": step, "ranks": ranks, "loss": row["loss"], "delta": delta, "same_samples": same})
    return rows


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'step':>5} {'ranks':>5} {'loss':>10} {'|delta|':>9}  samples"]
    for row in result["rows"]:
        ids = "same" if row["same_samples"] else "OTHERS"
        lines.append(f"{row['step']:>5} {row['ranks']:>5} {row['loss']:>10.6f} {row['delta']:>9.2e}  {ids}")
    order = " -> ".join(map(str, result["order"]))
    without = f", without {result['without']}" if result["without"] else ""
    return "\n".join([*lines, f"{order} ranks: largest |delta loss| {result['largest']:.2e}{without}"])
