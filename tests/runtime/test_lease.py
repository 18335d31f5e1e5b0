"""The lease of a run folder: one holder, whatever order jobs start, die, stop and wake in.

In: real processes that acquire, hold, are killed or stopped; races of many at once. Out: who holds the folder, and
LeaseError for the others. Decision: real SIGKILL and SIGSTOP, since they are what the lease is for.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eventlens_ds.errors import LeaseError, UserError
from eventlens_ds.runtime import lease

HOLDER = """
import sys, time
from pathlib import Path
from eventlens_ds.runtime import lease
held = lease.acquire(Path(sys.argv[1]), float(sys.argv[2]))
print(held.generation, flush=True)
while True:
    line = sys.stdin.readline()
    try:
        held.check()
        print("held", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


def holder(run: Path, seconds: float = 1.0) -> subprocess.Popen[str]:
    """A process that holds the folder and answers, to every line it is sent, whether it still does."""
    command = [sys.executable, "-c", HOLDER, str(run), str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().strip().isdigit()
    return process


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_living_holder_is_named_and_refuses_others(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(LeaseError, match=f"in use by process {process.pid} on .* \\(lease 1\\)") as error:
            lease.acquire(tmp_path, 1.0)
        assert error.value.code == 4 and ask(process) == "held"
    finally:
        end(process)


def test_a_killed_holder_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    process = holder(tmp_path, seconds=60)
    end(process)
    started = time.monotonic()
    held = lease.acquire(tmp_path, 60)
    assert time.monotonic() - started < 5 and held.generation == 2 and held.held()
    held.release()


def test_a_stopped_holder_is_replaced_and_knows_it_when_it_wakes(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        process.send_signal(signal.SIGSTOP)
        held = lease.acquire(tmp_path, 1.0)
        process.send_signal(signal.SIGCONT)
        assert ask(process).startswith("LeaseError") and held.held()
        held.release()
    finally:
        end(process)


def test_a_holder_of_another_machine_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process number means nothing here, though a process of that number may well be gone."""
    end(holder(tmp_path))
    monkeypatch.setattr(lease, "machine", lambda: "another")
    started = time.monotonic()
    lease.acquire(tmp_path, 1.0).release()
    assert 0.9 < time.monotonic() - started < 5


def test_given_back_it_is_free_at_once(tmp_path: Path) -> None:
    for generation in (1, 2, 3):
        held = lease.acquire(tmp_path, 60)
        assert held.generation == generation and held.held()
        held.release()
    assert [path.name for path in (tmp_path / lease.FOLDER).iterdir()] == ["00000003.json"]


def _race(run: Path, start: float, results: multiprocessing.Queue) -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        held = lease.acquire(run, 3.0)
    except LeaseError:
        results.put(0)
        return
    results.put(held.generation)
    time.sleep(4)


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results, start = context.Queue(), time.time() + 0.5
    racers = [context.Process(target=_race, args=(tmp_path, start, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    found = sorted(results.get(timeout=30) for _ in racers)
    for racer in racers:
        racer.join()
    assert found == [0] * 7 + [1]


def test_without_the_exclusive_link_two_would_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a claim that overwrites instead of failing."""
    (tmp_path / lease.FOLDER).mkdir()
    first = lease._claim(tmp_path, 1, lease._facts(1))
    assert first and not lease._claim(tmp_path, 1, lease._facts(1))
    monkeypatch.setattr(os, "link", lambda source, target: os.replace(source, target))
    assert lease._claim(tmp_path, 1, lease._facts(1))


def test_a_late_claim_of_an_old_generation_wins_nothing(tmp_path: Path) -> None:
    """A job that slept between looking and claiming: the number it wants was used, given back and removed."""
    for _ in range(3):
        lease.acquire(tmp_path, 60).release()
    assert not lease._claim(tmp_path, 2, lease._facts(2))
    assert lease.newest(tmp_path) == 3


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file, not a folder"):
        lease.acquire(tmp_path / "file", 1.0)


def test_a_torn_lease_file_is_waited_for_and_then_taken(tmp_path: Path) -> None:
    (tmp_path / lease.FOLDER).mkdir()
    (tmp_path / lease.FOLDER / "00000007.json").write_text('{"pid": 1, "sta')
    held = lease.acquire(tmp_path, 0.5)
    assert held.generation == 8
    held.release()
