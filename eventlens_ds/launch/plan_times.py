"""Times for `eventlens plan --calibrate RUN`: the speed of a measured run, carried over to other sizes.

In: RUN/log.jsonl, config.yaml and capsule.json of a run on the same kind of device; the scaling table without times.
Out: the table with a range of seconds per step, MFU and tokens per day, and the assumptions behind it.
Decision: two numbers in place of one. How much of the communication hides behind arithmetic is not known from one run,
so the lower time hides all of it and the upper none; a model of overlap would look exact and be a guess.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.errors import UserError

LINKS: dict[str, tuple[float, float]] = {
    "a100-40": (300e9, 25e9),
    "a100": (300e9, 25e9),
    "h100": (450e9, 50e9),
    "h200": (450e9, 50e9),
    "b200": (900e9, 50e9),
    "cpu": (10e9, 1.25e9),
}
"""Bytes a second one device sends (inside a node, between nodes): NVLink and one 200 or 400 Gb/s adapter per GPU, by
the vendors' data sheets; cpu: memory and 10 Gb/s Ethernet. Assumptions: no run is needed to change them."""

WARM_UP = 0.1
"""Share of the logged steps that is left out: the first ones compile and fill caches."""


class Speed(NamedTuple):
    """What a run did. flops: model FLOPs a second of one device. device: name of it."""

    flops: float
    seconds: float
    world: int
    device: str


def speed(run: Path) -> Speed:
    """Median speed of a run. UserError when its files do not say it."""
    from eventlens_ds.config import load
    from eventlens_ds.launch import plan, plan_shapes
    from eventlens_ds.runtime.build_model import describe
    from eventlens_ds.train.metrics import read_log

    try:
        log = read_log(run / "log.jsonl")
        capsule = json.loads((run / "capsule.json").read_text(encoding="utf-8"))
        config = load.load(str(run / "config.yaml"))
    except (OSError, ValueError) as error:
        raise UserError(f"--calibrate {run}: not a run folder with a log: {error}") from None
    log = log[max(1, round(WARM_UP * len(log))) :]
    if len(log) < 3:
        raise UserError(f"--calibrate {run}: {len(log)} logged steps after the first ones; 3 are needed")
    seconds = median(row["step_time"] for row in log)
    tokens = median(row["tokens_per_s"] * row["step_time"] for row in log)
    architecture = describe(config, dry=True)[0]
    row, _ = plan.rows(replace(config, data=replace(config.data, train=())), architecture)
    model = plan_shapes.meta_model(config, architecture, config.data.tasks or architecture.tasks)
    total = row_flops(model, architecture, row) * tokens / row.tokens
    gpus = capsule["hardware"]["gpus"]
    device = gpus[0]["name"] if gpus else "cpu"
    world = int(capsule["environment"].get("WORLD_SIZE", 1))
    return Speed(total / (seconds * world), seconds, world, device)


def row_flops(model: Any, architecture: Any, row: Any) -> float:
    """Model FLOPs of one row, as the trainer counts them for MFU."""
    from eventlens_ds.train.flops import StepFlops

    return StepFlops(model, architecture)(row.tokens, row.images)


def calibrated(
    config: RunConfig, shapes: Any, scaling: Sequence[Any], run: Path, gpu: str, per_node: int
) -> tuple[list[Any], list[str]]:
    """The table with times, and what they assume. UserError for a run on another kind of device."""
    from eventlens_ds.launch import plan, plan_shapes
    from eventlens_ds.runtime.build_model import describe
    from eventlens_ds.train.metrics import peak_flops

    found = speed(run)
    wanted = plan.GPUS[gpu][1]
    if (wanted.split()[0] if wanted else "cpu") not in found.device:
        raise UserError(f"--calibrate {run}: was measured on {found.device}; its times say nothing about {gpu}")
    architecture = describe(config, dry=True)[0]
    model = plan_shapes.meta_model(config, architecture, config.data.tasks or architecture.tasks)
    flops = row_flops(model, architecture, shapes.row)
    peak = peak_flops(wanted, config.train.dtype)[0] if wanted else None
    inside, between = LINKS[gpu]
    lines = []
    for line in scaling:
        compute = line.micro_steps * flops / found.flops
        wire = line.sent / (inside if line.nodes == 1 else between)
        seconds = (compute, compute + wire)
        useful = config.train.rows_per_step * flops
        mfu = None if peak is None else tuple(useful / (s * line.gpus * peak) for s in reversed(seconds))
        day = tuple(config.train.rows_per_step * shapes.row.tokens / s * 86400 for s in reversed(seconds))
        lines.append(replace(line, step_seconds=seconds, mfu=mfu, tokens_per_day=day))
    measured = f"{found.seconds:.3g} s a step on {found.world} x {found.device}"
    said = [
        f"times: {run}, {measured}, {found.flops / 1e12:.3g} model TFLOP/s a device",
        "times: a row costs its model FLOPs at that speed; the lower time hides all communication, the upper none",
        f"times: a device sends {inside / 1e9:g} GB/s inside a node and {between / 1e9:g} between nodes (data sheets)",
        "times: data are never waited for; the time to save is not predicted",
    ]
    return lines, said
