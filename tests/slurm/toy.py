"""A rank of a run that computes nothing: it opens an attempt, "trains" 0.2 s a step, saves, ends as a trainer ends.

In: the arguments of `python -m eventlens_ds.train`, and TOY_FAULT: a Python expression over `step`, `attempt` and
`rank` whose value is an exit code (0: go on; below 0: that signal), evaluated before every step, with TOY_EARLY also
before the attempt is opened; TOY_START: seconds before the first step; TOY_HANG: another expression, where it is true
the rank waits for ever as in a collective whose other ranks are gone; TOY_LEASE=0: it overlooks the lease of others.
Out: outcome.json and lease by the trainer's own functions, empty checkpoint folders, RUN/steps.txt (one line a step).
Decision: only rank 0 has state, and it tells the others through a file, so that no rank needs torch.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from eventlens_ds.errors import UserError
from eventlens_ds.runtime import commit
from eventlens_ds.train import door, outcome
from eventlens_ds.train.preempt import StopFlag

SAVE_EVERY = 5


def main(argv: list[str]) -> int:
    parser = door.Parser()
    door.add_arguments(parser)
    config = door.configure(*parser.parse_known_args(argv))
    run, rank = Path(config.io.run), int(os.environ["SLURM_PROCID"])
    if os.environ.get("TOY_EARLY"):
        fault(0, 0, rank)
    if os.environ.get("TOY_LEASE") == "0":
        shutil.rmtree(run / "lease", ignore_errors=True)
    with outcome.Attempt(run, config.io.lease_seconds) as attempt:
        if attempt.problem is not None:
            raise attempt.problem
        time.sleep(float(os.environ.get("TOY_START", "0")))
        with StopFlag() as stop:
            return train(run, rank, config.train.steps, attempt, stop)


def train(run: Path, rank: int, steps: int, attempt: outcome.Attempt, stop: StopFlag) -> int:
    number, step, end = together(run, rank)
    while step < steps:
        fault(step, number, rank)
        while value("TOY_HANG", step, number, rank):
            time.sleep(0.2)
        time.sleep(0.2)
        step += 1
        if rank == 0:
            with (run / "steps.txt").open("a") as file:
                file.write(f"{step}\n")
        last = stop.raised if rank == 0 else end.exists()
        if rank == 0 and (last or step % SAVE_EVERY == 0 or step == steps):
            folder = run / "checkpoints" / f"step-{step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / commit.MANIFEST).write_text("{}")
        if last and step < steps:
            if rank == 0:
                end.touch()
                time.sleep(1)  # rank 0 still writes when the others have gone
                attempt.end(outcome.PREEMPTED, 75, step, "signal")
            return 75
    if rank == 0:
        attempt.end(outcome.FINISHED, 0, step)
    return 0


def together(run: Path, rank: int) -> tuple[int, int, Path]:
    """(number of this attempt, step to go on from, file that tells of its end), when all ranks are there."""
    key = "-".join(os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    begun = run / f"begun-{key}"
    if rank == 0:
        while len(list(run.glob(f"here-{key}-*"))) < int(os.environ["SLURM_NTASKS"]) - 1:
            time.sleep(0.05)
        newest = max((int(path.name.split("-")[1]) for path in commit.committed(run)), default=0)
        commit.atomic_write(begun, f"{outcome.read(run)['attempt']} {newest}".encode())
    else:
        (run / f"here-{key}-{rank}").touch()
    while not begun.exists():
        time.sleep(0.05)
    number, step = map(int, begun.read_text().split())
    return number, step, run / f"end-{key}"


def value(name: str, step: int, attempt: int, rank: int) -> int:
    return int(eval(os.environ.get(name, "0"), {"step": step, "attempt": attempt, "rank": rank}))


def fault(step: int, attempt: int, rank: int) -> None:
    code = value("TOY_FAULT", step, attempt, rank)
    if code < 0:
        os.kill(os.getpid(), -code)
        time.sleep(5)
    if code:
        error = UserError(f"fault at step {step}")
        error.code = code
        raise error


if __name__ == "__main__":
    sys.exit(door.guarded(lambda: main(sys.argv[1:])))
