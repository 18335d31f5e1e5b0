"""`eventlens plan --check DATA`: predicted memory against the measured peak of small runs.

In: a folder of `eventlens data build`. Out: a table with predicted and measured bytes and the error of each, on this
machine's CPU: two ranks, two optimizer steps, the fullest row as it was. The rules of plan_memory.py were adjusted with
the configurations of ADJUSTED; those of HELD_OUT were first run when the rules stood.
Decision: measured is what torch's allocator handed out, as its profiler reports every allocation and release, from
before the model exists; the resident set would hold interpreters and libraries that no prediction is about.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError

RANKS, STEPS, GOAL = 2, 2, 0.15
SMALL_BUCKETS = {"reduce_bucket_size": 2_000_000, "allgather_bucket_size": 2_000_000, "stage3_prefetch_bucket_size": 0}
"""DeepSpeed's usual buckets hold more than these models."""

WIDE = ("--model.preset=small", "--data.row_tokens=512", "--train.rows_per_step=4")
NARROW = ("--model.preset=tiny", "--data.row_tokens=1024", "--train.rows_per_step=2")

ADJUSTED: dict[str, tuple[int, tuple[str, ...]]] = {
    "small zero0": (0, WIDE),
    "small zero1": (1, WIDE),
    "small zero2": (2, WIDE),
    "small zero3": (3, WIDE),
    "small zero3 lora": (3, (*WIDE, "--model.lora.rank=8", "--stage.train=[projector,regions,lora]")),
}
HELD_OUT: dict[str, tuple[int, tuple[str, ...]]] = {
    "tiny zero0, 1 row a rank": (0, NARROW),
    "tiny zero1 bf16": (1, (*NARROW, "--train.dtype=bf16", "--train.rows_per_step=4")),
    "tiny zero2 flat rows": (2, (*NARROW, "--data.layout=flat")),
    "tiny zero3 checkpointing": (3, (*NARROW, "--train.activation_checkpointing=true")),
    "small zero3 adapters 256": (3, (*WIDE, "--model.adapters.bottleneck=256")),
    "small zero2 frozen tower": (2, (*WIDE, "--stage.train=[projector,regions,adapters,language]")),
    "small zero3 frozen backbones": (
        3,
        (*WIDE, "--train.rows_per_step=2", "--stage.train=[projector,regions,adapters]"),
    ),
    "tiny zero3 lora bf16": (
        3,
        (*NARROW, "--model.lora.rank=32", "--train.dtype=bf16", "--stage.train=[regions,lora]"),
    ),
    "small zero2 bf16 2048 tokens": (2, (*WIDE, "--data.row_tokens=2048", "--train.dtype=bf16")),
}


def configure(data: str, zero: int, settings: Sequence[str], folder: Path) -> Any:
    from eventlens_ds.config import load

    path = folder / f"zero{zero}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": zero, **SMALL_BUCKETS, "overlap_comm": False}}))
    usual = [f"--data.train={data}", "--data.tasks=[event]", "--data.workers=0", "--train.threads=1"]
    return load.load(None, [*usual, *settings, f"--train.zero={path}", f"--train.steps={STEPS}"])


def predict(config: Any, row: dict[str, int]) -> int:
    """Bytes that plan_memory.py expects for that configuration and row."""
    from eventlens_ds.config.deepspeed import accumulation_steps, read_zero_file
    from eventlens_ds.launch import plan_memory, plan_shapes
    from eventlens_ds.runtime.build_model import describe

    shapes = plan_shapes.measure(config, describe(config)[0], plan_shapes.RowShape(**row))
    zero = read_zero_file(config.train.zero)["zero_optimization"]
    micro_steps = accumulation_steps(config.train.rows_per_step, RANKS)
    return plan_memory.memory(shapes, zero, RANKS, micro_steps, gloo=True).total


def row_of(batch: Any) -> dict[str, int]:
    roots = int((batch.parents < 0).sum())
    leaves = len(batch.leaf_weight)
    return {
        "tokens": batch.input_ids.shape[1],
        "images": batch.pixel_values.shape[0],
        "regions": batch.boxes.shape[0],
        "supervised": batch.target_from.numel(),
        "groups": max(1, roots),
        "leaves": max(1, round(leaves / max(1, roots))),
    }


def rank_job(folder: Path) -> None:
    """One rank: train two steps under the profiler; rank 0 writes the peak and its fullest row."""
    import torch

    from eventlens_ds.runtime import distributed
    from eventlens_ds.runtime.build_model import describe
    from eventlens_ds.train.engine import build
    from eventlens_ds.train.loop import micro_batches, optimizer_step
    from eventlens_ds.train.run import tasks_of, training_data

    asked = json.loads((folder / "asked.json").read_text())
    config = configure(asked["data"], asked["zero"], asked["settings"], folder)
    architecture, tokenizer, spec = describe(config)
    data = training_data(config, tokenizer, spec)
    plan = data.plan(seed=config.train.seed, rows_per_step=config.train.rows_per_step)
    world = distributed.start(threads=1, timeout_minutes=2.0)
    rows: list[dict[str, int]] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainable = build(config, architecture, world, tasks_of(data))
        batches = micro_batches(data, plan, config, world, 0)
        micro_steps = -(-config.train.rows_per_step // world.size)
        for step in range(STEPS):
            taken = [next(batches) for _ in range(micro_steps)]
            rows += [row_of(batch) for batch in taken]
            calls = [plan.vision_calls(step, i, world.size, config.train.vision_chunk) for i in range(micro_steps)]
            optimizer_step(trainable.engine, taken, calls, config, world)
    peak = peak_of(profile)
    fullest = {name: max(row[name] for row in rows) for name in rows[0]}
    if world.rank == 0:
        (folder / "found.json").write_text(json.dumps({"peak": peak, "row": fullest}))
    distributed.stop()


def peak_of(profile: Any) -> int:
    """Largest sum of allocations minus releases, over all events of torch's allocator."""
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def check(data: str, name: str, zero: int, settings: Sequence[str]) -> dict[str, Any]:
    """One line of the table."""
    from eventlens_ds.runtime.local_ranks import spawn

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "asked.json").write_text(json.dumps({"data": data, "zero": zero, "settings": list(settings)}))
        if spawn(RANKS, [place], module="eventlens_ds.launch.plan_check") != 0:
            raise DataError(f"plan --check: the ranks of {name!r} failed, see their messages above")
        found = json.loads((folder / "found.json").read_text())
        predicted = predict(configure(data, zero, settings, folder), found["row"])
    return {"name": name, "predicted": predicted, "measured": found["peak"], "row": found["row"],
            "error": predicted / found["peak"] - 1}  # fmt: skip


def text(lines: Sequence[dict[str, Any]], title: str) -> str:
    made = [f"{title:<32} {'predicted':>10} {'measured':>10} {'error':>7}"]
    for line in lines:
        sizes = (f"{line[key] / 2**20:>6.1f} MiB" for key in ("predicted", "measured"))
        made.append(f"{line['name']:<32} {' '.join(sizes)} {100 * line['error']:>+6.1f}%")
    return "\n".join(made)


def main(data: str) -> int:
    """Print both tables; exit code 3 when a held-out configuration is off by more than GOAL."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    held_out: list[dict[str, Any]] = []
    for title, cases in (("used to adjust the rules", ADJUSTED), ("held out", HELD_OUT)):
        lines = [check(data, name, *case) for name, case in cases.items()]
        sys.stdout.write(text(lines, title) + "\n")
        held_out = lines
    missed = [line["name"] for line in held_out if abs(line["error"]) > GOAL]
    if missed:
        raise DataError(f"plan --check: off by more than {GOAL:.0%}: {', '.join(missed)}")
    return 0


if __name__ == "__main__":
    from eventlens_ds.runtime.failures import leave

    def work() -> int:
        rank_job(Path(sys.argv[1]))
        return 0

    leave(work)
