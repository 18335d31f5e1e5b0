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
    assert "2 nodes are fit" in cluster.log(number) and not list((tmp_path / "run" / "slurm").glob("check-*"))


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
