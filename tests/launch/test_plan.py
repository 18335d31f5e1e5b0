"""Predictions: what they are made of, that they are labelled, and that no time appears without a measured run.

In: the tiny preset, a log. Out: shapes, memory of every stage, tables. Decision: figures are checked against counts
that can be made by hand or by running the real thing; the comparison with measured peaks takes minutes and is slow.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from eventlens_ds import cli
from eventlens_ds.config import load
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.launch import plan, plan_check, plan_memory, plan_shapes, plan_times
from eventlens_ds.launch.plan_shapes import Parameter, RowShape, Shapes
from eventlens_ds.runtime.build_model import describe

ROW = RowShape(tokens=512, images=4, regions=12, supervised=100, groups=2, leaves=4)


def shapes(*settings: str, row: RowShape = ROW) -> Shapes:
    config = load.load("tiny_event", settings)
    return plan_shapes.measure(config, describe(config)[0], row)


def test_live_bytes_counts_storages_once_and_forgets_them() -> None:
    with torch.device("meta"), plan_shapes.LiveBytes() as memory:
        a = torch.empty(1000)
        b = a.view(10, 100) + 1
        assert memory.live == 8000
        del a
        assert memory.live == 4000
        del b
    assert (memory.live, memory.peak) == (0, 8000)


def test_parameters_are_those_of_the_model(small: Any) -> None:
    from eventlens_ds.model.region_vlm import RegionVLM

    config = load.load("tiny_event", [])
    real = RegionVLM._from_config(describe(config)[0], dtype=torch.float32)
    found = shapes()
    assert found.total == sum(p.numel() for p in real.parameters())
    # The last norm of a tower whose states are read before it, and adapters of other tasks, learn nothing.
    assert 0 < found.total - found.trained < 0.05 * found.total
    assert shapes("--stage.train=[projector]").trained == sum(p.numel() for p in real.projector.parameters())


def test_recomputation_and_fused_attention_save_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shapes().activations
    assert shapes("--train.activation_checkpointing=true").activations < 0.7 * whole
    assert shapes("--train.dtype=bf16").activations < 0.65 * whole
    # The negative control: as torch computes attention on the meta device, its matrix is kept.
    monkeypatch.setattr(plan_shapes, "fused_attention", nullcontext)
    assert shapes().activations > 1.1 * whole


def test_zero3_keeps_the_inputs_of_frozen_layers() -> None:
    found = shapes("--stage.train=[projector,regions]")
    assert found.activations_zero3 > 1.05 * found.activations
    whole = shapes()
    assert whole.activations_zero3 == pytest.approx(whole.activations, rel=0.05)


MILLION = Shapes(
    (Parameter("a", "language", 600_000, True), Parameter("b", "vision", 400_000, False)), 5000, 5000, 2, ROW
)


def test_states_of_every_stage_by_hand() -> None:
    """1 M parameters of which 0.6 M learn, bf16, 4 GPUs."""
    found = [plan_memory.memory(MILLION, {"stage": stage}, 4, 1) for stage in range(4)]
    assert [m.parameters for m in found[:3]] == [2_000_000] * 3
    assert [m.optimizer for m in found] == [600_000 * 12, *[150_000 * 12] * 3]
    assert [m.gradients for m in found] == [1_200_000, 2_400_000, 600_000, 600_000]
    assert found[3].parameters == 500_000 and found[3].gathered == 2_000_000
    small = {"stage": 3, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    assert plan_memory.memory(MILLION, small, 4, 1).gathered == 1_200_000


def test_bytes_sent_by_hand() -> None:
    ring = 3 / 4
    assert plan.sent(MILLION, {"stage": 0}, 4, 2).total == 2 * ring * 1_200_000
    assert plan.sent(MILLION, {"stage": 2}, 4, 2) == plan.Traffic(round(ring * 1_200_000), 2 * round(ring * 1_200_000))
    few = {"stage": 3, "stage3_max_live_parameters": 10}
    assert plan.sent(MILLION, few, 4, 1).gather == 2 * plan.sent(MILLION, {"stage": 3}, 4, 1).gather
    assert plan.sent(MILLION, {"stage": 3}, 1, 1).total == 0


def test_ranks_without_a_row_are_shown() -> None:
    config = load.load("tiny_event", ["--train.rows_per_step=64"])
    lines = {line.nodes: line for line in plan.make(config, 2, 8, "h100").scaling}
    assert (lines[8].busy, lines[16].busy, lines[8].micro_steps) == (1.0, 0.5, 1)
    assert [line.nodes for line in lines.values()] == list(plan.NODES)


def test_text_is_labelled_and_without_times(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["plan", "--config", "tiny_event", "--nodes", "2", "--gpus-per-node", "4", "--gpu", "a100"]
    picture = tmp_path / "plan.png"
    assert cli.main([*given, "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("PREDICTION for 2 x 4 a100") and "scaling, prediction" in said
    assert said.count("not calibrated") == 3 * len(plan.NODES) and "assumed: " in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "prediction" and all(line["step_seconds"] is None for line in found["scaling"])


def test_rows_of_given_data_are_the_fullest(world_folder: Path) -> None:
    config = load.load("tiny_event", [f"--data.train={world_folder}", "--data.row_tokens=256"])
    row, origin = plan.rows(config, describe(config)[0])
    assert 128 < row.tokens <= 256 and row.images >= 1 and str(world_folder) in origin
    with pytest.raises(UserError, match="do not fit"):
        plan.rows(load.load("tiny_event", []), describe(config)[0], images=1000)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A run folder as a CPU run of two ranks leaves it, 0.5 s a step."""
    config = load.load("tiny_event", ["--data.train=x"])
    (tmp_path / "config.yaml").write_text(load.dump(config))
    rows = [{"step": n, "step_time": 5.0 if n == 1 else 0.5, "tokens_per_s": 8000.0} for n in range(1, 20)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "capsule.json").write_text(json.dumps({"hardware": {"gpus": []}, "environment": {"WORLD_SIZE": "2"}}))
    return tmp_path


def test_times_come_from_a_run_on_the_same_device(measured: Path) -> None:
    config = load.load("tiny_event", [])
    made = plan.make(config, 1, 2, "cpu", calibrate=measured)
    line = made.scaling[0]
    assert line.step_seconds is not None and line.tokens_per_day is not None and line.mfu is None
    # The same recipe on as many ranks as were measured: the arithmetic of 4,000 tokens in 0.5 s.
    assert line.step_seconds[0] == pytest.approx(0.5 * 4 * 1024 / 4000, rel=0.01) and line.step_seconds[1] > 0.5
    assert any("0.5 s a step on 2 x cpu" in said for said in made.assumptions)
    with pytest.raises(UserError, match="was measured on cpu; its times say nothing about h100"):
        plan.make(config, 1, 2, "h100", calibrate=measured)


def test_a_log_too_short_to_calibrate_is_refused(measured: Path) -> None:
    (measured / "log.jsonl").write_text('{"step": 1, "step_time": 1.0, "tokens_per_s": 1.0}\n')
    with pytest.raises(UserError, match="3 are needed"):
        plan_times.speed(measured)
    with pytest.raises(UserError, match="not a run folder"):
        plan_times.speed(measured / "absent")


def test_a_miss_of_the_check_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def check(data: str, name: str, *case: Any) -> dict[str, Any]:
        return {"name": name, "predicted": 130 << 20, "measured": 100 << 20, "row": {}, "error": 0.3}

    monkeypatch.setattr(plan_check, "check", check)
    with pytest.raises(DataError, match="off by more than 15%: tiny zero0"):
        plan_check.main("data")
    assert "+30.0%" in capsys.readouterr().out


@pytest.mark.slow
def test_predicted_memory_of_held_out_runs_is_within_the_goal(world_folder: Path) -> None:
    assert len(plan_check.HELD_OUT) >= 6 and plan_check.main(str(world_folder)) == 0
