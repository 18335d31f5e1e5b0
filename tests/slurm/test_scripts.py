"""The job scripts as text: shellcheck finds nothing, and every script says the same in the part that all share.

In: slurm/*.sh and cluster.sh. Out: findings. Decision: the head that finds job.sh is repeated in four scripts, because
Slurm runs a copy of each from its spool folder; the repetition is checked instead of avoided.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, SLURM

ENTRIES = ("pretrain.sh", "finetune.sh", "eval.sh", "shards.sh")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck (Debian: apt-get install shellcheck)")
def test_shellcheck_is_clean(tmp_path: Path) -> None:
    paths = [*sorted(SLURM.glob("*.sh")), ROOT / "tests" / "slurm" / "cluster.sh", ROOT / ".ci" / "run"]
    command = ["shellcheck", "--external-sources", *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "broken.sh"
    broken.write_text("#!/bin/bash\nrm -rf $1/*\n")
    assert subprocess.run(["shellcheck", str(broken)], capture_output=True, timeout=60).returncode != 0


def test_the_shared_head_is_the_same_everywhere() -> None:
    heads = {re.search(r"(?ms)^here=.*?^\. \"\$here/job\.sh\"$", (SLURM / name).read_text())[0] for name in ENTRIES}  # type: ignore[index]
    assert len(heads) == 1


def test_every_name_of_the_site_is_read_and_every_name_read_is_documented() -> None:
    site, rest = (SLURM / "site.sh").read_text(), ""
    for path in (SLURM / "job.sh", SLURM / "rank.sh", *(SLURM / name for name in ENTRIES)):
        rest += path.read_text()
    offered = set(re.findall(r'^: "\$\{(EVENTLENS_\w+):=', site, re.M))
    names = ("ACCOUNT", "PARTITION", "QOS", "CONSTRAINT", "TIME", "NODES", "GPUS_PER_NODE")
    submitted = {f"EVENTLENS_{name}" for name in names}
    read = set(re.findall(r"EVENTLENS_\w+", rest)) | submitted
    internal = {"EVENTLENS_SLURM", "EVENTLENS_SITE", "EVENTLENS_EXITS", "EVENTLENS_LEAD", "EVENTLENS_"}
    assert offered <= read
    assert read - offered - internal == {
        "EVENTLENS_SWEEP",
        "EVENTLENS_PARTS",
    }  # documented in the scripts that take them


def test_only_the_site_names_a_cluster() -> None:
    for name in ENTRIES:
        text = (SLURM / name).read_text()
        assert not re.search(r"--(account|partition|qos|constraint|reservation)", text)
