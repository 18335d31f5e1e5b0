"""Link-Context Learning's training strategies: how many shots an episode has and which class is its negative.

In: a uniform number in [0, 1) per choice, which the plan's `draw` gives (P3). Out: shots, or the rank of a neighbour.
  2-way         always `shots`                                             [paper]
  2-way-random  uniform in min_shots .. shots                              [paper]
  2-way-weight  p_j = e^j / sum_{m=min_shots}^{shots} e^m                  [paper]
  neighbours    p_j = (n + 1 - j) / sum_{m=1}^{n} m, rank j = 1 .. n       [paper, n = 100; released code, n = 36]
Decision: the names are the paper's. The released code calls the neighbour rule `policy_2way_weight`, and its
`policy_2way_random_shot` weighs shots by exp((i + 1) / 2); neither name nor number is taken over.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

Strategy = Literal["2-way", "2-way-random", "2-way-weight"]


def shot_probabilities(strategy: Strategy, shots: int, min_shots: int) -> np.ndarray:
    """float64[S] chance of min_shots .. shots shots per class. ValueError unless 1 <= min_shots <= shots."""
    if not 1 <= min_shots <= shots:
        raise ValueError(f"{min_shots} to {shots} shots: wants 1 <= min_shots <= shots")
    counts = np.arange(min_shots, shots + 1, dtype=np.float64)
    if strategy == "2-way":
        return (counts == shots).astype(np.float64)
    # Relative to the largest, so that no exponential overflows.
    weights = np.ones_like(counts) if strategy == "2-way-random" else np.exp(counts - shots)
    return weights / weights.sum()


def neighbour_probabilities(neighbours: int) -> np.ndarray:
    """float64[n] chance of each rank, the nearest first."""
    weights = np.arange(neighbours, 0, -1, dtype=np.float64)
    return weights / weights.sum()


@lru_cache(maxsize=256)
def _shot_ends(strategy: Strategy, shots: int, min_shots: int) -> np.ndarray:
    return np.cumsum(shot_probabilities(strategy, shots, min_shots))[:-1]


@lru_cache(maxsize=4096)
def _neighbour_ends(neighbours: int) -> np.ndarray:
    return np.cumsum(neighbour_probabilities(neighbours))[:-1]


def pick_shots(strategy: Strategy, shots: int, min_shots: int, uniform: np.ndarray | float) -> np.ndarray:
    """Shots int64[...] of uniform numbers [...] in [0, 1)."""
    return min_shots + np.searchsorted(_shot_ends(strategy, shots, min_shots), uniform, side="right")


def pick_neighbour(neighbours: int, uniform: np.ndarray | float) -> np.ndarray:
    """Rank int64[...] from 0, the nearest, of uniform numbers [...] in [0, 1)."""
    return np.searchsorted(_neighbour_ends(neighbours), uniform, side="right")


def uniform(drawn: int) -> float:
    """A number of `plan.draw` (64 bits) as a uniform one in [0, 1)."""
    return (drawn >> 11) / (1 << 53)
