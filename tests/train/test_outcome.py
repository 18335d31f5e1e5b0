"""outcome.json says how a run ended, whatever ended it, and never what the attempt before did; skipped.jsonl lists
every unused sample once.

In: runs of the tiny preset over the small world, in this process and by the command; faults put into their steps.
Out: the files of the run folder. Decision: errors are raised where a run meets them (preparing, stepping, in a rank
that is killed), since the file is only as good as the frame around everything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.config.run_config import DataConfig, IOConfig, ModelConfig, RunConfig, TrainConfig
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.runtime import checkpoint
from eventlens_ds.runtime.collectives import CollectiveMismatch
from eventlens_ds.runtime.distributed import free_port
from eventlens_ds.runtime.failures import Terminated
from eventlens_ds.runtime.local_ranks import Ended
from eventlens_ds.train import loop, outcome, run
from eventlens_ds.train.skipped import SkippedLog

ADAPTED = ModelConfig().adapters.tasks
LAUNCH = [sys.executable, "-m", "eventlens_ds", "train", "--ranks", "2"]


def config(world: Path, folder: Path, **train: Any) -> RunConfig:
    asked = {"steps": 2, "rows_per_step": 2, "lr": 1e-3, "warmup": 1, "zero": "zero0", "threads": 1, "log_every": 1}
    return RunConfig(
        model=ModelConfig(attention="sdpa"),
        data=DataConfig(train=(str(world),), row_tokens=512, workers=0, error_budget=1.0, tasks=ADAPTED),
        train=TrainConfig(**{**asked, **train}),
        io=IOConfig(run=str(folder), tensorboard=False),
    )


def settings(world: Path, folder: Path, *more: str) -> list[str]:
    given = ["--data.row_tokens=512", "--data.workers=1", "--train.rows_per_step=3", "--train.threads=1"]
    given += [
        "--train.timeout_minutes=1",
        "--train.log_every=1",
        "--io.tensorboard=false",
        f"--data.tasks=[{','.join(ADAPTED)}]",
    ]
    return [f"--data.train=[{world}]", f"--io.run={folder}", *given, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def brief(folder: Path) -> tuple[str, Any, int]:
    ended = outcome.read(folder)
    return ended["state"], ended["code"], ended["attempt"]


FAULTS = [
    (DataError("shard 3: crc32 differs"), 3, "shard 3: crc32 differs"),
    (
        RuntimeError("[gloo] Connection closed by peer\nmore"),
        1,
        "RuntimeError: [gloo] Connection closed by peer (in start)",
    ),
    (FloatingPointError("loss is nan"), 1, "FloatingPointError: loss is nan (in start)"),
    (CollectiveMismatch("ranks differ at event 3"), 1, "CollectiveMismatch: ranks differ at event 3 (in start)"),
    (OSError(28, "No space left on device", "/x"), 2, "/x: No space left on device"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize(("fault", "code", "reason"), FAULTS, ids=[type(fault[0]).__name__ for fault in FAULTS])
def test_every_end_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, code: int, reason: str
) -> None:
    def prepare(_: RunConfig) -> None:
        assert brief(tmp_path / "run") == ("running", None, 1)
        raise fault

    monkeypatch.setattr(run, "_prepare", prepare)
    with pytest.raises(type(fault)):
        run.main(config(tmp_path, tmp_path / "run"))
    assert brief(tmp_path / "run") == ("failed", code, 1) and outcome.read(tmp_path / "run")["reason"] == reason


def test_sigterm_before_training_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run, "_prepare", lambda _: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5)))
    with pytest.raises(Terminated):
        run.main(config(tmp_path, tmp_path / "run"))
    assert brief(tmp_path / "run") == ("failed", 143, 1) and "SIGTERM" in outcome.read(tmp_path / "run")["reason"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("grace", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sigterm_ends_a_rank_that_waits_for_the_others(world_folder: Path, tmp_path: Path, grace: bool) -> None:
    """Rank 0 of two, the other never comes: no Python handler runs in that wait. Negative control: without the
    thread the signal does nothing."""
    folder, port = tmp_path / "run", str(free_port())
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    program = "import sys; from eventlens_ds.train import door, preempt; preempt.EarlyStop.GRACE = float(sys.argv[1]); "
    program += "sys.exit(door.main(sys.argv[2:]))"
    command = [sys.executable, "-c", program, "1" if grace else "1000", *settings(world_folder, folder)]
    with subprocess.Popen(command, env=environment() | names, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", int(port))):  # the store of the rendezvous listens
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        if grace:
            assert process.wait(20) == 143 and brief(folder) == ("failed", 143, 1)
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(4)
            process.kill()


def test_a_fault_in_a_step_a_finish_and_a_refused_start(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, step = tmp_path / "run", loop.optimizer_step

    def broken(*args: Any) -> Any:
        assert brief(folder)[0] == "running"
        raise FloatingPointError("loss is nan")

    monkeypatch.setattr(loop, "optimizer_step", broken)
    with pytest.raises(FloatingPointError):
        run.main(config(world_folder, folder))
    assert brief(folder) == ("failed", 1, 1) and outcome.read(folder)["first_step_seconds"] is None

    monkeypatch.setattr(loop, "optimizer_step", step)
    monkeypatch.setattr(logging.getLogger("eventlens_ds"), "propagate", True)
    with caplog.at_level(logging.INFO, "eventlens_ds"):
        assert run.main(config(world_folder, folder)) == 0
    assert brief(folder) == ("finished", 0, 2) and outcome.read(folder)["step"] == 2
    seconds = outcome.read(folder)["first_step_seconds"]
    assert f"first step done {seconds:.1f} s after launch" in caplog.text
    assert 0 < seconds <= outcome.seconds_since_launch()

    with pytest.raises(DataError, match="made with other data"):
        run.main(config(world_folder, folder, seed=1))
    assert brief(folder) == ("failed", 3, 3)
    earlier = [(entry["attempt"], entry["state"], entry["code"]) for entry in outcome.read(folder)["earlier"]]
    assert earlier == [(1, "failed", 1), (2, "finished", 0)]


def test_without_the_frame_the_end_before_is_read(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: an attempt that does not say "running" leaves what the one before it wrote."""
    folder = tmp_path / "run"
    outcome.begin(folder)
    with outcome.Attempt(folder) as attempt:
        attempt.end("finished", 0, 9)
    monkeypatch.setattr(outcome, "begin", lambda _: 0)
    monkeypatch.setattr(run, "_prepare", lambda _: (_ for _ in ()).throw(DataError("broken")))
    with pytest.raises(DataError):
        run.main(config(world_folder, folder))
    assert outcome.read(folder)["state"] == "finished"


def test_the_first_reason_stays(tmp_path: Path) -> None:
    outcome.begin(tmp_path)
    outcome.fail(tmp_path, 3, "rank 1: shard 7 is broken")
    outcome.fail(tmp_path, 1, "RuntimeError: connection closed")
    assert outcome.read(tmp_path)["reason"] == "rank 1: shard 7 is broken" and brief(tmp_path) == ("failed", 3, 1)


@pytest.mark.parametrize(
    ("ended", "state", "code", "reason"),
    [
        (Ended(137, 0, 9), "failed", 137, "rank 0: ended by SIGKILL"),
        (Ended(5, 1), "failed", 5, "rank 1: exit code 5"),
        (Ended(0), "running", None, ""),
    ],
)
def test_the_launcher_says_what_rank_0_could_not(
    tmp_path: Path, ended: Ended, state: str, code: int | None, reason: str
) -> None:
    attempt = outcome.begin(tmp_path)
    outcome.conclude(tmp_path, attempt, ended)
    found = outcome.read(tmp_path)
    assert (found["state"], found["code"], found["reason"]) == (state, code, reason)
    again = outcome.begin(tmp_path)
    outcome.conclude(tmp_path, attempt, Ended(5, 1))
    assert brief(tmp_path) == ("running", None, again), "a launcher must not speak for another attempt"


def test_a_killed_rank_is_the_reason_of_what_the_others_say(tmp_path: Path) -> None:
    attempt = outcome.begin(tmp_path)
    outcome.fail(tmp_path, 1, "RuntimeError: connection closed")
    outcome.conclude(tmp_path, attempt, Ended(137, 1, 9))
    assert outcome.read(tmp_path)["reason"] == "rank 1: ended by SIGKILL (RuntimeError: connection closed)"
    assert brief(tmp_path) == ("failed", 137, 1)


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="io.run .*/run: is a file, not a folder"):
        outcome.begin(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        outcome.begin(tmp_path / "run" / "below")


def test_a_port_in_use_is_one_line_and_the_outcome(world_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "eventlens_ds.train", *settings(world_folder, folder)]
        done = subprocess.run(command, env=environment() | names, capture_output=True, text=True)
    line = f"port {port} is in use on 127.0.0.1: set MASTER_PORT"
    assert done.returncode == 2 and f"eventlens: error: {line}\n" in done.stderr and "Traceback" not in done.stderr
    assert brief(folder) == ("failed", 2, 1) and outcome.read(folder)["reason"] == line


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write anywhere; an ordinary user may not."""
    mine = os.geteuid()
    os.seteuid(mine or 65534)
    try:
        yield
    finally:
        os.seteuid(mine)


def test_a_read_only_run_folder_is_refused_at_once() -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place) / "run"
        folder.mkdir(mode=0o555)
        with as_nobody(), pytest.raises(UserError, match="io.run .*/run: cannot be written: Permission denied"):
            outcome.begin(folder)
        with as_nobody(), pytest.raises(UserError, match="io.run .*/other: cannot be written: Permission denied"):
            outcome.begin(Path(place) / "other")
        assert list(folder.iterdir()) == []


def kill_rank(launcher: subprocess.Popen[str], rank: int) -> None:
    """SIGKILL to one rank of a launcher."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(int(pid), signal.SIGKILL)
            return
    raise AssertionError(f"rank {rank} is not there")


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named(world_folder: Path, tmp_path: Path, rank: int) -> None:
    folder = tmp_path / "run"
    command = [*LAUNCH, *settings(world_folder, folder, "--train.steps=10000")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while outcome.read(folder).get("first_step_seconds") is None:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.05)
    kill_rank(process, rank)
    process.communicate(timeout=60)
    assert process.returncode == 137 and brief(folder) == ("failed", 137, 1)
    assert outcome.read(folder)["reason"].startswith(f"rank {rank}: ended by SIGKILL")
    assert outcome.read(folder)["first_step_seconds"] > 1


@pytest.fixture(scope="module")
def injured(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world with every fifth picture damaged."""
    folder = tmp_path_factory.mktemp("injured") / "world"
    shutil.copytree(world_folder, folder)
    shards = ShardSet.open(folder, "train")
    tars = sorted((folder / "train").glob("*.tar"))
    for image in range(0, shards.num_images, 5):
        data = shards.image_bytes(image)
        for tar in tars:
            whole = tar.read_bytes()
            at = whole.find(data)
            if at >= 0:
                tar.write_bytes(whole[: at + len(data) // 2] + b"\0" * 64 + whole[at + len(data) // 2 + 64 :])
    return folder


def listed(folder: Path) -> list[tuple[int | None, str, str]]:
    lines = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    return [(line["step"], line["id"], line["reason"]) for line in lines]


def test_one_list_of_skipped_samples_over_ranks_workers_and_kills(
    injured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"steps": 12, "rows_per_step": 3, "save_every": 4}
    one = config(injured, tmp_path / "one", **steps)
    assert run.main(one) == 0
    straight = listed(tmp_path / "one")
    assert len(straight) > 5 and len({name for _, name, _ in straight}) == len(straight)
    assert [step for step, _, _ in straight] == sorted(step or 0 for step, _, _ in straight)
    assert all("crc" in why or "row holds" in why for _, _, why in straight)

    killed = config(injured, tmp_path / "killed", **steps)
    whole, step = 0, loop.optimizer_step

    def breaks(*args: Any) -> Any:
        nonlocal whole
        whole += 1
        if whole == 7:
            raise RuntimeError("power cut")
        return step(*args)

    monkeypatch.setattr(loop, "optimizer_step", breaks)
    with pytest.raises(RuntimeError, match="power cut"):
        run.main(replace(killed, data=replace(killed.data, workers=2)))
    at_kill = listed(tmp_path / "killed")
    assert 0 < len(at_kill) < len(straight) and at_kill == straight[: len(at_kill)]
    with open(tmp_path / "killed" / "skipped.jsonl", "a") as file:
        file.write('{"step": 7, "id": "to')
    assert run.main(killed) == 0
    assert listed(tmp_path / "killed") == straight

    command = [*LAUNCH, *settings(injured, tmp_path / "two", "--train.steps=12", "--data.error_budget=1.0")]
    done = subprocess.run([*command, "--train.zero=zero0"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert listed(tmp_path / "two") == straight
    assert [path.name for path in (tmp_path / "two").glob("skipped*")] == ["skipped.jsonl"]


def test_a_group_no_row_can_hold_is_listed_once(world_folder: Path, tmp_path: Path) -> None:
    long = config(world_folder, tmp_path / "run")
    long = replace(long, data=replace(long.data, row_tokens=256, group_tokens=4096))
    for seed in (0, 0):
        assert run.main(replace(long, train=replace(long.train, seed=seed))) == 0
    lines = listed(tmp_path / "run")
    assert lines and all(step is None and "256" in why for step, _, why in lines)
    assert len({name for _, name, _ in lines}) == len(lines)


def test_a_repeated_sample_is_listed_once(tmp_path: Path) -> None:
    skipped = SkippedLog(tmp_path)
    assert skipped.add(3, [("a", "broken"), ("b", "broken"), ("a", "again")]) == 2
    assert SkippedLog(tmp_path).add(9, [("b", "again"), ("c", "x")]) == 1
    assert listed(tmp_path) == [(3, "a", "broken"), (3, "b", "broken"), (9, "c", "x")]
    (tmp_path / "skipped.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match="skipped.jsonl: cannot be continued"):
        SkippedLog(tmp_path)


@pytest.mark.P9
def test_no_space_for_the_last_checkpoint_is_not_a_finished_run(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is set after the first checkpoint: that one stays, the run has failed."""
    folder, save = tmp_path / "run", checkpoint.save
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args: Any, **options: Any) -> Path | None:
        if options["step"] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            return save(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(DataError, match="the checkpoint of step 2, the last of the run, cannot be written"):
        run.main(config(world_folder, folder, save_every=1))
    assert brief(folder) == ("failed", 3, 1)
    found = checkpoint.resolve(folder)
    assert found is not None and found.name == "step-1"
    monkeypatch.undo()
    assert run.main(config(world_folder, folder, save_every=1)) == 0
    assert brief(folder) == ("finished", 0, 2)
