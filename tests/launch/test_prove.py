"""The proofs that users run, run here: a kill and a resume, faults, preflight, compare; and that they can fail.

In: the commands' functions over the small world. Out: their tables and files. Decision: the fast half kills once and
tries two faults; `make test-slow` has every fault in every phase and the proof without generators.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.errors import DataError, PreflightError, UserError
from eventlens_ds.launch import compare, elastic, faults, preflight, prove
from eventlens_ds.train import ledger
from tests.small_world import small_config

SMALL = ("--model.image_size=24", "--data.row_tokens=384", "--data.error_budget=1.0", "--train.rows_per_step=2")


def proof(world: Path, out: Path, *more: str, without: str = "") -> prove.Proof:
    settings = (*SMALL, f"--data.train=[{world}]", "--eval.samples=4", *more)
    return prove.Proof("prove", settings, out, 2, without)


@pytest.mark.P9
def test_a_killed_run_is_the_same_as_one_nobody_disturbed(world_folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    asked = proof(world_folder, tmp_path, "--train.steps=8", "--train.save_every=2", "--train.eval_every=4")
    result = prove.resume(asked, 1, 4, told.append)
    assert result["identical"] and result["kills"] == 1 and result["steps"] == 8 and result["samples"] > 8
    assert len(told) == 2 and "killed" in told[1] and "identical" in prove.table(result)
    assert json.loads((tmp_path / "resume.json").read_text()) == result


@pytest.mark.P9
@pytest.mark.slow
def test_without_generators_the_proof_fails(world_folder: Path, tmp_path: Path) -> None:
    """Negative control."""
    result = prove.resume(
        proof(world_folder, tmp_path, "--train.steps=12", "--train.save_every=2", without="rng"), 3, 1, print
    )
    same = result["runs"][0]["same"]
    assert not result["identical"] and same["ledger"] and not same["losses"] and not same["parameters"]


def test_every_kind_of_difference_is_seen() -> None:
    facts: dict[str, Any] = {
        "ledger": [[((0, 0), ["a"])]],
        "losses": [(1, "0x1p0", "0x1p0", "h")],
        "parameters": {"w": "1"},
        "moments": {"w exp_avg": "2"},
        "tensorboard": {"train/loss": [(1, 1.0)]},
        "skipped": "",
    }
    assert all(prove.compare(facts, facts).values())
    for name in facts:
        assert [kind for kind, same in prove.compare(facts, {**facts, name: "other"} if name != "tensorboard" else
                {**facts, name: {"train/loss": [(1, 2.0)]}}).items() if not same] == [name]  # fmt: skip
    twice = {**facts, "tensorboard": {"train/loss": [(1, 1.0), (1, 1.0)]}}
    assert not prove.compare(twice, twice)["tensorboard"]
    assert not prove.compare({**facts, "losses": []}, {**facts, "losses": []})["losses"], "no facts are no proof"


def test_the_ledger_forgets_what_a_later_attempt_did_again(tmp_path: Path) -> None:
    rows = [(0, 0, "a"), (0, 1, "b"), (0, 2, "c"), (1, 1, "b"), (1, 2, "x")]
    path = tmp_path / "ledger-rank0.jsonl"
    lines = [json.dumps({"attempt": n, "step": s, "micro_step": 0, "id": i}) for n, s, i in rows]
    path.write_text("\n".join(lines) + '\n{"attempt": 1, "st')
    assert ledger.effective(path) == {(0, 0): ["a"], (1, 0): ["b"], (2, 0): ["x"]}
    assert ledger.Ledger(tmp_path, 0).attempt == 2 and path.read_text() == "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("fault", "phase"), [("stop", "eval"), ("exit", "start"), pytest.param("exit", "step", marks=pytest.mark.slow)]
)
def test_a_fault_ends_the_run_in_time_and_is_blamed_on_its_rank(
    world_folder: Path, tmp_path: Path, fault: str, phase: str
) -> None:
    (cell,) = faults.matrix(proof(world_folder, tmp_path), [fault], [phase], 3.0, print)
    assert cell.ok(3.0 + faults.GRACE), cell
    assert cell.code == (5 if fault == "stop" else 1) and cell.report == (fault == "stop")
    if fault == "stop":
        report = next((tmp_path / f"{fault}-{phase}").glob("watchdog-*.txt")).read_text()
        assert "rank 1: step 2, phase eval" in report and "(stopped)" in report and "stacks of rank 0" in report
        assert "File " in report.partition("stacks of rank 0")[2].partition("stacks of rank 1")[0]


@pytest.mark.slow
def test_without_the_watchdog_a_stopped_rank_hangs_the_run(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    monkeypatch.setattr(faults, "GRACE", 12.0)
    (cell,) = faults.matrix(proof(world_folder, tmp_path), ["stop"], ["step"], 0.0, print)
    assert cell.code is None and not cell.ok(12.0)


@pytest.mark.slow
def test_every_fault_in_every_phase(world_folder: Path, tmp_path: Path) -> None:
    names = (*faults.FAULTS, "hang", "lock")
    cells = faults.matrix(proof(world_folder, tmp_path), names, faults.PHASES, 5.0, print)
    wrong = [cell for cell in cells if not cell.ok(5.0 + faults.GRACE)]
    # A rank that hangs before the others have met it is left to the timeout of the rendezvous.
    assert {(cell.fault, cell.phase) for cell in wrong} <= {("hang", "start")}, wrong


def test_preflight_passes_and_reports_the_collectives(world_folder: Path, tmp_path: Path) -> None:
    report = preflight.main("prove", [*SMALL, f"--data.train=[{world_folder}]"], 2, tmp_path)
    assert report["rows"][0][0] == "missing" and report["rows"][1][0] == "full" and len(report["collectives"]) == 32
    assert {"text", "image", "single"} < {*report["rows"][0]} == {*report["rows"][1]}
    assert all(one != other for one, other in zip(*report["rows"]))
    assert report["events"] > 100 and report["checkpoint_bytes"] > 1000 and report["loss"] > 0
    assert not (tmp_path / "run").exists() and "passed" in preflight.text(report)


def test_preflight_sees_a_load_that_does_nothing(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control, in this process: the weights stay disturbed."""
    from eventlens_ds.runtime import checkpoint

    monkeypatch.setenv("WORLD_SIZE", "1")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29611")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: {})
    with pytest.raises(PreflightError, match="before the save and .* after the load"):
        preflight.rank_main(small_config(world_folder, tmp_path / "run", zero="zero0"))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "run" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    asked = proof(tmp_path, tmp_path)
    starts: list[Callable[[], object]] = [
        lambda: prove.resume(asked, 1, 0, print),
        lambda: elastic.elastic(asked, [2, 1], print),
        lambda: faults.matrix(asked, ["exit"], ["step"], 1.0, print),
        lambda: preflight.main("prove", [], 2, tmp_path),
    ]
    for start in starts:
        with pytest.raises(UserError, match=f"--out {tmp_path}: holds files that no proof left there"):
            start()
    assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine.parent]
    prove.claim(tmp_path / "new")
    (tmp_path / "new" / "reference").mkdir()
    prove.claim(tmp_path / "new")


def test_unknown_names_and_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nonsense: known are exception"):
        faults.matrix(proof(tmp_path, tmp_path), ["nonsense"], ["step"], 1.0, print)
    with pytest.raises(UserError, match="--kills 0"):
        prove.resume(proof(tmp_path, tmp_path), 0, 0, print)
    with pytest.raises(UserError, match="no run folder"):
        compare.differences(tmp_path, tmp_path)
    with pytest.raises(DataError, match="the undisturbed run ended with exit code 2"):
        prove.reference(proof(tmp_path / "nowhere", tmp_path), [tmp_path / "nowhere"])


def test_compare_says_only_what_differs(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    row = {"step": 1, "loss": 2.0, "step_time": 0.1, "sample_hash": "x"}
    (a / "log.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "step": 2}) + "\n")
    (a / "capsule.json").write_text(json.dumps({"versions": {"torch": "1"}, "data": {"w": "f"}}))
    (a / "outcome.json").write_text(json.dumps({"state": "finished", "code": 0, "attempt": 1}))
    shutil.copytree(a, b)
    (b / "outcome.json").write_text(json.dumps({"state": "finished", "code": 0, "attempt": 7}))
    assert compare.text(a, b) == "no difference but times, speed and memory"
    (b / "log.jsonl").write_text(
        json.dumps({**row, "step_time": 9.0}) + "\n" + json.dumps({**row, "step": 2, "loss": 2.5}) + "\n"
    )
    (b / "capsule.json").write_text(json.dumps({"versions": {"torch": "2"}, "data": {"w": "f"}}))
    assert compare.differences(a, b) == [
        "capsule.versions.torch: 1 -> 2",
        "log.loss: differs in 1 of 2 steps, first in step 2: 2.0 -> 2.5, by at most 0.5",
    ]


@pytest.mark.P3
@pytest.mark.slow
@pytest.mark.parametrize("without", ["", "rng"])
def test_other_numbers_of_ranks_see_the_same_samples_and_losses(
    world_folder: Path, tmp_path: Path, without: str
) -> None:
    """And without seeds by row (the negative control) they do not."""
    more = ("--train.steps=16", "--train.save_every=4", "--train.rows_per_step=4", "--train.eval_every=0")
    result = elastic.elastic(proof(world_folder, tmp_path, *more, without=without), (2, 1, 4, 2), print)
    assert result["same_samples"] and len(result["rows"]) == 16
    assert {row["ranks"] for row in result["rows"]} == {1, 2, 4}
    assert (result["largest"] <= elastic.TOLERANCE) == (not without), result["largest"]
