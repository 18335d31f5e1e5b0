"""`eventlens prove faults`: one fault on one rank in every phase of a run; how long until the run has ended, and whom
it blames.

In: a recipe, faults, phases. Out: a table and OUT/faults.json; exit code 3 when a run goes on, hangs or blames another.
Each cell is a run of its own, by the command a user types: the fault strikes rank 1 when it enters the phase
(launch/sabotage.py), and must end the run with a code other than 0 within train.watchdog_seconds and GRACE, with the
rank and the phase in outcome.json.
Decision: the time counts from the fault itself, which writes the clock before it strikes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eventlens_ds.errors import UserError
from eventlens_ds.launch import sabotage
from eventlens_ds.launch.prove import Proof, claim, data_of
from eventlens_ds.runtime import heartbeat
from eventlens_ds.runtime.local_ranks import before_exec
from eventlens_ds.train import outcome

FAULTS = ("exception", "exit", "abort", "kill", "stop")
PHASES = (heartbeat.START, heartbeat.STEP, heartbeat.EVAL, heartbeat.SAVE)
GRACE = 25.0
"""Seconds beside train.watchdog_seconds: stacks of the others, the launcher's patience with ranks that are left."""
GUILTY = 1
STEP = 2
"""Step in which the fault strikes; evaluation and saving are due in it."""
SETTINGS = ("--train.steps=4", "--train.save_every=2", "--train.eval_every=2", "--io.tensorboard=false")


@dataclass
class Cell:
    """What came of one fault. seconds: from the fault to the end of the command; None: it never struck."""

    fault: str
    phase: str
    code: int | None
    seconds: float | None
    named: bool
    report: bool
    reason: str

    def ok(self, limit: float) -> bool:
        """The run ended with an error, in time, and blames the right rank in the right phase."""
        return bool(self.code) and self.seconds is not None and self.seconds <= limit and self.named


def run(proof: Proof, data: Sequence[Path], fault: str, phase: str, limit: float) -> Cell:
    """One cell."""
    folder = proof.out / f"{fault}-{phase}"
    shutil.rmtree(folder, ignore_errors=True)
    log = Path(f"{folder}.log")
    asked = {"fault": fault, "rank": GUILTY, "phase": phase, "step": 0 if phase == heartbeat.START else STEP}
    command = [sys.executable, "-m", sabotage.MODULE, *proof.command(folder, data)[4:]]
    env = {**os.environ, sabotage.VARIABLE: json.dumps(asked)}
    with log.open("wb") as out:
        arm = before_exec(os.getpid())
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, preexec_fn=arm)
        code, struck = _wait(process, log, limit)
    ended = time.time()
    said = outcome.read(folder)
    reason = str(said.get("reason", ""))
    reports = list(folder.glob("watchdog-*.txt"))
    where = phase if phase == heartbeat.START else f"step {STEP}, phase {phase}"
    named = f"rank {GUILTY}" in reason and where in reason and said.get("state") == outcome.FAILED
    seconds = None if struck is None else round(ended - struck, 1)
    return Cell(fault, phase, code, seconds, named, bool(reports), reason)


def _wait(process: subprocess.Popen[bytes], log: Path, limit: float) -> tuple[int | None, float | None]:
    """(exit code, time of the fault); a run that goes on for longer than `limit` after it is killed, code None."""
    struck = None
    while True:
        try:
            return process.wait(0.1), struck or _struck(log)
        except subprocess.TimeoutExpired:
            pass
        struck = struck or _struck(log)
        if struck and time.time() - struck > limit:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None, struck


def _struck(log: Path) -> float | None:
    found = re.search(r"^sabotage: .* at ([\d.]+)$", log.read_text(errors="replace"), re.MULTILINE)
    return float(found[1]) if found else None


def matrix(
    proof: Proof, faults: Sequence[str], phases: Sequence[str], seconds: float, say: Callable[[str], None]
) -> list[Cell]:
    """Every fault in every phase; OUT/faults.json. UserError: an unknown name."""
    for names, known in ((faults, tuple(sabotage.FAULTS)), (phases, PHASES)):
        for name in names:
            if name not in known:
                raise UserError(f"eventlens prove faults: {name}: known are {', '.join(known)}")
    claim(proof.out)
    data = data_of(proof)
    watch = f"--train.watchdog_seconds={seconds:g}"
    proof = Proof(proof.recipe, (*SETTINGS, *proof.settings, watch), proof.out, proof.ranks)
    cells = []
    for phase in phases:
        for fault in faults:
            cells.append(run(proof, data, fault, phase, seconds + GRACE))
            say(line(cells[-1], seconds + GRACE))
    (proof.out / "faults.json").write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")
    return cells


def line(cell: Cell, limit: float) -> str:
    """A cell for people."""
    took = "-" if cell.seconds is None else f"{cell.seconds:.1f} s"
    code = "hung" if cell.code is None else str(cell.code)
    verdict = "ok" if cell.ok(limit) else "WRONG"
    return f"{verdict:<6} {cell.fault:<10} {cell.phase:<6} {took:>8}  exit {code:<5} {cell.reason[:110]}"
