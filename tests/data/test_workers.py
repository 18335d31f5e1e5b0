"""A worker goes when its parent was killed. In: real processes. Decision: the control shows that it stays otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

PARENT = """
import os, sys, time
from eventlens_ds.data import workers
parent = os.getpid()
child = os.fork()
if child == 0:
    if sys.argv[1] != "unwatched":
        getattr(workers, sys.argv[1])(parent)
    time.sleep(30)
    os._exit(0)
print(child, flush=True)
time.sleep(30)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["leave_with_parent", "heed_parent_alone", "unwatched"])
def test_a_worker_ends_with_its_parent(how: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (1 if how == "unwatched" else 5)
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = alive(child)
    if left:
        os.kill(child, signal.SIGKILL)
    assert left == (how == "unwatched")


TOLD = """
import os, signal, sys, time
from eventlens_ds.data import workers
parent = os.getpid()
child = os.fork()
if child == 0:
    getattr(workers, sys.argv[1])(parent)
    time.sleep(30)
    os._exit(0)
print(child, flush=True)
sys.stdin.readline()
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="this system does not tell who sent a signal")
@pytest.mark.parametrize(("how", "survives"), [("heed_parent_alone", True), ("leave_with_parent", False)])
def test_sigterm_counts_only_from_the_parent(how: str, survives: bool) -> None:
    """Slurm sends it to every process of a job; without the guard the workers of a rank that wants to save are gone."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", TOLD, how], **pipes, text=True) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        os.kill(child, signal.SIGTERM)
        time.sleep(0.7)
        assert alive(child) == survives
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert int(parent.stdout.readline()) == (0 if survives else -signal.SIGTERM)
