"""What one process of `bench train` does: take the steps of one arm and count what they saw.

In: a `Job` and the `World` of this rank. Out: one dict per arm and repeat, the same on every rank. An arm is a layout
of the same samples; its steps are warm-up, then timed, then clocked by part.
Decision: all arms draw the groups of the same planned steps, and each reports the ids it really trained on; figures of
arms whose ids differ are never compared. Our arms run the engine and the step of train/, nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from eventlens_ds.bench.parts import WAIT, PartClock, flops_by_part, shares
from eventlens_ds.config.load import load
from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.data.loader import RowDataset, RunData, rank_batches, row_seed
from eventlens_ds.data.packing import Row, vision_calls
from eventlens_ds.data.records import Batch
from eventlens_ds.model.configuration import RegionVLMConfig
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.ops import dispatch
from eventlens_ds.runtime.distributed import World, gather_objects
from eventlens_ds.train.metrics import memory_bytes, sample_hash

log = logging.getLogger(__name__)

BASELINE = "hf_trainer"
ARMS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "ours": (),
    "ours_flat": ("--data.layout=flat",),
    "ours_unpacked": (),
    "ours_reference": ("--model.kernels=reference",),
}
"""Settings of every arm: the baseline; ours; ours without shared prefixes; with one group per row; without kernels."""


class Phases(NamedTuple):
    """Optimizer steps of a run: warm-up, timed, and clocked by part."""

    warmup: int
    timed: int
    clocked: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class Job:
    """What a process is asked to do; written to job.json by bench/train.py.

    kind: "time" (one arm) or "gate" (the losses of all `arms`). micro_batch: samples per micro-step of the baseline.
    """

    kind: str
    data: str
    recipe: str
    settings: tuple[str, ...]
    arms: tuple[str, ...]
    phases: Phases
    micro_batch: int = 0


@dataclass(frozen=True)
class Setting:
    """Everything an arm needs before a model exists."""

    config: RunConfig
    architecture: RegionVLMConfig
    data: RunData
    steps: list[list[Row]]
    """Planned rows of every step, of all phases."""
    phases: Phases

    @property
    def by_phase(self) -> list[list[list[Row]]]:
        """The planned steps of each phase."""
        ends = list(itertools.accumulate(self.phases, initial=0))
        return [self.steps[first:last] for first, last in itertools.pairwise(ends)]


def setting(job: Job, arm: str, *more: str) -> Setting:
    """Configuration, data and plan of an arm. Shapes without published weights get random ones."""
    from eventlens_ds.runtime.build_model import describe
    from eventlens_ds.train.run import training_data

    config = load(job.recipe, [*job.settings, f"--data.train={job.data}", *ARMS[arm], *more])
    architecture, tokenizer, spec = describe(config, dry=True)
    data = training_data(config, tokenizer, spec)
    cache = Path(job.data) / "plans"
    plan = data.plan(seed=config.train.seed, rows_per_step=config.train.rows_per_step, cache_dir=cache)
    steps = [list(plan.step(step)) for step in range(job.phases.total)]
    return Setting(config, architecture, data, steps, job.phases)


class Meter:
    """Counts what the timed steps of this rank saw, how long they took, and the time by part of the clocked ones."""

    def __init__(self, phases: Phases, world: World, model: RegionVLM) -> None:
        self.phases, self.world, self.model = phases, world, model
        self.step, self.seconds, self.waited = 0, 0.0, 0.0
        self.counts = dict.fromkeys(("tokens", "computed", "supervised", "samples", "images", "regions", "micro"), 0)
        self.ids: list[str] = []
        self.by_part: dict[str, float] | None = None
        self._clock: PartClock | None = None
        self._started = 0.0
        self._enter()

    @property
    def timing(self) -> bool:
        return self.phases.warmup <= self.step < self.phases.warmup + self.phases.timed

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around everything that waits for the loader."""
        before = self._clock.switch(WAIT) if self._clock else ""
        started = time.perf_counter()
        yield
        if self.timing:
            self.waited += time.perf_counter() - started
        if self._clock:
            self._clock.switch(before)

    def saw(self, **counts: int) -> None:
        """Add what a micro-step holds; nothing outside of the timed steps."""
        if self.timing:
            for name, count in counts.items():
                self.counts[name] += count

    def samples(self, ids: Sequence[str]) -> None:
        if self.timing:
            self.ids += ids
            self.counts["samples"] += len(ids)

    def step_done(self) -> None:
        """After every optimizer step."""
        if self.step == self.phases.warmup + self.phases.timed - 1:
            self.seconds = self._now() - self._started
            self.memory = memory_bytes(self.world.device)
        self.step += 1
        self._enter()

    def _enter(self) -> None:
        first_clocked = self.phases.warmup + self.phases.timed
        if self.step == self.phases.warmup:
            reset_peak_memory(self.world.device)
            self._started = self._now()
        elif self.step == first_clocked and self.phases.clocked:
            self._clock = PartClock(self.model, self.world.device)
            self._clock.start()
        elif self.step == self.phases.total and self._clock:
            self.by_part, self._clock = self._clock.stop(), None

    def _now(self) -> float:
        """The time when every rank has finished what it was given."""
        if self.world.device != "cpu":
            torch.cuda.synchronize()
        torch.distributed.barrier()
        return time.perf_counter()

    def result(self, config: RunConfig) -> dict[str, Any]:
        """Sums over ranks (seconds and waits: the largest; by_part: rank 0's). A collective."""
        own = {"seconds": self.seconds, "waited": self.waited, "memory": self.memory, "ids": self.ids} | self.counts
        ranks = gather_objects(own)
        seen = {name: sum(rank[name] for rank in ranks) for name in self.counts}
        ids = [sample for rank in ranks for sample in rank["ids"]]
        return {
            **seen,
            "seconds": max(rank["seconds"] for rank in ranks),
            "waited": max(rank["waited"] for rank in ranks),
            "memory": [rank["memory"] for rank in ranks],
            "ids": sample_hash(ids),
            "steps": self.phases.timed,
            "shares": None if self.by_part is None else shares(self.by_part),
            "flops": flops_by_part(self.model, seen),
            "ranks": self.world.size,
            "threads": torch.get_num_threads(),
            "gpu": None if self.world.device == "cpu" else torch.cuda.get_device_name(),
            "attention": self.model.config.text_config._attn_implementation,
            "kernels": dispatch.decisions(),
            "zero": config.train.zero,
            "dtype": config.train.dtype,
        }


def reset_peak_memory(device: str) -> None:
    """Start the peak that `memory_bytes` reports anew, where that is possible (on the CPU: Linux)."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class StepRows(Sequence):
    """(members, seed) of the rows of one rank, micro-step by micro-step; ranks take the rows of a step in turn."""

    def __init__(self, steps: Sequence[Sequence[Row]], rank: int, size: int, seed: int) -> None:
        self.steps, self.rank, self.size, self.seed = steps, rank, size, seed
        self.micro_steps = -(-max(map(len, steps)) // size)

    def __len__(self) -> int:
        return len(self.steps) * self.micro_steps

    def __getitem__(self, index: int) -> tuple[Sequence[tuple[int, int]], int]:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, micro = divmod(index, self.micro_steps)
        slot = micro * self.size + self.rank
        rows = self.steps[step]
        return rows[slot].groups if slot < len(rows) else (), row_seed(self.seed, step, slot)

    def calls(self, step: int, chunk: int) -> list[int]:
        """Calls of the vision tower in each micro-step of `step`, the same on every rank (P5)."""
        firsts = range(0, self.micro_steps * self.size, self.size)
        return [vision_calls(self.steps[step][first : first + self.size], chunk) for first in firsts]


def arm_rows(given: Setting, arm: str) -> list[list[Row]]:
    """The rows of every step of one of our arms; without packing, the groups of a phase dealt out evenly."""
    if arm != "ours_unpacked":
        return given.steps
    steps: list[list[Row]] = []
    for phase in given.by_phase:
        alone = [
            Row(row.index, row.epoch, (member,), int(given.data.groups[member[0]].lengths[member[1]]), 1)
            for step in phase
            for row in step
            for member in row.groups
        ]
        ends = [len(alone) * i // max(1, len(phase)) for i in range(len(phase) + 1)]
        steps += [alone[first:last] for first, last in itertools.pairwise(ends)]
    return steps


def run(given: Setting, arm: str, world: World) -> dict[str, Any]:
    """Train the steps of one of our arms with the engine and the step of train/. A collective."""
    from eventlens_ds.train.engine import build
    from eventlens_ds.train.loop import optimizer_step
    from eventlens_ds.train.run import tasks_of

    rows = arm_rows(given, arm)
    config = replace(given.config, train=replace(given.config.train, rows_per_step=max(map(len, rows))))
    trainable = build(config, given.architecture, world, tasks_of(given.data))
    mine = StepRows(rows, world.rank, world.size, config.train.seed)
    batches = rank_batches(RowDataset(given.data, mine), workers=config.data.workers, prefetch=config.data.prefetch)
    meter = Meter(given.phases, world, region_vlm_of(trainable.model))
    for step in range(given.phases.total):
        with meter.waiting():
            step_rows = [next(batches) for _ in range(mine.micro_steps)]
        for row in step_rows:
            _count(meter, row)
        optimizer_step(trainable.engine, step_rows, mine.calls(step, config.train.vision_chunk), config, world)
        meter.step_done()
    return meter.result(config)


def _count(meter: Meter, row: Batch) -> None:
    meter.samples(row.sample_ids)
    meter.saw(
        tokens=row.real_tokens,
        computed=row.input_ids.numel(),
        supervised=row.target_ids.numel(),
        images=row.pixel_values.shape[0],
        regions=row.boxes.shape[0],
        micro=1,
    )


def region_vlm_of(module: nn.Module) -> RegionVLM:
    """The RegionVLM inside its wrappers."""
    return next(found for found in module.modules() if isinstance(found, RegionVLM))
