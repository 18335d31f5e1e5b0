"""Times of several pieces of work, taken in turns in one process.

In: named works, each a preparation that is not timed and a run that is. Out: seconds per run, in order.
Decision: works take turns in rounds, in an order shuffled from a fixed seed; one that takes long sits out evenly spread
rounds, so that it does not use up the time in which a short one runs often enough. Drift of clocks and other load then
fall on all of them alike, and so does what the work before left in the caches: in a rotated order each work would
always follow the same one, and of two that read the same data the second would seem faster. On CUDA a run lies between
two events; `cold` overwrites a buffer larger than the L2 cache before it, `warm` does the same run once untimed. A CPU
has neither: its caches hold what the previous work left, which `cache` calls "not controlled".
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Cache = Literal["warm", "cold", "not controlled"]

_FLUSH_BYTES = 256 << 20
"""More than twice the L2 cache of any GPU so far (H200: 50 MB; B200: 126 MB)."""


@dataclass(frozen=True)
class Work:
    """`run(prepare())` is one run; only `run` is timed."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


class Clock:
    """Times runs on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.caches: tuple[Cache, ...] = ("cold", "warm") if device.type == "cuda" else ("not controlled",)
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def seconds(self, work: Work, cache: Cache) -> float:
        """Seconds of one run. On CUDA: between two events on the current stream, waiting launches included."""
        if self._flush is None:
            state = work.prepare()
            started = time.perf_counter()
            work.run(state)
            return time.perf_counter() - started
        if cache == "warm":
            work.run(work.prepare())
        state = work.prepare()
        if cache == "cold":
            self._flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work.run(state)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def interleaved(
        self, works: Mapping[str, Work], cache: Cache, *, repeats: int, budget: float
    ) -> dict[str, list[float]]:
        """Up to `repeats` runs of each. Each has an equal share of `budget` seconds; one whose `repeats` runs would not
        fit its share runs less often, at least 3 times, and its runs are spread evenly over the rounds.

        A first round is dropped: it pays for warm-up and tells how long a run takes, its preparation included.
        """
        names = list(works)
        order = random.Random(len(names))
        runs: dict[str, int] = {}
        for name in names:
            started = time.perf_counter()
            self.seconds(works[name], cache)
            fitting = int(budget / len(names) / max(1e-9, time.perf_counter() - started))
            runs[name] = max(3, min(repeats, fitting))
        rounds = max(runs.values())
        taken: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            due = [name for name in names if (number + 1) * runs[name] // rounds > number * runs[name] // rounds]
            order.shuffle(due)
            for name in due:
                taken[name].append(self.seconds(works[name], cache))
        return taken


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, between two of them linearly."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
