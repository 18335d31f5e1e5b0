"""`python -m eventlens_ds.launch.parity DATA`: one planned step under every ZeRO stage, layout and rank count.

In: a folder of `eventlens data build`. Out: a table of loss and gradient norm beside those of plain torch in one
process without DeepSpeed, with the relative differences; exit code 3 when one is above the tolerance (P8).
The stages: draw weights once and save them; compute the reference; per rank count start one group of processes that
loops over rows per step, ZeRO stages and layouts; join.
Decision: learning rate 0, so an engine can take several steps from the same weights, and ZeRO-3 keeps no parameter
gathered (persistence threshold 0), so that even the smallest tensor is partitioned.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventlens_ds.config.run_config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from eventlens_ds.errors import DataError, UserError

if TYPE_CHECKING:
    from eventlens_ds.data.loader import RunData
    from eventlens_ds.data.records import Batch
    from eventlens_ds.data.tokenizer import PieceTokenizer
    from eventlens_ds.model.configuration import RegionVLMConfig
    from eventlens_ds.model.region_vlm import RegionVLM
    from eventlens_ds.runtime.distributed import World

log = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest relative difference of loss and gradient norm in fp32."""

ALWAYS_GATHER = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""Under these even a small model is gathered module by module, forward and backward, as a large one is."""

COLUMNS = ("stage", "layout", "ranks", "rows", "micro_steps", "loss", "grad_norm", "loss_rel", "norm_rel")


@dataclass(frozen=True)
class Matrix:
    """What is run. rows: rows per step; ranks: processes of a group, so accumulation is ceil(rows / ranks)."""

    data: str
    row_tokens: int = 512
    stages: tuple[int, ...] = (0, 1, 2, 3)
    layouts: tuple[str, ...] = ("tree", "flat")
    rows: tuple[int, ...] = (2, 3)
    ranks: tuple[int, ...] = (1, 2)
    seed: int = 0

    def config(self, rows: int, layout: str, zero: str = "zero0") -> RunConfig:
        return RunConfig(
            model=ModelConfig(attention="sdpa"),
            data=DataConfig(
                train=(self.data,),
                row_tokens=self.row_tokens,
                workers=0,
                layout=layout,  # type: ignore[arg-type]
                tasks=AdapterConfig().tasks,
            ),
            train=TrainConfig(rows_per_step=rows, lr=0.0, zero=zero, seed=self.seed, threads=1, timeout_minutes=2.0),
        )


def table(
    matrix: Matrix, architecture: RegionVLMConfig | None = None, module: str = "eventlens_ds.launch.parity"
) -> list[dict[str, Any]]:
    """One dict per cell with the keys COLUMNS, `partitioned` and `gathers` (stage 3).

    architecture: None takes the preset tiny. module: what every rank runs as `python -m module FOLDER`; it ends in
    `rank_job`. Raises DataError when a group of ranks fails.
    """
    from eventlens_ds.runtime.local_ranks import spawn

    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), matrix, architecture)
        expected = {rows: reference(Path(folder), matrix, rows) for rows in matrix.rows}
        cells: list[dict[str, Any]] = []
        for size in matrix.ranks:
            if spawn(size, [folder], module=module) != 0:
                raise DataError(f"parity: a group of {size} ranks failed, see its messages above")
            cells += json.loads((Path(folder) / f"ranks-{size}.json").read_text())
    for cell in cells:
        loss, norm = expected[cell["rows"]]
        cell["loss_rel"] = abs(cell["loss"] - loss) / abs(loss)
        cell["norm_rel"] = abs(cell["grad_norm"] - norm) / norm
    return cells


def prepare(folder: Path, matrix: Matrix, architecture: RegionVLMConfig | None) -> None:
    """Write what all ranks read: the matrix, the architecture, and weights in which no adapter is the identity."""
    import safetensors.torch
    import torch

    from eventlens_ds.model.region_vlm import RegionVLM
    from eventlens_ds.runtime.build_model import describe

    architecture = architecture or describe(matrix.config(1, "tree"))[0]
    (folder / "matrix.json").write_text(json.dumps(asdict(matrix)))
    architecture.save_pretrained(folder)
    torch.manual_seed(matrix.seed)
    model = RegionVLM._from_config(architecture, dtype=torch.float32)
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, tensor in state.items():
        if name.startswith("adapters.") and name.endswith(("_up", "_bias")):
            tensor.normal_(std=0.1)
    safetensors.torch.save_file(state, str(folder / "weights.safetensors"))


def _architecture(folder: Path) -> RegionVLMConfig:
    from eventlens_ds.model.configuration import RegionVLMConfig

    made = RegionVLMConfig.from_pretrained(folder)
    made.text_config._attn_implementation = "sdpa"
    return made


@cache
def _tokenizer() -> PieceTokenizer:
    from eventlens_ds.data.tokenizer import load_tokenizer

    return load_tokenizer("")


def _data(config: RunConfig, architecture: RegionVLMConfig) -> RunData:
    from eventlens_ds.data.loader import RunData
    from eventlens_ds.data.prompts import PromptStyle
    from eventlens_ds.model.presets import encode_spec

    return RunData(
        config.data.train,
        config.data.split,
        config=config.data,
        tokenizer=_tokenizer(),
        tokenizer_path="",
        spec=encode_spec(architecture, PromptStyle()),
        tasks=config.data.tasks,
    )


def _load(model: RegionVLM, folder: Path) -> None:
    import safetensors.torch

    from eventlens_ds.model import weights

    tensors = safetensors.torch.load_file(str(folder / "weights.safetensors"))
    report = weights.assign(model, sorted(tensors.items()), str(folder))
    assert not report.new and not report.unused, report.text()


def _rows(config: RunConfig, data: RunData, rank: int, size: int) -> tuple[list[Batch], list[int]]:
    """The rows of one rank in step 0 and the calls of the vision tower in each of its micro-steps."""
    from eventlens_ds.data.loader import PlannedRows, RowDataset

    plan = data.plan(seed=config.train.seed, rows_per_step=config.train.rows_per_step)
    rows = PlannedRows(plan, rank=rank, world=size, first_step=0, last_step=1, seed=config.train.seed)
    dataset = RowDataset(data, rows)
    calls = [plan.vision_calls(0, micro, size, config.train.vision_chunk) for micro in range(len(rows))]
    return [dataset[i] for i in range(len(rows))], calls


def reference(folder: Path, matrix: Matrix, rows: int) -> tuple[float, float]:
    """(loss, gradient norm) of the step in plain torch: one process, tree layout, sums over all rows."""
    import torch

    from eventlens_ds.model import objective
    from eventlens_ds.model.region_vlm import RegionVLM
    from eventlens_ds.model.stages import apply_stage
    from eventlens_ds.train.run import tasks_of

    config, architecture = matrix.config(rows, "tree"), _architecture(folder)
    data = _data(config, architecture)
    model = RegionVLM._from_config(architecture, dtype=torch.float32)
    _load(model, folder)
    apply_stage(model, config.stage.train, tasks_of(data))
    batches, calls = _rows(config, data, 0, 1)
    denominators = torch.stack([objective.counts(batch) for batch in batches]).sum(0)
    made = [objective.row_sums(model(b, n), b, config.objective).sums for b, n in zip(batches, calls)]
    loss = objective.step_loss(torch.stack(made).sum(0), denominators, config.objective)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), float(torch.nn.utils.get_total_norm(grads))


def rank_job(folder: Path) -> None:
    """One rank of a group: every cell of its size; rank 0 writes ranks-SIZE.json."""
    from eventlens_ds.runtime import distributed

    raw: dict[str, Any] = json.loads((folder / "matrix.json").read_text())
    settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
    matrix = Matrix(**settings)
    world = distributed.start(threads=1, timeout_minutes=2.0)
    cells = []
    for rows in matrix.rows:
        for stage in matrix.stages:
            cells += _cells(folder, matrix, rows, stage, world)
    if world.rank == 0:
        (folder / f"ranks-{world.size}.json").write_text(json.dumps(cells))
    distributed.stop()


def _cells(folder: Path, matrix: Matrix, rows: int, stage: int, world: World) -> list[dict[str, Any]]:
    """One engine, one step per layout."""
    from eventlens_ds.runtime.collectives import Recorder
    from eventlens_ds.train.loop import optimizer_step

    zero = folder / f"zero{stage}-{os.getpid()}.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": stage, **ALWAYS_GATHER}}))
    architecture = _architecture(folder)
    engine = _engine(folder, matrix.config(rows, "tree", str(zero)), architecture, world)
    cells = []
    for layout in matrix.layouts:
        config = matrix.config(rows, layout, str(zero))
        batches, calls = _rows(config, _data(config, architecture), world.rank, world.size)
        partitioned = sum(p.numel() == 0 and hasattr(p, "ds_id") for p in engine.module.parameters())
        with Recorder(engine.module) as recorder:
            report = optimizer_step(engine, batches, calls, config, world)
            gathers = sum(event[0].startswith("all_gather") for event in recorder.events)
        cells.append(
            {
                "stage": stage,
                "layout": layout,
                "ranks": world.size,
                "rows": rows,
                "micro_steps": len(batches),
                "loss": report.loss,
                "grad_norm": report.grad_norm,
                "partitioned": partitioned,
                "parameters": sum(1 for _ in engine.module.parameters()),
                "gathers": gathers,
            }
        )
    engine.destroy()
    # transformers goes on partitioning new models for as long as this object lives.
    del engine
    gc.collect()
    return cells


def _engine(folder: Path, config: RunConfig, architecture: RegionVLMConfig, world: World) -> Any:
    """train.engine.build with the saved weights put in before the optimizer copies them."""
    import deepspeed
    import torch

    from eventlens_ds.config.deepspeed import deepspeed_dict
    from eventlens_ds.model.stages import apply_stage
    from eventlens_ds.runtime.build_model import new_model
    from eventlens_ds.train.engine import parameter_groups
    from eventlens_ds.train.run import tasks_of

    settings = deepspeed_dict(config, world.size)
    model = new_model(config, architecture, settings)
    _load(model, folder)
    apply_stage(model, config.stage.train, tasks_of(_data(config, architecture)))
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def text(cells: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for cell in cells:
        shown = [f"{cell[c]:.3g}" if c.endswith("_rel") else cell[c] for c in COLUMNS]
        lines.append("| " + " | ".join(f"{v:.8g}" if isinstance(v, float) else str(v) for v in shown) + " |")
    worst = max(max(cell["loss_rel"], cell["norm_rel"]) for cell in cells)
    return "\n".join([*lines, "", f"{len(cells)} cells, largest relative difference to plain torch {worst:.2g}"])


def main(argv: Sequence[str]) -> int:
    """Print the table of a data folder. As a rank (one positional argument that holds matrix.json) run its part."""
    from eventlens_ds.train import door

    parser = door.Parser(prog="python -m eventlens_ds.launch.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of `eventlens data build`")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 3], metavar="N", help="rows per optimizer step")
    parser.add_argument("--row-tokens", type=int, default=512, metavar="T")
    args = parser.parse_args(argv)
    if (args.data / "matrix.json").is_file():
        rank_job(args.data)
        return 0
    if not args.data.is_dir():
        raise UserError(f"{args.data}: no such folder")
    # Differences of 1e-5 are a statement about fp32 sums, which GPUs take in changing orders.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    matrix = replace(Matrix(str(args.data)), ranks=tuple(args.ranks), rows=tuple(args.rows), row_tokens=args.row_tokens)
    cells = table(matrix)
    sys.stdout.write(text(cells) + "\n")
    failed = [cell for cell in cells if max(cell["loss_rel"], cell["norm_rel"]) > TOLERANCE]
    if failed:
        raise DataError(f"parity: {len(failed)} of {len(cells)} cells differ by more than {TOLERANCE}")
    return 0


def _guarded_main() -> int:
    from eventlens_ds.train import door

    return door.guarded(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    from eventlens_ds.runtime.failures import leave

    leave(_guarded_main)
