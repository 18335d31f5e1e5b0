"""A file that hashes what is written to it, beside the writing.

In: bytes, as torch.save hands them over. Out: the file, synced, its size and sha256, and what hashing cost. Decision: a
large write is hashed by a thread while the kernel takes it, and not read again from the disk afterwards; `write`
returns when both are done, because the caller may change its memory then.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ASIDE = 1 << 20
"""Bytes of one write above which a thread is worth its start."""


class HashingFile:
    """A file for torch.save that hashes what passes through and never raises while it is written.

    torch's zip writer calls `write` from C code, and the other ranks wait in collectives meanwhile, so the first
    OSError is kept in `error` and the rest of the data is dropped. After `close`: `size`, `sha256`, `error`, and
    `held_up`, the seconds that hashing took beyond writing: what is large is hashed on another core meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.held_up = 0.0
        self.error: OSError | None = None
        self._hash = hashlib.sha256()
        self._path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            self.error = error

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            hashing, aside = threading.Thread(target=self._hash.update, args=(view,)), len(view) > ASIDE
            self._held_up_by(hashing.start if aside else hashing.run)
            self.size += len(view)
            try:
                rest = view
                while len(rest):
                    rest = rest[os.write(self._fd, rest) :]
            except OSError as error:
                self.error = OSError(error.errno, error.strerror, str(self._path))
            if aside:
                self._held_up_by(hashing.join)
        return len(view)

    def _held_up_by(self, work: Callable[[], None]) -> None:
        begun = time.perf_counter()
        work()
        self.held_up += time.perf_counter() - begun

    def flush(self) -> None:
        """Nothing is buffered here; torch.save calls it."""

    def close(self) -> None:
        """fsync and close; an error of either counts like one of `write`."""
        if self._fd < 0:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            self.error = self.error or OSError(error.errno, error.strerror, str(self._path))
        finally:
            os.close(self._fd)
            self._fd = -1

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()
