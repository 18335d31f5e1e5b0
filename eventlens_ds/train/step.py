"""One optimizer step: denominators, micro-steps, the sums over all ranks, and the decision to take it or to skip it.

In: the rows of this rank. Out: a `StepReport`, the same on every rank.
Decision: DeepSpeed averages gradients over ranks and divides by accumulation; the loss is multiplied by both, so what
it minimises is the weighted sum of objective means over the whole step whatever the layout (P8). The sums are shared
before the optimizer moves, so that a loss that is no number on one rank keeps all ranks from moving.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.data.records import TASKS, Batch
from eventlens_ds.model import objective
from eventlens_ds.runtime import heartbeat
from eventlens_ds.runtime.distributed import World, all_reduce_sum
from eventlens_ds.train.guard import StepGuard


class StepReport(NamedTuple):
    """Sums of one step over all ranks. load_balance: the load-balance loss before its weight, nan where the objective
    has none. refused: why the optimizer did not move, empty when it did."""

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
    refused: str = ""


class _Sums:
    """What the micro-steps of a rank add up, in one vector that is summed over ranks."""

    def __init__(self, objectives: torch.Tensor, device: str) -> None:
        self.objectives = torch.zeros_like(objectives)
        self.tasks = torch.zeros(len(TASKS), dtype=torch.float64, device=device)
        self.counts = torch.zeros_like(self.tasks)

    def add(self, made: Any) -> None:
        self.objectives += made.sums.detach().double()
        self.tasks += made.task_sums
        self.counts += made.task_counts

    def over_ranks(self, rows: list[Batch], world: World, waited: float, stop: bool) -> list[torch.Tensor]:
        """[objective sums, task sums, task counts, counters, waits by rank] over all ranks, on the CPU."""
        own = [
            (len(row.sample_ids), len(row.skipped), row.real_tokens, row.regions_used, row.regions_unused)
            for row in rows
        ]
        device = self.tasks.device
        extras = torch.tensor([*map(sum, zip(*own)), stop], dtype=torch.float64, device=device)
        waits = torch.zeros(world.size, dtype=torch.float64, device=device)
        waits[world.rank] = waited
        joined = all_reduce_sum(torch.cat([self.objectives, self.tasks, self.counts, extras, waits])).cpu()
        return list(joined.split([len(self.objectives), len(TASKS), len(TASKS), len(extras), world.size]))


def optimizer_step(
    engine: Any,
    rows: list[Batch],
    calls: list[int],
    config: RunConfig,
    world: World,
    waited: float = 0.0,
    stop: bool = False,
    guard: StepGuard | None = None,
) -> StepReport:
    """One optimizer step of this rank over its rows. A collective: every rank has the same number of rows.

    guard: None takes every step that DeepSpeed takes.
    """
    rows = [row.to(world.device) for row in rows]
    asked: dict[str, bool] = {"balance": True} if objective.balances(config) else {}
    denominators = all_reduce_sum(torch.stack([objective.counts(row, **asked) for row in rows]).sum(0))
    scale = world.size * len(rows)
    sums = _Sums(denominators, world.device)
    plain_norm, joined, loss = None, [], 0.0
    for micro, (row, vision_calls) in enumerate(zip(rows, calls)):
        heartbeat.mark(heartbeat.STEP, micro=micro, samples=row.sample_ids)
        torch.manual_seed(row.seed)
        if asked:
            token_logp, balance = engine(batch=row, vision_calls=vision_calls, with_balance=True)
        else:
            token_logp, balance = engine(batch=row, vision_calls=vision_calls), None
        made = objective.row_sums(token_logp, row, config.objective, balance)
        heartbeat.here.module = "(backward)"
        engine.backward(objective.step_loss(made.sums, denominators, config.objective) * scale)
        sums.add(made)
        if micro + 1 < len(rows):
            engine.step()
            continue
        plain_norm = _norm_without_zero(engine)
        joined = sums.over_ranks(rows, world, waited, stop)
        loss = float(objective.step_loss(joined[0], denominators.cpu(), config.objective))
        heartbeat.here.module = "(optimizer)"
        if guard is None:
            engine.step()
        else:
            guard.see_loss(loss, plain_norm)
            guard.step()
    total, task_sums, task_counts, extras, waits = joined
    return StepReport(
        loss=loss,
        load_balance=float(total[3] / denominators[3]) if asked else float("nan"),
        task_loss={t: float(s / c) for t, s, c in zip(TASKS, task_sums, task_counts) if c > 0},
        supervised=int(denominators[0] + denominators[2]),
        tokens=int(extras[2]),
        samples=int(extras[0]),
        skipped=int(extras[1]),
        regions_used=int(extras[3]),
        regions_unused=int(extras[4]),
        stop=bool(extras[5] > 0),
        slowest_wait=float(waits.max()),
        grad_norm=_norm(engine, plain_norm, guard),
        refused=guard.reason if guard else "",
    )


def _norm(engine: Any, plain: float | None, guard: StepGuard | None) -> float:
    """Gradient norm before clipping; the engine's own is that of the last step it took."""
    if guard is not None and guard.reason:
        return float("nan") if guard.norm is None else guard.norm
    norm = engine.get_global_grad_norm()
    norm = plain if norm is None else norm
    return float("nan") if norm is None else float(norm)


def _norm_without_zero(engine: Any) -> float | None:
    """Norm of the step's gradient, before clipping, where DeepSpeed reports none (stage 0 in fp32); else None.

    Called between backward and step: at the last micro-step the gradients are averaged over ranks by then.
    """
    if engine.zero_optimization_stage() != 0 or not engine.is_gradient_accumulation_boundary():
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else None
