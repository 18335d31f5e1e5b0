"""Twelve shards built by a job array are, byte for byte, those of one process.

In: an embedded world in VCR's and VisualCOMET's form. Out: two folders. Decision: tasks run at once on nodes with
process ids of their own, which is how two of them come to the same name for a temporary file.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from eventlens_ds import cli
from tests.slurm.cluster import SLURM, Cluster

PARTS = 12


def content(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file but the markers of finished parts."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and f"parts-{PARTS}" not in path.parts
    }


def test_an_array_builds_what_one_process_builds(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    world = ["data", "build", "--source", "world", "--limit", "24", "--val-images", "2", "--image-size", "64"]
    assert cli.main([*world, "--out", str(tmp_path / "world"), "--root", str(raw)]) == 0
    asked = ["--source", "vcr,visualcomet", "--root", str(raw), "--splits", "train", "--shard-images", "2"]
    assert cli.main(["data", "build", *asked, "--out", str(tmp_path / "one")]) == 0
    many = tmp_path / "many"
    script = ("--output=shards-%j.log", str(SLURM / "shards.sh"), *asked, "--out", str(many))
    number = cluster.submit(f"--array=0-{PARTS - 1}", *script)
    assert [cluster.ended(f"{number}_{task}").code for task in range(PARTS)] == [0] * PARTS, cluster.logs()
    one = content(tmp_path / "one")
    assert content(many) == one and sum(name.endswith(".tar") for name in one) == PARTS
    # A part that is repeated alone joins again, as all others are there.
    (many / "train" / "shard-000003.tar").unlink()
    again = cluster.submit("--array=3", *script, EVENTLENS_PARTS=str(PARTS))
    assert cluster.ended(f"{again}_3").code == 0 and content(many) == one
    capsys.readouterr()


def test_an_array_that_does_not_begin_at_0_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    asked = ["--source", "vcr", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    number = cluster.submit("--array=3", "--output=refused-%j.log", str(SLURM / "shards.sh"), *asked)
    assert cluster.ended(f"{number}_3").code == 2
    (log,) = cluster.folder.glob("refused-*.log")
    assert "EVENTLENS_PARTS says of how many" in log.read_text() and not (tmp_path / "out").exists()
