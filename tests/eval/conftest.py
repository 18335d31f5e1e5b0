"""A run of two steps over the small world, for tests that evaluate one.

In: the session's `world_folder`. Out: a run folder with a committed checkpoint, made by the training that users run.
Decision: the tiny preset and not a smaller stand-in, since a run folder must be enough to rebuild its model.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from eventlens_ds.config.run_config import DataConfig, IOConfig, ModelConfig, RunConfig, TrainConfig
from eventlens_ds.eval.score import Ranks

ALONE = Ranks(0, 1, "cpu", 4)


@pytest.fixture(scope="session")
def run_folder(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN after two steps on one rank; no evaluation was asked for, so it names no best checkpoint."""
    from eventlens_ds.train import run

    folder = tmp_path_factory.mktemp("runs") / "two-steps"
    config = RunConfig(
        model=ModelConfig(attention="sdpa"),
        data=DataConfig(train=(str(world_folder),), row_tokens=768, workers=0, tasks=ModelConfig().adapters.tasks),
        train=TrainConfig(steps=2, rows_per_step=1, lr=1e-3, warmup=1, zero="zero0", threads=1),
        io=IOConfig(run=str(folder), tensorboard=False),
    )
    assert run.main(config) == 0
    return folder
