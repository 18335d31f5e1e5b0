"""A step whose loss or gradient is no number, or far off, is skipped on all ranks: weights and moments keep their bits.

In: two real gloo ranks under ZeRO 0 to 3, with NaN put into the loss or the gradient of one of them. Out: bytes of
parameters and moments before and after, and what the run writes. The file is its own job, as checkpoint_jobs.py.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.runtime.distributed import start, stop
from eventlens_ds.runtime.failures import leave
from eventlens_ds.runtime.local_ranks import spawn
from eventlens_ds.train import guard, loop, run, step
from tests.small_world import small_config, small_engine, small_run

ROOT = Path(__file__).parents[2]


def state_of(engine: Any) -> list[str]:
    """sha256 of everything that a step may change on this rank."""
    import hashlib

    import torch

    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    held += [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    held += [flat for flat in getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])]
    return [hashlib.sha256(t.detach().float().cpu().numpy().tobytes()).hexdigest() for t in held]


def job(folder: Path) -> dict[str, Any]:
    import torch

    world = start(threads=1, timeout_minutes=1)
    folder_of_world = Path(json.loads((folder / "world.json").read_text()))
    small = small_run(folder_of_world, small_config(folder_of_world, rows_per_step=2))
    rows = [small.batch(small.groups_of(task)[:2], seed=5) for task in ("caption", "event")]
    out: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        engine = small_engine(small, world, folder, stage=stage).engine
        watch = guard.StepGuard(engine, guard.fresh())
        names = sorted(name for name, p in engine.module.named_parameters() if p.requires_grad)
        bad = dict(engine.module.named_parameters())[names[0]]

        def take(engine: Any = engine, watch: Any = watch) -> Any:
            return loop.optimizer_step(engine, [rows[world.rank]], [1], small.config, world, 0.0, False, watch)

        first = take()
        before = state_of(engine)
        objective, poisoned = step.objective.row_sums, {}

        def nan_here(*args: Any, objective: Any = objective) -> Any:
            made = objective(*args)
            return replace(made, sums=made.sums * (math.nan if world.rank == 1 else 1.0))

        step.objective.row_sums = nan_here
        poisoned["loss"] = take()
        step.objective.row_sums = objective
        after_loss = state_of(engine)
        handle = bad.register_hook(lambda grad: grad * (math.nan if world.rank == 1 else 1.0))
        poisoned["gradient"] = take()
        handle.remove()
        after_gradient = state_of(engine)
        good = take()
        out[str(stage)] = {
            "first": first.refused,
            "loss": poisoned["loss"].refused,
            "gradient": poisoned["gradient"].refused,
            "unchanged": before == after_loss == after_gradient,
            "good": good.refused,
            "norm": good.grad_norm,
            "moved": state_of(engine) != before,
            "finite": all(bool(torch.isfinite(getattr(p, "ds_tensor", p)).all()) for p in engine.module.parameters()),
        }
        engine.destroy()
    stop()
    return out


@pytest.fixture(scope="module")
def stages(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("guard")
    (folder / "world.json").write_text(json.dumps(str(world_folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        assert spawn(2, [str(folder)], module="tests.train.test_guard") == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_nan_on_one_rank_is_skipped_by_all(stages: list[dict[str, Any]], stage: str) -> None:
    for out in (rank[stage] for rank in stages):
        assert out["first"] == out["good"] == "" and out["loss"] == "loss is nan"
        assert out["gradient"] == "gradient is not finite"
        assert out["unchanged"] and out["moved"] and out["finite"] and math.isfinite(out["norm"])


def test_a_spike_is_far_off_and_noise_is_not() -> None:
    draw, stats = random.Random(0), [0.0, 0.0, 0.0]
    for _ in range(500):
        value = 2.0 + draw.gauss(0, 0.1)
        assert not guard.far_off(stats, value, 6.0)
        guard.update(stats, value)
    assert guard.far_off(stats, 3.5, 6.0) and not guard.far_off(stats, 3.5, 0.0)
    assert abs(stats[1] - 2.0) < 0.05 and abs(math.sqrt(stats[2]) - 0.1) < 0.03
    assert not guard.far_off([guard.WARM - 1.0, 2.0, 0.01], 9.0, 6.0), "too few values to say"


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """NaN losses in the steps that are counted here, from 1, whatever attempt runs them."""
    from eventlens_ds.runtime import heartbeat

    objective = step.objective.row_sums

    def maybe(*args: Any) -> Any:
        made = objective(*args)
        return replace(made, sums=made.sums * math.nan) if heartbeat.here.step in steps else made

    monkeypatch.setattr(step.objective, "row_sums", maybe)


def test_a_skipped_step_is_logged_listed_counted_and_survives_a_resume(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.train.test_outcome import config, listed

    poison(monkeypatch, {2, 4})
    whole = config(world_folder, tmp_path / "run", steps=5, save_every=2, ledger=True)
    assert run.main(replace(whole, train=replace(whole.train, steps=3))) == 0
    assert run.main(whole) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["refused"] for row in log] == [None, "loss is nan", None, "loss is nan", None]
    assert log[1]["loss"] is None and "loss" in log[1]["nonfinite"]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-5" / "manifest.json").read_text())
    assert manifest["state"]["refused"] == 2 and manifest["state"]["refused_in_a_row"] == 0
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger-rank0.jsonl").read_text().splitlines()]
    wanted = {entry["id"] for entry in ledger if entry["step"] in (1, 3)}
    assert {name for _, name, why in listed(tmp_path / "run") if why == "its step was skipped: loss is nan"} == wanted


def test_too_many_in_a_row_end_the_run(world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eventlens_ds.errors import DataError
    from tests.train.test_outcome import brief, config

    poison(monkeypatch, set(range(2, 99)))
    with pytest.raises(DataError, match="3 steps in a row were skipped"):
        run.main(config(world_folder, tmp_path / "run", steps=9, skip_limit=3))
    assert brief(tmp_path / "run") == ("failed", 3, 1)


def main(folder: Path) -> None:
    out = job(folder)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    leave(lambda: main(Path(sys.argv[1])))
