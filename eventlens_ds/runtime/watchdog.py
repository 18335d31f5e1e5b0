"""Ends a run whose ranks wait for one that is stopped, dead or stuck, with one report that names it (exit code 5).

In: the heartbeats of all ranks (runtime/heartbeat.py), `train.watchdog_seconds`. Out: RUN/watchdog-HEX.txt with the
guilty rank, its phase, step, samples, the state of every rank and the stacks of those that can still write them;
outcome.json by `on_end`; exit code 5 on every rank.
Rank 0 watches all ranks, the others watch rank 0. A rank is gone when its process on this machine has ended, silent
when its beat stands still, stuck when its beat goes on and its main thread does not; among stuck ranks the one that
has come least far is guilty, for the others wait for it.
Decision: nothing here uses a collective or the process group, whose own timeout may never fire, and times are counted
from when this process last saw a change, so machines need no common clock.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eventlens_ds.errors import RankLost
from eventlens_ds.runtime import heartbeat
from eventlens_ds.runtime.failures import FailedElsewhere, lost_contact
from eventlens_ds.runtime.heartbeat import FOLDER, START, Heartbeat, place
from eventlens_ds.runtime.lease import started

GONE, SILENT, STUCK = "gone", "silent", "stuck"

_LONGEST_INTERVAL = 2.0
_BEATS = 6
"""Beats within the time a rank may be silent."""
_STACKS = 3.0
"""Seconds the reporter waits for the stacks of the others."""


@dataclass
class _Seen:
    """What is known of a rank, and since when each of its counters stands still (our own monotonic clock)."""

    last: dict[str, Any]
    beat_since: float
    moves_since: float

    def look(self, now: dict[str, Any], clock: float) -> None:
        if not now:
            return
        if now["pid"] != self.last.get("pid") or now["beat"] != self.last.get("beat"):
            self.beat_since = clock
        if now["pid"] != self.last.get("pid") or now["moves"] != self.last.get("moves"):
            self.moves_since = clock
        self.last = now


@dataclass(frozen=True)
class Verdict:
    """rank: the guilty one. kind: GONE, SILENT or STUCK. seconds: for how long. last: its last beat."""

    rank: int
    kind: str
    seconds: float
    last: dict[str, Any]

    def line(self) -> str:
        still = f" for {self.seconds:.1f} s"
        what = {GONE: "has died", SILENT: f"gave no sign of life{still}", STUCK: f"did not go on{still}"}[self.kind]
        return f"rank {self.rank} {what}; last seen in {place(self.last)}"


def judge(seen: dict[int, _Seen], clock: float, seconds: float) -> Verdict | None:
    """The guilty rank, or None. A rank that was never seen to beat has not started and is left alone."""
    for rank, row in sorted(seen.items()):
        if row.last and heartbeat.gone(row.last):
            return Verdict(rank, GONE, clock - row.beat_since, row.last)
        if row.last and row.last["phase"] != heartbeat.END and clock - row.beat_since > seconds:
            return Verdict(rank, SILENT, clock - row.beat_since, row.last)
    stuck = [
        (row.last["step"], row.last["moves"], rank)
        for rank, row in seen.items()
        if row.last and row.last["phase"] not in (START, heartbeat.END) and clock - row.moves_since > seconds
    ]
    if not stuck or len(stuck) < len([row for row in seen.values() if row.last]):
        return None  # as long as one rank goes on, the others have not waited for long enough
    _, _, rank = min(stuck)
    return Verdict(rank, STUCK, clock - seen[rank].moves_since, seen[rank].last)


class Watchdog:
    """The beat of this rank and its eye on the others; `with Watchdog(...) as dog:`. Seconds 0: neither.

    on_end(code, reason) writes outcome.json before the process ends, from the watching thread.
    """

    def __init__(
        self, run_dir: Path, session: str, rank: int, size: int, seconds: float, on_end: Callable[[int, str], None]
    ) -> None:
        self.run_dir, self.rank, self.size, self.seconds = run_dir, rank, size, seconds
        self.folder = run_dir / FOLDER / session
        self._on_end = on_end
        self._left = threading.Event()
        self._beat: Heartbeat | None = None
        self._thread: threading.Thread | None = None
        self._seen: dict[int, _Seen] = {}
        self._old_calls: set[str] = set()

    def __enter__(self) -> Watchdog:
        if self.seconds:
            interval = min(_LONGEST_INTERVAL, self.seconds / _BEATS)
            heartbeat.here.reset()
            if self.rank == 0:
                _remove_others(self.folder)
            self._beat = Heartbeat(self.folder, self.rank, interval, self.seconds)
            self._old_calls = {call.name for call in self._calls()}
            now = time.monotonic()
            watched = range(self.size) if self.rank == 0 else (0, self.rank)
            self._seen = {rank: _Seen(heartbeat.read(self.folder, rank), now, now) for rank in watched}
            self._stale = {rank: self._seen[rank].last.get("beat") for rank in watched if self._is_stale(rank)}
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._thread is not None and self._beat is not None:
            self._left.set()
            self._thread.join(5.0)
            self._beat.close()

    def _calls(self) -> list[Path]:
        return sorted(self.folder.glob("call-*"))

    def _look(self) -> float:
        clock = time.monotonic()
        for rank, row in self._seen.items():
            row.look(heartbeat.read(self.folder, rank), clock)
        return clock

    def _awake(self) -> dict[int, _Seen]:
        """Ranks that have beaten since we watch; a file of an attempt before does not change."""
        rows = self._seen.items()
        return {rank: row for rank, row in rows if rank not in self._stale or row.last.get("beat") != self._stale[rank]}

    def _is_stale(self, rank: int) -> bool:
        """True for the file of an attempt before; both times are those of the file system."""
        try:
            ours, other = ((self.folder / f"rank-{r}.json").stat().st_mtime for r in (self.rank, rank))
        except OSError:
            return False
        return ours - other > self.seconds

    def _watch(self) -> None:
        beat = self._beat
        assert beat is not None
        before = time.monotonic()
        while not self._left.wait(beat.interval):
            late = time.monotonic() - before - beat.interval
            before = time.monotonic()
            beat.write()
            call = next((path for path in self._calls() if path.name not in self._old_calls), None)
            if call is not None:
                self._obey(call)
            if late > self.seconds / 2:
                # We were stopped ourselves: what stood still meanwhile is not the fault of the others.
                for row in self._seen.values():
                    row.beat_since = row.moves_since = before
            verdict = judge(self._awake(), self._look(), self.seconds)
            if verdict is not None and (self.rank == 0 or verdict.rank == 0 and verdict.kind != STUCK):
                self._end(verdict)

    def _obey(self, call: Path) -> None:
        """Another rank ends the run: leave our stacks, wait until it has them, go."""
        assert self._beat is not None
        self._beat.dump()
        name = call.name.removeprefix("call-")
        deadline = time.monotonic() + 2 * _STACKS
        while time.monotonic() < deadline and not (self.run_dir / f"watchdog-{name}.txt").exists():
            time.sleep(0.1)
        os._exit(RankLost.code)

    def _end(self, verdict: Verdict) -> None:
        path = self.report(verdict)
        reason = f"{verdict.line()}; see {path}" if path else verdict.line()
        self._on_end(RankLost.code, reason)
        sys.stderr.write(f"eventlens: error: {reason}\n")
        sys.stderr.flush()
        os._exit(RankLost.code)

    def report(self, verdict: Verdict) -> Path | None:
        """Call for the stacks of all ranks and write the report; None when it cannot be written."""
        assert self._beat is not None
        name = secrets.token_hex(4)
        call, path = self.folder / f"call-{name}", self.run_dir / f"watchdog-{name}.txt"
        self._old_calls.add(call.name)
        try:
            call.write_text(json.dumps({"by": self.rank}))
            self._beat.dump()
            self._await_stacks(verdict)
            partial = path.with_suffix(".partial")
            partial.write_text(self._text(verdict), encoding="utf-8")
            os.replace(partial, path)
        except OSError:
            return None
        return path

    def _await_stacks(self, verdict: Verdict) -> None:
        deadline = time.monotonic() + _STACKS
        waiting = [rank for rank in range(self.size) if rank not in (self.rank, verdict.rank)]
        if verdict.kind == STUCK and verdict.rank != self.rank:
            waiting.append(verdict.rank)
        while time.monotonic() < deadline and any(not self._stack(rank) for rank in waiting):
            time.sleep(0.1)

    def _stack(self, rank: int) -> str:
        try:
            return (self.folder / f"rank-{rank}.stack").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _text(self, verdict: Verdict) -> str:
        lines = [verdict.line(), f"train.watchdog_seconds {self.seconds:g}, written by rank {self.rank}", "", "ranks:"]
        clock = time.monotonic()
        for rank in range(self.size):
            last = heartbeat.read(self.folder, rank)
            if not last:
                lines.append(f"  rank {rank}: never started")
                continue
            row = self._seen.get(rank)
            still = f", beat stands still for {clock - row.beat_since:.1f} s" if row else ""
            lines.append(f"  rank {rank}: {place(last)}, pid {last['pid']} {state_of(last['pid'])}{still}")
        for rank in range(self.size):
            lines += ["", f"stacks of rank {rank}:", self._stack(rank) or "  (none: the process could not write them)"]
        return "\n".join(lines) + "\n"

    def translate(self, error: BaseException) -> BaseException:
        """RankLost for an error that says no more than that a peer has gone, once it is known which; else the error."""
        if not self.seconds or isinstance(error, FailedElsewhere) or not lost_contact(error):
            return error
        verdict = self._find_silent()
        if verdict is None:
            return error
        path = self.report(verdict)
        return RankLost(f"{verdict.line()}{f'; see {path}' if path else ''}")

    def _find_silent(self) -> Verdict | None:
        """The rank whose beat stands still now that contact was lost: looked for during a few beats."""
        assert self._beat is not None
        patience = max(3 * self._beat.interval, 1.0)
        seen = {rank: _Seen(heartbeat.read(self.folder, rank), 0.0, 0.0) for rank in range(self.size)}
        begun = time.monotonic()
        while time.monotonic() < begun + patience:
            dead = next((rank for rank, row in seen.items() if row.last and heartbeat.gone(row.last)), None)
            if dead is not None:
                return Verdict(dead, GONE, 0.0, seen[dead].last)
            for row in seen.values():
                row.look(heartbeat.read(self.folder, row.last.get("rank", -1)), 1.0)
            time.sleep(self._beat.interval / 2)
        rows = [(rank, row) for rank, row in seen.items() if row.last and rank != self.rank]
        silent = [rank for rank, row in rows if row.beat_since == 0.0 and row.last["phase"] != heartbeat.END]
        if not silent:
            return None
        return Verdict(silent[0], SILENT, time.monotonic() - begun, seen[silent[0]].last)


def _remove_others(folder: Path) -> None:
    """Heartbeats of starts before; rank 0 holds the run, so nobody needs them."""
    for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def state_of(pid: int) -> str:
    """State of a process, where it is one of this machine: "(stopped)", "(gone)" ..."""
    if not re.fullmatch(r"\d+", str(pid)) or not Path("/proc/self/stat").exists():
        return ""
    if not started(pid):
        return "(not on this machine, or gone)"
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "(gone)"
    return {"T": "(stopped)", "R": "(running)", "S": "(sleeping)", "D": "(in an uninterruptible call)"}.get(letter, "")
