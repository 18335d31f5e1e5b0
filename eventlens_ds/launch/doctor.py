"""`eventlens doctor`: what this machine has, what is missing or at odds, and the command that mends it.

In: the environment. Out: a list of `Finding`s; the command line prints them, or gives them as JSON.
Decision: nothing here may fail or hang, so each probe is guarded and outside programs run with a time limit;
torchvision is tried in a process of its own, because a wheel of the wrong build breaks transformers as well.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from eventlens_ds.launch.doctor_cluster import Finding, _attention, _deepspeed, _slurm
from eventlens_ds.launch.doctor_cluster import run as _run

STALE_MINUTES = 10
"""A build lock older than this has outlived any build of ours; the build that held it was killed."""

NETWORK_FILESYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse.sshfs")


def examine() -> list[Finding]:
    """All findings. Takes a few seconds, for torch is imported."""
    probes: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _requirements,
        _torch,
        _gpus,
        _compilers,
        _optional,
        _ops,
        _attention,
        _deepspeed,
        _torchvision,
        _java,
        _slurm,
        _offline,
        _caches,
        _machine,
    )
    found: list[Finding] = []
    for probe in probes:
        try:
            found += probe()
        except Exception as error:  # the report is wanted most on a broken machine
            found.append(Finding(probe.__name__.strip("_"), "warn", f"{type(error).__name__}: {error}"))
    return found


def main(as_json: bool = False) -> tuple[str, int]:
    """(report, exit code): 2 when something needed is missing."""
    found = examine()
    code = 2 if any(item.state == "missing" for item in found) else 0
    if as_json:
        return json.dumps([asdict(item) for item in found], indent=1), code
    width = max(len(item.name) for item in found)
    lines = []
    for item in found:
        lines.append(f"{item.state:7} {item.name:{width}}  {item.detail}")
        if item.fix:
            lines.append(f"{'':7} {'':{width}}  -> {item.fix}")
    return "\n".join(lines), code


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[Finding]:
    yield Finding("eventlens_ds", "ok", _version("eventlens_ds") or "not installed (run from a checkout)")
    state: Literal["ok", "missing"] = "ok" if sys.version_info >= (3, 11) else "missing"
    yield Finding(
        "python", state, f"{platform.python_version()} at {sys.executable}", "" if state == "ok" else ">= 3.11"
    )


def _requirements() -> Iterator[Finding]:
    """Every package of pyproject.toml against its range."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("eventlens_ds") or []:
        wanted = Requirement(text)
        extra = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
        found = _version(wanted.name)
        if extra and found is None:
            continue
        spec = f"{wanted.name}{wanted.specifier}"
        if found is None:
            yield Finding(wanted.name, "missing", "not installed", f"pip install '{spec}'")
        elif not wanted.specifier.contains(found.partition("+")[0], prereleases=True):
            yield Finding(wanted.name, "warn", f"{found}, outside {wanted.specifier}", f"pip install '{spec}'")
        else:
            yield Finding(wanted.name, "ok", found)


def _torch() -> Iterator[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch build", "info", f"{build}, {torch.get_num_threads()} threads")
    accelerator = os.environ.get("DS_ACCELERATOR")
    if not torch.cuda.is_available():
        detail = f"DS_ACCELERATOR={accelerator}" if accelerator else "unset; training sets it to cpu by itself"
        yield Finding("accelerator", "info", f"cpu ({detail})")
    elif accelerator == "cpu":
        yield Finding("accelerator", "warn", "DS_ACCELERATOR=cpu, but GPUs are visible", "unset DS_ACCELERATOR")


def _gpus() -> Iterator[Finding]:
    import torch

    driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    number = torch.cuda.device_count()
    for i in range(number):
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Finding(f"gpu {i}", "ok", f"{properties.name}, {memory}, sm_{properties.major}{properties.minor}")
    if number and torch.distributed.is_nccl_available():
        yield Finding("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    if driver:
        yield Finding("driver", "ok", driver.splitlines()[0])
    if driver and not number:
        fix = "pip install a CUDA build of torch: make install TORCH_INDEX=https://download.pytorch.org/whl/cu130"
        yield Finding("gpus", "warn", "nvidia-smi sees GPUs, torch does not", fix)
    elif not number:
        yield Finding("gpus", "info", "none visible")


def _compilers() -> Iterator[Finding]:
    text = _run("nvcc", "--version")
    release = re.search(r"release ([\d.]+)", text or "")
    if release:
        yield Finding(
            "nvcc", "ok", f"{release[1]} at {shutil.which('nvcc')}, CUDA_HOME={os.environ.get('CUDA_HOME', '')}"
        )
    else:
        yield Finding("nvcc", "info", "not found; needed only to build csrc/")
    for name, need in (("g++", "csrc/ and DeepSpeed's compiled ops"), ("ninja", "DeepSpeed's compiled ops")):
        path = shutil.which(name)
        yield Finding(f"{name} on PATH", "ok" if path else "info", path or f"not found; needed only for {need}")


def _optional() -> Iterator[Finding]:
    flash = _version("flash-attn")
    usable = flash is not None and importlib.util.find_spec("flash_attn") is not None
    yield Finding(
        "flash-attn", "ok" if usable else "info", flash or "not installed; SDPA and varlen attention are used"
    )


def _ops() -> Iterator[Finding]:
    """Per operator and device: the backend that runs, and what keeps each other one from running."""
    import torch

    from eventlens_ds.ops import dispatch

    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for op in sorted(dispatch.PREFERENCE):
            chosen = dispatch.choose_backend(op, device)
            others = [
                f"{name} {f'cannot: {obstacle}' if obstacle else 'can be asked for'}"
                for name, obstacle in dispatch.available(op, device).items()
                if name != chosen
            ]
            yield Finding(f"ops {op} on {device}", "ok", f"{chosen} runs; {'; '.join(others)}")


def _torchvision() -> Iterator[Finding]:
    version = _version("torchvision")
    if version is None:
        yield Finding("torchvision", "info", "not installed; only a benchmark baseline needs it")
    elif _run(sys.executable, "-c", "import torchvision, torch; torch.ops.torchvision.nms", seconds=60) is None:
        detail = f"{version} does not match torch {_version('torch')}: transformers cannot be imported beside it"
        yield Finding("torchvision", "missing", detail, "pip uninstall -y torchvision timm")
    else:
        yield Finding("torchvision", "ok", f"{version}, torch.ops.torchvision.nms found")


def _java() -> Iterator[Finding]:
    text = _run("java", "-version")
    if text:
        yield Finding("java", "ok", text.splitlines()[0])
    else:
        fix = "apt-get install default-jre-headless"
        yield Finding("java", "info", "not found; METEOR is left out and says so", fix)


def _offline() -> Iterator[Finding]:
    flags = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "WDS_SECURE")
    yield Finding("flags", "info", " ".join(f"{name}={os.environ.get(name, '')}" for name in flags))


def _caches() -> Iterator[Finding]:
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    yield Finding("torch extensions", "info", f"{extensions} ({size_of(extensions)})")
    for lock, minutes in stale_locks(extensions):
        detail = f"{lock} is {minutes:.0f} minutes old: a build was killed, the next one waits for ever"
        yield Finding("stale lock", "warn", detail, f"rm {lock}")
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    kind = filesystem(triton)
    if kind in NETWORK_FILESYSTEMS:
        fix = "export TRITON_CACHE_DIR=/tmp/$USER-triton"
        yield Finding("triton cache", "warn", f"{triton} is on {kind}: ranks race for its files", fix)
    else:
        yield Finding("triton cache", "info", f"{triton} ({kind}, {size_of(triton)})")


def size_of(folder: Path, most: int = 20000) -> str:
    """Bytes below a folder, in words; a folder of more than `most` files is not counted to its end."""
    total = 0
    for number, path in enumerate(folder.rglob("*") if folder.is_dir() else ()):
        if number >= most:
            return f"more than {total / 2**20:.0f} MiB"
        total += path.stat().st_size if path.is_file() else 0
    return f"{total / 2**20:.0f} MiB"


def stale_locks(folder: Path) -> list[tuple[Path, float]]:
    """(lock file, age in minutes) of builds below TORCH_EXTENSIONS_DIR that no living build can hold."""
    now = time.time()
    ages = [(lock, (now - lock.stat().st_mtime) / 60) for lock in sorted(folder.glob("**/lock"))]
    return [(lock, age) for lock, age in ages if age > STALE_MINUTES]


def filesystem(path: Path, mounts: str = "/proc/mounts") -> str:
    """Type of the file system that holds `path`, or would hold it; "unknown" where /proc is absent."""
    try:
        rows = [line.split() for line in Path(mounts).read_text().splitlines()]
    except OSError:
        return "unknown"
    where = str(path.absolute()) + "/"
    held = [(len(row[1]), row[2]) for row in rows if where.startswith(row[1].rstrip("/") + "/")]
    return max(held)[1] if held else "unknown"


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("machine", "info", f"{platform.system()} {platform.machine()}, {cores} cores, {memory:.0f} GiB")
    for folder in (Path.cwd(), Path("/dev/shm")):
        if folder.is_dir():
            free = shutil.disk_usage(folder).free / 2**30
            yield Finding(f"free in {folder}", "warn" if free < 1 else "info", f"{free:.1f} GiB ({filesystem(folder)})")
