"""How `eventlens data build` shows its progress: a bar on a terminal, lines in a log.

In: the BuildProgress of every batch of images. Out: text on stderr. Decision: a log gets a line every few seconds and
the last state, whatever the rate, so that a finished build can be told from one that was cut off.
"""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eventlens_ds.data.build import BuildProgress

LINE_SECONDS = 5.0
"""Seconds between two progress lines where there is no terminal."""


class BuildDisplay:
    """Shows a build: a bar on a terminal, else a line every few seconds; the last state is always shown."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.next_line = 0.0
        self.unshown: BuildProgress | None = None

    def __enter__(self) -> BuildDisplay:
        return self

    def __call__(self, state: BuildProgress) -> None:
        if sys.stderr.isatty():
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(total=state.total, unit="img", file=sys.stderr)
            self.bar.set_description(state.split)
            self.bar.update(state.images - self.bar.n)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + LINE_SECONDS
            self._line(state)
        else:
            self.unshown = state

    def _line(self, state: BuildProgress) -> None:
        eta = f"{state.eta:.0f} s" if math.isfinite(state.eta) else "unknown"
        counts = f"{state.images}/{state.total} images ({state.kept} kept, {state.skipped} skipped)"
        print(f"{state.split}: {counts}, {state.rate:.1f} img/s, ETA {eta}", file=sys.stderr, flush=True)
        self.unshown = None

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.unshown is not None:
            self._line(self.unshown)
