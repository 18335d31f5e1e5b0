"""Local ranks: start the processes of a group on this machine, pass signals on, see them end.

In: a module and its arguments, a number of ranks. Out: how they ended (`Ended`); `spawn` is the launcher behind
`eventlens train --ranks N`. Decision: a rank never outlives its launcher, and after one failed the others get time to
finish what they write, less after a crash than after a planned stop.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from eventlens_ds.errors import UserError
from eventlens_ds.runtime.distributed import LOOPBACK, free_port

PREEMPTED = 75
"""Exit code of a rank that stopped on request after saving."""


def before_exec(parent: int, on_death: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """A preexec function: on Linux this child gets `on_death` as soon as its parent, process `parent`, is gone.

    SIGUSR1 is ignored until the child installs its handler; its default action would kill a rank that is starting.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None

    def arm() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if prctl is not None:
            prctl(1, on_death, 0, 0, 0)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    return arm


class Ended(NamedTuple):
    """How local ranks ended: exit code of the whole (0: all well), first rank that failed (-1: none), its signal."""

    code: int
    rank: int = -1
    signal: int = 0


def _start_ranks(
    ranks: int, argv: Sequence[str], module: str, more: dict[str, str], children: list[subprocess.Popen[bytes]]
) -> None:
    port = str(free_port())
    arm = before_exec(os.getpid())
    for rank in range(ranks):
        env = {
            **os.environ,
            **more,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": port,
        }
        # Own session: Ctrl-C in a terminal reaches the ranks once, through us, and not twice.
        command = [sys.executable, "-m", module, *argv]
        children.append(subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=arm))


def _watch(children: list[subprocess.Popen[bytes]]) -> Ended:
    """Wait for all; once one failed, give the others a grace period, then SIGTERM, then SIGKILL."""
    first, deadline, asked = -1, float("inf"), False
    while None in [child.poll() for child in children]:  # a list: every child must be polled, not only the first
        if first < 0 and (first := _first_failure(children)) >= 0:
            # After a planned stop rank 0 may still be writing; after a crash the others only wait for the dead one.
            deadline = time.monotonic() + (60.0 if children[first].returncode == PREEMPTED else 5.0)
        if time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill() if asked else child.terminate()
            asked, deadline = True, time.monotonic() + 5.0
        time.sleep(0.05)
    first = first if first >= 0 else _first_failure(children)
    code = 0 if first < 0 else children[first].returncode
    return Ended(128 - code, first, -code) if code < 0 else Ended(code, first)


def _first_failure(children: list[subprocess.Popen[bytes]]) -> int:
    """Number of a rank that is known to have failed, or -1."""
    return next((rank for rank, child in enumerate(children) if child.returncode not in (None, 0)), -1)


def spawn(ranks: int, argv: Sequence[str], module: str = "eventlens_ds.train") -> int:
    """`run_ranks` for callers that need the exit code alone."""
    return run_ranks(ranks, argv, module).code


def run_ranks(
    ranks: int, argv: Sequence[str], module: str = "eventlens_ds.train", env: dict[str, str] | None = None
) -> Ended:
    """Run `python -m module *argv` as `ranks` local processes, with `env` added to the environment; how they ended.

    SIGTERM, SIGINT and SIGUSR1 are passed on to the ranks. When one rank fails the others get five seconds (a minute
    after exit code 75) before they are ended. A rank killed by signal S counts as 128 + S. The ranks die with the
    calling thread, which must be the main one (only there can Python take signals).
    """
    if ranks < 1:
        raise UserError(f"--ranks must be at least 1, not {ranks}")
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        _start_ranks(ranks, argv, module, env or {}, children)
        return _watch(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
