"""The commit protocol tried in every order (commit_model.py), and the real code held against it.

In: the model under its rules and under each rule switched off; the operations that runtime/commit.py really makes on a
disk, replayed up to every single one with every unsynced write kept, lost or torn. Out: no promise is broken, and
each rule is needed. Decision: the model shows that the protocol is right, the trace that the code is the protocol.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from eventlens_ds.runtime import commit
from tests.runtime import commit_model
from tests.runtime.commit_model import Rules, violations
from tests.runtime.disk_log import KEPT, LOST, TORN, Disk, recorded
from tests.runtime.test_commit import manifest_of


@pytest.mark.P9
def test_no_order_of_steps_and_no_crash_breaks_a_promise() -> None:
    assert violations(Rules()) == {}
    assert commit_model.size(Rules()) > 300, "the search did not go anywhere"


@pytest.mark.P9
@pytest.mark.parametrize("rule", Rules._fields)
def test_every_rule_is_needed(rule: str) -> None:
    """Negative controls: without a rule some order of steps loses a checkpoint, or lets a replaced job publish."""
    found = violations(Rules()._replace(**{rule: False}))
    lost = {"a final name on a folder that is not whole", "a reported checkpoint is lost"}
    fenced = {"a job that lost the run publishes"}
    assert found.keys() == (fenced if rule in ("check_lease", "clean_before_resolve") else lost)


def save(run: Path, step: int, ranks: int = 2) -> None:
    """The calls of checkpoint.save in their order, with a small file in place of a rank's shard."""
    commit.clean_stale(run)
    temporary = run / commit.FOLDER / f".tmp-step-{step}-x"
    (temporary / "state").mkdir(parents=True)
    files = {}
    for rank in range(ranks):
        name = f"state/rank{rank}.pt"
        files[name] = {**commit.write_file(temporary / name, f"{name} {step}".encode() * 9), "rank": rank}
        commit.sync_dir(temporary / "state")
    path = commit.publish(temporary, manifest_of(step, files))
    commit.point(run, commit.LATEST, path)
    commit.retain(run, 1)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list:
    run = tmp_path_factory.mktemp("recorded")
    with recorded(run) as operations:
        for step in (1, 2, 3):
            save(run, step)
            operations.append(("reported", step))
    return operations


@pytest.mark.P9
def test_what_the_code_does_is_a_path_of_the_model(log: list) -> None:
    """The operations of the first save, in the words of the model, are steps it allows in that order."""
    words = []
    for what, *names in log[: log.index(("reported", 1))]:
        name = str(names[0])
        if ".tmp-step-1" not in name and not (what == "fsync" and name == commit.FOLDER):
            continue
        for rank in (0, 1):
            if name.endswith(f"rank{rank}.pt") and what in ("write", "fsync"):
                words.append(f"rank {rank}: {'write' if what == 'write' else 'sync'}")
        if what == "fsync" and name.endswith("/state"):
            words.append(f"rank {sum('sync names' in word for word in words)}: sync names")
        if name.endswith(commit.MANIFEST) and what in ("write", "fsync"):
            words.append("rank 0: manifest" if what == "write" else "rank 0: sync manifest")
        if what == "rename":
            words.append("rank 0: rename")
        if what == "fsync" and name == commit.FOLDER and words and words[-1] == "rank 0: rename":
            words.append("rank 0: sync place")
    assert len(words) == 10, words
    silent = {"rank 0: check", "rank 1: check", "rank 0: mkdir", "rank 1: mkdir", "rank 0: barrier"}
    states = {commit_model.State()}
    for word in words:
        reached, todo = set(), list(states)
        while todo:
            s = todo.pop()
            for step, after in [
                *commit_model.rank_step(s, 0, Rules()),
                *commit_model.rank_step(s, 1, Rules()),
            ]:
                if step == word:
                    reached.add(after)
                elif step in silent:
                    todo.append(after)
        assert reached, f"the model does not allow {word!r} here; before it: {words[: words.index(word)]}"
        states = reached


@pytest.mark.P9
@pytest.mark.parametrize("how", [KEPT, LOST, TORN])
def test_a_power_loss_after_any_operation_leaves_what_was_reported(log: list, tmp_path: Path, how: str) -> None:
    disk, reported = Disk(), 0
    for number, operation in enumerate(log):
        disk.do(operation)
        if operation[0] == "reported":
            reported = operation[1]
        run = tmp_path / str(number)
        disk.write(run, how)
        found = commit.resolve(run) if commit.committed(run) else None
        assert found is not None or not reported, (number, operation)
        assert found is None or commit.read_manifest(found)["step"] >= reported, (number, operation)
        shutil.rmtree(run)
    assert reported == 3 and number > 80


@pytest.mark.P9
@pytest.mark.parametrize("left_out", ["file", "folder", "checkpoints"])
def test_without_an_fsync_the_replay_loses_a_checkpoint(tmp_path: Path, left_out: str) -> None:
    """Negative control of the replay itself: fsyncs taken out of the log."""
    run = tmp_path / "run"
    run.mkdir()
    with recorded(run) as log:
        save(run, 1)
    kept = {
        "file": lambda name: not name.endswith(".pt"),
        "folder": lambda name: not name.endswith("state"),
        "checkpoints": lambda name: name not in (commit.FOLDER, "."),
    }[left_out]
    disk = Disk()
    for operation in log:
        if operation[0] != "fsync" or kept(operation[1]):
            disk.do(operation)
    disk.write(tmp_path / "after", LOST)
    after = tmp_path / "after"
    assert not commit.committed(after) or all(commit.verify(path) for path in commit.committed(after))


@pytest.mark.P9
def test_a_job_that_takes_over_stops_a_rename_that_is_under_way(tmp_path: Path) -> None:
    """The folder is taken away in one step: whoever renames second finds nothing. Emptied in place, as rmtree does it,
    the other job would publish what is left of it."""
    temporary = tmp_path / commit.FOLDER / ".tmp-step-1-x"
    temporary.mkdir(parents=True)
    manifest = manifest_of(1, {"a": {**commit.write_file(temporary / "a", b"x"), "rank": 0}})
    rename = os.rename

    def overtaken(*names: Path) -> None:
        os.rename = rename
        commit.clean_stale(tmp_path)
        rename(*names)

    try:
        os.rename = overtaken
        with pytest.raises(FileNotFoundError):
            commit.publish(temporary, manifest)
    finally:
        os.rename = rename
    assert commit.committed(tmp_path) == [] and os.listdir(tmp_path / commit.FOLDER) == []
