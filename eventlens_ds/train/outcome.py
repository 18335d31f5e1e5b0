"""outcome.json: how a run ended, or that it is running; what launchers read, since they rewrite exit codes.

In: what happens to an attempt. Out: RUN/outcome.json {"state", "reason", "code", "attempt", "step",
"first_step_seconds", "earlier"}. States: running (also of an attempt whose machine died), finished, preempted (saved,
wants to be continued), failed. `earlier` lists state, code and attempt of the attempts before.
Decision: the file says "running" before anything can fail, so what is read is never the end of the attempt before; the
first reason given for a failure stays, because what follows it is a consequence.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.errors import UserError
from eventlens_ds.runtime import heartbeat, lease
from eventlens_ds.runtime.commit import atomic_write
from eventlens_ds.runtime.distributed import rendezvous
from eventlens_ds.runtime.failures import exit_of
from eventlens_ds.runtime.lease import Lease
from eventlens_ds.runtime.local_ranks import Ended
from eventlens_ds.train.preempt import EarlyStop

log = logging.getLogger(__name__)

FILE = "outcome.json"
RUNNING, FINISHED, PREEMPTED, FAILED = "running", "finished", "preempted", "failed"

ATTEMPT, LAUNCHED = "EVENTLENS_ATTEMPT", "EVENTLENS_LAUNCHED"
"""Variables by which `eventlens train --ranks N` tells its ranks the attempt it opened and when it was started."""


def read(run_dir: Path) -> dict[str, Any]:
    """Content of outcome.json; empty when there is none or it is no JSON object."""
    try:
        content = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(run_dir: Path, content: dict[str, Any]) -> None:
    atomic_write(run_dir / FILE, json.dumps(content).encode() + b"\n")


def begin(run_dir: Path) -> int:
    """Make the run folder if need be, write "running", return the number of this attempt, counted from 1.

    UserError when the folder cannot be made or written, before anything has been computed.
    """
    before = read(run_dir)
    attempt = int(before.get("attempt", 0)) + 1
    earlier = list(before.get("earlier", []))
    if before:
        earlier.append({name: before.get(name) for name in ("attempt", "state", "code")})
    content = {"state": RUNNING, "reason": "", "code": None, "attempt": attempt, "step": None}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write(run_dir, {**content, "first_step_seconds": None, "earlier": earlier})
    except FileExistsError:
        raise UserError(f"io.run {run_dir}: is a file, not a folder") from None
    except OSError as error:
        raise UserError(f"io.run {run_dir}: cannot be written: {error.strerror}") from None
    if before:
        log.info("attempt %d of %s; attempt %d: %s", attempt, run_dir, attempt - 1, before.get("state"))
    return attempt


def fail(run_dir: Path, code: int, reason: str, attempt: int | None = None) -> None:
    """Write "failed" unless the attempt (the present one by default) has ended already. Logs what hinders it."""
    content = read(run_dir)
    if content.get("state") != RUNNING or attempt not in (None, content["attempt"]):
        return
    try:
        _write(run_dir, {**content, "state": FAILED, "reason": reason, "code": code})
    except OSError as error:
        log.error("%s: cannot be written: %s", run_dir / FILE, error.strerror)


def conclude(run_dir: Path, attempt: int, ended: Ended) -> None:
    """The launcher's part, after all ranks have gone: an attempt that still runs, has failed. A rank ended by a signal
    is the reason for what the others said about it."""
    content = read(run_dir)
    if content.get("attempt") != attempt or content.get("state") not in (RUNNING, FAILED) or not ended.code:
        return
    if ended.signal:
        reason = f"rank {ended.rank}: ended by {signal.Signals(ended.signal).name}"
        if content["state"] == FAILED:
            reason += f" ({content['reason']})"
        _write(run_dir, {**content, "state": FAILED, "reason": reason, "code": ended.code})
    else:
        fail(run_dir, ended.code, f"rank {ended.rank}: exit code {ended.code}", attempt)


class Attempt:
    """One attempt at a run, on every rank: `with Attempt(run_dir) as attempt: ...`.

    Rank 0 holds the lease of the run folder (or knows the one its launcher holds) and writes; another rank writes only
    when it fails while rank 0 has said nothing, and once it knows the `number` of the attempt. What hinders rank 0 from
    opening the attempt is kept in `problem`, to be raised when all ranks are together; the folder then stays as it is.
    Leaving with an exception writes "failed" and its reason. Until a `StopFlag` takes SIGTERM over, that signal ends
    the attempt with exit code 143.
    """

    def __init__(self, run_dir: Path, lease_seconds: float = 30.0, signals: Sequence[str] = ("SIGUSR1",)) -> None:
        self.run_dir, self.lease_seconds = run_dir, lease_seconds
        self.lead = rendezvous(dict(os.environ))["RANK"] == "0"
        self.problem: UserError | None = None
        self.lease: Lease | None = None
        opened = os.environ.get(ATTEMPT)
        self.number = int(opened) if opened else None
        self.stop = EarlyStop(self._failed, signals)

    def __enter__(self) -> Attempt:
        if self.lead:
            try:
                self._open()
            except UserError as error:
                self.problem = error
        self.stop.__enter__()
        return self

    def _open(self) -> None:
        held = os.environ.get(lease.VARIABLE)
        if held:
            self.lease = Lease(self.run_dir, int(held))
            self.lease.check()
        else:
            self.lease = lease.acquire(self.run_dir, self.lease_seconds)
        if self.number is None or read(self.run_dir).get("attempt") != self.number:
            self.number = begin(self.run_dir)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.stop.__exit__()
        if error is not None:
            self._failed(error)
        if self.lease is not None:
            self.lease.release()
        heartbeat.here.reset()

    def _failed(self, error: BaseException) -> None:
        code, reason = exit_of(error)
        # The note that runtime/failures.py gives a crash which is one rank's own: "(rank 1 of 2)".
        own = next((note for note in getattr(error, "__notes__", []) if note.startswith("(rank ")), "")
        self.fail(code, f"{own[1:].partition(' of ')[0]}: {reason}" if own else reason)

    def fail(self, code: int, reason: str) -> None:
        """Write "failed", unless this attempt has ended or the run is another job's."""
        if self.number is not None and (self.lease is None or self.lease.held()):
            fail(self.run_dir, code, reason, self.number)

    def first_step(self) -> None:
        """Note how long the first optimizer step took to come; rank 0 calls it."""
        seconds = round(seconds_since_launch(), 1)
        log.info("first step done %.1f s after launch", seconds)
        try:
            _write(self.run_dir, {**read(self.run_dir), "first_step_seconds": seconds})
        except OSError as error:
            log.error("%s: cannot be written: %s", self.run_dir / FILE, error.strerror)

    def end(self, state: str, code: int, step: int, reason: str = "") -> None:
        """Write how the attempt ended; rank 0 calls it. LeaseError when the run is another job's by now."""
        if self.lease is not None:
            self.lease.check()
        _write(self.run_dir, {**read(self.run_dir), "state": state, "reason": reason, "code": code, "step": step})


_IMPORTED = time.monotonic()


@functools.cache
def _origin() -> float:
    """When this process began, on the clock of `_now`; where /proc is missing, when this module was imported."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return _IMPORTED


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if Path("/proc/self/stat").exists() else time.monotonic()


def launched() -> str:
    """Value of LAUNCHED for processes started by this one."""
    return repr(_origin())


def seconds_since_launch() -> float:
    """Seconds since the launcher was started, or this process where its launcher is not ours (torchrun, srun)."""
    given = os.environ.get(LAUNCHED)
    return _now() - (float(given) if given else _origin())
