"""Killed and resumed equals never stopped, bit for bit (P9); the order of samples is arithmetic (P3); every door gives
the same numbers; a run refuses what is not its own.

In: the small world, the commands a user types, as processes. Out: log.jsonl, ledgers, checkpoints, exit codes.
Decision: dropout is on and the kill is a SIGKILL of the launcher in the middle of a run, as an out-of-memory kill or a
lost node would do it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eventlens_ds.config.run_config import AdapterConfig
from eventlens_ds.data import loader
from eventlens_ds.data.loader import PlannedRows, RowDataset, rank_batches
from eventlens_ds.runtime import checkpoint
from eventlens_ds.runtime.distributed import free_port
from eventlens_ds.train import outcome
from tests.small_world import SmallRun

STEPS = 8
RANKS = ["-m", "eventlens_ds.train"]
LAUNCH = ["-m", "eventlens_ds", "train", "--ranks", "2"]


def settings(world: Path, run: Path, *more: str) -> list[str]:
    made = {
        "data.train": f"[{world}]",
        "data.tasks": f"[{','.join(AdapterConfig().tasks)}]",
        "data.row_tokens": 512,
        "data.workers": 1,
        "model.dropout": 0.1,
        "train.steps": STEPS,
        "train.rows_per_step": 3,
        "train.save_every": 3,
        "train.log_every": 1,
        "train.threads": 1,
        "train.ledger": "true",
        "train.timeout_minutes": 1,
        "io.run": run,
        "io.tensorboard": "false",
    }
    return [*(f"--{key}={value}" for key, value in made.items()), *more]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more}


def call(command: list[str], seconds: float = 180, **more: str) -> subprocess.CompletedProcess[str]:
    done = [sys.executable, *command]
    return subprocess.run(done, capture_output=True, text=True, timeout=seconds, env=environment(**more))


def losses(run: Path) -> dict[int, str]:
    """Step -> loss and gradient norm with all their bits."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: f"{line['loss']!r} {line['grad_norm']!r}" for line in lines}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.resolve(run)
    assert path is not None and path.name == f"step-{STEPS}"
    return dict(checkpoint.weights(path))


@pytest.fixture(scope="module")
def straight(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks under ZeRO-3 that nobody disturbs."""
    run = tmp_path_factory.mktemp("straight") / "run"
    done = call([*LAUNCH, *settings(world_folder, run)])
    assert done.returncode == 0, done.stderr
    return run


def kill_after_first_checkpoint(command: list[str], run: Path) -> None:
    """SIGKILL to the launcher as soon as step 3 is committed; its ranks die with it."""
    process = subprocess.Popen(
        [sys.executable, *command], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "LATEST").exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stderr:
        process.stderr.close()


@pytest.mark.P9
@pytest.mark.P3
def test_killed_and_resumed_is_bit_identical(straight: Path, world_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*LAUNCH, *settings(world_folder, run)]
    kill_after_first_checkpoint(command, run)
    assert outcome.read(run)["state"] == "running", "the kill came too late to test anything"
    assert max(losses(run)) < STEPS
    done = call(command)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and "at step 3" in done.stdout
    assert losses(run) == losses(straight)
    ended = outcome.read(run)
    assert (ended["state"], ended["code"], ended["attempt"], ended["step"]) == ("finished", 0, 2, STEPS)
    assert ended["earlier"] == [{"attempt": 1, "state": "running", "code": None}]
    one, two = tensors(straight), tensors(run)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.P9
@pytest.mark.slow
def test_weights_without_optimizer_and_cursor_are_not_a_resume(
    straight: Path, world_folder: Path, tmp_path: Path
) -> None:
    """Negative control: the comparison sees a run that starts from the same weights and nothing else."""
    first = next(path for path in (straight / "checkpoints").iterdir() if path.name == "step-6")
    command = settings(world_folder, tmp_path / "run", "--init-from", str(first), "--train.steps=2")
    done = call([*LAUNCH, *command])
    assert done.returncode == 0, done.stderr
    assert list(losses(tmp_path / "run").values()) != [losses(straight)[step] for step in (7, 8)]


@pytest.mark.P3
def test_the_ledger_is_the_plan(straight: Path, small: SmallRun) -> None:
    plan = small.data.plan(seed=0, rows_per_step=3)
    seen: dict[int, list[str]] = {}
    for rank in (0, 1):
        for line in (straight / f"ledger-rank{rank}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            seen.setdefault(entry["step"], []).append(entry["id"])
    for step in range(STEPS):
        groups = [small.data.group(*member) for row in plan.step(step) for member in row.groups]
        assert sorted(seen[step]) == sorted(sample.id for group in groups for sample in group.samples)


def order(small: SmallRun, world: int, workers: int, first: int = 0, last: int = 3) -> list[list[tuple]]:
    """Per step the rows in their places: (sample ids, dropout seed); missing rows are left out."""
    plan = small.data.plan(seed=0, rows_per_step=5)
    steps: list[dict[int, tuple]] = [{} for _ in range(last - first)]
    for rank in range(world):
        rows = PlannedRows(plan, rank=rank, world=world, first_step=first, last_step=last, seed=0)
        for i, batch in enumerate(rank_batches(RowDataset(small.data, rows), workers=workers, prefetch=2)):
            step, micro = divmod(i, rows.micro_steps)
            if batch.real_tokens:
                steps[step][micro * world + rank] = (batch.sample_ids, batch.seed)
    return [[found[place] for place in sorted(found)] for found in steps]


@pytest.mark.P3
@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 2), (3, 0), (3, 2)])
def test_order_and_seeds_do_not_depend_on_ranks_and_workers(small: SmallRun, world: int, workers: int) -> None:
    expected = order(small, 1, 0)
    assert [len(step) for step in expected] == [5, 5, 5]
    assert order(small, world, workers) == expected
    assert order(small, world, workers, first=2) == expected[2:]


@pytest.mark.P3
def test_seeds_by_rank_would_be_seen(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a dropout seed counted by each rank for itself."""
    counter = iter(range(10**6))
    expected = order(small, 1, 0)
    monkeypatch.setattr(loader, "row_seed", lambda seed, step, slot: next(counter))
    assert order(small, 2, 0) != expected


@pytest.mark.P3
def test_dropout_follows_the_row_and_not_what_ran_before(small: SmallRun) -> None:
    model = small.model(dropout=0.5).train()
    batch = small.batch(small.groups_of("caption")[:1], seed=7)

    def run(before: int, seeded: bool) -> torch.Tensor:
        torch.manual_seed(before)
        torch.rand(before)
        if seeded:
            torch.manual_seed(batch.seed)
        return model(batch).detach()

    assert torch.equal(run(3, True), run(40, True))
    assert not torch.equal(run(3, False), run(40, False))  # negative control


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--data.limit=20", ["made with other data or settings", "data.limit: 0 -> 20", "--io.accept=data.limit"]),
        ("--model.adapters.bottleneck=32", ["model.adapters.bottleneck: 64 -> 32"]),
        pytest.param("--stage.train=[projector]", ["stage.train: [", "-> ['projector']"], marks=pytest.mark.slow),
    ],
)
def test_a_run_refuses_what_is_not_its_own(
    straight: Path, world_folder: Path, tmp_path: Path, change: str, words: list[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    done = call([*LAUNCH, *settings(world_folder, run, change)])
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert done.returncode == 3 and len(lines) == 1, done.stderr
    line = lines[0]
    assert line.startswith("eventlens: error: ") and all(word in line for word in words), line
    assert losses(run) == losses(straight), "a refused start must not touch the run"
    ended = outcome.read(run)
    assert (ended["state"], ended["code"], ended["attempt"]) == ("failed", 3, 2)
    assert ended["earlier"] == [{"attempt": 1, "state": "finished", "code": 0}]
    assert f"eventlens: error: {ended['reason']}" == line


def by_hand(world: Path, runs: list[list[str]], slurm: bool = False) -> list[tuple[int, str]]:
    """One process per list of arguments, with the variables of a launcher or of srun: (exit code, stderr)."""
    port, size, processes = str(free_port()), str(len(runs)), []
    for rank, arguments in enumerate(runs):
        if slurm:
            names = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": size, "SLURM_JOB_ID": "7"}
            names |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": size}
        else:
            names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        env = environment(**names, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        command = [sys.executable, *RANKS, *arguments]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    texts = [process.communicate(timeout=180)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts)]


def test_ranks_with_different_configurations_stop_with_one_line(world_folder: Path, tmp_path: Path) -> None:
    runs = [settings(world_folder, tmp_path / "run", f"--train.lr={lr}") for lr in ("0.001", "0.002")]
    (code, text), (other, silence) = by_hand(world_folder, runs)
    assert code == other == 3 and silence == "", silence
    assert text == "eventlens: error: the configuration is not the same on all ranks: rank(s) 1 differ from rank 0\n"


@pytest.mark.slow
def test_every_door_gives_the_same_losses(world_folder: Path, tmp_path: Path) -> None:
    binaries = Path(sys.executable).parent
    doors = {
        "eventlens": [*LAUNCH],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), *RANKS],
        "deepspeed": [str(binaries / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())],
    }
    doors["deepspeed"] += ["--module", "eventlens_ds.train"]
    found = {}
    for door, launcher in doors.items():
        run = tmp_path / door
        path = f"{binaries}:{os.environ['PATH']}"
        done = call([*launcher, *settings(world_folder, run, "--train.steps=3")], PATH=path)
        assert done.returncode == 0, (door, done.stderr[-2000:])
        found[door] = losses(run)
    arguments = settings(world_folder, tmp_path / "slurm", "--train.steps=3")
    assert [code for code, _ in by_hand(world_folder, [arguments, arguments], slurm=True)] == [0, 0]
    found["slurm"] = losses(tmp_path / "slurm")
    assert len(found["slurm"]) == 3 and all(value == found["eventlens"] for value in found.values()), found
