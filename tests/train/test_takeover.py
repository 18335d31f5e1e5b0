"""A run that another job holds, loses, or is asked to stop: nothing is written that is not its own, nothing is lost.

In: runs of the small world in this process, a lease held by another process, signals at moments that are chosen. Out:
exit codes, outcome.json, log, checkpoints. Decision: signals are sent by the code under way, so that they arrive where
a test wants them: while preparing, in an evaluation, in a save.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.errors import DataError, LeaseError, UserError
from eventlens_ds.runtime import checkpoint, lease
from eventlens_ds.train import loop, outcome, run
from eventlens_ds.train.identity import changes, identity, refuse_changes
from tests.runtime.test_lease import ask, end, holder
from tests.train.test_outcome import brief, config


def test_a_folder_that_a_living_job_holds_is_left_as_it_is(world_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcome.begin(folder)
    other = holder(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.json") if path.parent == folder}
    try:
        with pytest.raises(LeaseError, match="in use by process"):
            run.main(config(world_folder, folder))
        assert {path: path.read_bytes() for path in before} == before and ask(other) == "held"
        assert not (folder / "heartbeats").exists() and not (folder / "log.jsonl").exists()
    finally:
        end(other)


def test_a_job_that_lost_its_folder_writes_nothing_more(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job takes over while step 3 is computed, and says so in outcome.json."""
    folder, step = tmp_path / "run", loop.optimizer_step

    def overtaken(*args: Any) -> Any:
        report = step(*args)
        if len((folder / "log.jsonl").read_text().splitlines()) == 2:
            assert lease._claim(folder, lease.newest(folder) + 1, lease._facts(2))
            outcome.begin(folder)
        return report

    monkeypatch.setattr(loop, "optimizer_step", overtaken)
    with pytest.raises(LeaseError, match="taken over by process"):
        run.main(config(world_folder, folder, steps=5, save_every=1))
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2 and brief(folder) == ("running", None, 2)
    found = checkpoint.resolve(folder)
    assert found is not None and found.name == "step-2"


def test_without_the_question_it_would_publish(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a lease that always says it is held lets a replaced job end the run of the other."""
    folder, step = tmp_path / "run", loop.optimizer_step

    def overtaken(*args: Any) -> Any:
        if not (folder / "lease" / "00000002.json").exists():
            lease._claim(folder, 2, lease._facts(2))
        return step(*args)

    monkeypatch.setattr(loop, "optimizer_step", overtaken)
    monkeypatch.setattr(lease.Lease, "held", lambda self: True)
    assert run.main(config(world_folder, folder, steps=2)) == 0
    assert brief(folder)[0] == "finished"


def test_a_signal_while_preparing_ends_before_the_first_step(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, folder = run._prepare, tmp_path / "run"

    def signalled(asked: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return prepare(asked)

    monkeypatch.setattr(run, "_prepare", signalled)
    assert run.main(config(world_folder, folder)) == 75
    assert brief(folder) == ("preempted", 75, 1) and not (folder / "log.jsonl").exists()
    monkeypatch.undo()
    assert run.main(config(world_folder, folder)) == 0 and brief(folder) == ("finished", 0, 2)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_in_an_evaluation_ends_it_and_saves(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, forward, calls = tmp_path / "run", run._Evaluation._forward, []

    def signalled(self: Any, batch: Any, vision_calls: int) -> Any:
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.Signals[name])
        return forward(self, batch, vision_calls)

    monkeypatch.setattr(run._Evaluation, "_forward", signalled)
    asked = config(world_folder, folder, steps=6, eval_every=2, stop_signals=("SIGTERM", "SIGUSR1", "SIGUSR2"))
    assert run.main(asked) == 75
    assert len(calls) == 1 and brief(folder) == ("preempted", 75, 1)
    found = checkpoint.resolve(folder)
    assert found is not None and outcome.read(folder)["step"] == int(found.name.split("-")[1]) <= 3


def test_a_signal_in_a_save_does_not_break_it(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, save = tmp_path / "run", checkpoint.save

    def signalled(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args, **options)

    monkeypatch.setattr(checkpoint, "save", signalled)
    assert run.main(config(world_folder, folder, steps=6, save_every=2)) == 75
    found = checkpoint.resolve(folder)
    assert found is not None and found.name == "step-3" and outcome.read(folder)["step"] == 3


def test_changes_are_listed_refused_and_accepted(world_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = config(world_folder, folder, steps=2, save_every=1)
    assert run.main(first) == 0
    other = replace(first, train=replace(first.train, lr=5e-4, steps=3, log_every=2))
    with pytest.raises(DataError, match=r"train.lr: 0.001 -> 0.0005 \(to go on: --io.accept=train.lr\)"):
        run.main(other)
    with pytest.raises(UserError, match="io.accept: train.lrr: not among"):
        run.main(replace(other, io=replace(other.io, accept=("train.lrr",))))
    assert run.main(replace(other, io=replace(other.io, accept=("train.lr",)))) == 0
    assert outcome.read(folder)["step"] == 3


def test_shards_and_tokenizer_are_told_apart(tmp_path: Path) -> None:
    plain = config(tmp_path, tmp_path)
    saved = identity(plain, ["a" * 64], "p1", "t1", 3)
    assert changes(saved, identity(plain, ["a" * 64], "p1", "t1", 3)) == {}
    now = identity(plain, ["b" * 64, "c" * 64], "p2", "t2", 3)
    found = changes(saved, now)
    assert found["data: folder 1 of data.train"] == f"{'a' * 12} -> {'b' * 12}"
    assert found["data: folder 2 of data.train"] == f"none -> {'c' * 12}" and found["tokenizer"] == "t1 -> t2"
    refuse_changes(saved, now, ("data", "tokenizer"), "x")
    with pytest.raises(DataError, match="tokenizer: t1 -> t2"):
        refuse_changes(saved, now, ("data",), "x")
    moved = replace(plain, io=replace(plain.io, run="elsewhere"), data=replace(plain.data, workers=7))
    assert changes(saved, identity(moved, ["a" * 64], "p1", "t1", 3)) == {}


def test_a_setting_younger_than_the_run_counts_as_its_default(tmp_path: Path) -> None:
    plain = config(tmp_path, tmp_path)
    saved = identity(plain, [], "p1", "t1", 3)
    del saved["settings"]["model.qk_correlation"]
    assert changes(saved, identity(plain, [], "p1", "t1", 3)) == {}
    other = replace(plain, model=replace(plain.model, qk_correlation=0.5))
    assert changes(saved, identity(other, [], "p1", "t1", 3)) == {"model.qk_correlation": "0.0 -> 0.5"}
