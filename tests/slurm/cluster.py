"""A Slurm cluster for a test: `with Cluster(nodes=2) as cluster: job = cluster.submit(...)`.

In: cluster.sh beside this file, which starts real daemons. Out: jobs as `Job` (state, exit code, restarts) and their
logs. Decision: jobs are watched through `scontrol show job`, because `sbatch --wait` looks once in ten seconds; every
command has a time limit, because a Slurm command may wait for ever for a controller that is gone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("cluster.sh")
ROOT = Path(__file__).parents[2]
SLURM = ROOT / "slurm"

LIVING = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED")


def obstacle() -> str:
    """Why no cluster can run here; "" where one can."""
    done = subprocess.run([SCRIPT, "probe"], capture_output=True, text=True, timeout=30)
    return "" if done.returncode == 0 else done.stdout.strip().removeprefix("none: ")


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job. code: exit code of its script."""

    id: str
    state: str
    code: int
    restarts: int
    reason: str


class Cluster:
    """Starts daemons on entering, ends every process of them on leaving; `folder` is where jobs are submitted."""

    def __init__(self, nodes: int = 2, **settings: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sc.", dir="/tmp"))
        self.nodes = nodes
        self._settings = {f"CLUSTER_{name.upper()}": str(value) for name, value in settings.items()}

    def __enter__(self) -> Cluster:
        self._call("start", str(self.nodes), env={**os.environ, **self._settings})
        return self

    def __exit__(self, *_: object) -> None:
        self._call("stop")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _call(self, verb: str, *words: str, **options: Any) -> str:
        command = [str(SCRIPT), verb, str(self.folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
        if done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def run(self, *words: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """A client command on the controller; its output. AssertionError when it fails."""
        return self._call("exec", *words, cwd=cwd or self.folder, env={**environment(), **(env or {})})

    def on(self, node: str, *words: str) -> str:
        return self._call("on", node, *words)

    def node(self, verb: str, node: str) -> None:
        """crash, boot, cut or mend a node."""
        self._call(verb, node)

    def submit(self, *words: str, cwd: Path | None = None, **env: str) -> str:
        """`sbatch --parsable ...`; the job's number."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, env=env).strip()

    def job(self, number: str) -> Job:
        text = self.run("scontrol", "show", "job", number, "-o")

        def field(name: str) -> str:
            found = re.search(rf"\b{name}=(\S*)", text)
            assert found, text
            return found[1]

        return Job(
            number, field("JobState"), int(field("ExitCode").split(":")[0]), int(field("Restarts")), field("Reason")
        )

    def until(self, number: str, wanted: Callable[[Job], bool], seconds: float = 120) -> Job:
        """The job as soon as `wanted`; a requeued job is not made to wait. AssertionError, with the logs, if never."""
        deadline, held = time.monotonic() + seconds, 0.0
        while time.monotonic() < deadline:
            job = self.job(number)
            if wanted(job):
                return job
            held = held or time.monotonic() if job.reason == "BeginTime" else 0.0
            # Sooner, a node would take the new start for the old one ("credential revoked"): it counts whole seconds.
            if held and time.monotonic() > held + 2:
                subprocess.run(
                    [SCRIPT, "exec", self.folder, "scontrol", "update", f"jobid={number}", "StartTime=now"],
                    capture_output=True,
                    timeout=30,
                )
            time.sleep(0.1)
        raise AssertionError(f"after {seconds} s: {self.job(number)}\n{self.logs()}")

    def ended(self, number: str, seconds: float = 120) -> Job:
        return self.until(number, lambda job: job.state not in LIVING, seconds)

    def signal(self, number: str, name: str = "USR1") -> None:
        """What --signal=B:USR1@300 does at its time."""
        self.run("scancel", "--batch", f"--signal={name}", number)

    def log(self, number: str, folder: Path | None = None) -> str:
        (path,) = (folder or self.folder).glob(f"*-{number}.log")
        return path.read_text(errors="replace")

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')}" for path in self.folder.glob("*.log"))


def environment(**more: str) -> dict[str, str]:
    """Variables of a submitting shell: this Python, CPU ranks, no other launcher."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "EVENTLENS_"))}
    given = {"DS_ACCELERATOR": "cpu", "EVENTLENS_PYTHON": sys.executable, "EVENTLENS_PREFLIGHT": "0"}
    return {**kept, **given, **more}
