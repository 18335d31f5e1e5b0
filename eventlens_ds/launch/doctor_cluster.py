"""Probes of `eventlens doctor` about the cluster and about DeepSpeed: Slurm, its ops, the attention that runs.

In: client commands of Slurm, the installed packages. Out: `Finding`s, which doctor.py prints with its own.
Decision: a controller that does not answer is asked with a time limit, since Slurm's own clients wait for it; what
ds_report prints in forty lines is three here, those that a run of ours depends on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report: `missing` is needed, `warn` will cost something later, `info` is only stated."""

    name: str
    state: Literal["ok", "info", "warn", "missing"]
    detail: str
    fix: str = ""


def run(*command: str, seconds: float = 20) -> str | None:
    """What a program prints, both streams; None when it is absent, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout + done.stderr).strip() if done.returncode == 0 else None


def scripts() -> Path | None:
    """Folder of the job scripts: of this checkout, or of the installed wheel."""
    package = Path(__file__).parents[1]
    return next((folder for folder in (package / "slurm", package.parent / "slurm") if folder.is_dir()), None)


def _slurm() -> Iterator[Finding]:
    """Is there a cluster, does it answer, has it GPUs, and does the site file say more than its defaults?"""
    where = scripts()
    yield Finding("job scripts", "ok" if where else "info", str(where or "not in this installation"))
    if shutil.which("sbatch") is None:
        fix = "apt-get install slurm-client munge" if shutil.which("apt-get") else ""
        yield Finding("slurm", "info", "not found; needed only to submit jobs", fix)
        return
    version = run("scontrol", "--version", seconds=5) or "version unknown"
    job = os.environ.get("SLURM_JOB_ID")
    inside = f", inside job {job}" if job else ""
    answer = run("sinfo", "--noheader", "--format=%R|%D|%G|%l", seconds=8)
    if answer is None:
        fix = "check SLURM_CONF, munge and the network: scontrol ping"
        yield Finding("slurm", "warn", f"{version}{inside}; its controller does not answer", fix)
        return
    yield Finding("slurm", "ok", f"{version}{inside}")
    for line in answer.splitlines():
        name, nodes, gres, limit = (line.split("|") + ["", "", ""])[:4]
        yield Finding(f"partition {name}", "info", f"{nodes} nodes, {gres}, time limit {limit}")
    if "gpu" not in answer:
        fix = "sbatch --gpus-per-node=0 ..., or GresTypes=gpu in slurm.conf"
        yield Finding("slurm gpus", "warn", "no partition offers GPUs as gres; the scripts ask for 8 a node", fix)
    accounts = [name for name in ("SBATCH_ACCOUNT", "SBATCH_PARTITION") if os.environ.get(name)]
    yield Finding("site", "info", f"{where / 'site.sh' if where else 'none'}; set: {', '.join(accounts) or 'nothing'}")


def _deepspeed() -> Iterator[Finding]:
    """The essentials of ds_report: accelerator, compiled ops, and what those need."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not Path("/dev/nvidiactl").exists() else "cuda")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator()._name
    yield Finding("deepspeed accelerator", "info", f"{name}, {get_accelerator().communication_backend_name()}")
    built = sorted(op for op, done in deepspeed.git_version_info.installed_ops.items() if done)
    yield Finding("deepspeed ops", "info", f"built in: {', '.join(built) or 'none'}; the default path needs none")
    compiles = shutil.which("ninja") and shutil.which("g++")
    detail = "zero3_offload compiles its CPU optimizer at first use" if compiles else "zero3_offload cannot compile"
    fix = "" if compiles else "pip install ninja; apt-get install g++"
    yield Finding("deepspeed offload", "info" if compiles else "warn", detail, fix)


def _attention() -> Iterator[Finding]:
    """Which form of the segment tree `model.attention` auto takes here, per dtype."""
    import torch

    from eventlens_ds.model.attention import choose_form

    device = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    forms = {
        name: choose_form("auto", device, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    said = ", ".join(f"{form.removeprefix('eventlens_')} in {name}" for name, form in forms.items())
    yield Finding(f"attention on {device}", "ok", f"auto takes {said}")
