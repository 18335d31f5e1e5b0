"""Skips an optimizer step whose loss or gradient is no number, or far off what it was: on every rank or on none.

In: the loss and gradient norm of a step, both summed over ranks, before the optimizer moves. Out: a reason to skip, or
""; statistics for the next step, which travel in the checkpoint, so that a resumed run decides as the first one did.
A value is far off when it lies more than `train.spike_sigma` standard deviations above its running mean (as the
SkipStepOptimizer of OLMo-core), of which the last `WINDOW` steps hold the most weight.
Decision: DeepSpeed finds infinite gradients by itself and skips in silence. We answer in place of its norm: the value
it takes for an invalid norm makes it drop the gradients and leave weights and moments alone, in ZeRO 1, 2 and 3.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

log = logging.getLogger(__name__)

WINDOW = 64
"""Steps over which the weight of an old value falls to 1/e."""
WARM = 20
"""Values seen before anything is called far off."""

_INVALID = -1.0
"""What DeepSpeed's norms say for a gradient that is not finite."""


def far_off(stats: list[float], value: float, sigma: float) -> bool:
    """True when `value` lies `sigma` deviations above the mean of stats = [values seen, mean, variance]."""
    seen, mean, variance = stats
    return bool(sigma) and seen >= WARM and value - mean > sigma * math.sqrt(variance)


def update(stats: list[float], value: float) -> None:
    """Take a value into [values seen, mean, variance]: plain moments first, then exponentially weighted ones."""
    stats[0] += 1
    weight = max(1.0 / stats[0], 1.0 / WINDOW)
    step = value - stats[1]
    stats[1] += weight * step
    stats[2] = (1.0 - weight) * (stats[2] + weight * step * step)


class StepGuard:
    """Decides about the steps of one engine.

    stats: {"loss": [values seen, mean, variance], "norm": ...}, changed in place; part of TrainState. Per step:
    `see_loss` before engine.step, which asks for the norm; then `reason` says why the step was skipped ("": it was
    not), and `norm` is the norm before clipping, nan when it is no number and None where DeepSpeed computed none.
    """

    def __init__(self, engine: Any, stats: dict[str, list[float]], sigma: float = 0.0) -> None:
        self.engine, self.stats, self.sigma = engine, stats, sigma
        self.reason = ""
        self.norm: float | None = None
        self._loss = 0.0
        optimizer, stage = engine.optimizer, int(engine.zero_optimization_stage())
        if stage == 3:
            self._original = optimizer._get_norm_groups
            optimizer._get_norm_groups = self._groups
        elif stage:
            self._original = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = self._global

    def see_loss(self, loss: float, norm: float | None = None) -> None:
        """The loss of the step that comes; norm: of its gradient, where DeepSpeed computes none (stage 0 in fp32)."""
        self.reason, self._loss, self.norm = "", loss, norm
        if not math.isfinite(loss):
            self.reason = f"loss is {loss}"
        elif far_off(self.stats["loss"], loss, self.sigma):
            self.reason = f"loss {loss:.6g} is more than {self.sigma:g} sigma above {self.stats['loss'][1]:.6g}"
        elif norm is not None:
            self._see_norm(norm)

    def _see_norm(self, norm: float) -> None:
        self.norm = norm if math.isfinite(norm) and norm >= 0 else math.nan
        if self.reason:
            return
        if math.isnan(self.norm):
            self.reason = "gradient is not finite"
        elif far_off(self.stats["norm"], norm, self.sigma):
            mean = self.stats["norm"][1]
            self.reason = f"gradient norm {norm:.6g} is more than {self.sigma:g} sigma above {mean:.6g}"

    def _groups(self) -> Any:
        groups = self._original()
        finite = all(float(norm) >= 0 for norm in groups)
        self._see_norm(math.sqrt(sum(float(norm) ** 2 for norm in groups)) if finite else math.nan)
        return [torch.full_like(torch.as_tensor(norm), _INVALID) for norm in groups] if self.reason else groups

    def _global(self, *args: Any, **kwargs: Any) -> Any:
        norm = self._original(*args, **kwargs)
        self._see_norm(float(norm))
        return torch.full_like(torch.as_tensor(norm), _INVALID) if self.reason else norm

    def step(self) -> None:
        """engine.step() of the last micro-step: the update, or its omission."""
        optimizer = self.engine.optimizer
        if self.engine.zero_optimization_stage() == 0 and self.reason:
            # The engine clears the gradients after what it takes for an update.
            optimizer.step = lambda *args, **kwargs: getattr(optimizer, "clear_hp_grads", lambda: None)()
            try:
                self.engine.step()
            finally:
                del optimizer.step
        else:
            self.engine.step()
            if getattr(optimizer, "overflow", False) and not self.reason:
                self.reason, self.norm = "gradient is not finite", math.nan
        if not self.reason:
            update(self.stats["loss"], self._loss)
            if self.norm is not None:
                update(self.stats["norm"], self.norm)


def fresh() -> dict[str, list[float]]:
    """Statistics of a run that begins."""
    return {"loss": [0.0, 0.0, 0.0], "norm": [0.0, 0.0, 0.0]}
