"""`make world-small`: two steps of each stage, twice; finished stages are kept, other arguments are refused.

In: nothing. Out: the files a user gets. Decision: the whole launcher runs, on a world of a few pictures; what the
recipes reach is measured by the full run and is in LOG.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.config.load import load
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.launch import world_small
from eventlens_ds.launch.demo import Stages

SMALL = ["--images", "24", "--image-size", "64", "--event-steps", "2", "--vcr-steps", "2"]


def test_the_recipes_are_harder_than_the_demos_and_fit_each_other() -> None:
    event, vcr = load("world_small_event"), load("world_small_vcr")
    demo = load("tiny_event")
    assert event.model == vcr.model and event.model.preset == "small"
    assert event.data.list_objects and vcr.data.list_objects and not demo.data.list_objects
    assert event.data.event_context == vcr.data.event_context
    assert event.train.steps > demo.train.steps and 0 < event.train.save_every < event.train.steps


@pytest.mark.slow
def test_two_steps_end_in_a_summary_and_are_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert world_small.main(["--out", str(out), *SMALL]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ranks"] == 2 and summary["zero_stage"] == 3 and summary["vcr"]["n"] > 0
    assert summary["aim"] == {"q2a": 0.8, "reached": summary["vcr"]["q2a"] >= 0.8}
    stages = json.loads((out / "stages.json").read_text())
    assert stages["done"] == list(world_small.TITLES) and summary["seconds"] == pytest.approx(
        sum(stages["seconds"].values()), abs=0.1
    )
    commands = (out / "commands.log").read_bytes()
    assert "aim of Q->A" in capsys.readouterr().out
    assert world_small.main(["--out", str(out), *SMALL]) == 0
    assert (out / "commands.log").read_bytes() == commands
    assert capsys.readouterr().out.count("done before") == 4
    assert json.loads((out / "summary.json").read_text()) == summary


def test_a_failed_stage_is_repeated_and_its_time_counts(tmp_path: Path) -> None:
    stages = Stages(tmp_path, 1)
    ran: list[str] = []

    def fails(title: str) -> None:
        stages.seconds[title] = 2.0
        raise DataError("broken")

    progress = world_small.Progress(tmp_path / "out", {"seed": 0})
    with pytest.raises(DataError, match="broken"):
        progress.stage(stages, "one", fails)
    again = world_small.Progress(tmp_path / "out", {"seed": 0})
    assert again.state["done"] == []
    again.stage(stages, "one", ran.append)
    again.stage(stages, "one", ran.append)
    assert ran == ["one"] and again.state == {"arguments": {"seed": 0}, "done": ["one"], "seconds": {"one": 4.0}}


def test_other_arguments_and_foreign_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: dict[str, Any] = {"seed": 0, "images": 24}
    world_small.Progress(tmp_path / "out", arguments)
    world_small.Progress(tmp_path / "out", arguments)
    with pytest.raises(UserError, match="was begun with images 24, not 48"):
        world_small.Progress(tmp_path / "out", {**arguments, "images": 48})
    (tmp_path / "out" / "stages.json").write_text("{")
    with pytest.raises(DataError, match=r"stages\.json: cannot be read"):
        world_small.Progress(tmp_path / "out", arguments)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    assert world_small.main(["--out", str(tmp_path / "mine"), *SMALL]) == 2
    assert "is not empty and holds no stages.json" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["notes.txt"]
