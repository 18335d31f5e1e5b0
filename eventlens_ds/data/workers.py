"""Worker processes that end with their parent, and not before it.

In: the process id of the parent, inside a worker. Out: a watch that ends the worker once the parent is gone, however
it went, or asks it to. Decision: a thread that looks, because a worker may be blocked in a pipe whose other end it
holds itself, so neither an error nor a signal would ever reach it after its parent was killed.
"""

from __future__ import annotations

import os
import signal
import threading
import time


def leave_with_parent(parent: int) -> None:
    """End this worker when the parent was killed: it would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def heed_parent_alone(parent: int) -> None:
    """`leave_with_parent`, and SIGTERM from anyone but the parent is ignored.

    Slurm sends it to every process of a job when it wants one to stop. The parent then still trains a step and saves,
    for which it needs its workers.
    """
    if not hasattr(signal, "sigtimedwait"):  # macOS, which has no Slurm either
        return leave_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while os.getppid() == parent:
            got = signal.sigtimedwait({signal.SIGTERM}, 0.3)
            if got is not None and got.si_pid == parent:
                os._exit(0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
