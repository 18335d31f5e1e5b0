"""Event files read back by TensorBoard's own reader, and resume without double points."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eventlens_ds.train import tensorboard as tb
from eventlens_ds.train.metrics import StepMetrics

LOSSES = {"event": 2.0, "vcr_answer": 1.5}
STEP = StepMetrics(1, 2.5, LOSSES, 0.5, 1e-3, 1234.0, 321, 7, 2, 0.25, 0.005, None, 2**30, "ff")


def read(folder: Path) -> EventAccumulator:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    return reader


def write(folder: Path, steps: range, loss: float, first_step: int | None = None) -> None:
    board = tb.Board(folder, first_step=first_step)
    for step in steps:
        board.step(replace(STEP, step=step, loss=loss))
        board.panel(step, "sample", np.full((8, 8, 3), int(loss), np.uint8))
    board.close()


def test_scalars_by_namespace(tmp_path: Path) -> None:
    board = tb.Board(tmp_path)
    board.step(STEP)
    board.step(replace(STEP, step=2, mfu=0.4))
    nested = {"q2a": 0.5, "n": 10, "qa2r": None, "which_person": {"q2a": 0.25}, "intervals": {"q2a": [0.4, 0.6]}}
    board.evaluation(2, nested)
    board.scalars(2, {"opt/lr/adapters": 1e-4})
    board.text(2, "sample", "| a | b |")
    board.close()
    reader = read(tmp_path)
    assert set(reader.Tags()["scalars"]) == {
        "train/loss",
        "train/loss/event",
        "train/loss/vcr_answer",
        "opt/grad_norm",
        "opt/lr",
        "opt/lr/adapters",
        "perf/tokens_per_s",
        "perf/step_time",
        "perf/memory_gib",
        "perf/mfu",
        "data/wait",
        "data/supervised_tokens",
        "data/regions_used",
        "data/regions_unused",
        "eval/q2a",
        "eval/which_person/q2a",
    }
    assert [(e.step, e.value) for e in reader.Scalars("train/loss/event")] == [(1, 2.0), (2, 2.0)]
    assert [e.step for e in reader.Scalars("perf/mfu")] == [2]
    assert [e.value for e in reader.Scalars("eval/which_person/q2a")] == [0.25]


def test_resumes_and_a_torn_file_leave_one_point_per_step(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), loss=1.0)
    newest = max(tmp_path.iterdir(), key=lambda p: p.name)
    with open(newest, "r+b") as file:
        file.truncate(os.path.getsize(newest) - 7)
    write(tmp_path, range(5, 10), loss=2.0, first_step=5)
    write(tmp_path, range(4, 11), loss=3.0, first_step=4)
    reader = read(tmp_path)
    expected = [(s, 1.0) for s in range(1, 4)] + [(s, 3.0) for s in range(4, 11)]
    assert [(e.step, e.value) for e in reader.Scalars("train/loss")] == expected
    assert [e.step for e in reader.Images("eval/sample")] == list(range(1, 11))


def test_without_the_purge_mark_points_show_twice(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), loss=1.0)
    write(tmp_path, range(2, 5), loss=2.0)
    assert [e.step for e in read(tmp_path).Scalars("train/loss")] == [1, 2, 3, 2, 3, 4]


def test_restart_within_a_second_sorts_after_the_old_file(tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        tb.Board(tmp_path, first_step=1).close()
        names.append({p.name for p in tmp_path.iterdir()})
    assert int(max(names[1] - names[0]).split(".")[3]) > int(max(names[0]).split(".")[3])


def test_a_clock_behind_the_files_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"events.out.tfevents.{int(time.time()) + 1000}.host.1.0").write_bytes(b"")
    tb.Board(tmp_path, first_step=1).close()
    assert "ahead of the clock" in caplog.text
