"""The training loop: load a step, run its micro-steps, update, log, evaluate, save, stop when asked.

One optimizer step:
  1. load         all rows of this rank (they fix the denominators)
  2. denominators sums over ranks, before the first backward (P8)
  3. micro-steps  forward, loss = sums / denominators, backward; the last one updates
  4. report       losses by task over all ranks, together with the stop flags
Decision: DeepSpeed averages gradients over ranks and divides by accumulation; the loss is multiplied by both, so what
it minimises is the weighted sum of objective means over the whole step whatever the layout.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.data.loader import PlannedRows, RowDataset, RunData, rank_batches
from eventlens_ds.data.plan import Plan
from eventlens_ds.data.records import TASKS, Batch
from eventlens_ds.errors import DataError
from eventlens_ds.model import objective
from eventlens_ds.runtime import checkpoint
from eventlens_ds.runtime.distributed import World, all_reduce_sum
from eventlens_ds.train.audit import Audit
from eventlens_ds.train.engine import Trainable, set_lr
from eventlens_ds.train.flops import StepFlops
from eventlens_ds.train.metrics import RunLog, StepMetrics, memory_bytes, mfu, sample_hash
from eventlens_ds.train.preempt import StopFlag
from eventlens_ds.train.routing import Routing, RoutingProbe
from eventlens_ds.train.schedule import lr_factor
from eventlens_ds.train.skipped import SkippedLog, gather_skipped
from eventlens_ds.train.state import TrainState
from eventlens_ds.train.tensorboard import Board

log = logging.getLogger(__name__)


class StepReport(NamedTuple):
    """Sums of one step over all ranks. load_balance: the load-balance loss before its weight, nan where the objective
    has none."""

    loss: float
    load_balance: float
    task_loss: dict[str, float]
    supervised: int
    tokens: int
    samples: int
    skipped: int
    regions_used: int
    regions_unused: int
    stop: bool
    slowest_wait: float
    grad_norm: float


@dataclass
class Writers:
    """What only rank 0 has."""

    run_log: RunLog
    board: Board | None
    flops: StepFlops
    skipped: SkippedLog
    first_step: Callable[[], None]
    """Called once, when the first optimizer step of this attempt is done."""

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
    frozen = checkpoint.save_frozen(trainable.engine, run_dir, trainable.frozen_own)
    batches = micro_batches(data, plan, config, world, state.step)
    ledger = _Ledger(run_dir, world.rank) if config.train.ledger else None
    micro_steps = -(-config.train.rows_per_step // world.size)
    audit, probe = Audit(trainable.engine.module), RoutingProbe(trainable.engine.module)
    first_step = state.step + 1
    while state.step < config.train.steps:
        started = time.monotonic()
        step_rows = [next(batches) for _ in range(micro_steps)]
        waited = time.monotonic() - started
        step = state.step
        lr = config.train.lr * lr_factor(step, config.train)
        set_lr(trainable.engine, lr)
        calls = [plan.vision_calls(step, micro, world.size, config.train.vision_chunk) for micro in range(micro_steps)]
        logged = probe.watch(_logged(step + 1, config))
        report = optimizer_step(trainable.engine, step_rows, calls, config, world, waited, stop_flag.raised)
        routing = probe.read(step_rows, world.device) if logged else None
        state.step += 1
        state.samples_read += report.samples
        state.samples_skipped += report.skipped
        audit.after_step(report.task_loss)
        if writers and state.step == first_step:
            writers.first_step()
        if report.skipped:
            skipped = gather_skipped(step_rows, world)
            if writers:
                writers.skipped.add(state.step, skipped)
            _check_budget(run_dir, state, config)
        if ledger:
            ledger.write(step, step_rows)
        if writers and logged:
            _report(writers, report, routing, probe, plan, data, state, lr, time.monotonic() - started, world, config)
        due = config.train.eval_every and state.step % config.train.eval_every == 0
        best = evaluate(state) if due else False
        last = state.step == config.train.steps
        if report.stop or last or best or (config.train.save_every and state.step % config.train.save_every == 0):
            saved = _save(trainable, config, state, frozen, best, told=writers is not None)
            if not saved and (last or report.stop):
                raise DataError(
                    f"{run_dir}: the checkpoint of step {state.step}, the last of the run, cannot be written"
                )
        if report.stop and not last:
            return "preempted"
    return "finished"


def _save(
    trainable: Trainable, config: RunConfig, state: TrainState, frozen: str | None, best: bool, told: bool
) -> bool:
    """Commit a checkpoint, and log it where `told`; False, on every rank, when storage failed. A collective."""
    started = time.monotonic()
    path = checkpoint.save(
        trainable.engine,
        Path(config.io.run),
        step=state.step,
        state=state.to_json(),
        base=trainable.base,
        frozen_saved_in=frozen,
        keep=config.train.keep,
        best=best,
    )
    if path is not None and told:
        log.info("saved %s in %.1f s", path, time.monotonic() - started)
    return path is not None


def optimizer_step(
    engine: Any,
    rows: list[Batch],
    calls: list[int],
    config: RunConfig,
    world: World,
    waited: float = 0.0,
    stop: bool = False,
) -> StepReport:
    """One optimizer step of this rank over its rows. A collective: every rank has the same number of rows."""
    rows = [row.to(world.device) for row in rows]
    asked: dict[str, bool] = {"balance": True} if objective.balances(config) else {}
    denominators = all_reduce_sum(torch.stack([objective.counts(row, **asked) for row in rows]).sum(0))
    scale = world.size * len(rows)
    sums = torch.zeros_like(denominators)
    task_sums = torch.zeros(len(TASKS), dtype=torch.float64, device=world.device)
    task_counts = torch.zeros_like(task_sums)
    for row, vision_calls in zip(rows, calls):
        torch.manual_seed(row.seed)
        if asked:
            token_logp, balance = engine(batch=row, vision_calls=vision_calls, with_balance=True)
        else:
            token_logp, balance = engine(batch=row, vision_calls=vision_calls), None
        made = objective.row_sums(token_logp, row, config.objective, balance)
        engine.backward(objective.step_loss(made.sums, denominators, config.objective) * scale)
        plain_norm = _norm_without_zero(engine)
        engine.step()
        sums += made.sums.detach().double()
        task_sums += made.task_sums
        task_counts += made.task_counts
    own = [
        (len(row.sample_ids), len(row.skipped), row.real_tokens, row.regions_used, row.regions_unused) for row in rows
    ]
    extras = torch.tensor([*map(sum, zip(*own)), stop], dtype=torch.float64, device=world.device)
    waits = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    waits[world.rank] = waited
    joined = all_reduce_sum(torch.cat([sums, task_sums, task_counts, extras, waits])).cpu()
    sizes = [len(sums), len(TASKS), len(TASKS), len(extras), world.size]
    sums, task_sums, task_counts, extras, waits = joined.split(sizes)
    norm = engine.get_global_grad_norm()
    norm = plain_norm if norm is None else norm
    return StepReport(
        loss=float(objective.step_loss(sums, denominators.cpu(), config.objective)),
        load_balance=float(sums[3] / denominators[3]) if asked else float("nan"),
        task_loss={t: float(s / c) for t, s, c in zip(TASKS, task_sums, task_counts) if c > 0},
        supervised=int(denominators[0] + denominators[2]),
        tokens=int(extras[2]),
        samples=int(extras[0]),
        skipped=int(extras[1]),
        regions_used=int(extras[3]),
        regions_unused=int(extras[4]),
        stop=bool(extras[5] > 0),
        slowest_wait=float(waits.max()),
        grad_norm=float("nan") if norm is None else float(norm),
    )


def _norm_without_zero(engine: Any) -> float | None:
    """Norm of the step's gradient, before clipping, where DeepSpeed reports none (stage 0 in fp32); else None.

    Called between backward and step: at the last micro-step the gradients are averaged over ranks by then.
    """
    if engine.zero_optimization_stage() != 0 or not engine.is_gradient_accumulation_boundary():
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else None


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
    ids = (sample.id for row in rows for member in row.groups for sample in data.group(*member).samples)
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
    )
    writers.run_log.append(metrics)
    if writers.board:
        writers.board.step(metrics)
    if routing and writers.board:
        writers.board.routing(state.step, routing)
    if routing:
        probe.collapse.add(state.step, routing)


def _check_budget(run_dir: Path, state: TrainState, config: RunConfig) -> None:
    """Stop the run when too many samples could not be used; all ranks agree, because the counts are sums over ranks."""
    if state.samples_skipped > max(1.0, config.data.error_budget * state.samples_read):
        raise DataError(
            f"{run_dir}: {state.samples_skipped} of {state.samples_read} samples could not be used, more than "
            f"data.error_budget {config.data.error_budget}"
        )


class _Ledger:
    """ledger-rank*.jsonl: which sample was seen in which step and micro-step, by which attempt."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.path = run_dir / f"ledger-rank{rank}.jsonl"
        self.attempt = 0
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            self.attempt = 1 + max((json.loads(line)["attempt"] for line in lines), default=-1)

    def write(self, step: int, rows: list[Batch]) -> None:
        with self.path.open("a") as file:
            for micro, row in enumerate(rows):
                for sample in row.sample_ids:
                    entry = {"attempt": self.attempt, "step": step, "micro_step": micro, "id": sample}
                    file.write(json.dumps(entry) + "\n")
