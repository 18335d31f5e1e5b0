"""The demo's recipe under sbatch: two nodes, a rank each, real training.

In: a small embedded world. Out: logs and checkpoints of a Slurm job beside those of `eventlens train --ranks 2`.
Decision: losses, gradient norms and final parameters are compared bit for bit, since ranks, data and arithmetic are
the same and only the launcher differs; what is close but not equal would be a launcher that changes training.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.launch import job as launch
from eventlens_ds.train import outcome
from tests.slurm.cluster import SLURM, Cluster, environment

STEPS = 6
PLACE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


def settings(world: Path, run: Path, steps: int = STEPS) -> list[str]:
    return [
        f"--data.train={world}", f"--io.run={run}", f"--train.steps={steps}", "--train.log_every=1",
        "--train.threads=1", "--io.tensorboard=false", "--train.timeout_minutes=2",
    ]  # fmt: skip


def trained(run: Path) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """(step, loss, gradient norm, samples) of every step, and the final parameters."""
    from eventlens_ds.runtime.checkpoint import resolve, weights

    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    path = resolve(run)
    assert path is not None
    return [(r["step"], r["loss"], r["grad_norm"], r["sample_hash"]) for r in rows], dict(weights(path))


def same(run: Path, other: Path) -> bool:
    import torch

    (log, ends), (other_log, other_ends) = trained(run), trained(other)
    return (
        log == other_log
        and ends.keys() == other_ends.keys()
        and all(torch.equal(t, other_ends[n]) for n, t in ends.items())
    )


def train_here(world: Path, run: Path, *more: str, steps: int = STEPS) -> Path:
    command = [sys.executable, "-m", "eventlens_ds", "train", "--ranks", "2", "--config", "tiny_event"]
    done = subprocess.run(
        [*command, *settings(world, run, steps), *more], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def test_sbatch_equals_two_local_ranks_bit_for_bit(cluster: Cluster, world_folder: Path, tmp_path: Path) -> None:
    """With a USR1 on the way: stopped, queued again, gone on, and still the same bits."""
    run = tmp_path / "slurm"
    number = cluster.submit(*PLACE, str(SLURM / "pretrain.sh"), "tiny_event", *settings(world_folder, run))
    cluster.until(
        number, lambda _: (run / "log.jsonl").exists() and (run / "log.jsonl").read_text().count("\n") >= 2, 180
    )
    cluster.signal(number)
    job = cluster.ended(number, 240)
    assert (job.state, job.code) == ("COMPLETED", 0), cluster.log(number)
    log = cluster.log(number)
    assert "2 ranks on 2 nodes: n[1-2]" in log and "finished" in log
    if job.restarts:
        assert [row["state"] for row in launch.journal(run)] == ["preempted", "finished"]
    assert same(run, train_here(world_folder, tmp_path / "here"))


def when_logged(step: int) -> Callable[[Path], bool]:
    return lambda run: (run / "log.jsonl").exists() and (run / "log.jsonl").read_text().count("\n") >= step


LONG = 30


@pytest.fixture(scope="module")
def whole(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that all faults are measured against."""
    return train_here(world_folder, tmp_path_factory.mktemp("whole") / "run", *LONGER, steps=LONG)


LONGER = ("--train.save_every=10", "--train.keep=5", "--train.eval_every=10", "--eval.samples=150")


COLUMNS = ("fault", "restarts", "went on at step", "seconds to the end of the ranks", "time lost, s")


def lost_time(cluster: Cluster, number: str, run: Path, begun: float, restarts: bool = True) -> float:
    """Seconds from `begun` to the first optimizer step of the next attempt; without one, to the next step logged.
    Slurm's own wait before a requeued job is cut short by Cluster.until."""
    rows = (run / "log.jsonl").read_text().count("\n") if (run / "log.jsonl").exists() else 0
    attempt = outcome.read(run)["attempt"]

    def goes_on(_: Any) -> bool:
        now = outcome.read(run)
        if not restarts:
            return when_logged(rows + 1)(run)
        return now["attempt"] > attempt and now["first_step_seconds"] is not None

    cluster.until(number, goes_on, 400)
    return time.time() - begun


def row_of(fault: str, number: str, cluster: Cluster, run: Path, seconds: float) -> tuple[str, ...]:
    """A line of the table of faults, from the job, its log and the journal of its run."""
    stops = [row["stop_seconds"] for row in launch.journal(run) if row["signal"]]
    at = re.findall(r"resumed from .* at step (\d+)", cluster.log(number))
    return (
        fault,
        str(cluster.job(number).restarts),
        at[-1] if at else "-",
        str(max(stops, default="-")),
        f"{seconds:.0f}",
    )


def table_of(rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (COLUMNS, ("---",) * len(COLUMNS), *rows))


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, ...]]]:
    """Rows of the table of faults, printed at the end."""
    rows: list[tuple[str, ...]] = []
    yield rows
    print("\n" + table_of(rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["start", "step", "eval", "save", "preempt", "requeue", "restart slurmctld", "node crash"]
)
def test_every_fault_ends_in_the_same_parameters(
    cluster: Cluster, world_folder: Path, whole: Path, tmp_path: Path, table: list[tuple[str, ...]], fault: str
) -> None:
    run = tmp_path / "run"
    number = cluster.submit(
        *PLACE, str(SLURM / "pretrain.sh"), "tiny_event", *settings(world_folder, run, LONG), *LONGER
    )
    ready = {
        "start": lambda: (run / "outcome.json").exists(),
        "eval": lambda: when_logged(10)(run),
        "save": lambda: any((run / "checkpoints").glob("*10*")),
    }.get(fault, lambda: when_logged(13)(run))
    cluster.until(number, lambda _: ready(), 180)
    begun = time.time()
    strike(cluster, number, fault)
    seconds = lost_time(cluster, number, run, begun, restarts=fault != "restart slurmctld")
    job = cluster.ended(number, 400)
    assert (job.state, job.code) == ("COMPLETED", 0), cluster.log(number)
    assert same(run, whole)
    if fault == "eval":
        log = cluster.log(number)
        # Ranks stop between the parts of an evaluation, so its scores come after the signal, or not in this attempt.
        scores = log.find("step 10: q2a")
        assert scores < 0 or log.index("USR1: asking") < scores, "the evaluation was over before the signal"
    table.append(row_of(fault, number, cluster, run, seconds))
    print(f"\n{fault}: {seconds:.1f} s lost, restarts {job.restarts}\n{launch.history(run)}")


def strike(cluster: Cluster, number: str, fault: str) -> None:
    if fault in ("start", "step", "eval", "save"):
        cluster.signal(number)
    elif fault == "preempt":
        cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2")
    elif fault == "requeue":
        cluster.run("scontrol", "requeue", number)
    elif fault == "restart slurmctld":
        cluster.run("sh", "-c", "scontrol shutdown slurmctld && sleep 2 && slurmctld")
    else:
        cluster.node("crash", "n2")
        cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=crash")
        cluster.node("boot", "n2")


@pytest.mark.slow
def test_eval_on_two_nodes_equals_eval_here(cluster: Cluster, world_folder: Path, tmp_path: Path) -> None:
    run = train_here(world_folder, tmp_path / "run", steps=1)
    asked = [str(run), "--data", str(world_folder), "--limit", "4", "--controls", "none"]
    number = cluster.submit(*PLACE, str(SLURM / "eval.sh"), *asked, "--out", str(tmp_path / "slurm"))
    assert cluster.ended(number, 240).code == 0, cluster.log(number)
    here = [sys.executable, "-m", "eventlens_ds", "eval", *asked, "--out", str(tmp_path / "here"), "--ranks", "2"]
    subprocess.run(here, env=environment(), check=True, capture_output=True, timeout=240)
    found = [json.loads((tmp_path / place / "metrics" / "vcr.json").read_text())["vcr"] for place in ("slurm", "here")]
    assert found[0] == found[1] and found[0]["n"] > 0
    assert not list(run.glob(".exits-*"))
