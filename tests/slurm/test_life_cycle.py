"""Who stops a job, who queues it again, and who does not: the scripts on real daemons, with toy ranks.

In: a cluster of two nodes, one rank each. Out: states of jobs, their exit codes and restarts, the journal of the run,
the lines of the log. Decision: every test says how often each step was run, for "it ended well" would also be true of a
job that began from scratch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eventlens_ds.launch import job as launch
from tests.slurm.cluster import SLURM, Cluster, Job
from tests.slurm.conftest import STEPS


def steps(run: Path) -> list[int]:
    return [int(line) for line in (run / "steps.txt").read_text().split()] if (run / "steps.txt").exists() else []


def at_step(cluster: Cluster, number: str, run: Path, step: int) -> None:
    cluster.until(number, lambda _: step in steps(run), 60)


def journal(run: Path) -> list[tuple[str, int, str]]:
    return [(row["state"], row["code"], row["decision"]) for row in launch.journal(run)]


def went_through(job: Job, run: Path) -> None:
    assert (job.state, job.code) == ("COMPLETED", 0), f"{job}\n{launch.history(run)}"
    assert sorted(set(steps(run))) == list(range(1, STEPS + 1))


def test_a_job_ends_and_another_one_finds_it_finished(
    cluster: Cluster, begin: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = cluster.ended(begin())
    went_through(job, run)
    assert job.restarts == 0 and steps(run) == list(range(1, STEPS + 1)) and journal(run) == [("finished", 0, "exit")]
    again = begin()
    assert cluster.ended(again).code == 0 and "finished before" in cluster.log(again)
    assert len(steps(run)) == STEPS and len(journal(run)) == 1
    # More steps than before are work again.
    assert cluster.ended(begin(settings=(f"--train.steps={STEPS + 1}",))).code == 0 and steps(run)[-1] == STEPS + 1


def test_usr1_saves_stops_and_queues_again(cluster: Cluster, begin: Callable[..., str], tmp_path: Path) -> None:
    """No step is lost: the attempt after goes on where the signal came. Rank 0 still writes when rank 1 has left."""
    run = tmp_path / "run"
    number = begin()
    at_step(cluster, number, run, 2)
    cluster.signal(number)
    job = cluster.ended(number)
    went_through(job, run)
    assert job.restarts == 1 and steps(run) == list(range(1, STEPS + 1))
    assert journal(run) == [("preempted", 0, "requeue"), ("finished", 0, "exit")]
    log = cluster.log(number)
    assert "restart 0" in log and "restart 1" in log and "saved at step" in log


@pytest.mark.slow
def test_usr1_while_ranks_start_is_repeated_until_it_is_heard(
    cluster: Cluster, begin: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = begin(TOY_START="4")
    cluster.until(number, lambda _: (run / "outcome.json").exists(), 30)
    cluster.signal(number)
    job = cluster.ended(number)
    went_through(job, run)
    assert job.restarts == 1 and steps(run) == list(range(1, STEPS + 1))
    assert journal(run)[0] == ("preempted", 0, "requeue")


@pytest.mark.slow
def test_a_start_that_takes_too_long_is_ended_by_term(
    cluster: Cluster, begin: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = begin(TOY_START="40", EVENTLENS_LEAD="8")
    cluster.until(number, lambda _: (run / "outcome.json").exists(), 30)
    cluster.signal(number)
    cluster.until(number, lambda job: job.restarts == 1, 40)
    assert journal(run) == [("failed", 143, "requeue")] and "before its first step" in cluster.log(number)
    cluster.run("scancel", number)
    cluster.ended(number)


def test_preemption_saves_and_goes_on(cluster: Cluster, begin: Callable[..., str], tmp_path: Path) -> None:
    """A job of a higher partition takes the nodes; ranks get TERM from Slurm, the script hears nothing."""
    run = tmp_path / "run"
    number = begin()
    at_step(cluster, number, run, 2)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.until(number, lambda job: job.restarts == 1, 40)
    assert cluster.ended(urgent).state == "COMPLETED"
    job = cluster.ended(number)
    went_through(job, run)
    assert job.restarts == 1 and steps(run) == list(range(1, STEPS + 1))
    assert journal(run) == [("preempted", 0, "requeue"), ("finished", 0, "exit")]


@pytest.mark.parametrize("code", [2, 3, 6])
def test_what_repeating_cannot_change_is_not_repeated(
    cluster: Cluster, begin: Callable[..., str], tmp_path: Path, code: int
) -> None:
    number = begin(TOY_FAULT=f"{code} if step == 2 else 0")
    job = cluster.ended(number)
    assert (job.state, job.code, job.restarts) == ("FAILED", code, 0), cluster.log(number)
    log = cluster.log(number)
    assert f"failed with code {code}" in log and "fault at step 2" in log


def test_a_deterministic_crash_is_given_up(cluster: Cluster, begin: Callable[..., str], tmp_path: Path) -> None:
    """It fails at step 7 for ever: three attempts from the checkpoint of step 5, then its own exit code."""
    run = tmp_path / "run"
    number = begin(TOY_FAULT="17 if step == 7 else 0")
    job = cluster.ended(number)
    assert (job.state, job.code, job.restarts) == ("FAILED", 17, 2)
    assert [row[2] for row in journal(run)] == ["requeue", "requeue", "exit"]
    assert "given up after 3 attempts" in cluster.log(number) and set(steps(run)) <= set(range(1, 8))


@pytest.mark.slow
def test_a_killed_rank_is_named_and_its_run_goes_on(
    cluster: Cluster, begin: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = begin(TOY_FAULT="-9 if step == 7 and rank == 1 and attempt == 1 else 0")
    job = cluster.ended(number)
    went_through(job, run)
    assert job.restarts == 1 and "rank 1 on n2 ended with 137" in cluster.log(number)


@pytest.mark.slow
def test_a_stale_outcome_is_not_believed(cluster: Cluster, begin: Callable[..., str], tmp_path: Path) -> None:
    """The attempt before was preempted; ranks that die before they write anything must not look like it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "outcome.json").write_text(json.dumps({"state": "preempted", "code": 75, "attempt": 4, "step": 3}) + "\n")
    job = cluster.ended(begin(TOY_FAULT="9", TOY_EARLY="1"))
    assert (job.state, job.code, job.restarts) == ("FAILED", 9, 2) and journal(run)[0] == ("", 9, "requeue")


@pytest.mark.slow
def test_lease_is_asked_for_again_only_after_a_restart(
    cluster: Cluster, begin: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = cluster.ended(begin(TOY_FAULT="4"))
    assert (job.state, job.code, job.restarts) == ("FAILED", 4, 0)
    (run / "slurm" / launch.JOURNAL).unlink()
    fault = "9 if attempt == 2 else 4 if attempt == 3 else 0"
    number = begin(TOY_FAULT=fault, EVENTLENS_LEASE_WAIT="1")
    job = cluster.ended(number)
    went_through(job, run)
    assert job.restarts == 1 and [row[2] for row in journal(run)] == ["requeue", "again", "exit"]


def test_cancelled_is_not_queued_again(cluster: Cluster, begin: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = begin()
    at_step(cluster, number, run, 1)
    cluster.run("scancel", number)
    assert cluster.ended(number).state == "CANCELLED"
    time.sleep(1)
    assert cluster.job(number).restarts == 0


@pytest.mark.slow
def test_scontrol_requeue_from_outside(cluster: Cluster, begin: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = begin()
    at_step(cluster, number, run, 7)
    cluster.run("scontrol", "requeue", number)
    job = cluster.ended(number)
    went_through(job, run)
    assert job.restarts == 1


@pytest.mark.slow
def test_a_chain_goes_on_without_requeueing(cluster: Cluster, toy: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = [f"--io.run={run}", f"--data.train={tmp_path}", f"--train.steps={STEPS}"]
    said = cluster.run(
        "bash", str(SLURM / "pretrain.sh"), "--chain", "3", "tiny_event", *given,
        env={"EVENTLENS_PYTHON": toy, "EVENTLENS_GPUS_PER_NODE": "1", "EVENTLENS_LOGS": str(tmp_path / "logs")},
    )  # fmt: skip
    jobs = [line.split()[2].rstrip(";") for line in said.splitlines()]
    at_step(cluster, jobs[0], run, 3)
    cluster.signal(jobs[0])
    ended = [cluster.ended(number) for number in jobs]
    assert [(job.state, job.restarts) for job in ended] == [("COMPLETED", 0)] * 3
    assert steps(run) == list(range(1, STEPS + 1)) and [row[0] for row in journal(run)] == ["preempted", "finished"]
    assert "finished before" in (tmp_path / "logs" / f"pretrain-{jobs[2]}.log").read_text()


@pytest.mark.slow
def test_the_time_limit_saves_and_goes_on(cluster: Cluster, begin: Callable[..., str], tmp_path: Path) -> None:
    """Slurm's own clock, which it looks at every 30 s: USR1 comes half a minute before the end of a minute."""
    run = tmp_path / "run"
    number = begin("--time=1", "--signal=B:USR1@30", settings=("--train.steps=5000",))
    job = cluster.until(number, lambda job: job.restarts == 1 or job.state == "TIMEOUT", 150)
    assert job.restarts == 1 and journal(run) == [("preempted", 0, "requeue")]
    cluster.run("scancel", number)
    cluster.ended(number)
