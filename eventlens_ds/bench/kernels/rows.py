"""The rows of eventlens_ds/bench/results/*.csv: one per case, mode, cache state and provider, with what it ran on.

In: measured values. Out: dictionaries of COLUMNS, appended to a CSV file. Decision: every row carries device,
versions, threads, commit and date, so that a file may hold several machines and a figure can be traced from any line.
"""

from __future__ import annotations

import csv
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from eventlens_ds.errors import DataError
from eventlens_ds.runtime import capsule

COLUMNS = (
    "op", "case", "dtype", "mode", "cache", "provider", "scope", "ours", "status",
    "us_p20", "us_p50", "us_p80", "repeats", "copy_us", "copy_share", "roofline_share", "gb_per_s", "min_bytes",
    "max_error", "rms_error", "peak_bytes", "held_bytes", "io_bytes", "launches", "kernel_us", "bitwise",
    "device_type", "device", "threads", "torch", "triton", "cuda", "python", "commit", "modified", "date",
)  # fmt: skip
"""
scope       call: from tokens and boxes (or logits) as a model has them; kernel: weights or layout made beforehand
status      ok; or why there is no time: "wrong: ..." (disagrees with float64), "failed: ...", "absent: ..."
copy_us     median of a copy_ that reads and writes min_bytes in all, in the same rounds; copy_share = copy_us / us_p50
roofline_share   as copy_share, of the slower of that copy and the needed FLOPs at the speed of a large matrix product
min_bytes   bytes that any implementation must read or write; gb_per_s = min_bytes / us_p50
max_error, rms_error   of the output (fwd) or the worst gradient (bwd), in units of the rms of the float64 result
peak_bytes  allocated during the call above what was there; held_bytes: its inputs; io_bytes: inputs and outputs
launches, kernel_us    kernels, copies and fills on the GPU, and their summed time
bitwise     yes or no: repeated calls gave the same bits
modified    yes: the checkout had changes that are not in `commit`
"""

RESULTS = Path(__file__).resolve().parents[1] / "results"


def environment(device: torch.device) -> dict[str, str]:
    """The columns that say where and with what a row was measured."""
    code = capsule.code()
    versions = capsule.versions()
    return {
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else capsule.hardware()["processor"],
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "triton": versions["triton"] or "",
        "cuda": str(torch.version.cuda or ""),
        "python": platform.python_version(),
        "commit": code["commit"] or "",
        "modified": "yes" if code.get("diff_sha256") else "no",
        "date": datetime.now(UTC).date().isoformat(),
    }


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a CSV file, with the header when it is new. Raises DataError for a file with other columns."""
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if tuple(header) != COLUMNS:
            raise DataError(f"{path}: its columns are not those of this version; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV file, the newest measurement of each figure only; [] when there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = ("op", "case", "dtype", "mode", "cache", "provider", "device", "threads")
    return list({tuple(row[name] for name in key): row for row in rows}.values())
