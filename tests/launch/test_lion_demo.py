"""`make lion-demo` and `make lion-ablation`: the runs they plan, the files they read, and a run of a few steps.

In: nothing. Out: what a user gets. Decision: the whole launcher runs on a few pictures in a slow test; what the recipes
reach is measured by the full run and is in LOG.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eventlens_ds.config.load import load
from eventlens_ds.launch import lion_ablation, lion_demo

SMALL = ["--images", "24", "--steps", "0.01"]


def write_scores(folder: Path, cider: float) -> None:
    """The files of an evaluation, as far as the summary reads them."""
    metrics = folder / "metrics"
    metrics.mkdir(parents=True)
    floor = {"cider": 0.05}
    scores = {
        "caption": {"cider": cider, "n": 3, "floor": floor},
        "reg": {"cider": 0.5, "n": 5, "floor": floor},
        "rec": {"accuracy": 0.25, "n": 5, "floor": {"accuracy": 0.08}},
        "vqa": {"accuracy": 0.75, "n": 4},
    }
    for task, values in scores.items():
        (metrics / f"{task}.json").write_text(json.dumps({task: values}))


def test_every_arm_starts_from_a_run_that_was_made_before() -> None:
    made: list[str] = []
    for arm in lion_demo.arms(100):
        assert arm.start in ("", *made)
        made.append(arm.name)
    assert len(set(made)) == len(made)


def test_the_arms_differ_in_what_they_say_and_in_nothing_else() -> None:
    models = [load(f"tiny_lion_{n}").model for n in ("1", "2", "3", "4", "single")]
    for part in ("preset", "aggregator", "qformer", "adapters", "linking", "word_spread", "soft_prompt"):
        wanted = {repr(getattr(model, part)) for model in (models if part != "soft_prompt" else models[3:])}
        assert len(wanted) == 1, part
    for arm in lion_demo.arms(100):
        config = load(arm.recipe, [*arm.settings])
        places = 0.0 if arm.recipe == "tiny_lion_1" else 1.4
        assert (config.model.word_spread, config.model.visual_positions) == (1.0, places), arm.name
        assert ("router" in config.stage.train) == (arm.name in ("stage3", "stage4", "single_stage"))
    for recipe in ("tiny_lion_3", "tiny_lion_4"):
        (without,) = (arm for arm in lion_demo.arms(100) if arm.recipe == recipe and arm.settings)
        assert set(load(recipe).stage.train) - set(load(recipe, [*without.settings]).stage.train) == {"router"}
    frozen = [load(f"tiny_lion_{n}").stage.train for n in lion_demo.STAGES]
    assert not any({"vision", "language"} & set(parts) for parts in frozen)


def test_the_summary_is_read_from_the_evaluations(tmp_path: Path) -> None:
    for i, name in enumerate(["stage0", "stage1", "stage2", "stage3", "stage4", "single_stage", "no_router"]):
        write_scores(tmp_path / "seed-7" / "eval" / name, float(i))
    write_scores(tmp_path / "seed-7" / "eval" / lion_demo.IMAGE_LEVEL, 2.5)
    summary = lion_demo.summarise(tmp_path / "seed-7", {"a": 1.5, "b": 2.0}, 40)
    wanted = {"caption_cider": 2.5, "vqa_acc": 0.75, "rec_acc50": 0.25, "reg_cider": 0.5}
    assert summary["stages"]["2"] == wanted and list(summary["stages"]) == ["1", "2", "3", "4"]
    assert summary["stage2_through_aggregator"] == {"caption_cider": 2.0, "vqa_acc": 0.75}
    assert summary["single_stage"]["caption_cider"] == 5.0 and summary["no_router"]["caption_cider"] == 6.0
    assert summary["floor"] == {"rec_constant_box": 0.08, "caption_most_frequent": 0.05}
    assert summary["seconds"] == 3.5 and summary["steps"] == 40
    assert summary["start"]["caption_cider"] == 0.0
    assert any("0.080" in line and "0.050" in line for line in lion_demo.table(summary))

    (tmp_path / "seed-7" / "summary.json").write_text(json.dumps(summary))
    raised = json.loads(json.dumps(summary))
    raised["stages"]["2"]["caption_cider"] = 3.0
    (tmp_path / "seed-8").mkdir()
    (tmp_path / "seed-8" / "summary.json").write_text(json.dumps(raised))
    both = lion_ablation.summarise(tmp_path, [7, 8])
    assert both["arms"]["stage 2"]["caption_cider"] == [2.75, 2.5, 3.0]
    assert any("2.750 (2.500 - 3.000)" in line for line in lion_ablation.table(both))


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (lion_demo, ["--images", "4"], "--images 4 --ranks 2 --steps 1.0: at least 8"),
        (lion_demo, ["--steps", "0"], "--steps 0.0"),
        (lion_ablation, ["--seeds", "1,1"], "--seeds 1,1: different whole numbers"),
        (lion_ablation, ["--seeds", "x"], "--seeds x"),
    ],
)
def test_bad_arguments_are_named(command, arguments, said, tmp_path, capsys) -> None:
    assert command.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_few_steps_end_in_a_summary_and_are_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert lion_demo.main(["--out", str(out), *SMALL]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["stages"]) == set(lion_demo.STAGES)
    for values in (*summary["stages"].values(), summary["single_stage"], summary["no_router"]):
        assert list(values) == list(lion_demo.NUMBERS)
    commands = (out / "commands.log").read_bytes()
    capsys.readouterr()
    assert lion_demo.main(["--out", str(out), *SMALL]) == 0
    assert (out / "commands.log").read_bytes() == commands and "done before" in capsys.readouterr().out
