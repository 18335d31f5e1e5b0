"""What one optimizer step reports: the log.jsonl line, the console columns, and model FLOP utilisation.

In: a `StepMetrics` per logged step, on rank 0. Out: RUN/log.jsonl (one JSON object per line, keys of `StepMetrics`),
fixed-width console lines through logging, and MFU as a share of the GPU's dense peak. Decision: the log is the truth
that TensorBoard and reports are drawn from, so a resumed run first cuts the lines it is going to write again; after
any number of kills each step has exactly one line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eventlens_ds.errors import UserError

log = logging.getLogger(__name__)

HEADER_EVERY = 20

PEAK_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    ("A100", 312.0),
    ("A800", 312.0),
    ("A30", 165.0),
    ("L40S", 362.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100 80GB HBM3", 989.0),
    ("H100 SXM5", 989.0),
    ("GH200", 989.0),
    ("H800 PCIe", 756.0),
    ("H800", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("B200", 2250.0),
)
"""Dense bf16 tensor-core peak of one GPU, by the first entry whose words its name contains (NVIDIA data sheets; figures
that a sheet gives with sparsity are halved)."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step over all ranks. Times in seconds, memory in bytes, learning rate of a part with scale 1.

    `loss` is the weighted sum of objective means and `task_loss` the mean of each task (P8). `tokens_per_s` counts
    real tokens (no padding) over all ranks, `supervised_tokens` those with a loss. `regions_used` counts the regions
    that a mention or an object list of the step links to, `regions_unused` the other regions of its images (P6),
    an image once per group of samples on it. `data_wait` is the part of
    `step_time` spent waiting for the loader, largest over ranks. `mfu` is None where `mfu()` gives a reason.
    `routing` is a `train.routing.Routing` as a dict, None for a model without adapters;
    `load_balance` the loss of a token router before its weight, None where the objective has none.
    `refused` says why the optimizer did not move in this step, None when it did.
    """

    step: int
    loss: float
    task_loss: dict[str, float]
    grad_norm: float
    lr: float
    tokens_per_s: float
    supervised_tokens: int
    regions_used: int
    regions_unused: int
    step_time: float
    data_wait: float
    mfu: float | None
    memory: int
    sample_hash: str
    routing: dict[str, Any] | None = None
    load_balance: float | None = None
    refused: str | None = None

    def to_json(self) -> str:
        """One JSON line. NaN and infinities, which JSON lacks, become null and are named under "nonfinite"."""
        fields, odd = _finite(asdict(self))
        return json.dumps(fields | ({"nonfinite": odd} if odd else {}), allow_nan=False)


def sample_hash(ids: Iterable[str]) -> str:
    """16 hex digits over the sample ids of a step, whatever their order: equal for every world size (P3)."""
    return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()[:16]


def memory_bytes(device: str = "cpu") -> int:
    """Peak memory: allocated on a CUDA device, resident set of this process on the CPU."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return int(peak if sys.platform == "darwin" else peak * 1024)


def part_flops(
    tokens: int,
    params: int,
    *,
    trained: float = 1.0,
    backward: bool = True,
    layers: int = 0,
    width: int = 0,
    attended: int = 0,
) -> float:
    """Model FLOPs of one part (tower, language model, ...) on `tokens` tokens of a step.

    2 * params * tokens forward, as much again for the gradient of activations, and once more for the gradient of the
    share `trained` of the weights: 6 N T when everything learns, 4 N T for frozen weights under trained ones, 2 N T
    with `backward` off. Attention adds 4 * layers * width FLOPs per attended (query, key) pair, three times with a
    backward pass; `attended` counts those pairs in one layer. `params` leaves out embedding tables, which are looked
    up, not multiplied. Recomputed activations are not counted (MFU as in PaLM, appendix B, not hardware utilisation).
    """
    weights = 2.0 * params * tokens * (1 + (1 + trained) * backward)
    return weights + 4.0 * layers * width * attended * (3 if backward else 1)


def peak_flops(device_name: str, dtype: str = "bf16") -> tuple[float | None, str]:
    """Dense peak FLOP/s of a GPU and "", or None and the reason why it is not known."""
    if dtype != "bf16":
        return None, f"no peak is tabulated for {dtype}"
    if "MIG" in device_name:
        return None, f"{device_name} is a slice of a GPU"
    for part, tflops in PEAK_BF16_TFLOPS:
        # Whole words: "RTX A1000" is not an A100.
        if re.search(rf"\b{part}\b", device_name):
            return tflops * 1e12, ""
    return None, f"no peak is tabulated for {device_name or 'an unnamed device'}"


def mfu(
    flops: float, seconds: float, devices: int, device_name: str | None, dtype: str = "bf16"
) -> tuple[float | None, str]:
    """Share of the peak of `devices` equal GPUs that `flops` in `seconds` amounts to, or None and the reason.

    `device_name` is torch.cuda.get_device_name(), None on a CPU.
    """
    if device_name is None:
        return None, "not defined on a CPU"
    peak, reason = peak_flops(device_name, dtype)
    if peak is None:
        return None, reason
    if seconds <= 0 or devices <= 0:
        return None, f"{seconds} s on {devices} devices"
    return flops / seconds / (peak * devices), ""


class ConsoleTable:
    """Metrics as lines of fixed columns, one loss column per task, the header again every 20 lines."""

    def __init__(self, tasks: Sequence[str] = ()) -> None:
        self._tasks = tuple(tasks)
        self._titles = ("step", "loss", *self._tasks, "grad", "lr", "tok/s", "sup", "s/step", "wait", "mfu", "GiB")
        self._widths = tuple(max(9, len(title)) for title in self._titles)
        self._lines = 0

    def render(self, m: StepMetrics) -> list[str]:
        """The line of `m`, after the header when one is due. A task without a loss in this step shows "-"."""
        cells = [
            str(m.step),
            _number(m.loss, 4),
            *(_number(m.task_loss.get(task), 4) for task in self._tasks),
            _number(m.grad_norm, 3),
            f"{m.lr:.2e}",
            _number(m.tokens_per_s, 0),
            str(m.supervised_tokens),
            _number(m.step_time, 3),
            # Share of the step spent waiting for data: what tells a slow loader from a slow model.
            "-" if m.step_time <= 0 else f"{100 * m.data_wait / m.step_time:.1f}%",
            "-" if m.mfu is None else f"{100 * m.mfu:.1f}%",
            _number(m.memory / 2**30, 2),
        ]
        line = self._row(cells)
        header = [self._row(self._titles)] if self._lines % HEADER_EVERY == 0 else []
        self._lines += 1
        return [*header, line]

    def _row(self, cells: Sequence[str]) -> str:
        return " ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True))


class RunLog:
    """RUN/log.jsonl and its console lines; made on rank 0 only.

    `first_step` is the first step this attempt will write: a checkpoint of step N is continued with N + 1. Lines of
    that step and later ones, and a last line torn by a kill, are removed by an atomic rewrite before anything is
    appended. Raises UserError naming the file when it cannot be written (no space left).
    """

    def __init__(self, path: str | os.PathLike[str], *, first_step: int, tasks: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self._console = ConsoleTable(tasks)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.removed = cut_log(self.path, first_step)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be opened: {error.strerror}") from None
        if self.removed:
            log.info("%s: removed %d lines of step %d and later", self.path.name, self.removed, first_step)

    def append(self, metrics: StepMetrics) -> None:
        """Write one line and hand it to the operating system, so that a killed process loses nothing."""
        try:
            self._file.write(metrics.to_json() + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        for line in self._console.render(metrics):
            log.info("%s", line)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut_log(path: Path, first_step: int) -> int:
    """Drop the lines with step >= first_step and those that are not JSON objects with a step; return how many."""
    if not path.exists():
        return 0
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    kept: list[str] = []
    for number, line in enumerate(lines, 1):
        step = _step_of(line)
        if step is None and number < len(lines):
            log.warning("%s:%d: not a step line, removed", path, number)
        if step is not None and step < first_step:
            kept.append(line)
    whole = "".join(line + "\n" for line in kept)
    if whole != text:
        _replace(path, whole)
    return len(lines) - len(kept)


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Lines of a log.jsonl; a last line still being written, or torn by a kill, is left out."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if _step_of(line) is not None]


def _step_of(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _finite(fields: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    clean, odd = dict(fields), []
    for name, value in fields.items():
        if isinstance(value, dict):
            clean[name], inner = _finite(value, f"{prefix}{name}.")
            odd += inner
        elif isinstance(value, list):
            numbered, inner = _finite({str(i): item for i, item in enumerate(value)}, f"{prefix}{name}.")
            clean[name] = list(numbered.values())
            odd += inner
        elif isinstance(value, float) and not math.isfinite(value):
            clean[name] = None
            odd.append(f"{prefix}{name}")
    return clean, odd


def _number(value: float | None, digits: int) -> str:
    """At most nine characters: decimals give way to the exponent form for large and for tiny values."""
    if value is None:
        return "-"
    shown = f"{value:.{digits}f}"
    tiny = value != 0 and digits > 0 and abs(value) < 10**-digits
    return f"{value:.2e}" if len(shown) > 9 or tiny else shown
