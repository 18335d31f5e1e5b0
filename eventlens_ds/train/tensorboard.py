"""TensorBoard of a run: scalars by namespace, and picture panels that show what was asked and answered.

In: `StepMetrics`, evaluation dicts, and panels of data/panel.py. Out: event files under RUN/tensorboard.
Decision: a resumed run writes a purge mark at its first step, so however often it is killed a viewer shows one point
per tag and step; TensorBoard is imported when a `Board` is opened.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eventlens_ds.train.heat_map import heat_map
from eventlens_ds.train.metrics import StepMetrics
from eventlens_ds.train.routing import Routing

log = logging.getLogger(__name__)


class Board:
    """Event files of one attempt, on rank 0 only. Namespaces: train/, eval/, perf/, opt/, data/, router/ (means over
    layers, and the heat map), router_layers/.

    `first_step` is the first step a resumed attempt writes (None for a new run): viewers drop older points at it and
    after it. Opening may wait up to a second, because viewers order event files by the second in their names.
    """

    def __init__(self, folder: str | os.PathLike[str], *, first_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _wait_for_a_later_name(Path(folder))
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def step(self, m: StepMetrics) -> None:
        """All scalars of a logged step; the loss of each task under train/loss/<task>. An unknown MFU is left out."""
        values = {
            "train/loss": m.loss,
            **{f"train/loss/{task}": loss for task, loss in m.task_loss.items()},
            "opt/grad_norm": m.grad_norm,
            "opt/lr": m.lr,
            "perf/tokens_per_s": m.tokens_per_s,
            "perf/step_time": m.step_time,
            "perf/memory_gib": m.memory / 2**30,
            "data/wait": m.data_wait,
            "data/supervised_tokens": m.supervised_tokens,
            "data/regions_used": m.regions_used,
            "data/regions_unused": m.regions_unused,
        }
        if m.mfu is not None:
            values["perf/mfu"] = m.mfu
        if m.load_balance is not None:
            values["router/load_balance"] = m.load_balance
        self.scalars(m.step, values)

    def routing(self, step: int, routing: Routing) -> None:
        """The adapters of a logged step: scalars, and by_task as a picture under router/by_task."""
        self.scalars(step, routing.scalars())
        if routing.by_task:
            self._writer.add_image("router/by_task", heat_map(routing), step, dataformats="HWC")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values under their full tags, e.g. {"opt/lr/adapters": 1e-4}."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Every float of a nested metrics dict as eval/<path>; counts, lists and values that are None are left out."""
        self.scalars(step, dict(_floats(metrics, "eval")))

    def panel(self, step: int, name: str, picture: np.ndarray) -> None:
        """An RGB picture uint8 [H, W, 3] (see `panel.draw`) under eval/<name>."""
        self._writer.add_image(f"eval/{name}", picture, step, dataformats="HWC")

    def text(self, step: int, name: str, markdown: str) -> None:
        self._writer.add_text(f"eval/{name}", markdown, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _floats(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _floats(value, f"{path}/{name}")
        elif isinstance(value, float):
            yield f"{path}/{name}", value


def _wait_for_a_later_name(folder: Path) -> None:
    """Event files of a restart must sort after the old ones, or viewers apply the purge mark too early."""
    stamps = [int(p.name.split(".")[3]) for p in folder.glob("events.out.tfevents.*") if p.name.split(".")[3].isdigit()]
    newest = max(stamps, default=0)
    ahead = newest - int(time.time())
    if ahead > 1:
        log.warning("%s: an event file is %d s ahead of the clock; points may show twice", folder, ahead)
    while 0 <= newest - int(time.time()) <= 1:
        time.sleep(0.05)
