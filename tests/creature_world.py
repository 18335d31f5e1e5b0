"""A small world of creatures for tests of episodes, built once per session, and a run over it.

In: a folder, settings of episodes. Out: shards as `eventlens data build --source creatures` writes them; a SmallRun.
Decision: the same functions as the command's; 12 training and 4 test classes at 48 pixels take a second.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from eventlens_ds.config.run_config import EpisodeConfig
from tests.small_world import SmallRun, small_config, small_run

TRAIN, TEST = 12, 4


def build_creatures(out: Path, *, train: int = TRAIN, test: int = TEST, seed: int = 0) -> Path:
    """`eventlens data build --source creatures` without a command line; returns `out`."""
    from eventlens_ds.data import build
    from eventlens_ds.data.sources import combined

    source = combined.draw_creatures(out.with_name(out.name + "-raw"), seed=seed, train=train, test=test, image_size=48)
    build.build(source, out, shard_images=100)
    return out


def episode_run(
    folder: Path, *others: Path, row_tokens: int = 1024, tasks: tuple[str, ...] = ("lcl",), **set: Any
) -> SmallRun:
    """A run over `folder` (and others) whose episodes have the settings `set`."""
    config = small_config(folder)
    episodes = EpisodeConfig(**{"shots": 2, "min_shots": 1, **set})
    data = replace(
        config.data,
        train=(str(folder), *map(str, others)),
        tasks=tasks,
        row_tokens=row_tokens,
        list_objects=False,
        episodes=episodes,
    )
    model = replace(config.model, adapters=replace(config.model.adapters, tasks=tasks))
    return small_run(folder, replace(config, data=data, model=model))
