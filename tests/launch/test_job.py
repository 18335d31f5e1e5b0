"""What the end of a Slurm job means: the table of decisions, and what is believed of outcome.json.

In: ends of attempts, journals, outcome files. Out: decisions. Decision: the table is tested without Slurm;
tests/slurm runs the same rules on real daemons.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.errors import UserError
from eventlens_ds.launch import job
from eventlens_ds.launch.job import End


def decide(end: End, earlier: list[dict[str, Any]] | None = None) -> tuple[str, int]:
    made = job.decide(end, earlier or [], max_crashes=3, lease_tries=2)
    assert "\n" not in made.reason and made.reason
    return made.action, made.code


def end(
    state: str = "", code: int = 0, signal: str = "", step: int = 5, restarted: bool = False, job: str = "7.0"
) -> End:
    return End(state, code, "why", signal, step, restarted, job)


@pytest.mark.parametrize(
    ("ended", "then"),
    [
        (end("finished"), ("exit", 0)),
        (end("finished", signal="USR1"), ("exit", 0)),
        (end("finished", signal="TERM"), ("exit", 0)),
        (end("preempted"), ("requeue", 75)),
        (end("preempted", signal="USR1"), ("requeue", 75)),
        (end("preempted", signal="TERM"), ("exit", 143)),
        (end("", signal="USR1"), ("requeue", 75)),  # the signal came before the ranks were started
        (end("failed", 143, signal="USR1"), ("requeue", 75)),
        (end("failed", 143), ("requeue", 75)),  # preempted while starting: TERM came from Slurm
        (end("failed", 2), ("exit", 2)),
        (end("failed", 3, signal="USR1"), ("exit", 3)),
        (end("failed", 6), ("exit", 6)),
        (end("failed", 4), ("exit", 4)),
        (end("failed", 4, restarted=True), ("again", 4)),
        (end("failed", 5), ("requeue", 5)),
        (end("running", 137), ("requeue", 137)),
        (end("running", 0), ("requeue", 1)),  # all ranks gone without a word, srun content
    ],
)
def test_what_follows_an_end(ended: End, then: tuple[str, int]) -> None:
    assert decide(ended) == then


def rows(*steps: int, code: int = 1, decision: str = "requeue") -> list[dict[str, Any]]:
    return [{"code": code, "step": step, "decision": decision, "job": "7.0"} for step in steps]


def test_crashes_without_a_new_checkpoint_end() -> None:
    assert decide(end("failed", 1), rows(5)) == ("requeue", 1)
    assert decide(end("failed", 1), rows(5, 5)) == ("exit", 1)
    # Progress starts the count again; so does a planned stop in between.
    assert decide(end("failed", 1), rows(3, 4)) == ("requeue", 1)
    assert decide(end("failed", 1), rows(5, 5) + rows(5, code=0)) == ("requeue", 1)


def waited(*jobs: str) -> list[dict[str, Any]]:
    return [{**row, "job": name} for row, name in zip(rows(*[5] * len(jobs), code=4, decision="again"), jobs)]


def test_a_lease_is_not_waited_for_for_ever() -> None:
    assert decide(end("failed", 4, restarted=True, job="7.1"), waited("7.1")[:0]) == ("again", 4)
    assert decide(end("failed", 4, restarted=True, job="7.1"), waited("7.1")) == ("exit", 4)
    # What other attempts waited is theirs, and a first attempt does not wait: it is another job's folder.
    assert decide(end("failed", 4, restarted=True, job="7.2"), waited("7.1", "6.1")) == ("again", 4)
    assert decide(end("failed", 4, job="8.0"), waited("7.1")) == ("exit", 4)


def test_waiting_for_a_lease_is_neither_a_crash_nor_progress() -> None:
    crash = rows(5)
    assert decide(end("failed", 1), crash + waited("7.1", "7.1", "7.1")) == ("requeue", 1)
    assert decide(end("failed", 1), crash + waited("7.1") + crash + waited("7.2")) == ("exit", 1)


def conclude(run: Path, srun: int = 0, before: int = 1, exits: str = "", **more: str) -> tuple[str, int]:
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    path = run / "slurm" / "exits"
    path.write_text(exits)
    words = ["conclude", "--run", str(run), "--exits", str(path), "--before", str(before), "--srun", str(srun)]
    words += ["--seconds", "9", "--stop-seconds", "0", "--max-crashes", "3", "--lease-tries", "2"]
    words += [word for name, value in {"job": "7.0", **more}.items() for word in (f"--{name}", value)]
    args, _ = job._parser().parse_known_args(words)
    action, code, _ = job.conclude(args).splitlines()
    assert not path.exists()
    return action, int(code)


def outcome(run: Path, **content: Any) -> None:
    run.mkdir(parents=True, exist_ok=True)
    usual = {"state": "running", "reason": "", "code": None, "attempt": 2}
    (run / "outcome.json").write_text(json.dumps({**usual, **content}))


def test_only_this_attempt_s_outcome_counts(tmp_path: Path) -> None:
    outcome(tmp_path, state="preempted", code=75)
    assert conclude(tmp_path, before=1) == ("requeue", 75)
    assert conclude(tmp_path, before=2, srun=1) == ("requeue", 1)
    assert [row["state"] for row in job.journal(tmp_path)] == ["preempted", ""]


def test_the_first_rank_that_failed_is_the_reason(tmp_path: Path) -> None:
    """srun tells the others to stop: what they say of it is a consequence."""
    outcome(tmp_path, state="failed", code=143, reason="ended by SIGTERM before the first step")
    assert conclude(tmp_path, srun=143, exits="139 1 n2\n143 0 n1\n") == ("requeue", 139)
    assert "rank 1 on n2 ended with 139" in job.journal(tmp_path)[-1]["reason"]
    outcome(tmp_path, state="preempted", code=75)
    assert conclude(tmp_path, srun=143, exits="2 1 n2\n") == ("exit", 2)
    outcome(tmp_path, state="failed", code=3, reason="shard 7")
    assert conclude(tmp_path, srun=143, exits="3 0 n1\n") == ("exit", 3)
    assert "shard 7" in job.journal(tmp_path)[-1]["reason"]


def test_begin_tells_finished_from_work(tmp_path: Path) -> None:
    given = ["--config", "tiny_event", f"--data.train={tmp_path}", f"--io.run={tmp_path / 'run'}", "--train.steps=9"]
    assert job.begin(given).splitlines() == ["train", str(tmp_path / "run"), "0"]
    outcome(tmp_path / "run", state="finished", code=0, step=9)
    assert job.begin(given).splitlines()[0] == "finished"
    assert job.begin([*given, "--train.steps=10"]).splitlines() == ["train", str(tmp_path / "run"), "2"]
    with pytest.raises(UserError, match="nearest"):
        job.begin([*given, "--train.stepz=3"])


def test_lead_follows_the_slowest_stop(tmp_path: Path) -> None:
    given = ["--config", "tiny_event", f"--data.train={tmp_path}", f"--io.run={tmp_path}"]
    assert job.lead(given) == "300"
    (tmp_path / "slurm").mkdir()
    path = tmp_path / "slurm" / job.JOURNAL
    for seconds, wanted in ((5, "120"), (100, "260"), (9000, "3600")):
        path.write_text(json.dumps({"stop_seconds": seconds}) + '\n{"torn')
        assert job.lead(given) == wanted


def test_history_is_a_table_of_attempts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no attempts"):
        job.history(tmp_path)
    outcome(tmp_path, state="finished", code=0)
    conclude(tmp_path, nodes="n[1-2]")
    head, line = job.history(tmp_path).splitlines()
    assert head.split()[:3] == ["job", "nodes", "state"] and line.split()[:3] == ["7.0", "n[1-2]", "finished"]
