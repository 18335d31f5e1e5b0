"""`eventlens plan`: what a recipe would take on N nodes, before a GPU is asked for.

In: a recipe, nodes, GPUs per node, kind of GPU. Out: per-GPU memory for each ZeRO stage and row length and whether it
fits, bytes of collectives and of a checkpoint, and the same over 1 .. 512 nodes; as text, JSON or a plot. All of it is
prediction, and says so. Times need a measured run (--calibrate); without one their columns say "not calibrated".
The stages: rows (from the data, or assumed), shapes on the meta device, memory (plan_memory.py), tables.
Decision: a figure that no rule checked against measurement stands behind is not printed; so no time without a run,
and every assumption is a line of the output.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.errors import UserError

GIB = 2**30

GPUS: dict[str, tuple[float, str]] = {
    "a100-40": (39.4, "A100"),
    "a100": (79.1, "A100"),
    "h100": (79.1, "H100 80GB HBM3"),
    "h200": (139.7, "H200"),
    "b200": (178.3, "B200"),
    "cpu": (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, ""),
}
"""Kind -> (GiB a program can ask for, name in train/metrics.PEAK_BF16_TFLOPS)."""

RESERVE = 4.0
"""GiB kept back on every GPU for the CUDA context, NCCL's buffers and holes between blocks; an assumption."""

TEXT_TOKENS, REGIONS, SUPERVISED = 128, 8, 4
"""Assumed where no data are given: tokens of text and regions of an image; one token in this many is supervised."""

STAGES = ("zero0", "zero1", "zero2", "zero3")
NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Cell:
    """One line of the memory table; bytes on one GPU, `parts` by what they are for."""

    zero: str
    row_tokens: int
    parts: dict[str, int]
    total: int
    fits: bool


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in an optimizer step."""

    gather: int
    reduce: int

    @property
    def total(self) -> int:
        return self.gather + self.reduce


@dataclass(frozen=True)
class Scale:
    """One line of the scaling table. busy: share of the ranks' micro-steps that have a row. step_seconds, mfu and
    tokens_per_day are None without calibration; step_seconds is (communication hidden, not hidden at all)."""

    nodes: int
    gpus: int
    micro_steps: int
    busy: float
    memory: int
    fits: bool
    sent: int
    step_seconds: tuple[float, float] | None = None
    mfu: tuple[float, float] | None = None
    tokens_per_day: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plan:
    """Everything `eventlens plan` prints."""

    parameters: dict[str, tuple[int, int]]
    row: dict[str, int]
    cells: list[Cell]
    traffic: dict[str, Traffic]
    checkpoint: int
    scaling: list[Scale]
    assumptions: list[str]


def rows(config: RunConfig, architecture: Any, images: int = 0) -> tuple[Any, str]:
    """(RowShape of a full row, where it comes from): the fullest of the first planned rows, or an assumption."""
    from eventlens_ds.launch.plan_shapes import RowShape

    tokens, visual = config.data.row_tokens, architecture.visual_tokens
    if config.data.train:
        return _measured_row(config), f"the fullest of the first rows of {config.data.train[0]}"
    count = images or max(1, tokens // (visual + TEXT_TOKENS))
    if visual * count >= tokens:
        raise UserError(f"data.row_tokens {tokens}: {count} images of {visual} tokens do not fit into a row")
    what = f"{count} images of {visual} tokens with {REGIONS} regions each, every {SUPERVISED}th token supervised"
    shape = RowShape(tokens, count, REGIONS * count, tokens // SUPERVISED, count, 4)
    return shape, f"assumed: {what}; --data.train=DIR takes the data's"


def _measured_row(config: RunConfig) -> Any:
    from eventlens_ds.launch.plan_check import row_of
    from eventlens_ds.launch.plan_shapes import RowShape
    from eventlens_ds.runtime.build_model import describe
    from eventlens_ds.train.run import training_data

    architecture, tokenizer, spec = describe(config, dry=True)
    data = training_data(config, tokenizer, spec)
    plan = data.plan(seed=config.train.seed, rows_per_step=config.train.rows_per_step)
    found = [row_of(data.batch(row.groups, 0)) for step in range(4) for row in plan.step(step)[:8]]
    return RowShape(**{name: max(row[name] for row in found) for name in found[0]})


def make(
    config: RunConfig, nodes: int, per_node: int, gpu: str, *, images: int = 0, calibrate: Path | None = None
) -> Plan:
    """The plan of a configuration on `nodes` x `per_node` GPUs of a kind.

    images: per row, where no data are given (0: as many as fit). calibrate: run folder whose times are taken.
    UserError for an unknown kind of GPU or a row that cannot hold its images.
    """
    from eventlens_ds.launch import plan_shapes
    from eventlens_ds.runtime.build_model import describe

    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: not known; there are: {', '.join(GPUS)}")
    architecture = describe(config, dry=True)[0]
    if architecture.encoder_decoder:
        raise UserError(
            f"model.preset {config.model.preset}: plan knows decoder-only models; T5's rows are not laid out"
        )
    row, origin = rows(config, architecture, images)
    shapes = plan_shapes.measure(config, architecture, row)
    world = nodes * per_node
    cells = [_cell(config, shapes, zero, world, gpu) for zero in STAGES]
    cells += _other_rows(config, architecture, shapes, world, gpu)
    chosen = config.train.zero
    scaling = [_scale(config, shapes, n, per_node, gpu) for n in NODES]
    assumptions = [
        f"row: {origin}",
        f"fits: {RESERVE:g} GiB of {GPUS[gpu][0]:g} stay free for the CUDA context, NCCL and holes between blocks",
        "rows of twice the length: activations by a straight line through the other two lengths",
        "attention is a fused kernel; the parameters that ZeRO-3 keeps gathered are those its file allows",
        "bytes sent: rings over all GPUs; ZeRO-3 gathers each parameter once per pass unless they all stay gathered",
    ]
    if calibrate is not None:
        from eventlens_ds.launch import plan_times

        scaling, said = plan_times.calibrated(config, shapes, scaling, calibrate, gpu, per_node)
        assumptions += said
    traffic = {zero: sent(shapes, _zero(zero), world, _micro_steps(config, world)) for zero in STAGES}
    return Plan(shapes.parts(), asdict(row), cells, traffic, checkpoint(shapes, _zero(chosen)), scaling, assumptions)


def _other_rows(config: RunConfig, architecture: Any, shapes: Any, world: int, gpu: str) -> list[Cell]:
    """Cells of rows half and twice as long; the latter by a straight line, since fused attention keeps no square."""
    from eventlens_ds.launch import plan_shapes

    half = _stretched(shapes.row, 0.5)
    if half.tokens <= architecture.visual_tokens * half.images:
        return []
    less = plan_shapes.measure(config, architecture, half, like=shapes)
    names = ("activations", "activations_zero3")
    double = {name: 3 * getattr(shapes, name) - 2 * getattr(less, name) for name in names}
    more = replace(shapes, row=_stretched(shapes.row, 2.0), **double)
    return [_cell(config, found, zero, world, gpu) for found in (less, more) for zero in STAGES]


def _zero(name: str) -> dict[str, Any]:
    from eventlens_ds.config.deepspeed import read_zero_file

    made: dict[str, Any] = read_zero_file(name)["zero_optimization"]
    return made


def _micro_steps(config: RunConfig, world: int) -> int:
    return -(-config.train.rows_per_step // world)


def _stretched(row: Any, factor: float) -> Any:
    images = max(1, round(row.images * factor))
    scaled = {
        name: max(1, round(getattr(row, name) * factor)) for name in ("tokens", "regions", "supervised", "groups")
    }
    return replace(row, images=images, **scaled)


def _cell(config: RunConfig, shapes: Any, zero: str, world: int, gpu: str) -> Cell:
    from eventlens_ds.launch.plan_memory import memory

    found = memory(shapes, _zero(zero), world, _micro_steps(config, world))
    parts = asdict(found)
    return Cell(zero, shapes.row.tokens, parts, found.total, found.total <= (GPUS[gpu][0] - RESERVE) * GIB)


def sent(shapes: Any, zero: dict[str, Any], world: int, micro_steps: int) -> Traffic:
    """Bytes one GPU sends in a step: a ring moves (W - 1) / W of a buffer to gather or to reduce it, twice for both."""
    from eventlens_ds.launch.plan_memory import settings

    asked = settings(zero)
    ring = (world - 1) / world
    stage, b, grad_bytes = asked["stage"], shapes.dtype_bytes, shapes.dtype_bytes
    if stage == 0:
        return Traffic(0, round(2 * ring * shapes.trained * b))
    if stage == 3:
        passes = 1 if shapes.total <= asked["stage3_max_live_parameters"] else 2
        gathered = round(ring * shapes.total * b) * passes * micro_steps
        return Traffic(gathered, round(ring * shapes.trained * grad_bytes) * micro_steps)
    if stage == 1:
        grad_bytes, micro_steps = 4, 1
    return Traffic(round(ring * shapes.trained * b), round(ring * shapes.trained * grad_bytes) * micro_steps)


def checkpoint(shapes: Any, zero: dict[str, Any]) -> int:
    """Bytes of one checkpoint: trained tensors, and AdamW's moments and master weights of them."""
    trained, stage = shapes.trained, zero["stage"]
    optimizer = 8 if stage == 0 and shapes.dtype_bytes == 4 else 12
    return int(trained * ((0 if stage == 3 else shapes.dtype_bytes) + optimizer))


def _scale(config: RunConfig, shapes: Any, nodes: int, per_node: int, gpu: str) -> Scale:
    world = nodes * per_node
    micro_steps = _micro_steps(config, world)
    cell = _cell(config, shapes, config.train.zero, world, gpu)
    moved = sent(shapes, _zero(config.train.zero), world, micro_steps).total
    busy = config.train.rows_per_step / (world * micro_steps)
    return Scale(nodes, world, micro_steps, busy, cell.total, cell.fits, moved)


def text(plan: Plan, config: RunConfig, nodes: int, per_node: int, gpu: str) -> str:
    """The plan as tables."""
    total = sum(n for n, _ in plan.parameters.values())
    learn = sum(n for _, n in plan.parameters.values())
    what = ", ".join(f"{part} {n / 1e6:,.1f} M" for part, (n, _) in sorted(plan.parameters.items()) if n)
    head = f"PREDICTION for {nodes} x {per_node} {gpu}, {config.train.dtype}, {config.train.rows_per_step} rows a step"
    row = ", ".join(f"{value} {name}" for name, value in plan.row.items())
    lines = [head, f"model: {total / 1e6:,.1f} M parameters, {learn / 1e6:,.1f} M learn ({what})", f"row: {row}", ""]
    lines += [*_memory_table(plan), "", *_traffic_table(plan), "", *_scaling_table(plan), "", "assumptions"]
    return "\n".join([*lines, *(f"  {line}" for line in plan.assumptions)])


def _memory_table(plan: Plan) -> list[str]:
    names = ("parameters", "gradients", "optimizer", "buffers", "gathered", "activations", "step")
    lines = ["GiB on one GPU; total is the larger of backward and the optimizer step, so less than the sum"]
    lines.append(f"{'row':>6} {'zero':<6}" + "".join(f"{name:>12}" for name in names) + f"{'total':>9}  fits")
    for cell in sorted(plan.cells, key=lambda cell: (cell.row_tokens, cell.zero)):
        numbers = "".join(f"{cell.parts[name] / GIB:>12.2f}" for name in names)
        fits = "yes" if cell.fits else "no"
        lines.append(f"{cell.row_tokens:>6} {cell.zero:<6}{numbers}{cell.total / GIB:>9.2f}  {fits}")
    return lines


def _traffic_table(plan: Plan) -> list[str]:
    lines = [f"checkpoint {plan.checkpoint / GIB:.2f} GiB; GiB that one GPU sends in a step"]
    for zero, found in plan.traffic.items():
        lines.append(f"{zero:<6} gather {found.gather / GIB:>8.2f}  reduce {found.reduce / GIB:>8.2f}")
    return lines


def _scaling_table(plan: Plan) -> list[str]:
    titles = ("nodes", "GPUs", "rows/GPU", "busy", "GiB/GPU", "fits", "GiB sent", "s/step", "mfu", "tokens/day")
    lines = ["scaling, prediction", " ".join(f"{title:>14}" for title in titles)]
    for line in plan.scaling:
        cells = [
            str(line.nodes),
            str(line.gpus),
            str(line.micro_steps),
            f"{line.busy:.0%}",
            f"{line.memory / GIB:.2f}",
            "yes" if line.fits else "no",
            f"{line.sent / GIB:.2f}",
            _range(line.step_seconds, "{:.3g}"),
            _range(line.mfu, "{:.1%}"),
            _range(line.tokens_per_day, "{:.3g}"),
        ]
        lines.append(" ".join(f"{cell:>14}" for cell in cells))
    return lines


def _range(values: tuple[float, float] | None, form: str) -> str:
    return "not calibrated" if values is None else " - ".join(form.format(v) for v in values)


def as_json(plan: Plan) -> str:
    return json.dumps({"kind": "prediction", **asdict(plan)}, indent=1)


def plot(plan: Plan, path: Path, gpu: str) -> None:
    """Memory and traffic over nodes, labelled as prediction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    nodes = [line.nodes for line in plan.scaling]
    left.plot(nodes, [line.memory / GIB for line in plan.scaling], "o-")
    left.axhline(GPUS[gpu][0] - RESERVE, linestyle=":", color="gray")
    left.set(title="memory of a GPU (prediction)", xlabel="nodes", ylabel="GiB", xscale="log")
    right.plot(nodes, [line.sent / GIB for line in plan.scaling], "o-")
    right.set(title="sent by a GPU per step (prediction)", xlabel="nodes", ylabel="GiB", xscale="log")
    for axis in (left, right):
        axis.set_xticks(nodes, [str(n) for n in nodes])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(args: Any, settings: Sequence[str]) -> int:
    """The command; `args` are its options, `settings` the overrides of the recipe."""
    if args.check is not None:
        from eventlens_ds.launch import plan_check

        return plan_check.main(str(args.check))
    from eventlens_ds.config import load

    if not args.config:
        raise UserError("eventlens plan: --config RECIPE is missing")
    for name in ("nodes", "gpus_per_node"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    config = load.load(args.config, settings)
    nodes, per_node = args.nodes, args.gpus_per_node
    logger = logging.getLogger("eventlens_ds")
    level = logger.level
    logger.setLevel(logging.WARNING)  # what runs on the meta device is no decision
    try:
        made = make(config, nodes, per_node, args.gpu, images=args.images, calibrate=args.calibrate)
    finally:
        logger.setLevel(level)
    if args.plot:
        plot(made, args.plot, args.gpu)
    print(as_json(made) if args.json else text(made, config, nodes, per_node, args.gpu))
    return 0
