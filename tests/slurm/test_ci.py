""".ci/run where Slurm cannot be had: it says why in one line and runs the tests all the same.

In: the script itself, with an apt-get, a sudo and a make of ours on a PATH that has little else. Out: what it says and
its exit code, which is that of `make test`. Decision: nothing of the script is cut out or sourced, so that its order
and its `set -e` are tested too; no daemon is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT

TOOLS = ("bash", "env", "dirname", "mktemp", "timeout", "tail", "head", "grep", "rm", "realpath", "true", "chmod")
MAKE = 'echo "make $* REQUIRE_SLURM=${REQUIRE_SLURM:-unset}"; exit 7\n'


def ci(folder: Path, apt_get: str | None, sudo: str | None = None) -> subprocess.CompletedProcess[str]:
    """`.ci/run` with these programs as shell scripts; None: there is no such program. With a sudo it is no root."""
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path, tool
        (folder / tool).symlink_to(path)
    uid = f"echo {0 if sudo is None else 1000}\n"
    for name, text in (("apt-get", apt_get), ("sudo", sudo), ("make", MAKE), ("id", uid)):
        if text is not None:
            (folder / name).write_text(f"#!/bin/sh\n{text}")
            (folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "TMPDIR")}
    command = [str(ROOT / ".ci" / "run")]
    return subprocess.run(command, env={**kept, "PATH": str(folder)}, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("apt_get", "why"),
    [
        (
            "echo Ign:1; echo 'E: Could not resolve deb.debian.org'; echo; exit 100\n",
            "E: Could not resolve deb.debian.org",
        ),
        ('[ "$2" = update ] || { echo "E: Unable to locate package slurmd" >&2; exit 100; }\n', "E: Unable to locate"),
        ("echo Killed; exit 137\n", "Killed"),
        ("exit 124\n", "no answer within its time limit"),
        ("exit 0\n", "no answer"),  # content, and still nothing there
        (None, "no apt-get"),
    ],
)
def test_a_failed_installation_is_said_and_the_tests_run(tmp_path: Path, apt_get: str | None, why: str) -> None:
    done = ci(tmp_path, apt_get)
    assert done.returncode == 7 and done.stdout == "make test REQUIRE_SLURM=unset\n", done
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ci: WARNING: Slurm could not be installed: {why}")
    assert line.endswith("The tests of the job scripts skip.")


def test_an_installed_slurm_that_cannot_run_here_is_said(tmp_path: Path) -> None:
    """The control: this apt-get does what it should, so the next thing that is missing is named."""
    programs = "slurmctld slurmd sbatch srun scontrol sinfo squeue scancel munged shellcheck"
    made = f'for p in {programs}; do echo "#!/bin/sh" >{tmp_path}/$p; chmod 755 {tmp_path}/$p; done\n'
    done = ci(tmp_path, f'[ "$2" != install ] || {made}')
    assert done.returncode == 7 and done.stdout == "make test REQUIRE_SLURM=unset\n"
    assert "WARNING: Slurm is installed, but no cluster can run here: unshare is not installed" in done.stderr


@pytest.mark.parametrize(
    ("sudo", "why"), [("exit 1\n", "neither root nor sudo without a password"), ('shift; exec "$@"\n', "E: broken")]
)
def test_without_rights_it_says_so(tmp_path: Path, sudo: str, why: str) -> None:
    done = ci(tmp_path, "echo E: broken; exit 100\n", sudo)
    assert done.returncode == 7 and f"could not be installed: {why}. The tests" in done.stderr
