"""A Slurm cluster per test file, and ranks that take no time.

In: Slurm's daemons; without them the tests skip with the reason, and fail where REQUIRE_SLURM=1. Out: the fixtures
`cluster`, `toy` and `begin`. Decision: tests of the life cycle run the real scripts on real daemons with toy ranks
(tests/slurm/toy.py), because what is tested is who signals, waits and queues again; what trains is tested beside them.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SLURM, Cluster, obstacle

STEPS = 12


@pytest.fixture(scope="session")
def slurm_here() -> None:
    """Skips, or fails under REQUIRE_SLURM=1, where no cluster can be started."""
    why = obstacle()
    if why and os.environ.get("REQUIRE_SLURM") == "1":
        pytest.fail(f"REQUIRE_SLURM=1, but: {why}")
    if why:
        pytest.skip(why)


@pytest.fixture(scope="module")
def cluster(slurm_here: None) -> Iterator[Cluster]:
    with Cluster(nodes=2) as made:
        yield made


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A value of EVENTLENS_PYTHON: this Python, but `-m eventlens_ds.train` runs tests/slurm/toy.py."""
    path = tmp_path_factory.mktemp("toy") / "python"
    program = Path(__file__).with_name("toy.py")
    path.write_text(
        f"""#!/bin/sh
if [ "$2" = eventlens_ds.train ]; then shift 2; exec {sys.executable} {program} "$@"; fi
exec {sys.executable} "$@"
"""
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def begin(cluster: Cluster, toy: str, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Submits pretrain.sh on two nodes with the run folder `tmp_path`/run; environment as keyword arguments."""

    def submit(*options: str, settings: tuple[str, ...] = (), **env: str) -> str:
        place = ["--nodes=2", "--gpus-per-node=1", *options, str(SLURM / "pretrain.sh")]
        given = [f"--io.run={tmp_path / 'run'}", f"--data.train={tmp_path}", f"--train.steps={STEPS}", *settings]
        return cluster.submit(*place, "tiny_event", *given, **{"EVENTLENS_PYTHON": toy, **env})

    yield submit
    print(cluster.logs())
    for path in cluster.folder.glob("*.log"):
        path.unlink()
