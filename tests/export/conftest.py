"""A trained run for the tests of export: two steps of preset tiny on the small world, by the command a user types.

In: `world_folder`. Out: `run_folder` and, made from it once, `exported`. Decision: a process of its own, so that
DeepSpeed leaves no process group behind in the process that runs the tests.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel, LlamaForCausalLM

from eventlens_ds.config.run_config import AdapterConfig
from eventlens_ds.export import folder
from tests.small_world import small_run

TASKS = f"--data.tasks=[{','.join(AdapterConfig().tasks)}]"
"""Those with an adapter by default; the world holds more."""


def train(data: Path, run: Path, *settings: str) -> Path:
    """Two optimizer steps of `eventlens train`; returns the run folder."""
    command = [sys.executable, "-m", "eventlens_ds", "train", f"--data.train=[{data}]", f"--io.run={run}"]
    command += ["--train.steps=2", "--train.rows_per_step=1", "--train.warmup=1", "--train.threads=1"]
    command += ["--data.workers=0", "--io.tensorboard=false", "--train.zero=zero0", TASKS, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return run


@pytest.fixture(scope="session")
def run_folder(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint."""
    return train(world_folder, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="session")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`eventlens export` of it."""
    out = tmp_path_factory.mktemp("exported") / "model"
    assert folder.main(run_folder, out) == 0
    return out


@pytest.fixture(scope="session")
def bases(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `vision` and `language` with tiny published weights."""
    root = tmp_path_factory.mktemp("published")
    made = small_run(world_folder)
    torch.manual_seed(3)
    CLIPVisionModel(made.architecture.vision_config).save_pretrained(root / "vision")
    LlamaForCausalLM(made.architecture.text_config).save_pretrained(root / "language")
    made.tokenizer.hf.save_pretrained(root / "language")
    return root
