"""Our own language model, trained without pixels and regions, stays at chance: the world's texts give nothing away.

In: a world drawn here, the demo's recipes and steps with --data.control=blank, all by the commands a user types. Out:
Q->A and QA->R on 2,400 held-out questions. Decision: a model that is trained blind, and not one that is blinded for
the evaluation alone, because only the former has had every reason to learn what the texts betray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

CHANCE, MARGIN = 0.25, 0.03
IMAGES, HELD_OUT = 2400, 600
LEAK = "indeed"
RANKS = ["--ranks", "2"]


def eventlens(*command: str | Path) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "eventlens_ds", *map(str, command)], env=environment, text=True)
    assert done.returncode == 0, command


def train(recipe: str, data: Path, run: Path, *more: str | Path) -> None:
    given = [f"--data.train={data}", f"--io.run={run}", "--data.control=blank", "--io.tensorboard=false"]
    eventlens("train", "--config", recipe, *RANKS, *given, "--train.eval_every=0", *more)


def scores(run: Path, data: Path) -> dict[str, Any]:
    out = run / "blind"
    eventlens("eval", run, "--data", data, "--controls", "blank", "--out", out, *RANKS)
    return json.loads((out / "metrics" / "vcr-blank.json").read_text())["vcr"]


def away_from_chance(found: dict[str, Any]) -> list[str]:
    """Metrics more than MARGIN away from chance, on at least 2,000 questions each."""
    assert min(found["counts"][name] for name in ("q2a", "qa2r")) >= 2000
    return [f"{name} {found[name]:.3f}" for name in ("q2a", "qa2r") if abs(found[name] - CHANCE) > MARGIN]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("blind") / "world"
    size = ["--limit", str(IMAGES), "--val-images", str(HELD_OUT), "--image-size", "64", "--workers", "2"]
    eventlens("data", "build", "--source", "world", "--seed", "3", *size, "--out", out)
    return out


def test_trained_without_pixels_the_model_is_at_chance(world: Path, tmp_path: Path) -> None:
    train("tiny_event", world, tmp_path / "event")
    train("tiny_vcr", world, tmp_path / "vcr", "--init-from", tmp_path / "event")
    assert away_from_chance(scores(tmp_path / "vcr", world)) == []


def test_a_world_that_gives_answers_away_is_found(world: Path, tmp_path: Path) -> None:
    """Negative control: the same pictures, one more word in every right answer and rationale, fewer steps."""
    raw = world.with_name(world.name + "-raw")
    leaky = tmp_path / "raw"
    (leaky / "vcr").mkdir(parents=True)
    for entry in raw.iterdir():
        if entry.name != "vcr":
            (leaky / entry.name).symlink_to(entry)
    for split in ("train", "val"):
        rows = [json.loads(line) for line in (raw / "vcr" / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            for kind in ("answer", "rationale"):
                row[f"{kind}_choices"][row[f"{kind}_label"]].append(LEAK)
        (leaky / "vcr" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = tmp_path / "world"
    eventlens("data", "build", "--source", "vcr", "--root", leaky, "--workers", "2", "--out", built)
    train("tiny_vcr", built, tmp_path / "vcr", "--train.steps=100")
    assert len(away_from_chance(scores(tmp_path / "vcr", built))) == 2
