"""A job that may have one node or two goes on with the node that is left, its step unchanged.

In: `sbatch --nodes=1-2`, a node that crashes and stays away. Out: where the ranks of each attempt ran, the steps, and
for real training the losses. Decision: a loss may differ from the uninterrupted run's by what another order of
floating-point sums explains, as in `eventlens prove elastic`; the samples of a step may not differ at all.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eventlens_ds.launch import job as launch
from eventlens_ds.launch.elastic import TOLERANCE
from tests.slurm.cluster import SLURM, Cluster
from tests.slurm.conftest import STEPS
from tests.slurm.test_life_cycle import at_step, steps, went_through
from tests.slurm.test_training import LONG, LONGER, lost_time, row_of, settings, table_of, trained, when_logged, whole

__all__ = ["whole"]

RANGE = ("--nodes=1-2", "--gpus-per-node=2")


def lose(cluster: Cluster, node: str) -> None:
    cluster.node("crash", node)
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=crash")


def everyone(cluster: Cluster) -> None:
    """A range of nodes starts with those that are free: wait for all of them."""
    cluster.run(
        "sh", "-c", f"until [ $(sinfo -hN -p main -t idle -o %N | wc -l) = {cluster.nodes} ]; do sleep 0.1; done"
    )


def places(log: str) -> list[tuple[str, str]]:
    """(ranks, nodes) of every attempt."""
    return re.findall(r"(\d+) ranks on (\d+) nodes", log)


@pytest.mark.parametrize("node", ["n2", pytest.param("n1", marks=pytest.mark.slow)])
def test_a_job_goes_on_with_the_node_that_is_left(
    cluster: Cluster, begin: Callable[..., str], tmp_path: Path, node: str
) -> None:
    run = tmp_path / "run"
    everyone(cluster)
    number = begin(*RANGE, settings=("--io.lease_seconds=3",))
    at_step(cluster, number, run, 7)
    lose(cluster, node)
    try:
        job = cluster.ended(number)
    finally:
        cluster.node("boot", node)
    went_through(job, run)
    assert job.restarts == 1 and steps(run)[-1] == STEPS
    print(cluster.log(number))
    assert places(cluster.log(number)) == [("4", "2"), ("2", "1")]
    print(launch.history(run))


@pytest.mark.slow
def test_with_a_number_of_tasks_it_waits_for_the_node(
    cluster: Cluster, begin: Callable[..., str], tmp_path: Path
) -> None:
    """Why README says to leave --ntasks-per-node out: Slurm keeps the four tasks of the first start."""
    run = tmp_path / "run"
    everyone(cluster)
    number = begin(*RANGE, "--ntasks-per-node=2")
    at_step(cluster, number, run, 7)
    lose(cluster, "n2")
    try:
        cluster.until(number, lambda job: job.state == "PENDING" and job.reason.startswith("ReqNodeNotAvail"), 60)
    finally:
        cluster.node("boot", "n2")
    went_through(cluster.ended(number), run)
    assert places(cluster.log(number)) == [("4", "2")] * 2


@pytest.mark.slow
def test_training_goes_on_with_the_node_that_is_left(
    cluster: Cluster, world_folder: Path, whole: Path, tmp_path: Path
) -> None:
    """Two ranks, then one: the same samples and, but for the order of sums, the same losses."""
    run = tmp_path / "run"
    everyone(cluster)
    given = [*settings(world_folder, run, LONG), *LONGER]
    place = ("--nodes=1-2", "--gpus-per-node=1", str(SLURM / "pretrain.sh"), "tiny_event")
    number = cluster.submit(*place, *given)
    cluster.until(number, lambda _: when_logged(13)(run), 180)
    begun = time.time()
    lose(cluster, "n2")
    try:
        seconds = lost_time(cluster, number, run, begun)
        job = cluster.ended(number, 300)
    finally:
        cluster.node("boot", "n2")
    log = cluster.log(number)
    print("\n" + table_of([row_of("node lost, on with the other", number, cluster, run, seconds)]))
    assert (job.state, job.code, job.restarts) == ("COMPLETED", 0, 1), log
    assert places(log) == [("2", "2"), ("1", "1")] and "cut anew from 2 ranks to 1" in log
    (rows, _), (wanted, _) = trained(run), trained(whole)
    assert [(row[0], row[3]) for row in rows] == [(row[0], row[3]) for row in wanted]
    largest = max(abs(row[1] - other[1]) for row, other in zip(rows, wanted))
    print(f"largest |delta loss| {largest:.2e}")
    assert 0 < largest <= TOLERANCE
