"""The lease of a run folder: one job writes it at a time, and a job that lost it publishes nothing any more.

In: a run folder on a file system that the jobs share. Out: a `Lease`, or LeaseError (exit 4) naming the holder.
RUN/lease/00000003.json is generation 3; the highest generation holds the run, and its holder rewrites the file.
Decision: a generation is made by link(2), which one job alone can win, and is never used again, so the number is a
fencing token. Clocks of machines are never compared: a lease is free when it was given back, when its process on this
machine is gone, or when its file has not changed for `seconds` of our own clock. Whoever takes over removes the
unpublished folders of the other (commit.clean_stale) before it looks for checkpoints, so that a rename which the
other was about to make fails too; tests/runtime/commit_model.py tries every order of these steps.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from eventlens_ds.errors import LeaseError, UserError

log = logging.getLogger(__name__)

FOLDER = "lease"
VARIABLE = "EVENTLENS_LEASE"
"""By which `eventlens train --ranks N` tells its ranks the generation it holds."""

_BEATS = 5
"""Beats of a holder within the time after which its lease counts as left."""


def newest(run_dir: Path) -> int:
    """Highest generation of a run folder; 0 where nobody ever held it."""
    try:
        names = os.listdir(run_dir / FOLDER)
    except FileNotFoundError:
        return 0
    return max((int(name[:8]) for name in names if name[:8].isdigit() and name[8:] == ".json"), default=0)


def _file(run_dir: Path, generation: int) -> Path:
    return run_dir / FOLDER / f"{generation:08d}.json"


def machine() -> str:
    """This machine since it was started, and the process numbers in use here: containers have numbers of their own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def started(pid: int) -> str:
    """When a process of this machine was started, in ticks; empty for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _facts(generation: int) -> dict[str, Any]:
    pid = os.getpid()
    env = {name: os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")}
    who = {"pid": pid, "started": started(pid), "host": socket.gethostname(), "machine": machine()}
    return {"generation": generation, "token": secrets.token_hex(8), **who, **env, "state": "held", "beat": 0}


def _text(content: dict[str, Any]) -> bytes:
    """One line of a fixed size, so that it can be replaced by a single write."""
    return json.dumps(content).encode().ljust(1023) + b"\n"


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _gone(holder: dict[str, Any]) -> bool:
    """True when the holder was a process of this machine that has ended."""
    here = bool(holder.get("machine")) and holder["machine"] == machine() and bool(holder.get("started"))
    return here and started(int(holder["pid"])) != holder["started"]


def describe(holder: dict[str, Any]) -> str:
    """The holder of a lease in words."""
    job = f"job {holder['SLURM_JOB_ID']}, " if holder.get("SLURM_JOB_ID") else ""
    return f"{job}process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def holder(run_dir: Path) -> str:
    """Who holds a run folder, in words; for a reader that does not ask for it."""
    generation = newest(run_dir)
    return f"{describe(_read(run_dir, generation)[1])} (lease {generation})"


class Lease:
    """The right to write a run folder. `held` and `check` ask the file system; `release` gives it back."""

    def __init__(self, run_dir: Path, generation: int) -> None:
        self.run_dir, self.generation = run_dir, generation
        self._content: dict[str, Any] = {}
        self._fd = -1
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def held(self) -> bool:
        """True as long as nobody has taken over."""
        return newest(self.run_dir) == self.generation

    def check(self) -> None:
        """LeaseError unless the lease is still ours."""
        if not self.held():
            raise LeaseError(
                f"{self.run_dir}: taken over by {holder(self.run_dir)}, ours was lease {self.generation}: this job was "
                "silent for too long and writes nothing more"
            )

    def keep(self, content: dict[str, Any], seconds: float) -> None:
        """Show that the holder lives, from a thread of its own."""
        self._content = content
        self._fd = os.open(_file(self.run_dir, self.generation), os.O_WRONLY)
        self._thread = threading.Thread(target=self._beat, args=(seconds / _BEATS,), daemon=True, name="lease")
        self._thread.start()

    def _beat(self, interval: float) -> None:
        while not self._left.wait(interval):
            self._content["beat"] += 1
            self._write()

    def _write(self) -> None:
        try:
            os.pwrite(self._fd, _text(self._content), 0)
        except OSError as error:
            log.warning("%s: the lease cannot be renewed: %s", self.run_dir, error.strerror)

    def release(self) -> None:
        """Give the run back; nothing for a lease that another process keeps."""
        if self._thread is not None:
            self._left.set()
            self._thread.join(5.0)
            self._content["state"] = "released"
            self._write()
            os.close(self._fd)
            self._thread = None


def _read(run_dir: Path, generation: int) -> tuple[bytes, dict[str, Any]]:
    try:
        raw = _file(run_dir, generation).read_bytes()
    except OSError:
        return b"", {}
    return raw, _parsed(raw)


def acquire(run_dir: Path, seconds: float) -> Lease:
    """Hold a run folder, which is made if need be. LeaseError: another job holds it and lives.

    seconds: how long a holder may be silent. Waits that long where nothing else tells that the holder is gone.
    UserError: the folder cannot be written.
    """
    try:
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        while True:
            generation = newest(run_dir)
            if generation:
                _await_free(run_dir, generation, seconds)
            content = _facts(generation + 1)
            if _claim(run_dir, generation + 1, content):
                break
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"io.run {run_dir}: is a file, not a folder") from None
    except OSError as error:
        raise UserError(f"io.run {run_dir}: cannot be written: {error.strerror}") from None
    made = Lease(run_dir, generation + 1)
    made.keep(content, seconds)
    for old in (run_dir / FOLDER).glob("*.json"):
        if old.name != _file(run_dir, made.generation).name:
            old.unlink(missing_ok=True)
    return made


def _await_free(run_dir: Path, generation: int, seconds: float) -> None:
    """Return once a lease may be taken over; LeaseError as soon as its holder is seen to live."""
    first, holder = _read(run_dir, generation)
    deadline = time.monotonic() + seconds
    while holder.get("state") != "released" and not _gone(holder):
        if time.monotonic() > deadline:
            log.warning("%s: taking over from %s, silent for %g s", run_dir, describe(holder), seconds)
            return
        time.sleep(min(0.2, seconds / 20))
        raw, holder = _read(run_dir, generation)
        if raw != first and holder.get("state") == "held":
            raise LeaseError(f"{run_dir}: in use by {describe(holder)} (lease {generation}); name another io.run")


def _claim(run_dir: Path, generation: int, content: dict[str, Any]) -> bool:
    """Make a generation, whole and by one job alone; False when another was faster."""
    draft = run_dir / FOLDER / f".{content['token']}"
    draft.write_bytes(_text(content))
    try:
        os.link(draft, _file(run_dir, generation))
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return newest(run_dir) == generation
