"""The training loop: load a step, run its micro-steps, update, log, evaluate, save, stop when asked.

One optimizer step:
  1. load         all rows of this rank (they fix the denominators)
  2. denominators sums over ranks, before the first backward (P8); train/step.py
  3. micro-steps  forward, loss = sums / denominators, backward
  4. report       losses by task over all ranks, together with the stop flags
  5. update       or none, on all ranks, when loss or gradient is no number; train/guard.py
Decision: whatever a rank does is marked (runtime/heartbeat.py), and rank 0 asks for its lease before it writes, so a
job that was stopped for too long finds that it has been replaced and changes nothing more.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.data.loader import PlannedRows, RowDataset, RunData, rank_batches
from eventlens_ds.data.plan import Plan
from eventlens_ds.data.records import Batch
from eventlens_ds.errors import DataError
from eventlens_ds.runtime import checkpoint, heartbeat
from eventlens_ds.runtime.distributed import World
from eventlens_ds.runtime.lease import Lease
from eventlens_ds.train.audit import Audit
from eventlens_ds.train.engine import Trainable, set_lr
from eventlens_ds.train.flops import StepFlops
from eventlens_ds.train.guard import StepGuard
from eventlens_ds.train.ledger import Ledger
from eventlens_ds.train.metrics import RunLog, StepMetrics, memory_bytes, mfu, sample_hash
from eventlens_ds.train.preempt import StopFlag
from eventlens_ds.train.routing import Routing, RoutingProbe
from eventlens_ds.train.schedule import lr_factor
from eventlens_ds.train.skipped import SkippedLog, gather_refused, gather_skipped
from eventlens_ds.train.state import TrainState
from eventlens_ds.train.step import StepReport, optimizer_step
from eventlens_ds.train.tensorboard import Board

__all__ = ["StepReport", "Writers", "micro_batches", "optimizer_step", "train"]

log = logging.getLogger(__name__)


@dataclass
class Writers:
    """What only rank 0 has."""

    run_log: RunLog
    board: Board | None
    flops: StepFlops
    skipped: SkippedLog
    first_step: Callable[[], None]
    """Called once, when the first optimizer step of this attempt is done."""
    lease: Lease | None = None
    """Right to the run folder; None where nobody shares it, as in tests of the loop."""

    def close(self) -> None:
        self.run_log.close()
        if self.board:
            self.board.close()


def micro_batches(data: RunData, plan: Plan, config: RunConfig, world: World, first_step: int) -> Iterator[Batch]:
    """The rows of this rank from a step on."""
    rows = PlannedRows(
        plan,
        rank=world.rank,
        world=world.size,
        first_step=first_step,
        last_step=config.train.steps,
        seed=config.train.seed,
    )
    return rank_batches(RowDataset(data, rows), workers=config.data.workers, prefetch=config.data.prefetch)


def train(
    trainable: Trainable,
    data: RunData,
    plan: Plan,
    config: RunConfig,
    world: World,
    state: TrainState,
    stop_flag: StopFlag,
    writers: Writers | None,
    evaluate: Any,
) -> str:
    """Run to train.steps or to a planned stop; returns "finished" or "preempted".

    DataError when the checkpoint of either cannot be written: the steps since the one before would be lost.
    """
    run_dir = Path(config.io.run)
    engine, lease = trainable.engine, writers.lease if writers else None
    frozen = checkpoint.save_frozen(engine, run_dir, trainable.frozen_own)
    batches = micro_batches(data, plan, config, world, state.step)
    ledger = Ledger(run_dir, world.rank) if config.train.ledger else None
    micro_steps = -(-config.train.rows_per_step // world.size)
    audit, probe = Audit(engine.module), RoutingProbe(engine.module)
    guard = StepGuard(engine, state.steady, config.train.spike_sigma)
    heartbeat.watch_modules(engine.module)
    first_step = state.step + 1
    while state.step < config.train.steps:
        started = time.monotonic()
        heartbeat.mark(heartbeat.LOAD, step=state.step + 1, samples=())
        step_rows = [next(batches) for _ in range(micro_steps)]
        waited = time.monotonic() - started
        step = state.step
        lr = config.train.lr * lr_factor(step, config.train)
        set_lr(engine, lr)
        calls = [plan.vision_calls(step, micro, world.size, config.train.vision_chunk) for micro in range(micro_steps)]
        logged = probe.watch(_logged(step + 1, config))
        report = optimizer_step(engine, step_rows, calls, config, world, waited, stop_flag.raised, guard)
        routing = probe.read(step_rows, world.device) if logged else None
        if lease:
            lease.check()
        state.count(report.samples, report.skipped, report.refused)
        _list_unused(step_rows, report, state, config, world, writers)
        if not report.refused:
            audit.after_step(report.task_loss)
        if writers and state.step == first_step:
            writers.first_step()
        if ledger:
            ledger.write(step, step_rows)
        if writers and (logged or report.refused):
            _report(writers, report, routing, probe, plan, data, state, lr, time.monotonic() - started, world, config)
        due = config.train.eval_every and state.step % config.train.eval_every == 0
        if due:
            heartbeat.mark(heartbeat.EVAL)
        best = evaluate(state) if due else False
        last = state.step == config.train.steps
        if report.stop or last or best or (config.train.save_every and state.step % config.train.save_every == 0):
            saved = _save(trainable, config, state, frozen, best, lease, told=writers is not None)
            if not saved and (last or report.stop):
                raise DataError(
                    f"{run_dir}: the checkpoint of step {state.step}, the last of the run, cannot be written"
                )
        if report.stop and not last:
            return "preempted"
    return "finished"


def _list_unused(
    rows: list[Batch], report: StepReport, state: TrainState, config: RunConfig, world: World, writers: Writers | None
) -> None:
    """Samples that could not be used, and all of a step that was skipped, into skipped.jsonl. A collective."""
    if report.skipped:
        skipped = gather_skipped(rows, world)
        if writers:
            writers.skipped.add(state.step, skipped)
    if report.refused:
        refused = gather_refused(rows, report.refused, world)
        if writers:
            log.warning("step %d was skipped on all ranks: %s", state.step, report.refused)
            writers.skipped.add(state.step, refused)
    if report.skipped or report.refused:
        _check_budget(Path(config.io.run), state, config)


def _save(
    trainable: Trainable,
    config: RunConfig,
    state: TrainState,
    frozen: str | None,
    best: bool,
    lease: Lease | None,
    told: bool,
) -> bool:
    """Commit a checkpoint, and log it where `told`; False, on every rank, when storage failed. A collective."""
    started = time.monotonic()
    heartbeat.mark(heartbeat.SAVE)
    path = checkpoint.save(
        trainable.engine,
        Path(config.io.run),
        step=state.step,
        state=state.to_json(),
        base=trainable.base,
        frozen_saved_in=frozen,
        keep=config.train.keep,
        best=best,
        identity=trainable.identity,
        lease=lease,
    )
    if path is not None and told:
        log.info("saved %s in %.1f s", path, time.monotonic() - started)
    return path is not None


def _logged(step: int, config: RunConfig) -> bool:
    return step % config.train.log_every == 0 or step in (1, config.train.steps)


def _report(
    writers: Writers,
    report: StepReport,
    routing: Routing | None,
    probe: RoutingProbe,
    plan: Plan,
    data: RunData,
    state: TrainState,
    lr: float,
    seconds: float,
    world: World,
    config: RunConfig,
) -> None:
    rows = plan.step(state.step - 1)
    ids = (name for row in rows for member in row.groups for name in data.names(*member))
    gpu = torch.cuda.get_device_name() if world.device != "cpu" else None
    flops = writers.flops(report.tokens, sum(row.images for row in rows))
    metrics = StepMetrics(
        step=state.step,
        loss=report.loss,
        task_loss=report.task_loss,
        grad_norm=report.grad_norm,
        lr=lr,
        tokens_per_s=report.tokens / seconds,
        supervised_tokens=report.supervised,
        regions_used=report.regions_used,
        regions_unused=report.regions_unused,
        step_time=seconds,
        data_wait=report.slowest_wait,
        mfu=mfu(flops, seconds, world.size, gpu, config.train.dtype)[0],
        memory=memory_bytes(world.device),
        sample_hash=sample_hash(ids),
        routing=asdict(routing) if routing else None,
        load_balance=None if math.isnan(report.load_balance) else report.load_balance,
        refused=report.refused or None,
    )
    writers.run_log.append(metrics)
    if writers.board:
        writers.board.step(metrics)
    if routing and writers.board:
        writers.board.routing(state.step, routing)
    if routing:
        probe.collapse.add(state.step, routing)


def _check_budget(run_dir: Path, state: TrainState, config: RunConfig) -> None:
    """Stop the run when too many samples or steps could not be used; all ranks agree, as they count the same."""
    if state.samples_skipped > max(1.0, config.data.error_budget * state.samples_read):
        raise DataError(
            f"{run_dir}: {state.samples_skipped} of {state.samples_read} samples could not be used, more than "
            f"data.error_budget {config.data.error_budget}"
        )
    if state.refused_in_a_row >= config.train.skip_limit:
        raise DataError(f"{run_dir}: {state.refused_in_a_row} steps in a row were skipped (train.skip_limit)")
