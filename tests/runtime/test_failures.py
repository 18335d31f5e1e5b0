"""Who reports a failure, and with which exit code every rank leaves: real ranks that fail together, alone, or early.

In: cases that `main` runs one after the other in one pair of processes, because starting them costs more than the
cases. Out: what each rank raised, as JSON, checked here. Decision: a rank that does not fail waits in a collective,
as the ranks of a training run do.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.errors import DataError, LeaseError, UserError
from eventlens_ds.runtime import distributed, failures, heartbeat, local_ranks

ROOT = Path(__file__).parents[2]
SAME = "no such folder"


def everybody(rank: int) -> None:
    raise LeaseError(SAME)


def alone(who: int, error: Exception) -> Callable[[int], None]:
    def case(rank: int) -> None:
        if rank == who:
            raise error
        distributed.gather_objects("waiting for the other rank")

    return case


def late(rank: int) -> None:
    """Rank 1 notices that rank 0 failed when that and the store in it have gone."""
    if rank == 0:
        raise DataError("log.jsonl: no space")
    time.sleep(failures._LISTEN.total_seconds() + 1.0)
    distributed.gather_objects("nobody is left")


def differently(rank: int) -> None:
    raise DataError(f"shard {rank} is broken")


CASES: dict[str, Callable[[int], None]] = {
    "everybody": everybody,
    "rank0": alone(0, DataError("log.jsonl: no space")),
    "rank1": alone(1, DataError("shard 7 is broken")),
    "late": late,
    "crash1": alone(1, ZeroDivisionError("oops")),
    "differently": differently,
    "early1": lambda rank: None,
    "early_both": lambda rank: None,
    "interrupt": lambda rank: (_ for _ in ()).throw(KeyboardInterrupt()),
    "deaf": everybody,
    "trusting_nobody": alone(1, DataError("shard 7 is broken")),
    "no_ear": late,
}
EARLY = {"early1": (None, UserError("no such tokenizer")), "early_both": (UserError(SAME), UserError(SAME))}


def attempt(name: str, rank: int) -> dict[str, Any]:
    """What a rank raised; the last three cases are negative controls, with a part of the guard switched off."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "deaf":
            patch.setattr(failures, "_exchange", lambda *_: (None, []))
        if name == "trusting_nobody":
            patch.setattr(failures, "_LOST_CONTACT", re.compile("(?!)"))
        if name == "no_ear":
            patch.setattr(failures._Ear, "_listen", lambda *_: None)
        try:
            with failures.process_group(1, 0.5, EARLY.get(name, (None, None))[rank]):
                CASES[name](rank)
        except BaseException as error:
            code, text = failures.exit_of(error)
            notes = getattr(error, "__notes__", [])
            return {"type": type(error).__name__, "code": code, "text": text, "notes": notes}
    return {"type": "", "code": 0, "text": "", "notes": []}


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("failures")
    (folder / "ports.json").write_text(json.dumps([distributed.free_port() for _ in CASES]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        assert local_ranks.spawn(2, [str(folder)], module="tests.runtime.test_failures") == 0
    outs = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [out[name] for out in outs] for name in CASES}


def told(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["type"], row["code"], row["text"]


def test_an_error_of_all_ranks_is_said_by_rank_0_alone(raised: dict[str, list[dict[str, Any]]]) -> None:
    first, second = raised["everybody"]
    assert told(first) == ("LeaseError", 4, SAME) and told(second) == ("FailedElsewhere", 4, SAME)
    first, second = raised["early_both"]
    assert told(first) == ("UserError", 2, SAME) and told(second) == ("FailedElsewhere", 2, SAME)
    first, second = raised["interrupt"]
    assert told(first) == ("KeyboardInterrupt", 130, "interrupted") and told(second)[:2] == ("FailedElsewhere", 130)


def test_an_error_of_one_rank_is_said_by_it_with_its_number(raised: dict[str, list[dict[str, Any]]]) -> None:
    space, broken = "log.jsonl: no space", "shard 7 is broken"
    for name, who, text in (("rank0", 0, space), ("late", 0, space), ("rank1", 1, broken)):
        rows = raised[name]
        assert told(rows[who]) == ("DataError", 3, f"rank {who}: {text}"), name
        assert told(rows[1 - who]) == ("FailedElsewhere", 3, f"rank {who}: {text}"), name
    for rank, row in enumerate(raised["differently"]):
        assert told(row) == ("DataError", 3, f"rank {rank}: shard {rank} is broken")


def test_a_rank_without_a_problem_does_not_wait_for_one_that_has(raised: dict[str, list[dict[str, Any]]]) -> None:
    first, second = raised["early1"]
    assert told(second) == ("UserError", 2, "rank 1: no such tokenizer")
    assert told(first) == ("FailedElsewhere", 2, "rank 1: no such tokenizer")


def test_a_crash_keeps_its_type_and_names_its_rank(raised: dict[str, list[dict[str, Any]]]) -> None:
    first, second = raised["crash1"]
    assert told(second) == ("ZeroDivisionError", 1, "ZeroDivisionError: oops") and second["notes"] == ["(rank 1 of 2)"]
    assert told(first) == ("FailedElsewhere", 1, "rank 1: ZeroDivisionError: oops")


def test_without_the_store_everyone_speaks(raised: dict[str, list[dict[str, Any]]]) -> None:
    """Negative controls: ranks that do not hear each other, one that takes lost contact for an error of its own, and
    one that asks only when the store has gone."""
    assert [row["type"] for row in raised["deaf"]] == ["LeaseError", "LeaseError"]
    assert raised["trusting_nobody"][0]["type"] not in ("FailedElsewhere", "")
    assert raised["no_ear"][1]["type"] not in ("FailedElsewhere", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("x: broken"), 3, "x: broken"),
        (OSError(28, "No space left on device", "/tmp/x"), 2, "/tmp/x: No space left on device"),
        (OSError(5, "Input/output error"), 1, "OSError: [Errno 5] Input/output error"),
        (RuntimeError("first\nsecond"), 1, "RuntimeError: first"),
        (ValueError(), 1, "ValueError"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (failures.Terminated(), 143, "ended by SIGTERM before the first step"),
        (SystemExit(7), 7, "SystemExit: 7"),
    ],
)
def test_exit_code_and_line(error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests of this process may have trained: a process at work adds where it was.
    monkeypatch.setattr(heartbeat, "here", heartbeat.Here())
    assert failures.exit_of(error) == (code, line)


def test_the_line_of_a_crash_says_where_the_rank_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "here", heartbeat.Here())
    heartbeat.mark(heartbeat.SAVE, 7)
    assert failures.exit_of(ValueError("torn")) == (1, "ValueError: torn (in step 7, phase save)")
    assert failures.exit_of(UserError("no such folder")) == (2, "no such folder")


def test_a_crash_before_the_ranks_have_met_is_told_by_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "here", heartbeat.Here())
    ours = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left, failures.before_the_group():
        heartbeat.mark(heartbeat.START)
        sys.exit(0)
    assert left.value.code == 1 and left.value.__notes__ == ["(rank 1 of 3)"]
    assert failures.exit_of(left.value) == (1, "SystemExit: 0 (in start)")
    for expected in (UserError("no such folder"), failures.Terminated(), OSError(28, "full"), KeyboardInterrupt()):
        with pytest.raises(type(expected)) as known, failures.before_the_group():
            raise expected
        assert not hasattr(known.value, "__notes__")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError) as alone, failures.before_the_group():
        raise RuntimeError("x")
    assert not hasattr(alone.value, "__notes__")


def test_alone_nothing_is_added() -> None:
    with pytest.raises(DataError, match="^x$"), failures.process_group(1, 1.0):
        raise DataError("x")
    with pytest.raises(UserError, match="^y$"), failures.process_group(1, 1.0, UserError("y")):
        raise AssertionError("a problem is raised before the group is joined")


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    out = {}
    for name, port in zip(CASES, json.loads((folder / "ports.json").read_text()), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        out[name] = attempt(name, rank)
    (folder / f"{rank}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    failures.leave(lambda: main(Path(sys.argv[1])))
