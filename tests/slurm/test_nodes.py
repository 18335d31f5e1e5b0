"""The look at nodes in a job: a node that cannot find the others is named, and on request the job goes on without it.

In: three nodes, one of which has lost the name of the first. Out: the job's log, exit code, and where it ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SLURM, Cluster


@pytest.fixture(scope="module")
def cluster(slurm_here: None) -> Iterator[Cluster]:
    with Cluster(nodes=3) as made:
        hosts = made.folder / "hosts-of-n2"
        lines = (made.folder / "hosts").read_text().splitlines()
        hosts.write_text("".join(f"{line}\n" for line in lines if not line.endswith(" n1")))
        made.on("n2", "mount", "--bind", str(hosts), "/etc/hosts")
        yield made


def submit(cluster: Cluster, toy: str, tmp_path: Path, *options: str, **env: str) -> str:
    place = ("--ntasks-per-node=1", "--gpus-per-node=1", *options, str(SLURM / "pretrain.sh"), "tiny_event")
    given = (f"--io.run={tmp_path / 'run'}", f"--data.train={tmp_path}", "--train.steps=2")
    return cluster.submit(*place, *given, EVENTLENS_PYTHON=toy, **{"EVENTLENS_PREFLIGHT": "1", **env})


def test_fit_nodes_train(cluster: Cluster, toy: str, tmp_path: Path) -> None:
    number = submit(cluster, toy, tmp_path, "--nodes=2", "--exclude=n2")
    assert cluster.ended(number).code == 0, cluster.log(number)
    log = cluster.log(number)
    assert "all-reduce with a neighbour, GB/s: n1 " in log and "n1, n3: no kernel is compiled on a CPU" in log
    assert log.index("no kernel is compiled") < log.index("finished")
    assert "2 nodes are fit" in log and not list((tmp_path / "run" / "slurm").glob("check-*"))


def test_a_bad_node_ends_the_job_with_its_name(cluster: Cluster, toy: str, tmp_path: Path) -> None:
    number = submit(cluster, toy, tmp_path, "--nodes=2", "--exclude=n3")
    job = cluster.ended(number)
    assert (job.state, job.code, job.restarts) == ("FAILED", 6, 0), cluster.log(number)
    log = cluster.log(number)
    assert "bad node n2: cannot resolve n1" in log and "error: 1 of 2 nodes are not fit: n2" in log
    assert not (tmp_path / "run" / "outcome.json").exists()


@pytest.mark.slow
def test_a_bad_node_is_excluded_on_request(cluster: Cluster, toy: str, tmp_path: Path) -> None:
    number = submit(cluster, toy, tmp_path, "--nodes=2", EVENTLENS_EXCLUDE="1")
    job = cluster.ended(number)
    assert (job.state, job.code, job.restarts) == ("COMPLETED", 0, 1), cluster.log(number)
    log = cluster.log(number)
    assert "queued again without n2" in log and "ranks on 2 nodes: n[1,3]" in log


@pytest.mark.slow
def test_a_node_that_cannot_reduce_is_named_in_time(cluster: Cluster, toy: str, tmp_path: Path) -> None:
    """It does not find its own name: gloo then offers the others the loopback address, and who connects to it hangs."""
    hosts = cluster.folder / "hosts-of-n3"
    text = (cluster.folder / "hosts").read_text()
    hosts.write_text(text.replace("10.99.0.13 n3\n", ""))
    fixed = cluster.folder / "hosts-of-n2-again"
    fixed.write_text(text)
    cluster.on("n2", "mount", "--bind", str(fixed), "/etc/hosts")
    cluster.on("n3", "mount", "--bind", str(hosts), "/etc/hosts")
    try:
        job = cluster.ended(number := submit(cluster, toy, tmp_path, "--nodes=3"), 120)
    finally:
        cluster.on("n2", "umount", "/etc/hosts")
        cluster.on("n3", "umount", "/etc/hosts")
    log = cluster.log(number)
    print(log)
    assert (job.state, job.code) == ("FAILED", 6), log
    assert "bad node n3: an all-reduce with n" in log and "of 3 nodes are not fit: " in log
