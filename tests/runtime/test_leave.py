"""How a process ends: with the exit code of its work, whatever threads of torch are still alive.

In: programs whose thread waits inside torch, without the interpreter, when the main thread has finished. Out: exit
codes and what exit handlers printed. Decision: the thread is one of Python in a torch store, which wakes for certain
while the interpreter is torn down; gloo's own threads do the same about once in a thousand runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAIN = '\nif __name__ == "__main__":\n'

LATE = """
import atexit, sys, threading, time
from datetime import timedelta
from torch.distributed import HashStore
from eventlens_ds.runtime.failures import leave

class Late:
    def __init__(self, store):
        self.store, self.sleep = store, time.sleep

    def __del__(self):
        # Part of the teardown: the waiting thread wakes now, and has a second to ask for the interpreter.
        self.store.set("key", "value")
        self.sleep(1)

def main():
    store = HashStore()
    sys.late = Late(store)
    threading.Thread(target=store.wait, args=(["key"], timedelta(minutes=5)), daemon=True).start()
    time.sleep(0.5)
    atexit.register(print, "handled", end="")
    return 7
"""


def ended(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_a_thread_inside_torch_does_not_change_the_exit_code() -> None:
    done = ended(LATE + "\nleave(main)")
    assert (done.returncode, done.stdout, done.stderr) == (7, "handled", "")


def test_python_s_own_teardown_would_abort() -> None:
    """The negative control: the same work, ended as Python ends."""
    done = ended(LATE + "\nsys.exit(main())")
    assert done.returncode == -6 and "terminate called without an active exception" in done.stderr


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("return None", 0, ""),
        ("raise SystemExit(75)", 75, ""),
        ("raise SystemExit('one line')", 1, "one line\n"),
        ("raise ZeroDivisionError('oops')", 1, "ZeroDivisionError: oops\n"),
    ],
)
def test_the_code_is_the_one_python_gives(work: str, code: int, said: str) -> None:
    program = f"def main():\n    print('out', end='')\n    {work}\n"
    ours = ended("from eventlens_ds.runtime.failures import leave\n" + program + "leave(main)")
    python = ended("import sys\n" + program + "sys.exit(main())")
    assert (ours.returncode, ours.stdout) == (python.returncode, python.stdout) == (code, "out")
    assert ours.stderr.endswith(said) and python.stderr.endswith(said)


def test_every_program_of_ranks_ends_by_leave() -> None:
    """A rank that ends as Python ends fails its launcher about once in a thousand runs, with exit code 134."""
    starts = re.compile(r"\b(start|process_group|spawn|run_ranks|rank_job)\(")
    programs = {
        path.relative_to(ROOT).as_posix(): text.split(MAIN)[1]
        for folder in ("tests", "eventlens_ds")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if MAIN in (text := path.read_text()) and starts.search(text)
    }
    assert {"tests/runtime/checkpoint_jobs.py", "eventlens_ds/launch/parity.py"} <= programs.keys()
    assert [name for name, ending in programs.items() if "leave(" not in ending] == []
