"""T5 learns: a few steps in this process, and a run on two ZeRO-3 ranks that is scored and answers afterwards.

In: the small world. Out: losses of log.jsonl, prediction rows. Decision: the slow test types what a user types, so
plan, checkpoint, evaluation and export meet an encoder-decoder too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from eventlens_ds.model import objective
from tests.model.test_region_vlm import mixed_members
from tests.model.test_t5 import awake, t5_config
from tests.small_world import small_run


def test_the_loss_falls_and_every_part_of_t5_learns(world_folder: Path) -> None:
    run = small_run(world_folder, t5_config(world_folder))
    model = awake(run).train()
    batch, weights = run.batch(mixed_members(run)), replace(run.config.objective, choice_lm=1.0)
    counts = objective.counts(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = {name: p.detach().clone() for name, p in model.language_model.named_parameters()}
    losses = []
    for _ in range(16):
        optimizer.zero_grad()
        loss = objective.step_loss(objective.row_sums(model(batch), batch, weights).sums, counts, weights)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    still = [name for name, p in model.language_model.named_parameters() if torch.equal(p, before[name])]
    assert not still


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "eventlens_ds", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_two_partitioned_ranks_train_and_the_run_is_scored(world_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    zero = tmp_path / "zero3.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    settings = [f"--data.train=[{world_folder}]", f"--io.run={run}", "--model.preset=tiny-t5", f"--train.zero={zero}"]
    settings += ["--data.tasks=[caption,vcr_answer,vcr_rationale]", "--data.row_tokens=320", "--data.workers=0"]
    settings += ["--train.steps=20", "--train.rows_per_step=2", "--train.warmup=3", "--train.lr=2e-3"]
    settings += ["--objective.choice_lm=1.0", "--train.log_every=1", "--io.tensorboard=false", "--train.threads=1"]
    command("train", "--ranks", "2", *settings)
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 20 and sum(losses[-4:]) < 0.7 * sum(losses[:4])
    asked = ["--tasks", "caption", "--controls", "none", "--limit", "4", "--beams", "2", "--max-new-tokens", "6"]
    where = ["--data", str(world_folder), "--split", "val", "--out", str(tmp_path / "out"), "--ranks", "2", "--zero3"]
    command("eval", str(run), *where, *asked)
    rows = [json.loads(line) for file in (tmp_path / "out").rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert {"caption", "vcr_answer", "vcr_rationale"} <= {row["task"] for row in rows}
    command("export", str(run), str(tmp_path / "model"))
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    asked_for = processor(np.zeros((64, 64, 3), np.uint8), question="what is this?", choices=("a dog", "a ball"))
    with torch.no_grad():
        assert bool(model(asked_for).isfinite().all()) and bool(asked_for.start_slots.any())
