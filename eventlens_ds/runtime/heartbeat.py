"""What this rank is doing, for others to see: phase, step, micro-step, module and samples, written by a thread.

In: `mark` from wherever the main thread goes on to something else, and hooks on modules. Out: rank-N.json below
RUN/heartbeats, one line of a fixed size, rewritten a few times within the time a rank may be silent.
Decision: two counters. `beat` is raised by the thread and stands still when the process is stopped, dead or holds the
interpreter lock in C code; `moves` is raised by the main thread and stands still when that waits. runtime/watchdog.py
tells the two apart. A mark is written at once, so that a rank that dies right after it was seen there; it costs some
twenty microseconds, so it may be put into every micro-step, while the module is told by the next beat.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.runtime.lease import machine, started

FOLDER = "heartbeats"
START, LOAD, STEP, EVAL, SAVE, END = "start", "load", "step", "eval", "save", "end"
"""Phases of a run. In `start` the main thread may work for as long as it likes: lengths and plan of large data."""

AT_WORK = (LOAD, STEP, EVAL, SAVE)

_START = (
    "EVENTLENS_ATTEMPT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
)
_SAMPLES = 8
_LINE = 2048


class Here:
    """Where the main thread of this process is."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A run begins."""
        self.moves = 0
        self.phase, self.step, self.micro, self.module = START, 0, 0, ""
        self.samples: Sequence[str] = ()
        self.tell: Callable[[], None] | None = None

    def to_json(self) -> dict[str, Any]:
        fields = {"moves": self.moves, "phase": self.phase, "step": self.step, "micro_step": self.micro}
        return {**fields, "module": self.module, "samples": [name[:80] for name in self.samples[:_SAMPLES]]}


here = Here()
"""One per process, as there is one main thread."""


def mark(phase: str, step: int | None = None, micro: int = 0, samples: Sequence[str] | None = None) -> None:
    """The main thread goes on to something else. step: as in log.jsonl, counted from 1; None: the same as before."""
    here.moves += 1
    here.phase, here.micro, here.module = phase, micro, ""
    if step is not None:
        here.step = step
    if samples is not None:
        here.samples = samples
    if here.tell is not None:
        here.tell()


def watch_modules(model: Any, depth: int = 4) -> None:
    """Name the module in progress, down to `depth` levels of a model."""
    for name, module in model.named_modules():
        if name and name.count(".") < depth:
            module.register_forward_pre_hook(_entering(name))


def _entering(name: str) -> Any:
    def hook(_module: Any, _args: Any) -> None:
        here.moves += 1
        here.module = name

    return hook


def place(beat: dict[str, Any]) -> str:
    """Where a rank is, in words: "step 4, save" or "step 4, step, micro-step 1, module regions, samples a, b"."""
    words = [beat["phase"]] if beat["phase"] == START else [f"step {beat['step']}", f"phase {beat['phase']}"]
    if beat["phase"] == STEP:
        words.append(f"micro-step {beat['micro_step']}")
    if beat["module"]:
        words.append(f"module {beat['module']}")
    if beat["samples"] and beat["phase"] in (STEP, LOAD):
        words.append(f"samples {', '.join(beat['samples'])}")
    return ", ".join(words)


def session(env: Mapping[str, str]) -> str:
    """Name of the folder of this start of the ranks, which each of them knows before it has met the others: two jobs
    that were given the same run folder do not write into each other's files."""
    return hashlib.sha256("/".join(env.get(name, "") for name in _START).encode()).hexdigest()[:12]


def read(folder: Path, rank: int) -> dict[str, Any]:
    """The last beat of a rank; empty when there is none, or while it is being replaced."""
    try:
        content = json.loads((folder / f"rank-{rank}.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def gone(beat: dict[str, Any]) -> bool:
    """True when a rank was a process of this machine that has ended without a last beat."""
    here_too = bool(beat.get("machine")) and beat["machine"] == machine()
    return here_too and beat["phase"] != END and not started(int(beat["pid"]))


class Heartbeat:
    """Writes rank-N.json every `interval` seconds until `close`, through a file descriptor kept open.

    stack: rank-N.stack gets the stacks of all threads of this process when its interpreter has not run
    for `silent` seconds; C code that never lets go of the lock can be seen in no other way.
    """

    def __init__(self, folder: Path, rank: int, interval: float, silent: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.interval, self._silent = interval, silent
        self._facts: dict[str, Any] = {"rank": rank, "pid": os.getpid(), "machine": machine(), "beat": 0}
        self._fd = os.open(folder / f"rank-{rank}.json", os.O_WRONLY | os.O_CREAT, 0o644)
        self.stack = folder / f"rank-{rank}.stack"
        self._stack_file = open(self.stack, "w", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._lock = threading.Lock()
        here.tell = self.tell
        self.write()

    def tell(self) -> None:
        """Write where the main thread is."""
        with self._lock, contextlib.suppress(OSError):  # a full disk is no reason to end a run
            line = json.dumps({**here.to_json(), **self._facts}).encode()[: _LINE - 1]
            os.pwrite(self._fd, line.ljust(_LINE - 1) + b"\n", 0)

    def write(self) -> None:
        """One beat."""
        self._facts["beat"] += 1
        self.tell()
        faulthandler.dump_traceback_later(self._silent, file=self._stack_file)

    def dump(self) -> None:
        """Stacks of all threads into the stack file, now."""
        with self._lock:
            faulthandler.dump_traceback(file=self._stack_file, all_threads=True)
            self._stack_file.flush()

    def close(self) -> None:
        """The last beat says that this rank has left by itself."""
        here.tell = None
        self._facts["phase"] = END
        self.write()
        faulthandler.cancel_dump_traceback_later()
        os.close(self._fd)
        self._stack_file.close()
