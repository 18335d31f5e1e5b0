"""`eventlens bench train`: the gate, the baseline's data, the clock, and a run of three steps.

In: the embedded world of the tests and the preset tiny. Out: nothing. Decision: what the benchmark refuses is tested by
baselines that are wrong on purpose (another sample, a lost region, one sample spoilt among many); its figures are not
tested, because the machine of a test is not a place to measure.
"""

from __future__ import annotations

import csv
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eventlens_ds.bench import arms, gate, hf_trainer, parts, train
from eventlens_ds.bench.arms import ARMS, BASELINE, Job, Phases, Setting
from eventlens_ds.config.load import load
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.model import objective

SMALL = ("--train.rows_per_step=2", "--data.row_tokens=384", "--data.workers=0", "--train.threads=1")


def job(folder: Path, *names: str, phases: Phases = Phases(1, 2, 1), kind: str = "gate") -> Job:  # noqa: B008
    return Job(kind, str(folder), "tiny_vcr", SMALL, names or tuple(ARMS), phases, micro_batch=3)


@pytest.fixture(scope="module")
def given(world_folder: Path) -> Setting:
    return arms.setting(job(world_folder), BASELINE)


@pytest.fixture(scope="module")
def seen(world_folder: Path) -> list[dict[str, Any]]:
    """What every arm makes of the same samples."""
    return gate.losses(job(world_folder), "cpu")


def test_every_arm_has_the_loss_of_the_same_samples(seen: list[dict[str, Any]]) -> None:
    assert [row["arm"] for row in seen] == list(ARMS)
    assert gate.check(seen) < 1e-6
    assert seen[0]["samples"] == len(seen[0]["logp"]) > 10


def test_the_gate_refuses_a_baseline_with_another_sample(
    world_folder: Path, seen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = hf_trainer.lines_of

    def other(data: Any, steps: Any) -> list[hf_trainer.Line]:
        lines = true(data, steps)
        return [lines[1], *lines[1:]] if lines else lines

    monkeypatch.setattr(hf_trainer, "lines_of", other)
    wrong = gate.losses(job(world_folder, BASELINE), "cpu")
    with pytest.raises(DataError, match="hf_trainer trains on other samples than ours"):
        gate.check([seen[1], *wrong])


def test_the_gate_refuses_a_baseline_that_loses_a_region(
    world_folder: Path, seen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = hf_trainer.pad

    def other(flat: Any, pad_id: int) -> Any:
        batch, sequences = true(flat, pad_id)
        return replace(batch, region_slots=torch.full_like(batch.region_slots, -1)), sequences

    monkeypatch.setattr(hf_trainer, "pad", other)
    wrong = gate.losses(job(world_folder, BASELINE), "cpu")
    with pytest.raises(DataError, match="log-likelihood"):
        gate.check([seen[1], *wrong])


def test_the_gate_refuses_one_spoilt_sample_among_many(seen: list[dict[str, Any]]) -> None:
    spoilt = json.loads(json.dumps(seen[1]))
    name = next(iter(spoilt["logp"]))
    spoilt["logp"][name] *= 1 + 1e-3
    with pytest.raises(DataError, match=name):
        gate.check([seen[0], spoilt])


@pytest.mark.parametrize(("field", "value"), [("loss", 1.001), ("supervised", 1), ("loss", float("nan"))])
def test_the_gate_refuses_another_loss(seen: list[dict[str, Any]], field: str, value: float) -> None:
    with pytest.raises(DataError, match="no speed is measured"):
        gate.check([seen[0], {**seen[1], field: seen[1][field] * value + (field == "supervised")}])


def test_padded_sequences_give_the_loss_of_a_row(given: Setting) -> None:
    """`PaddedModel` returns the step's loss, with the denominators that the Trainer hands it."""
    model = gate.build(given, "cpu")
    schedule = hf_trainer.Schedule(given, 1, 3)
    inputs = hf_trainer.Collator(given.data)([schedule.dataset[i] for i in schedule.indices[:3]])
    batch, sequences = hf_trainer.batch_of(inputs)
    assert batch.input_ids.shape[1] % sequences == 0
    padded = hf_trainer.PaddedModel(model, given.config.objective)
    model.config.text_config._attn_implementation = hf_trainer.ATTENTION
    counts = objective.counts(batch)
    loss, halved = (padded(num_items_in_batch=n, **inputs)["loss"].item() for n in (None, 2 * counts))
    model.config.text_config._attn_implementation = "sdpa"
    members = [hf_trainer.Collator(given.data).data.encode(schedule.dataset.group(i), *schedule.dataset.lines[i][:2])
               for i in schedule.indices[:3]]  # fmt: skip
    row = given.data.collate(members, 0)
    expected = objective.step_loss(
        objective.row_sums(model(row), row, given.config.objective).sums, counts, given.config.objective
    )
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert halved == pytest.approx(loss / 2, rel=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_the_baseline_sees_every_timed_sample_once(given: Setting, world: int) -> None:
    schedule = hf_trainer.Schedule(given, world, 3)
    per_step = 3 * schedule.accumulation * world
    warm = schedule.phases.warmup * per_step
    timed = schedule.indices[warm : warm + schedule.phases.timed * per_step]
    lines = [schedule.dataset.lines[i] for i in timed if i != hf_trainer.NOBODY]
    assert sorted(lines) == sorted(hf_trainer.lines_of(given.data, given.by_phase[1]))
    assert len(schedule.indices) == sum(schedule.phases) * per_step


def test_lengths_of_the_baseline_are_those_it_pads_to(given: Setting) -> None:
    dataset = hf_trainer.SampleDataset(given.data, hf_trainer.lines_of(given.data, given.by_phase[1]))
    for i in range(4):
        inputs = hf_trainer.Collator(given.data)([dataset[i]])
        assert inputs["input_ids"].shape[1] // inputs["sequences"] == dataset.length(i)


def test_unpacked_rows_hold_the_same_groups_one_each(given: Setting) -> None:
    rows = arms.arm_rows(given, "ours_unpacked")
    assert all(len(row.groups) == 1 for step in rows for row in step)
    alone = sorted(row.groups[0] for row in rows[1] + rows[2])
    assert alone == sorted(member for step in given.by_phase[1] for row in step for member in row.groups)
    assert abs(len(rows[1]) - len(rows[2])) <= 1


@pytest.mark.parametrize(
    ("where", "part"),
    [
        (r"vision_tower\..*layers\.0\.mlp\.fc2", "vision"),
        (r"regions\.linear_1", "roi"),
        (r"language_model\.model\.layers\.1\.mlp\.up_proj", "language"),
        (r"adapters\.1", "adapters"),
    ],
)
def test_the_clock_finds_the_part_whose_backward_takes_long(given: Setting, where: str, part: str) -> None:
    """Half of a second in the backward pass of a module is counted in its part, and in no other."""
    model = gate.build(given, "cpu")
    batch = given.data.batch(given.steps[0][0].groups, 0)
    (module,) = [module for name, module in model.named_modules() if re.fullmatch(where, name)]
    clock = parts.PartClock(model, "cpu")
    before = [len(m._forward_hooks) for name, m in model.named_modules() if not name.startswith("vision_tower")]
    clock.start()
    # After the clock's own hooks: what is registered last runs last.
    slow = module.register_forward_hook(lambda _m, _i, out: out.register_hook(lambda _grad: time.sleep(0.5)) and None)
    model(batch).sum().backward()
    slow.remove()
    taken = clock.stop()
    assert max(taken, key=lambda name: taken[name]) == part and taken[part] > 0.5
    shares = parts.shares(taken)
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    # transformers adds hooks of its own to the tower at its first forward; ours are gone from everything else.
    ours = [len(m._forward_hooks) for name, m in model.named_modules() if not name.startswith("vision_tower")]
    assert ours == before


def test_flops_are_six_per_weight_and_token(given: Setting) -> None:
    model = gate.build(given, "cpu").requires_grad_(True)
    seen = {"images": 1, "regions": 2, "tokens": 5, "supervised": 3}
    found = parts.flops_by_part(model, seen)
    width, bottleneck = 128, given.architecture.adapters["bottleneck"]
    layer = 4 * width**2 + 3 * width * 256
    head = width * given.architecture.text_config.vocab_size
    assert found["language"] == 6 * (3 * layer * 5 + head * 3)
    assert found["adapters"] == 6 * 3 * 2 * width * bottleneck * 5
    frozen = parts.flops_by_part(model.requires_grad_(False), seen)
    assert frozen["language"] == 4 * (3 * layer * 5 + head * 3) and frozen["vision"] < found["vision"] / 2


def test_a_model_of_any_size_runs_on_shapes(world_folder: Path) -> None:
    lines = {line["arm"]: line for line in gate.shapes(job(world_folder))}
    assert lines["ours_flat"]["tokens"] > lines["ours"]["tokens"] == lines["ours_reference"]["tokens"]
    assert lines[BASELINE]["computed"] >= lines[BASELINE]["tokens"]
    assert all(flops > 0 for flops in lines["ours"]["flops"].values())


@pytest.mark.slow
def test_the_7b_shape_runs_on_shapes(world_folder: Path) -> None:
    tasks = ("--data.tasks=[vcr_answer,vcr_rationale]",)
    asked = Job("gate", str(world_folder), "vicuna7b-clipL336", tasks, (BASELINE, "ours"), Phases(0, 1, 0), 2)
    for line in gate.shapes(asked):
        assert 1e9 < line["flops"]["language"] / line["tokens"] / 6 < 8e9


def results(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = dict.fromkeys(("tokens", "computed", "supervised", "samples", "images", "regions"), 8)
    made |= {"micro": 2, "seconds": 2.0, "waited": 0.5, "memory": [2**20], "ids": "a", "steps": 2, "shares": None}
    made |= {"flops": dict.fromkeys(parts.PARTS, 1.0), "ranks": 1, "threads": 1, "gpu": None, "attention": "sdpa"}
    return made | {"kernels": {}, "zero": "zero3", "dtype": "fp32", "preset": "tiny", **changes}


def test_nothing_is_reported_of_arms_that_trained_on_other_samples(tmp_path: Path) -> None:
    asked = job(tmp_path, "ours", "ours_flat")
    good = {"ours": [results(), results(seconds=4.0)], "ours_flat": [results()]}
    line = train.join(asked, good, 0.0)[0]
    assert (line["supervised_per_s_p20"], line["supervised_per_s_p50"], line["data_wait_share"]) == (
        "2.4",
        "3.0",
        "0.188",
    )
    assert line["mfu"] == line["mfu_roi"] == ""
    for wrong in ({"ids": "b"}, {"supervised": 9}):
        with pytest.raises(DataError, match="nothing is reported"):
            train.join(asked, {**good, "ours_flat": [results(**wrong)]}, 0.0)
    with pytest.raises(DataError, match="other kernels"):
        train.join(asked, {"ours": [results(), results(kernels={"moa": "csrc"})]}, 0.0)


def test_mfu_is_split_by_part_on_a_known_gpu(tmp_path: Path) -> None:
    made = results(gpu="NVIDIA H200", dtype="bf16", flops=dict.fromkeys(parts.PARTS, 2 * 98.9e12))
    line = train.join(job(tmp_path, "ours"), {"ours": [made]}, 0.0)[0]
    assert [line[f"mfu_{part}"] for part in parts.PARTS] == ["0.1000"] * 4 and line["mfu"] == "0.4000"
    assert line["device"] == "NVIDIA H200"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--arms", "ours,theirs"], "no arm 'theirs'"),
        (["--steps", "0"], "--steps 0"),
        (["--repeat", "2"], "nearest: --repeats"),
        (["--model.kernels=cuda"], "model.kernels"),
        (["--out", "{other}"], "other columns"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    world_folder: Path, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    other = tmp_path / "score.csv"
    other.write_text("layout,questions\n")
    with pytest.raises(UserError, match=complaint):
        train.main([str(world_folder), *(a.format(other=other) for a in arguments)])


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_three_steps_of_baseline_and_ours(
    world_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], dtype: str
) -> None:
    """bf16: by itself the Trainer rounds every float of a batch to the model's dtype, boxes in pixels too."""
    out = tmp_path / "train.csv"
    code = train.main(
        [str(world_folder), "--steps", "3", "--warmup", "1", "--clocked", "1", "--repeats", "1", "--ranks", "1",
         "--threads", "1", "--hf-batch", "4", "--arms", f"{BASELINE},ours", "--out", str(out), f"--train.dtype={dtype}",
         *SMALL[:-1]]
    )  # fmt: skip
    assert code == 0
    with out.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["arm"] for line in lines] == [BASELINE, "ours"]
    for line in lines:
        assert tuple(line) == train.COLUMNS
        empty = {name for name, value in line.items() if value == ""}
        assert empty <= {"mfu", *(f"mfu_{part}" for part in parts.PARTS), "micro_batch", "changed", "commit"}
        assert float(line["gate_difference"]) < 1e-5
    baseline, ours = lines
    assert (baseline["samples"], baseline["supervised"]) == (ours["samples"], ours["supervised"])
    assert int(baseline["tokens"]) > int(ours["tokens"]) and ours["padding_share"] == "0.000"
    shown = capfd.readouterr().out
    assert "hf_trainer" in shown and "x: relative to hf_trainer" in shown


def test_kernels_are_chosen_by_setting(given: Setting) -> None:
    from eventlens_ds.config.deepspeed import deepspeed_dict
    from eventlens_ds.model.adapters import TaskAdapters
    from eventlens_ds.model.regions import RegionEncoder
    from eventlens_ds.runtime.build_model import new_model

    for setting, expected in (("", {None}), ("reference", {"reference"})):
        config = load("tiny_vcr", [f"--model.kernels={setting}"])
        model = new_model(config, given.architecture, deepspeed_dict(config, 1, "zero0"))
        chosen = [m.backend for m in model.modules() if isinstance(m, RegionEncoder | TaskAdapters)]
        assert set(chosen) == expected and len(chosen) == 4
