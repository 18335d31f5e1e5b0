"""What SIGTERM does: before training it ends the attempt, during training it asks for a planned stop.

In: signals to any rank. Out: `EarlyStop` raises Terminated (exit code 143) for SIGTERM and notes the other signals;
`StopFlag`, for `train.stop_signals`, is a flag that the loop sends along with the sums of every step and that is asked
for between the parts of the start and of an evaluation, so a signal to one rank stops all of them at the same place,
with a checkpoint and exit code 75.
Decision: handlers do next to nothing. A rank that waits for the others inside a C call runs no handler at all, so a
thread that the signal wakes ends it there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from eventlens_ds.runtime.failures import Terminated


class StopFlag:
    """Context manager that installs the handlers and puts the former ones back. `raised` may be set from the start, by
    a signal that came earlier."""

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1"), raised: bool = False) -> None:
        self.raised = raised
        self._signals = [signal.Signals[name] for name in signals]
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopFlag:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.raised = True


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(signal.Signals(number).name)


class EarlyStop:
    """SIGTERM raises Terminated, wherever no StopFlag has taken it over. Outside the main thread nothing is done.

    last_words: called with the error where the main thread does not come to raise it within GRACE seconds; the process
    then ends with its exit code. noted: True once one of the other signals came: nothing is lost by going on until all
    ranks can agree to stop, and the default action of SIGUSR1 would be death.
    """

    GRACE = 3.0

    def __init__(self, last_words: Callable[[Terminated], None], signals: Sequence[str] = ("SIGUSR1",)) -> None:
        self.noted = False
        self._others = [signal.Signals[name] for name in signals if name != "SIGTERM"]
        self._others_before: dict[signal.Signals, Any] = {}
        self._last_words = last_words
        self._left = threading.Event()
        self._before: Any = None
        self._wake = -1

    def __enter__(self) -> EarlyStop:
        if threading.current_thread() is threading.main_thread():
            read, self._wake = os.pipe()
            os.set_blocking(self._wake, False)
            signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
            self._before = signal.signal(signal.SIGTERM, _terminate)
            self._others_before = {number: signal.signal(number, self._note) for number in self._others}
            threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()
        if self._wake >= 0:
            signal.signal(signal.SIGTERM, self._before)
            for number, handler in self._others_before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)
            os.close(self._wake)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True

    def _watch(self, read: int) -> None:
        with open(read, "rb", buffering=0) as woken:
            while number := woken.read(1):  # empty once the other end is closed
                early = number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _terminate
                if early and not self._left.wait(self.GRACE):
                    error = Terminated()
                    self._last_words(error)
                    os._exit(int(str(error.code)))


# A forked worker shares the pipe: a signal meant for it would wake the thread of the rank.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
