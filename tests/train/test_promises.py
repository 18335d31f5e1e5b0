"""Two ranks under ZeRO-3 with every parameter partitioned: equal collectives whatever the rows hold (P5), and what is
frozen stays frozen while what learns is seen to learn (P10).

In: the small world. Out: what each rank saw, as JSON, checked here. Decision: one pair of processes runs all cases,
because starting them costs more than the cases; the file is the job of its ranks too.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.runtime.failures import leave
from tests.small_world import SmallRun, small_config, small_engine, small_run

ROOT = Path(__file__).parents[2]

ROWS = ("pictures", "text_only", "no_regions", "missing", "caption", "one_picture")


def rows_by_name(run: SmallRun) -> dict[str, Any]:
    """Rows that differ in everything a rank's collectives could depend on."""
    import torch

    vcr, caption, event = (run.groups_of(task) for task in ("vcr_answer", "caption", "event"))
    full = run.batch([*vcr[:1], *caption[1:3]], seed=1)
    none = torch.full_like(full.region_slots, -1)
    no_regions = replace(full, boxes=full.boxes[:0], box_offsets=torch.zeros_like(full.box_offsets), region_slots=none)
    text = replace(
        no_regions, pixel_values=full.pixel_values[:0], box_offsets=torch.zeros(1, dtype=torch.int64), image_slots=none
    )
    return {
        "pictures": full,
        "text_only": text,
        "no_regions": no_regions,
        "missing": run.batch((), seed=2),
        "caption": run.batch(caption[:1], seed=3),
        "one_picture": run.batch(event[:1], seed=4),
    }


def job_rows(run: SmallRun, world: Any, folder: Path) -> dict[str, Any]:
    """Rank 0 always has pictures, rank 1 another kind of row; the tower is called once per picture."""
    from eventlens_ds.runtime.collectives import CollectiveMismatch, Recorder
    from eventlens_ds.train.loop import optimizer_step

    trainable = small_engine(run, world, folder)
    rows = rows_by_name(run)
    out: dict[str, Any] = {}
    for name in ROWS:
        row = rows[name if world.rank else "pictures"]
        with Recorder(trainable.engine.module, strict=True) as recorder:
            try:
                report = optimizer_step(trainable.engine, [row], [3], run.config, world)
                events = list(recorder.events)
                recorder.check()
            except CollectiveMismatch as error:
                return {**out, name: {"error": str(error)}}
        gathered = {event[1] for event in events if event[0].startswith("all_gather")}
        out[name] = {"loss": report.loss, "norm": report.grad_norm, "gathered": sorted(gathered)}
    return out


def job_tower_is_skipped(run: SmallRun, world: Any, folder: Path) -> dict[str, Any]:
    """Negative control of P5: a model that saves itself the tower where a row has no picture."""
    import torch

    from eventlens_ds.model.region_vlm import RegionVLM

    usual = RegionVLM.encode_images

    def skip(self: Any, pixel_values: torch.Tensor, calls: int) -> tuple[torch.Tensor, ...]:
        if pixel_values.shape[0]:
            return usual(self, pixel_values, calls)
        vision = self.config.vision_config
        empty = pixel_values.new_zeros(1, 1 + self.config.grid[0] ** 2, vision.hidden_size)
        return (empty,) * (vision.num_hidden_layers + 1)

    from eventlens_ds.runtime.collectives import CollectiveMismatch, Recorder
    from eventlens_ds.train.loop import optimizer_step

    trainable = small_engine(run, world, folder)
    row = rows_by_name(run)["text_only" if world.rank else "pictures"]
    with Recorder(trainable.engine.module, strict=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegionVLM, "encode_images", skip)
        try:
            optimizer_step(trainable.engine, [row], [1], run.config, world)
        except CollectiveMismatch as error:
            return {"error": str(error)}
    return {"error": ""}


def train_steps(run: SmallRun, world: Any, trainable: Any, audit: Any, steps: int = 3) -> None:
    from eventlens_ds.train.loop import micro_batches, optimizer_step

    plan = run.data.plan(seed=0, rows_per_step=run.config.train.rows_per_step)
    batches = micro_batches(run.data, plan, run.config, world, 0)
    micro_steps = -(-run.config.train.rows_per_step // world.size)
    for step in range(steps):
        rows = [next(batches) for _ in range(micro_steps)]
        calls = [plan.vision_calls(step, micro, world.size, 16) for micro in range(micro_steps)]
        audit.after_step(optimizer_step(trainable.engine, rows, calls, run.config, world).task_loss)


def whole(module: Any) -> dict[str, str]:
    """sha256 of every parameter, gathered, on every rank."""
    import hashlib

    import deepspeed

    found = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
    return found


def frozen_run(folder: Path) -> SmallRun:
    """Only events, tower and language model frozen, but adapters of all tasks asked to learn."""
    data = Path(json.loads((folder / "case.json").read_text()))
    config = small_config(data, rows_per_step=3, steps=3, weight_decay=0.0)  # decay moves tensors without gradient
    config = replace(config, stage=replace(config.stage, train=("projector", "regions", "adapters")))
    return small_run(data, config, tasks=("event",))


def job_frozen(run: SmallRun, world: Any, folder: Path) -> dict[str, Any]:
    from eventlens_ds.train.audit import Audit

    every_task = replace(run.config, data=replace(run.config.data, tasks=run.config.model.adapters.tasks))
    trainable = small_engine(replace(run, config=every_task), world, folder)
    module = trainable.engine.module
    before, audit = whole(module), Audit(module)
    train_steps(run, world, trainable, audit)
    after = whole(module)
    return {
        "trained": [name for name, p in module.named_parameters() if p.requires_grad],
        "frozen": [name for name, p in module.named_parameters() if not p.requires_grad],
        "changed": [name for name in before if before[name] != after[name]],
        "silent": dict(audit.silent or []),
        "hooks": sum(len(p._backward_hooks or ()) for p in module.parameters()),
    }


def job_guards_off(run: SmallRun, world: Any, folder: Path) -> dict[str, Any]:
    """Negative controls of P10: a part cut from the graph, and one value of a frozen shard moved on one rank."""
    import torch

    from eventlens_ds.train.audit import Audit

    trainable = small_engine(run, world, folder)
    module = trainable.engine.module
    audit = Audit(module)
    module.projector.register_forward_hook(lambda _module, _args, output: output.detach())
    train_steps(run, world, trainable, audit, 2)
    name, frozen = next((n, p) for n, p in module.named_parameters() if not p.requires_grad)
    if world.rank == 1:
        with torch.no_grad():
            frozen.ds_tensor[0] = torch.nextafter(frozen.ds_tensor[0], torch.tensor(9.0))
    try:
        audit.after_step(["event"])
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    return {"silent": dict(audit.silent or []), "nudged": name, "error": error}


@pytest.fixture(scope="module")
def outs(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    from eventlens_ds.runtime.local_ranks import spawn

    folder = tmp_path_factory.mktemp("promises")
    (folder / "case.json").write_text(json.dumps(str(world_folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        assert spawn(2, [str(folder)], module="tests.train.test_promises") == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.P5
@pytest.mark.parametrize("name", ROWS)
def test_ranks_keep_step_whatever_their_rows_hold(outs: list[dict[str, Any]], name: str) -> None:
    for out in outs:
        row = out["rows"][name]
        assert "error" not in row, row
        assert math.isfinite(row["loss"]) and math.isfinite(row["norm"]) and row["norm"] > 0
        parts = {module.split(".")[0] for module in row["gathered"]}
        assert {"vision_tower", "projector", "regions", "adapters", "language_model"} <= parts, row["gathered"]


@pytest.mark.P5
def test_a_skipped_tower_is_named(outs: list[dict[str, Any]]) -> None:
    for out in outs:
        assert "vision_tower" in out["skipped_tower"]["error"] and "rank 1 did" in out["skipped_tower"]["error"]


@pytest.mark.P10
def test_frozen_bytes_stay_and_every_trained_tensor_moves_or_is_listed(outs: list[dict[str, Any]]) -> None:
    for out in outs:
        found = out["frozen"]
        assert len(found["frozen"]) > 30 and not set(found["frozen"]) & set(found["changed"])
        assert set(found["changed"]) | set(found["silent"]) == set(found["trained"])
        assert not set(found["changed"]) & set(found["silent"]), found["silent"]
        assert found["hooks"] == 0


@pytest.mark.P10
def test_a_silent_tensor_is_listed_with_its_reason(outs: list[dict[str, Any]]) -> None:
    for out in outs:
        silent = out["frozen"]["silent"]
        tasks = {name.split(".")[-1].rsplit("_", 1)[0].removesuffix("_down").removesuffix("_up") for name in silent}
        assert tasks == {"caption", "vcr_answer", "vcr_rationale"}
        assert set(silent.values()) == {"no sample of its task in these steps"}


@pytest.mark.P10
def test_a_cut_part_and_a_nudged_frozen_tensor_are_found(outs: list[dict[str, Any]]) -> None:
    for out in outs:
        found = out["guards_off"]
        cut = {name for name, why in found["silent"].items() if why == "the loss does not depend on it"}
        assert cut == {f"projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
        assert found["nudged"] in found["error"] and found["error"].startswith("1 frozen tensor")


def main(folder: Path) -> None:
    from eventlens_ds.runtime.distributed import start, stop

    world = start(threads=1, timeout_minutes=1)
    data = Path(json.loads((folder / "case.json").read_text()))
    run, frozen = small_run(data, small_config(data, rows_per_step=2)), frozen_run(folder)
    out = {
        "rows": job_rows(run, world, folder),
        "frozen": job_frozen(frozen, world, folder),
        "guards_off": job_guards_off(frozen, world, folder),
        "skipped_tower": job_tower_is_skipped(run, world, folder),
    }
    (folder / f"{world.rank}.json").write_text(json.dumps(out))
    stop()


if __name__ == "__main__":
    leave(lambda: main(Path(sys.argv[1])))
