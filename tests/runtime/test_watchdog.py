"""Who is blamed: silent, dead and stuck ranks, told from ranks that only wait for them.

In: rows of what is known of ranks, by hand; files of heartbeats. Out: verdicts. Whole runs with real faults are in
tests/launch/test_prove.py. Decision: the judgement is a function of clocks and counters, so every case can be written
down.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.runtime import heartbeat
from eventlens_ds.runtime.heartbeat import Heartbeat
from eventlens_ds.runtime.watchdog import GONE, SILENT, STUCK, _Seen, judge


def row(step: int, moves: int, beat: float, moved: float, phase: str = "step", **more: Any) -> _Seen:
    last = {"pid": os.getpid(), "machine": "", "beat": 1, "moves": moves, "phase": phase, "step": step}
    return _Seen({**last, "micro_step": 0, "module": "", "samples": [], **more}, beat, moved)


def test_nobody_is_blamed_while_one_rank_goes_on() -> None:
    assert judge({0: row(3, 9, 99, 99), 1: row(3, 5, 99, 80)}, 100, 10) is None
    assert judge({}, 100, 10) is None


def test_a_silent_rank_is_blamed_before_those_that_wait_for_it() -> None:
    found = judge({0: row(3, 9, 99, 80), 1: row(3, 9, 89, 80)}, 100, 10)
    assert found is not None and (found.rank, found.kind) == (1, SILENT)
    assert found.line().startswith("rank 1 gave no sign of life for 11.0 s; last seen in step 3, phase step")


def test_of_stuck_ranks_the_one_that_came_least_far_is_blamed() -> None:
    found = judge({0: row(3, 9, 99, 80), 1: row(3, 5, 99, 81, "load"), 2: row(3, 9, 99, 80)}, 100, 10)
    assert found is not None and (found.rank, found.kind) == (1, STUCK) and "phase load" in found.line()
    found = judge({0: row(3, 9, 99, 80), 1: row(4, 2, 99, 80)}, 100, 10)
    assert found is not None and found.rank == 0


@pytest.mark.parametrize("phase", ["start", "end"])
def test_a_start_may_take_long_and_a_rank_that_has_left_is_not_stuck(phase: str) -> None:
    assert judge({0: row(0, 1, 99, 0, phase), 1: row(0, 1, 99, 0, phase)}, 100, 10) is None


def test_a_rank_that_was_never_seen_has_not_started() -> None:
    assert judge({0: row(0, 1, 99, 99), 1: _Seen({}, 0, 0)}, 100, 10) is None


def test_a_dead_process_of_this_machine_is_seen_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    here = heartbeat.machine()
    dead = row(3, 9, 99, 99, pid=int(done.stdout), machine=here)
    found = judge({0: row(3, 9, 99, 99), 1: dead}, 100, 10)
    assert found is not None and (found.rank, found.kind) == (1, GONE)
    assert judge({1: row(3, 9, 99, 99, "end", pid=int(done.stdout), machine=here)}, 100, 10) is None
    assert judge({1: row(3, 9, 99, 99, pid=int(done.stdout), machine="another")}, 100, 10) is None


def test_a_mark_is_written_at_once_and_cheap(tmp_path: Path) -> None:
    beat = Heartbeat(tmp_path, 3, 60.0, 600.0)
    try:
        heartbeat.mark(heartbeat.SAVE, step=7, samples=["a", "b"])
        assert heartbeat.place(heartbeat.read(tmp_path, 3)) == "step 7, phase save"
        heartbeat.mark(heartbeat.STEP, micro=1, samples=["x" * 500] * 50)
        assert heartbeat.read(tmp_path, 3)["samples"] == ["x" * 80] * 8
        started = time.perf_counter()
        for _ in range(1000):
            heartbeat.mark(heartbeat.STEP)
        assert time.perf_counter() - started < 0.5
    finally:
        beat.close()
    assert heartbeat.read(tmp_path, 3)["phase"] == heartbeat.END and not heartbeat.gone(heartbeat.read(tmp_path, 3))
