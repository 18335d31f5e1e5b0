"""`eventlens eval --tasks lcl`: rows, conditions, ranks, refusals, the plot.

In: a run of two steps over creatures, its pairs and its ISEKAI files. Out: rows and metrics of the command a user
types. Decision: the same command reads both forms, and all rows of a split must not depend on the number of ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.config.run_config import (
    AdapterConfig,
    DataConfig,
    EpisodeConfig,
    IOConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
)
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.eval import episode_conditions, harness, report

SHOTS = (0, 2)


@pytest.fixture(scope="module")
def run_folder(creatures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN after two steps of episodes on one rank."""
    from eventlens_ds.train import run

    folder = tmp_path_factory.mktemp("runs") / "episodes"
    config = RunConfig(
        model=ModelConfig(image_size=48, visual_pool=4, linking="none", adapters=AdapterConfig(bottleneck=0)),
        stage=StageConfig(train=("vision", "projector", "language")),
        data=DataConfig(
            train=(str(creatures),), row_tokens=512, workers=0, tasks=("lcl",), list_objects=False,
            episodes=EpisodeConfig(shots=2, form="plain", random_labels="both", label_form="syllables"),
        ),
        train=TrainConfig(steps=2, rows_per_step=1, warmup=1, zero="zero0", threads=1),
        io=IOConfig(run=str(folder), tensorboard=False),
    )  # fmt: skip
    assert run.main(config) == 0
    return folder


@pytest.fixture(scope="module")
def evaluated(run_folder: Path, creatures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "out"
    asked: dict[str, Any] = {
        "tasks": ["lcl"],
        "shots": SHOTS,
        "episodes": [*episode_conditions.CONDITIONS, "correct_0"],
    }
    assert harness.main(run_folder, creatures, out=out, answers=2, limit=16, **asked) == 0
    return out


def rows_of(out: Path, name: str = "lcl") -> list[dict[str, Any]]:
    return report.read_rows(out / "predictions" / f"{name}.jsonl")


def test_every_number_comes_from_rows(evaluated: Path) -> None:
    names = {"lcl", *(f"lcl-{name}" for name in (*episode_conditions.CONDITIONS[1:], "correct_0"))}
    assert {p.stem for p in (evaluated / "predictions").iterdir()} == names
    assert report.differences(evaluated) == []
    metrics = json.loads((evaluated / "metrics" / "lcl.json").read_text())
    assert list(metrics["lcl"]["shots"]) == ["0", "2"] and metrics["lcl"]["n"] == 16
    assert metrics["lcl"]["shots"]["2"]["answered"] == 2
    assert "--tasks lcl" in metrics["conditions"]["command"] and "--shots 0,2" in metrics["conditions"]["command"]
    assert (evaluated / "metrics" / "lcl.png").stat().st_size > 5000
    assert "lcl-blank_demos" in (evaluated / "metrics" / "table.txt").read_text()


def test_conditions_are_paired_and_act_on_demonstrations_alone(evaluated: Path) -> None:
    plain = rows_of(evaluated)
    for name in ("blank_demos", "shuffle_labels", "released_splice", "correct_0"):
        other = rows_of(evaluated, f"lcl-{name}")
        assert [(r["id"], r["shots"], r["names"]) for r in other] == [(r["id"], r["shots"], r["names"]) for r in plain]
        same = [all(abs(x - y) < 1e-5 for x, y in zip(a["scores"], b["scores"])) for a, b in zip(plain, other)]
        shots = [row["shots"] for row in plain]
        assert all(equal for equal, s in zip(same, shots) if s == 0), f"{name}: nothing to change without shots"
        assert not all(equal for equal, s in zip(same, shots) if s == 2), f"{name}: something must change"


def test_a_limit_keeps_both_classes_of_a_pair(evaluated: Path) -> None:
    rows = [row for row in rows_of(evaluated) if row["shots"] == 0]
    right = [row["names"][row["label"]] for row in rows]
    assert len(rows) == 16 and sorted(right.count(name) for name in set(right)) == [4, 4, 4, 4]


def test_isekai_files_on_two_ranks_give_the_numbers_of_pairs_on_one(
    run_folder: Path, creatures: Path, tmp_path: Path
) -> None:
    assert harness.main(run_folder, creatures, out=tmp_path / "pairs", tasks=["lcl"], shots=(2,)) == 0
    command = [sys.executable, "-m", "eventlens_ds", "eval", str(run_folder), "--data", str(creatures), "--shots", "2"]
    command += ["--tasks", "lcl", "--split", "isekai", "--out", str(tmp_path / "isekai"), "--ranks", "2", "--zero3"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    pairs, isekai = rows_of(tmp_path / "pairs"), rows_of(tmp_path / "isekai")
    assert len(pairs) == len(isekai) == 48 and [row["id"] for row in isekai] == [f"isekai/{i}" for i in range(48)]
    # The demonstrations are the same images; the order in which they are shown is that of the query's id.
    assert {(r["image"], r["names"][r["label"]]) for r in pairs} == {
        (r["image"], r["names"][r["label"]]) for r in isekai
    }
    again = tmp_path / "alone"
    assert harness.main(run_folder, creatures, split="isekai", out=again, tasks=["lcl"], shots=(2,)) == 0
    for a, b in zip(rows_of(again), isekai):
        assert {**a, "scores": 0} == {**b, "scores": 0}
        assert all(abs(x - y) < 1e-5 for x, y in zip(a["scores"], b["scores"]))


def test_refusals(run_folder: Path, creatures: Path) -> None:
    for asked, problem in (
        ({"tasks": ["lcl"], "episodes": ["blind"]}, "--episodes blind: unknown; there are: none, blank_demos"),
        ({"tasks": ["caption"], "shots": (1,)}, "--shots: read only with --tasks lcl"),
        ({"tasks": ["lcl"], "shots": (-1,)}, "must not be negative"),
    ):
        with pytest.raises(UserError, match=problem):
            harness.check(run_folder, creatures, **asked)
    with pytest.raises(UserError, match="--shots 16: an episode of 33 images takes up to"):
        harness.main(run_folder, creatures, tasks=["lcl"], shots=(16,))
    with pytest.raises(DataError, match="holds no pairs and no ISEKAI rows"):
        harness.main(run_folder, creatures, split="train", tasks=["lcl"])


def test_neighbours_from_the_tower_of_a_run(run_folder: Path, creatures: Path, tmp_path: Path) -> None:
    """Without a text side the similarity is that of images alone, and a class's own pictures are the most alike."""
    from eventlens_ds.data.sources import lcl
    from eventlens_ds.eval import neighbours

    raw = creatures.with_name(creatures.name + "-raw")
    rows = lcl.read_rows(raw / "lcl" / "train_pairs.jsonl")
    twin = {**rows[2], "class_id": "twin", "class_name": "another name", "samples": rows[2]["samples"][::2]}
    lcl.write_rows(tmp_path / "classes.jsonl", [*rows, twin])
    out = tmp_path / "pairs.jsonl"
    done = neighbours.main(tmp_path / "classes.jsonl", raw / "images", out, run=str(run_folder), count=1, per_class=9)
    assert done["texts"] is False
    found = {row["class_id"]: row["neighbors"][0][0] for row in lcl.read_rows(out)}
    assert found["twin"] == rows[2]["class_id"]
