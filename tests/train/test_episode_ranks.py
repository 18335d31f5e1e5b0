"""Episodes on two ranks under ZeRO-3: a row of 33 images beside a row without any does not hang (P5), and a run of
episodes mixed with VCR that is stopped goes on with the same episodes (P3, P9).

In: creatures and the small world, the commands a user types. Out: recorded collectives, ledgers, losses. Decision: one
pair of processes runs all rows; the run is a real one, killed by its own planned stop.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.runtime.failures import leave
from tests.creature_world import episode_run
from tests.small_world import SmallRun, small_engine

ROOT = Path(__file__).parents[2]
CHUNK = 4


def job(creatures: Path, world: Any, folder: Path) -> dict[str, Any]:
    """Rank 0 has an episode of 33 images, rank 1 in turn no image, a missing row and an episode of three."""
    from dataclasses import replace

    import torch

    from eventlens_ds.runtime.collectives import CollectiveMismatch, Recorder
    from eventlens_ds.train.loop import optimizer_step

    many: SmallRun = episode_run(creatures, shots=16, row_tokens=2048, form="plain")
    many = replace(many, config=replace(many.config, train=replace(many.config.train, rows_per_step=2)))
    few: SmallRun = episode_run(creatures, shots=1, form="plain")
    trainable = small_engine(many, world, folder)
    full, short = many.batch([(0, 0)]), few.batch([(0, 0)])
    none = torch.full_like(short.image_slots, -1)
    text = replace(
        short, pixel_values=short.pixel_values[:0], image_slots=none, box_offsets=torch.zeros(1, dtype=torch.int64)
    )
    out: dict[str, Any] = {"images": full.pixel_values.shape[0]}
    calls = -(-full.pixel_values.shape[0] // CHUNK)
    for name, row in (("text", text), ("missing", many.batch(())), ("three", short)):
        with Recorder(trainable.engine.module, strict=True) as recorder:
            try:
                report = optimizer_step(trainable.engine, [row if world.rank else full], [calls], many.config, world)
                recorder.check()
                out[name] = {"loss": report.loss, "norm": report.grad_norm}
            except CollectiveMismatch as error:
                return {**out, name: {"error": str(error)}}
    # Control: ranks that count calls by their own images part ways, and the recorder says where.
    own = calls if world.rank == 0 else 1
    with Recorder(trainable.engine.module, strict=True):
        try:
            optimizer_step(trainable.engine, [text if world.rank else full], [own], many.config, world)
            out["control"] = ""
        except CollectiveMismatch as error:
            out["control"] = str(error)
    return out


@pytest.fixture(scope="module")
def outs(creatures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    from eventlens_ds.runtime.local_ranks import spawn

    folder = tmp_path_factory.mktemp("episodes")
    (folder / "case.json").write_text(json.dumps(str(creatures)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        assert spawn(2, [str(folder)], module="tests.train.test_episode_ranks") == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.P5
def test_many_images_beside_few_or_none(outs: list[dict[str, Any]]) -> None:
    for out in outs:
        assert out["images"] == 33
        for name in ("text", "missing", "three"):
            assert "error" not in out[name], out[name]
            assert math.isfinite(out[name]["loss"]) and out[name]["norm"] > 0
    assert outs[0]["three"] == outs[1]["three"]


@pytest.mark.P5
def test_calls_that_are_not_agreed_are_found(outs: list[dict[str, Any]]) -> None:
    assert all("vision_tower" in out["control"] for out in outs)


STEPS, STOP = 6, 3


def train(run: Path, creatures: Path, world: Path, steps: int) -> subprocess.CompletedProcess[str]:
    settings = {
        "data.train": f"[{creatures},{world}]",
        "data.tasks": "[lcl,vcr_answer]",
        "data.episodes.strategy": "2-way-random",
        "data.episodes.shots": 3,
        "data.episodes.min_shots": 1,
        "data.episodes.share": 0.5,
        "data.row_tokens": 512,
        "model.image_size": 48,
        "model.visual_pool": 4,
        "model.adapters.tasks": "[lcl,vcr_answer]",
        "train.steps": steps,
        "train.rows_per_step": 4,
        "train.warmup": 0,
        "train.min_lr": 1,
        "train.save_every": STOP,
        "train.log_every": 1,
        "train.threads": 1,
        "train.ledger": "true",
        "train.timeout_minutes": 1,
        "io.run": run,
        "io.tensorboard": "false",
    }
    command = [sys.executable, "-m", "eventlens_ds", "train", "--ranks", "2"]
    command += [f"--{key}={value}" for key, value in settings.items()]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=env)


def ledger(run: Path) -> list[tuple[int, str]]:
    lines = [line for path in sorted(run.glob("ledger-rank*.jsonl")) for line in path.read_text().splitlines()]
    return sorted((row["step"], row["id"]) for row in map(json.loads, lines))


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.P3
@pytest.mark.P9
def test_resume_goes_on_with_the_same_episodes(creatures: Path, world_folder: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for run, steps in ((straight, STEPS), (stopped, STOP), (stopped, STEPS)):
        done = train(run, creatures, world_folder, steps)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed from" in done.stdout
    assert ledger(stopped) == ledger(straight) and losses(stopped) == losses(straight)
    ids = [name for _, name in ledger(straight)]
    episodes = [name for name in ids if name.startswith("lcl/")]
    assert len(set(episodes)) == len(episodes) > 4 and len(episodes) < len(ids), "mixed with questions of VCR"
    assert {name.split("/")[2] for name in episodes} == {"0"}, "inside an epoch"
    logged = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    assert {task for line in logged for task in line["task_loss"]} == {"lcl", "vcr_answer"}


def main(folder: Path) -> None:
    from eventlens_ds.runtime.distributed import start, stop

    world = start(threads=1, timeout_minutes=1)
    out = job(Path(json.loads((folder / "case.json").read_text())), world, folder)
    (folder / f"{world.rank}.json").write_text(json.dumps(out))
    stop()


if __name__ == "__main__":
    leave(lambda: main(Path(sys.argv[1])))
