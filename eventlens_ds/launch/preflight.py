"""`eventlens preflight`: one step of the real recipe with rows made to disagree, saved and loaded, before a job starts.

In: a recipe, settings, a number of processes. Out: OUT/preflight.json and a few lines; exit code 6 when something
fails, which keeps `sbatch` scripts from starting. The stages, on every rank:
  1. build    model, engine, ZeRO stage of the recipe; data of the recipe, or an embedded world
  2. step     each rank has another kind of row in each micro-step: none at all, a full row of the plan, text alone,
              images without a region, a single group. Every collective is compared before it runs (P5), so that where
              a run would hang, the module is named
  3. save, load   a committed checkpoint; the loss of a row must have the same bits after as before
Decision: rows per step are five per rank, whatever the recipe says: memory depends on the row, not on their number.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventlens_ds.errors import PreflightError

if TYPE_CHECKING:
    from eventlens_ds.config.run_config import RunConfig
    from eventlens_ds.data.loader import RunData
    from eventlens_ds.data.plan import Plan
    from eventlens_ds.data.records import Batch

log = logging.getLogger(__name__)

MODULE = "eventlens_ds.launch.preflight"
KINDS = ("missing", "full", "text", "image", "single")
FILE = "preflight.json"


def main(recipe: str, settings: Sequence[str], ranks: int, out: Path) -> dict[str, Any]:
    """Run it; the report, also in OUT/preflight.json. PreflightError (exit 6) names what failed."""
    from eventlens_ds.launch.prove import Proof, claim, data_of
    from eventlens_ds.runtime.local_ranks import run_ranks

    began = time.monotonic()
    claim(out)
    (out / FILE).unlink(missing_ok=True)
    data = data_of(Proof(recipe, tuple(settings), out, ranks))
    where = [f"--data.train=[{','.join(map(str, data))}]", f"--io.run={out / 'run'}"]
    shutil.rmtree(out / "run", ignore_errors=True)
    ended = run_ranks(ranks, ["--config", recipe, *settings, *where], MODULE)
    if ended.code:
        raise PreflightError(f"preflight of {recipe}: rank {ended.rank} ended with exit code {ended.code}, see above")
    report: dict[str, Any] = json.loads((out / "run" / FILE).read_text())
    report = {"recipe": recipe, "ranks": ranks, "seconds": round(time.monotonic() - began, 1), **report}
    (out / FILE).write_text(json.dumps(report, indent=1) + "\n")
    shutil.rmtree(out / "run", ignore_errors=True)
    return report


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = "; ".join(f"rank {rank}: {', '.join(kinds)}" for rank, kinds in enumerate(report["rows"]))
    return "\n".join(
        [
            f"preflight of {report['recipe']}: passed in {report['seconds']:.0f} s on {report['ranks']} ranks",
            f"  rows         {rows}",
            f"  step         loss {report['loss']:.4f}, gradient norm {report['grad_norm']:.4g}",
            f"  collectives  {report['events']} calls and collectives, hash {report['collectives']} on every rank",
            f"  checkpoint   {report['checkpoint_bytes'] / 2**20:.1f} MiB saved, loaded, same bits",
            f"  memory       {report['memory'] / 2**30:.2f} GiB at most on a rank",
        ]
    )


def rows_of(data: RunData, plan: Plan, rank: int) -> tuple[list[str], list[Batch]]:
    """Kind and row of each micro-step of a rank: ranks have different kinds in the same micro-step."""
    full = max(plan.step(0), key=lambda row: (row.images, row.tokens)).groups
    made = {
        "missing": lambda: data.batch((), 1),
        "full": lambda: data.batch(full, 2),
        "text": lambda: text_alone(data.batch(full[:1], 3)),
        "image": lambda: without_regions(data.batch(full[:1], 4)),
        "single": lambda: data.batch(full[:1], 5),
    }
    kinds = [KINDS[(rank + micro) % len(KINDS)] for micro in range(len(KINDS))]
    return kinds, [made[kind]() for kind in kinds]


def without_regions(row: Batch) -> Batch:
    """The row as if nobody had annotated its images: no box, and no token that names one."""
    import torch

    return replace(
        row,
        boxes=row.boxes[:0],
        box_offsets=torch.zeros_like(row.box_offsets),
        region_slots=torch.full_like(row.region_slots, -1),
        regions_used=0,
        regions_unused=0,
    )


def text_alone(row: Batch) -> Batch:
    """The row without its images; their tokens stay, as padding."""
    import torch

    row = without_regions(row)
    return replace(
        row,
        pixel_values=row.pixel_values[:0],
        box_offsets=row.box_offsets[:1],
        image_slots=torch.full_like(row.image_slots, -1),
        instruction_ids=row.instruction_ids[:0],
        instruction_mask=row.instruction_mask[:0],
    )


def _calls(rows: Sequence[Batch], chunk: int) -> list[int]:
    """Calls of the vision tower in each micro-step: the most that any rank needs. A collective."""
    from eventlens_ds.runtime.distributed import gather_objects

    own = [max(1, math.ceil(row.pixel_values.shape[0] / chunk)) for row in rows]
    return [max(calls) for calls in zip(*gather_objects(own))]


def rank_main(config: RunConfig) -> int:
    """One rank: build, step, save, load; rank 0 writes the report."""
    from eventlens_ds.runtime.failures import process_group
    from eventlens_ds.train.run import _prepare

    world_size = int(os.environ["WORLD_SIZE"])
    train = replace(config.train, rows_per_step=len(KINDS) * world_size, timeout_minutes=2.0)
    config = replace(config, train=train)
    architecture, data, plan = _prepare(config)
    with process_group(config.train.threads, config.train.timeout_minutes) as world:
        report = _check(config, architecture, data, plan, world)
        if world.rank == 0:
            (Path(config.io.run) / FILE).write_text(json.dumps(report))
    return 0


def _check(config: RunConfig, architecture: Any, data: RunData, plan: Plan, world: Any) -> dict[str, Any]:
    from eventlens_ds.runtime import checkpoint
    from eventlens_ds.runtime.collectives import Recorder
    from eventlens_ds.runtime.distributed import gather_objects
    from eventlens_ds.train.engine import build
    from eventlens_ds.train.loop import optimizer_step
    from eventlens_ds.train.metrics import memory_bytes
    from eventlens_ds.train.run import tasks_of

    trainable = build(config, architecture, world, tasks_of(data))
    kinds, rows = rows_of(data, plan, world.rank)
    calls = _calls(rows, config.train.vision_chunk)
    with Recorder(trainable.engine.module, strict=True) as recorder:
        step = optimizer_step(trainable.engine, rows, calls, config, world)
        digest, events = recorder.digest, len(recorder.events)
        recorder.check()
    if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
        raise PreflightError(f"preflight: loss {step.loss}, gradient norm {step.grad_norm}: not finite")
    run = Path(config.io.run)
    run.mkdir(parents=True, exist_ok=True)
    frozen = checkpoint.save_frozen(trainable.engine, run, trainable.frozen_own)
    before = _loss(trainable.engine, rows[-1], calls[-1], world)
    path = checkpoint.save(trainable.engine, run, step=1, state={}, base=trainable.base, frozen_saved_in=frozen, keep=1)
    if path is None:
        raise PreflightError(f"preflight: no checkpoint can be written below {run}")
    _disturb(trainable.engine)
    checkpoint.load(trainable.engine, path, base=trainable.base)
    after = _loss(trainable.engine, rows[-1], calls[-1], world)
    if any(one != other for one, other in gather_objects([before, after])):
        raise PreflightError(f"preflight: a row gives {before} before the save and {after} after the load")
    return {
        "rows": gather_objects(kinds),
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "collectives": digest,
        "events": events,
        "checkpoint_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "memory": max(gather_objects(memory_bytes(world.device))),
    }


def _loss(engine: Any, row: Any, calls: int, world: Any) -> str:
    """Bits of the log-probabilities of a row, in evaluation mode."""
    import torch

    engine.eval()
    with torch.no_grad():
        logp = engine(batch=row.to(world.device), vision_calls=calls)
    engine.train()
    return float(logp.double().sum()).hex()


def _disturb(engine: Any) -> None:
    """Other values in what is trained, so that a load that does nothing is seen."""
    import torch

    with torch.no_grad():
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                getattr(parameter, "ds_tensor", parameter).add_(1.0)


def _guarded() -> int:
    from eventlens_ds.config import load
    from eventlens_ds.train import door

    def rank() -> int:
        parser = door.Parser(prog=MODULE)
        door.add_arguments(parser)
        args, settings = parser.parse_known_args(door.join_settings(sys.argv[1:]))
        door.settle_accelerator()
        door.start_logging()
        return rank_main(load.load(args.config, settings))

    return door.guarded(rank)


if __name__ == "__main__":
    from eventlens_ds.runtime.failures import leave

    leave(_guarded)
