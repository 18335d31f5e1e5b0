"""A node that Slurm has lost while its rank lives on: the run stays that rank's until it has gone.

In: ranks that hold the lease of a run folder, toys and real ones, on nodes that are cut off or whose slurmd is killed.
Out: the log and the journal of the attempt that Slurm starts in their place. Decision: the old toy hangs as in a
collective without the others, and only the test ends it, so how long it lives does not depend on anybody's speed; the
real one does hang in a collective.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.launch import job as launch
from eventlens_ds.train import outcome
from tests.slurm.cluster import SLURM, Cluster
from tests.slurm.conftest import STEPS
from tests.slurm.test_life_cycle import at_step, journal, steps, went_through
from tests.slurm.test_training import (
    LONG,
    LONGER,
    PLACE,
    lost_time,
    row_of,
    same,
    settings,
    table_of,
    when_logged,
    whole,
)

__all__ = ["whole"]

ONE = {"TOY_HANG": "step == 7 and attempt == 1", "EVENTLENS_LEASE_WAIT": "1"}
LEASE = ("--io.lease_seconds=2",)


@pytest.fixture(scope="module")
def cluster(slurm_here: None) -> Iterator[Cluster]:
    with Cluster(nodes=3) as made:
        yield made


def holder(run: Path) -> dict[str, Any]:
    (path,) = (run / "lease").glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@contextmanager
def lost(cluster: Cluster, node: str, how: str) -> Iterator[None]:
    """The node is DOWN for Slurm: without a network, or with a killed slurmd. Its processes live."""
    if how != "cut":
        cluster.on(node, "pkill", "-KILL", "-x", "slurmd")
    if how != "slurmd":
        cluster.node("cut", node)
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    try:
        yield
    finally:
        if how == "cut":
            cluster.node("mend", node)
        cluster.node("crash", node)
        cluster.node("boot", node)


def refused(cluster: Cluster, number: str, times: int = 1, seconds: float = 60) -> None:
    cluster.until(number, lambda _: cluster.log(number).count("the run folder is in use, try") >= times, seconds)


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("cut and mended", "slurmd")]


@pytest.mark.parametrize("how", ["cut", *SLOW])
def test_a_rank_that_lives_on_keeps_the_run(
    cluster: Cluster, begin: Callable[..., str], tmp_path: Path, how: str
) -> None:
    run = tmp_path / "run"
    number = begin("--nodes=1", settings=LEASE, **ONE)
    at_step(cluster, number, run, 7)
    old = holder(run)
    node = old["host"]
    with lost(cluster, node, how):
        tries = 1 if how == "cut" else 2
        refused(cluster, number, tries)
        # Nobody else has written: neither an attempt nor a step nor a lease.
        assert outcome.read(run)["attempt"] == 1 and outcome.read(run)["state"] == outcome.RUNNING
        assert steps(run) == list(range(1, 8)) and holder(run)["token"] == old["token"]
        assert [row[1:] for row in journal(run) if row[1:] != (0, "requeue")] == [(4, "again")] * tries
        log = cluster.log(number)
        assert f"error: {run}: in use by job {number}, process {old['pid']} on {node} (lease 1)" in log
        assert "try 1 of 30: held by job" in log
        if how == "cut and mended":
            # The shell of the old attempt reaches Slurm again, no slurmd ends it, and its job runs: it must leave it.
            cluster.node("mend", node)
        cluster.on(node, "kill", "-KILL", str(old["pid"]))
        job = cluster.ended(number)
    if how == "cut and mended":
        assert "that attempt goes on" in cluster.log(number)
    went_through(job, run)
    assert job.restarts == 1 and steps(run) == [*range(1, 8), *range(6, STEPS + 1)]
    assert journal(run)[-1] == ("finished", 0, "exit") and outcome.read(run)["attempt"] == 2
    print(launch.history(run))


@pytest.mark.slow
def test_without_the_lease_two_attempts_write(cluster: Cluster, begin: Callable[..., str], tmp_path: Path) -> None:
    """The guard off: a second attempt is opened in the run of a rank that lives."""
    run = tmp_path / "run"
    number = begin("--nodes=1", settings=LEASE, **ONE, TOY_LEASE="0")
    at_step(cluster, number, run, 7)
    old = holder(run)
    with lost(cluster, old["host"], "cut"):
        cluster.until(number, lambda _: outcome.read(run)["attempt"] == 2 and len(steps(run)) > 7, 60)
        cluster.on(old["host"], "kill", "-0", str(old["pid"]))
        cluster.ended(number)


@pytest.mark.slow
def test_waiting_for_the_old_rank_is_bounded(cluster: Cluster, begin: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = begin("--nodes=1", settings=LEASE, **ONE, EVENTLENS_LEASE_TRIES="3")
    at_step(cluster, number, run, 7)
    with lost(cluster, holder(run)["host"], "cut"):
        job = cluster.ended(number)
    assert (job.state, job.code, job.restarts) == ("FAILED", 4, 1)
    assert [row[1:] for row in journal(run)] == [(4, "again"), (4, "again"), (4, "exit")]
    assert "try 3 of 3" in cluster.log(number) and outcome.read(run)["attempt"] == 1


@pytest.mark.slow
def test_training_goes_on_once_the_old_rank_has_gone(
    cluster: Cluster, world_folder: Path, whole: Path, tmp_path: Path
) -> None:
    """Two ranks train; the node of rank 0, which holds the lease, is cut off, and that rank waits for the other one."""
    run = tmp_path / "run"
    given = [*settings(world_folder, run, LONG), *LONGER, "--io.lease_seconds=10"]
    number = cluster.submit(*PLACE, str(SLURM / "pretrain.sh"), "tiny_event", *given, EVENTLENS_LEASE_WAIT="5")
    cluster.until(number, lambda _: when_logged(13)(run), 180)
    old = holder(run)
    begun = time.time()
    with lost(cluster, old["host"], "cut"):
        refused(cluster, number, seconds=180)
        written = (run / "log.jsonl").read_bytes()
        assert outcome.read(run)["attempt"] == 1 and holder(run)["token"] == old["token"]
        refused(cluster, number, 2, seconds=60)
        assert (run / "log.jsonl").read_bytes() == written
        cluster.on(old["host"], "kill", "-KILL", str(old["pid"]))
        seconds = lost_time(cluster, number, run, begun)
        job = cluster.ended(number, 300)
    assert (job.state, job.code, job.restarts) == ("COMPLETED", 0, 1), cluster.log(number)
    assert same(run, whole)
    print("\n" + table_of([row_of("node cut off, rank alive until refused twice", number, cluster, run, seconds)]))
