"""Routing when ranks differ in their tasks: two ranks under ZeRO-3 give the gradients of one process (P5, P7, P8).

In: the small world; rank 0 has region-level rows alone and rank 1 image-level rows alone. Out: the whole gradient of
every tensor in one step, compared with plain autograd over both rows in one process, and collectives that agree.
Decision: one pair of processes runs all cases, because starting them costs more than the cases.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.runtime.failures import leave
from tests.small_world import SmallRun, small_config, small_engine, small_run

ROOT = Path(__file__).parents[2]
CASES = [("mixture", True), ("topk", False), ("topk_of_eight", True)]
"""(router, activation checkpointing)."""
TASKS_OF_RANK = (("event", "vcr_answer"), ("caption",))


def run_of(data: Path, router: str, checkpointing: bool) -> SmallRun:
    """A run whose adapters are a mixture or have a router; every part learns."""
    config = small_config(data, rows_per_step=2, activation_checkpointing=checkpointing)
    adapters = replace(config.model.adapters, router=router.split("_")[0])
    if router == "topk_of_eight":
        # On neither rank does every adapter get a token.
        adapters = replace(adapters, experts=8, top_k=1, renormalise=False)
    stage = replace(config.stage, train=(*config.stage.train, "router"))
    return small_run(data, replace(config, model=replace(config.model, adapters=adapters), stage=stage))


def rows_of(run: SmallRun) -> list[Any]:
    """The row of each rank."""
    members = [[run.groups_of(task)[rank] for task in tasks] for rank, tasks in enumerate(TASKS_OF_RANK)]
    return [run.batch(groups, seed=rank) for rank, groups in enumerate(members)]


def awake(run: SmallRun) -> Any:
    """The model that both ranks and the single process start from; its gates have values."""
    import torch

    model, generator = run.model(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.adapters.named_parameters():
            if ".gate_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def engine_of(run: SmallRun, world: Any, folder: Path) -> Any:
    from eventlens_ds.model.weights import assign

    values = {name: p.detach().clone() for name, p in awake(run).named_parameters()}
    engine = small_engine(run, world, folder).engine
    assign(engine.module, values.items(), "awake")
    return engine


def case_of(router: str, checkpointing: bool) -> str:
    return f"{router}-{'recomputed' if checkpointing else 'kept'}"


def job(run: SmallRun, world: Any, folder: Path, case: str) -> dict[str, Any]:
    """One step of this rank over its row; rank 0 writes the gradients, whole, as they are before the update."""
    from deepspeed.utils import safe_get_full_grad
    from safetensors.torch import save_file

    from eventlens_ds.runtime.collectives import CollectiveMismatch, Recorder
    from eventlens_ds.train.loop import optimizer_step

    engine = engine_of(run, world, folder)
    grads: dict[str, Any] = {}
    update = engine.step

    def keep_and_update(*args: Any, **kwargs: Any) -> Any:
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                grads[name] = safe_get_full_grad(parameter).detach().cpu().clone()
        return update(*args, **kwargs)

    engine.step = keep_and_update
    with Recorder(engine.module, strict=True) as recorder:
        try:
            report = optimizer_step(engine, [rows_of(run)[world.rank]], [3], run.config, world)
            recorder.check()
        except CollectiveMismatch as mismatch:
            return {"error": str(mismatch)}
    if world.rank == 0:
        save_file(grads, folder / f"{case}.safetensors")
    return {"loss": report.loss, "load_balance": report.load_balance}


def job_adapters_are_skipped(run: SmallRun, world: Any, folder: Path) -> dict[str, Any]:
    """Negative control of P5: a rank without region-level tokens saves itself the adapters."""
    from eventlens_ds.model.adapters import Routing

    usual = Routing.__call__

    def skip(self: Any, layer: int, x: Any, residual: Any) -> Any:
        return residual if world.rank == 1 else usual(self, layer, x, residual)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Routing, "__call__", skip)
        return job(run, world, folder, "skipped")


@pytest.fixture(scope="module")
def outs(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    from eventlens_ds.runtime.local_ranks import spawn

    folder = tmp_path_factory.mktemp("routing")
    (folder / "case.json").write_text(json.dumps(str(world_folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        assert spawn(2, [str(folder)], module="tests.train.test_routed_gradients") == 0
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def single_process(run: SmallRun, rows: list[Any]) -> tuple[float, dict[str, Any]]:
    """(loss, gradients) of both rows in plain autograd: sums over the rows, divided once."""
    import torch

    from eventlens_ds.model import objective
    from eventlens_ds.model.stages import apply_stage

    model, config = awake(run).train(), run.config.objective
    apply_stage(model, run.config.stage.train, run.config.data.tasks)
    balanced = objective.balances(run.config)
    sums = []
    for row in rows:
        made = model(row, 3, with_balance=balanced)
        logp, balance = made if balanced else (made, None)
        sums.append(objective.row_sums(logp, row, config, balance).sums)
    denominators = torch.stack([objective.counts(row, balance=balanced) for row in rows]).sum(0)
    loss = objective.step_loss(torch.stack(sums).sum(0), denominators, config)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def furthest(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Largest difference of a gradient relative to the largest value of its tensor."""
    assert set(ours) == set(theirs)
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp(min=1e-6)) for n in ours)


@pytest.mark.P5
@pytest.mark.P7
@pytest.mark.P8
@pytest.mark.parametrize(("router", "checkpointing"), CASES)
def test_skewed_ranks_give_the_gradients_of_one_process(
    world_folder: Path, outs: tuple[Path, list[dict[str, Any]]], router: str, checkpointing: bool
) -> None:
    from safetensors.torch import load_file

    folder, reports = outs
    case = case_of(router, checkpointing)
    assert all("error" not in report[case] for report in reports), reports
    run = run_of(world_folder, router, checkpointing)
    loss, expected = single_process(run, rows_of(run))
    found = load_file(folder / f"{case}.safetensors")
    assert furthest(found, expected) <= 1e-4
    assert {report[case]["loss"] for report in reports} == {reports[0][case]["loss"]}
    assert reports[0][case]["loss"] == pytest.approx(loss, rel=1e-6)
    learned = {name for name in found if name.startswith("adapters.") and found[name].any()}
    assert any(".gate_" in name for name in learned)
    if router == "mixture":
        assert {name.split(".")[2] for name in learned if ".gate_" in name} == {"gate_region_level", "gate_image_level"}
    else:
        assert reports[0][case]["load_balance"] >= 1.0


@pytest.mark.P7
@pytest.mark.parametrize("router", ["mixture", "topk"])
def test_a_wrong_route_or_a_lost_balance_would_be_seen(
    world_folder: Path, outs: tuple[Path, list[dict[str, Any]]], router: str
) -> None:
    """Negative control: rank 1 routed as rank 0 is, the defect of a batch routed by its first sample; a balance that
    is not in the loss."""
    import torch
    from safetensors.torch import load_file

    checkpointing = router == "mixture"
    run = run_of(world_folder, router, checkpointing)
    rows = rows_of(run)
    if router == "mixture":
        rows[1] = replace(rows[1], task_ids=torch.full_like(rows[1].task_ids, int(rows[0].task_ids[0])))
    else:
        run.config = replace(run.config, objective=replace(run.config.objective, load_balance=0.0))
    _, other = single_process(run, rows)
    assert furthest(load_file(outs[0] / f"{case_of(router, checkpointing)}.safetensors"), other) > 1e-3


@pytest.mark.P5
def test_adapters_that_a_rank_skips_are_named(outs: tuple[Path, list[dict[str, Any]]]) -> None:
    for out in outs[1]:
        assert "adapters.0" in out["skipped"]["error"] and "rank 1" in out["skipped"]["error"]


def main(folder: Path) -> None:
    from eventlens_ds.runtime.distributed import start, stop

    world = start(threads=1, timeout_minutes=1)
    data = Path(json.loads((folder / "case.json").read_text()))
    out = {case_of(*case): job(run_of(data, *case), world, folder, case_of(*case)) for case in CASES}
    out["skipped"] = job_adapters_are_skipped(run_of(data, "mixture", False), world, folder)
    (folder / f"{world.rank}.json").write_text(json.dumps(out))
    stop()


if __name__ == "__main__":
    leave(lambda: main(Path(sys.argv[1])))
