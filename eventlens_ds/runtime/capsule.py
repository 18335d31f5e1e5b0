"""capsule.json: what a run ran with, so that a figure can be traced to versions, code, machine and data.

In: fingerprints of the data, the ops dispatch and whatever else the caller knows. Out: one JSON file in the run
folder. Decision: facts that explain a result go in; host names, user names and credentials do not, so a capsule
can be published with the numbers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import eventlens_ds
from eventlens_ds.runtime.commit import atomic_write

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "triton",
    "tokenizers",
    "safetensors",
    "webdataset",
    "numpy",
    "pillow",
    "flash-attn",
)
_ENV_PREFIXES = ("NCCL_", "DS_", "TORCH_", "DEEPSPEED_", "CUBLAS_", "TRITON_", "OMP_", "MKL_", "GLOO_")
_ENV_NAMES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "WDS_SECURE",
    "PYTHONHASHSEED",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_CPUS_PER_TASK",
)
_PRIVATE = ("TOKEN", "SECRET", "PASSW", "KEY", "HOST", "ADDR", "USER")


def versions() -> dict[str, str | None]:
    """Version of Python, of this package and of every package in PACKAGES; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "eventlens_ds": eventlens_ds.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _git(folder: Path, *args: str) -> bytes:
    command = ["git", "-C", str(folder), *args]
    return subprocess.run(command, check=True, capture_output=True, timeout=30).stdout


def code() -> dict[str, str | None]:
    """Git commit of this package and the sha256 of its uncommitted changes; None for an installed copy.

    `diff_sha256` is None for a clean checkout; files git does not track are not part of it.
    """
    here = Path(__file__).resolve().parent.parent
    try:
        # A wheel inside some other project's checkout must not report that project's commit.
        _git(here, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(here, "rev-parse", "HEAD").decode().strip()
        diff = _git(here, "diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "diff_sha256": None}
    return {"commit": commit, "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None}


def hardware() -> dict[str, Any]:
    """Cores this process may use, processor, memory in bytes, and name and memory of each visible GPU."""
    gpus = []
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "memory": properties.total_memory})
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": model,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "gpus": gpus,
    }


def environment() -> dict[str, str]:
    """Variables that change how torch, NCCL, DeepSpeed or Triton behave."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name in _ENV_NAMES or name.startswith(_ENV_PREFIXES)) and not any(word in name for word in _PRIVATE)
    }


def write(run_dir: Path, *, data: dict[str, Any], ops: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Write RUN/capsule.json and return its content; rank 0 calls it.

    data: fingerprints of the data folders. ops: which implementation each op dispatches to. more: further JSON-able
    entries (actual mixture, config hash).
    """
    torch = sys.modules.get("torch")
    content = {
        "versions": versions(),
        "code": code(),
        "hardware": hardware(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "environment": environment(),
        "data": data,
        "ops": ops,
        **more,
    }
    _replace(run_dir, content)
    return content


def update(run_dir: Path, **entries: Any) -> None:
    """Replace entries of RUN/capsule.json, for what is known only later; rank 0 calls it."""
    content = json.loads((run_dir / "capsule.json").read_text(encoding="utf-8"))
    _replace(run_dir, {**content, **entries})


def _replace(run_dir: Path, content: dict[str, Any]) -> None:
    atomic_write(run_dir / "capsule.json", json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
