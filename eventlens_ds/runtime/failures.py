"""When a rank fails: which rank says so, and with which exit code every rank leaves.

In: an exception on one rank or on all. Out: the same exception on the rank that has to report it, with its rank number
when it is not everybody's, and `FailedElsewhere` (a silent exit with the same code) on the others; `leave` ends the
process with that code and no other.
Decision: ranks compare notes through the key-value store of the rendezvous. A failing rank cannot use a collective,
because its peers may be waiting in another one; the store answers whatever they do. It usually lives in rank 0, so
every rank listens from the start: by the time it notices that rank 0 has gone there is nobody left to ask.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn

from eventlens_ds.errors import UserError
from eventlens_ds.runtime import distributed, heartbeat
from eventlens_ds.runtime.distributed import World

INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells give it."""

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
"""Faults of the place a user chose to write to, not of ours."""

_LISTEN = timedelta(seconds=2)
"""How long a failing rank waits to hear from the others; less than the grace that `spawn` gives them."""

_LOST_CONTACT = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|timed ?out", re.IGNORECASE)
"""What a collective says when a peer has gone."""

_KEY = "eventlens/failed"

_RUN = timedelta(days=365)
"""Longer than any run: a rank listens until it leaves."""


class FailedElsewhere(SystemExit):
    """Another rank reports the error; this one leaves with the exit code `code` and says nothing."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code)
        self.reason = reason


class Terminated(SystemExit):
    """SIGTERM before training began, when there is nothing to save. A SystemExit, so that a worker process that
    inherits the handler leaves without a traceback."""

    def __init__(self, name: str = "SIGTERM") -> None:
        super().__init__(128 + signal.Signals[name].value)
        self.reason = f"ended by {name} before the first step"


def lost_contact(error: BaseException) -> bool:
    """True for an error of a collective that says no more than that a peer has gone."""
    return isinstance(error, RuntimeError) and bool(_LOST_CONTACT.search(exit_of(error)[1]))


def exit_of(error: BaseException) -> tuple[int, str]:
    """(exit code, one line) of an exception; the code of a crash is 1, as Python's own, and its line says where."""
    if isinstance(error, UserError):
        return error.code, str(error)
    if isinstance(error, FailedElsewhere | Terminated):
        return int(str(error.code)), error.reason
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, OSError) and error.errno in STORAGE:
        return UserError.code, f"{error.filename or 'storage'}: {error.strerror}"
    text = str(error).strip().splitlines()
    # A rank that leaves with 0 before the run has ended has not succeeded.
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code else 1
    in_a_run = heartbeat.here.phase in heartbeat.AT_WORK or heartbeat.here.moves
    where = f" (in {heartbeat.place(heartbeat.here.to_json())})" if in_a_run else ""
    return code, (f"{type(error).__name__}: {text[0]}" if text else type(error).__name__) + where


@contextlib.contextmanager
def before_the_group() -> Iterator[None]:
    """Around what a rank does before it meets the others: a crash is its own and gets its number, and even
    `sys.exit(0)` leaves with code 1. The others wait for this rank, and launchers end them only after a failure."""
    try:
        yield
    except (UserError, OSError, Terminated, KeyboardInterrupt):
        raise
    except BaseException as error:
        place = distributed.rendezvous(dict(os.environ))
        if place["WORLD_SIZE"] != "1":
            error.add_note(f"(rank {place['RANK']} of {place['WORLD_SIZE']})")
        if isinstance(error, SystemExit) and not error.code:
            error.code = 1
        raise


@contextlib.contextmanager
def process_group(threads: int, timeout_minutes: float, problem: Exception | None = None) -> Iterator[World]:
    """`distributed.start` ... `stop`; an exception inside is reported by the ranks that should.

    problem: what went wrong on this rank before the group existed. It is raised here once all ranks are together, so
    that a rank without a problem leaves too, instead of waiting for one that never comes.
    """
    if problem is not None and distributed.rendezvous(dict(os.environ))["WORLD_SIZE"] == "1":
        raise problem
    world = distributed.start(threads, timeout_minutes)
    ear = _Ear(world)
    try:
        _raise_together(problem)
        yield world
    except BaseException as error:
        elsewhere = _tell(error, world, ear)
        if elsewhere is not None:
            raise elsewhere from None
        raise
    finally:
        ear.close()
        distributed.stop()


class _Ear:
    """Hears of the first failure of another rank whatever this one is doing, and remembers it in `heard`.

    A thread waits for the letter that the first rank to fail puts into every rank's box. heard: [rank, code, text], or
    None as long as nobody failed. Alone (world size 1) there is nothing to hear and no thread.
    """

    def __init__(self, world: World) -> None:
        self.heard: list[Any] | None = None
        self._box = _box(world.rank)
        self._thread: threading.Thread | None = None
        if world.size == 1:
            return
        from torch.distributed.distributed_c10d import _get_default_store

        store: Any = _get_default_store()
        self._store = store
        self._thread = threading.Thread(target=self._listen, args=(store.clone(),), daemon=True, name="ear")
        self._thread.start()

    def _listen(self, store: Any) -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # the store has gone
            store.wait([self._box], _RUN)
            self.heard = json.loads(store.get(self._box))

    def close(self) -> None:
        """Stop listening: the thread is woken by a letter of our own, or by the end of the store."""
        if self._thread is not None:
            with contextlib.suppress(RuntimeError, ValueError):
                self._store.compare_set(self._box, "", "null")
            self._thread.join(_LISTEN.total_seconds())


def _box(rank: int) -> str:
    return f"{_KEY}/{rank}/box"


def _raise_together(problem: Exception | None) -> None:
    """`problem` where there is one, FailedElsewhere on the other ranks; nothing when no rank has one. A collective."""
    rows = distributed.gather_objects(None if problem is None else exit_of(problem))
    if problem is not None:
        raise problem
    for rank, row in enumerate(rows):
        if row is not None:
            raise FailedElsewhere(row[0], f"rank {rank}: {row[1]}")


def _tell(error: BaseException, world: World, ear: _Ear) -> FailedElsewhere | None:
    """Tell the others; returns what to raise instead where another rank reports the error.

    Ranks whose text is that of rank 0 leave the word to it. A rank that only lost contact after another had failed
    takes that rank's code. A UserError that is not everybody's gets the number of this rank.
    """
    if world.size == 1:
        return None
    code, text = exit_of(error)
    first, others = _exchange(world, code, text)
    first = ear.heard or first
    if isinstance(error, FailedElsewhere):
        return error
    if first is not None and first[0] != world.rank and lost_contact(error):
        return FailedElsewhere(first[1], first[2] if first[2].startswith("rank ") else f"rank {first[0]}: {first[2]}")
    if text in others:
        return FailedElsewhere(code, text) if world.rank else None
    mark = f"rank {world.rank}: "
    if isinstance(error, UserError):
        error.args = (mark + text,)
    else:
        error.add_note(f"({mark.strip(': ')} of {world.size})")
    return None


def _exchange(world: World, code: int, text: str) -> tuple[list[Any] | None, list[str]]:
    """(rank, code and text of the first failure; texts that matter to this rank: rank 0's, or all others' on rank 0).

    Whatever cannot be heard within `_LISTEN`, or because the store has gone with its rank, is left out.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    def key(rank: int, what: str = "text") -> str:
        return f"{_KEY}/{rank}/{what}"

    peers = [rank for rank in range(world.size) if rank != world.rank]
    first, heard = None, []
    with contextlib.suppress(RuntimeError, ValueError):
        store = _get_default_store()
        said = json.dumps([world.rank, code, text])
        first = json.loads(store.compare_set(_KEY, "", said))
        for rank in peers if first[0] == world.rank else ():
            store.compare_set(_box(rank), "", said)
        store.set(key(world.rank), text)
        # Rank 0 usually hosts the store, so it stays until the others have read what it says.
        wanted = [key(rank, "read") for rank in peers] if world.rank == 0 else [key(0)]
        with contextlib.suppress(RuntimeError):
            store.wait(wanted, _LISTEN)
        speakers = [rank for rank in (peers if world.rank == 0 else [0]) if store.check([key(rank)])]
        heard = [store.get(key(rank)).decode() for rank in speakers]
        store.set(key(world.rank, "read"), "")
    return first, heard


def leave(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and end the process with its exit code, after exit handlers, without tearing Python down.

    gloo's threads outlive `distributed.stop`, because DeepSpeed keeps references to its groups. A thread that comes
    back from torch and wants the interpreter while that is torn down aborts the process ("terminate called without an
    active exception", exit code 134), although all work is done. Nothing may be left to do but exit handlers.
    """
    try:
        code: Any = main()
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not (code is None or isinstance(code, int)):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)
