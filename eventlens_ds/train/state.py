"""TrainState: the few numbers that must survive a restart; everything else follows from them and the configuration.

In and out: the JSON-able `state` of a checkpoint manifest. Decision: the data cursor is the step alone, because the
plan is arithmetic (P3); a changed plan is refused by its fingerprint, not guessed at.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from eventlens_ds.train import guard


@dataclass
class TrainState:
    """step: optimizer steps done, skipped ones included. best: highest evaluation score so far and its step.

    steady: what train/guard.py measures a step by. refused: steps skipped because loss or gradient was no number.
    """

    plan: str
    config: str
    step: int = 0
    best_score: float | None = None
    best_step: int = -1
    samples_read: int = 0
    samples_skipped: int = 0
    refused: int = 0
    refused_in_a_row: int = 0
    steady: dict[str, list[float]] = field(default_factory=guard.fresh)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over a saved state; whether the data are the same is asked before (train/identity.py)."""
        for name, value in saved.items():
            if name not in ("plan", "config") and hasattr(self, name):
                setattr(self, name, value)

    def count(self, samples: int, skipped: int, refused: str) -> None:
        """One more step: samples it read, samples of them that could not be used, why it was skipped if it was."""
        self.step += 1
        self.samples_read += samples
        self.samples_skipped += skipped
        self.refused += bool(refused)
        self.refused_in_a_row = self.refused_in_a_row + 1 if refused else 0
