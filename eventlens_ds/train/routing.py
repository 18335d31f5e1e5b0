"""Telemetry of the adapters: what tokens chose in a logged step, gate values, and a warning when a router collapses.

In: the model of an engine and the rows of one optimizer step, on every rank. Out: a `Routing` over all ranks, for
log.jsonl and TensorBoard, and one log line when one adapter takes nearly all while several are trained.
Decision: everything is read after the step, at logged steps alone, by the same collectives on every rank (P5): one
gather of the gates under ZeRO-3 and one sum. Between logged steps it costs nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from eventlens_ds.data.records import TASKS, Batch
from eventlens_ds.model.adapters import AdapterMixture, Adapters
from eventlens_ds.model.weights import gathered
from eventlens_ds.runtime.distributed import all_reduce_sum

log = logging.getLogger(__name__)

COLLAPSE_SHARE = 0.95
"""A layer has collapsed when one adapter takes more than this share of its tokens ..."""
COLLAPSE_STEPS = 20
"""... on the mean of this many logged steps; the line is written at most once in as many."""

Rows = list[list[float]]
"""One list per layer with a number per adapter."""


@dataclass(frozen=True)
class Routing:
    """The adapters of one logged step over all ranks. A number per layer, in the order of `layers`, and per adapter.

    usage: share of the routed tokens (a mixture shares a token out by mean |gate|); by_task: the same within each task
    of the step; entropy: mean over tokens of the entropy of their choice, in nats per layer. gate_mean, gate_std: a
    mixture's gates by level, over channels. tokens: by task, padding left out. Gates are those after the update.
    A task router chooses alike in all layers, so it has one row. Without a routed token usage and entropy are empty.
    """

    adapters: list[str]
    layers: list[str]
    tokens: dict[str, int]
    usage: Rows
    by_task: dict[str, Rows]
    entropy: list[float]
    gate_mean: dict[str, Rows] = field(default_factory=dict)
    gate_std: dict[str, Rows] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """Means over layers under router/, and under router_layers/ every gate of every layer."""
        out = {f"router/usage/{name}": _mean(column) for name, column in zip(self.adapters, zip(*self.usage))}
        if self.entropy:
            out["router/entropy"] = _mean(self.entropy)
        for kind, values in (("gate", self.gate_mean), ("gate_std", self.gate_std)):
            for level, rows in values.items():
                for name, column in zip(self.adapters, zip(*rows)):
                    out[f"router/{kind}/{level}/{name}"] = _mean(column)
                    out |= {f"router_layers/{kind}/{level}/{name}/{i}": v for i, v in zip(self.layers, column)}
        return out


class RoutingProbe:
    """Reads the adapters of `module`. `watch` before a step to be logged, `read` after it; both on every rank."""

    def __init__(self, module: nn.Module) -> None:
        found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, Adapters)]
        kept = found if found and found[0][1].by_layer else found[:1]
        self.layers = [layer for _, layer in kept]
        self.labels = [name.removeprefix("adapters.") for name, _ in kept] if len(kept) > 1 else ["all"] * len(kept)
        self.collapse = CollapseWatch(self.trained)

    @property
    def trained(self) -> int:
        """Adapters that learn."""
        first = self.layers[0] if self.layers else None
        return sum(getattr(first, f"{name}_up").requires_grad for name in first.names) if first is not None else 0

    def watch(self, on: bool) -> bool:
        """Tell routers that look at tokens whether to count; returns `on`."""
        for layer in self.layers:
            layer.watch(on)
        return on

    def read(self, rows: Sequence[Batch], device: str = "cpu") -> Routing | None:
        """What the rows of all ranks chose; None for a model without adapters. A collective."""
        if not self.layers:
            return None
        own = task_tokens(rows).to(device)
        gates = []
        with gathered([p for layer in self.layers for p in layer.usage_parameters()], modifier_rank=None):
            used = [layer.usage(own) for layer in self.layers]
            if all(isinstance(layer, AdapterMixture) for layer in self.layers):
                gates = [layer.gate_values() for layer in self.layers]  # type: ignore[operator]
        mass = torch.stack([one.mass for one in used])
        entropy = torch.stack([one.entropy.sum() for one in used])
        parts = [own, mass.flatten(), entropy]
        joined = all_reduce_sum(torch.cat(parts)).cpu().split([part.numel() for part in parts])
        return self._joined(joined[0], joined[1].reshape(mass.shape), joined[2], gates)

    def _joined(
        self, tokens: torch.Tensor, mass: torch.Tensor, entropy: torch.Tensor, gates: list[dict[str, torch.Tensor]]
    ) -> Routing:
        """Sums over ranks -> Routing. tokens [tasks], mass [layers, tasks, E], entropy [layers]."""
        routed = mass.sum((1, 2))
        present = [t for t, count in enumerate(tokens.tolist()) if count > 0]
        levels = gates[0] if gates else {}
        return Routing(
            adapters=list(self.layers[0].names),
            layers=self.labels,
            tokens={TASKS[t]: int(tokens[t]) for t in present},
            usage=_rows(mass.sum(1) / routed[:, None]) if routed.all() else [],
            by_task={TASKS[t]: _rows(mass[:, t] / tokens[t]) for t in present},
            entropy=_rows(entropy[None] / routed)[0] if routed.all() else [],
            gate_mean={level: _rows(torch.stack([g[level][:, 0] for g in gates])) for level in levels},
            gate_std={level: _rows(torch.stack([g[level][:, 1] for g in gates])) for level in levels},
        )


class CollapseWatch:
    """Logs a warning when an adapter takes more than `share` of a layer's tokens on the mean of the last `steps`
    logged steps, while `trained` adapters, more than one, learn. After a restart the window starts empty."""

    def __init__(self, trained: int, share: float = COLLAPSE_SHARE, steps: int = COLLAPSE_STEPS) -> None:
        self.trained, self.share, self.steps = trained, share, steps
        self._window: deque[torch.Tensor] = deque(maxlen=steps)
        self._quiet = 0

    def add(self, step: int, routing: Routing) -> bool:
        """Take in a logged step; whether a line was written."""
        self._quiet = max(0, self._quiet - 1)
        if self.trained < 2 or not routing.usage:
            return False
        self._window.append(torch.tensor(routing.usage))
        if len(self._window) < self.steps or self._quiet:
            return False
        mean = torch.stack(list(self._window)).mean(0)
        collapsed = (mean.max(1).values > self.share).nonzero()[:, 0].tolist()
        if not collapsed:
            return False
        self._quiet = self.steps
        worst = max(collapsed, key=lambda i: float(mean[i].max()))
        log.warning(
            "step %d: router collapse in %d of %d layers: adapter %s takes %.1f %% of the tokens of layer %s over the "
            "last %d logged steps, though %d adapters are trained",
            step,
            len(collapsed),
            len(mean),
            routing.adapters[int(mean[worst].argmax())],
            100 * float(mean[worst].max()),
            routing.layers[worst],
            self.steps,
            self.trained,
        )
        return True


def task_tokens(rows: Sequence[Batch]) -> torch.Tensor:
    """Tokens by task, float64[tasks], padding left out."""
    count = torch.zeros(len(TASKS), dtype=torch.float64)
    for row in rows:
        count += torch.bincount(row.task_ids[: row.real_tokens].cpu(), minlength=len(TASKS)).double()
    return count


def _rows(values: torch.Tensor) -> Any:
    """Nested lists with six decimals: enough to see a gate move, and a third of the bytes."""
    return [[round(x, 6) for x in row] for row in values.tolist()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
