"""Strategies of Link-Context Learning: drawn shots and neighbours follow the paper's formulas.

In: uniform numbers of the plan's `draw_many`. Out: chi-square of 1e5 draws against the formulas, written out here as
the paper has them. Decision: the critical value is that of p = 0.001, and each wrong law is shown to exceed it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from eventlens_ds.data import strategies
from eventlens_ds.data.plan import draw, draw_many

DRAWS = 100_000


def uniforms(salt: str) -> np.ndarray:
    return (draw_many(0, 0, np.arange(DRAWS), salt) >> np.uint64(11)) / float(1 << 53)


def chi_square(found: np.ndarray, expected: dict[int, float]) -> tuple[float, float]:
    """(statistic, critical value at p = 0.001 by Wilson and Hilferty)."""
    counts = np.asarray([(found == value).sum() for value in expected])
    assert counts.sum() == len(found), "a value outside the law"
    wanted = np.asarray(list(expected.values())) * len(found)
    freedom = len(expected) - 1
    critical = freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((counts - wanted) ** 2 / wanted).sum()), critical


RANDOM = {j: 1 / 15 for j in range(2, 17)}
WEIGHT = {j: math.exp(j) / sum(math.exp(m) for m in range(2, 17)) for j in range(2, 17)}
RELEASED = {j: math.exp((j - 1) / 2) / sum(math.exp((m - 1) / 2) for m in range(2, 17)) for j in range(2, 17)}
PAPER_NEIGHBOURS = {j - 1: (101 - j) / sum(range(1, 101)) for j in range(1, 101)}
RELEASED_NEIGHBOURS = {j - 1: (37 - j) / 666 for j in range(1, 37)}


@pytest.mark.parametrize(("strategy", "law"), [("2-way-random", RANDOM), ("2-way-weight", WEIGHT)])
def test_shots_follow_the_paper(strategy, law):
    found = strategies.pick_shots(strategy, 16, 2, uniforms("shots"))
    # Classes of fewer than five expected draws are joined, as the test demands.
    rare = [j for j in law if law[j] * DRAWS < 5]
    joined = {j: p for j, p in law.items() if j not in rare}
    if rare:
        joined[rare[-1]] = sum(law[j] for j in rare)
        found = np.where(np.isin(found, rare), rare[-1], found)
    statistic, critical = chi_square(found, joined)
    assert statistic < critical
    assert WEIGHT[16] == pytest.approx(0.632, abs=1e-3) and WEIGHT[15] == pytest.approx(0.233, abs=1e-3)


def test_the_released_weights_are_another_law():
    found = strategies.pick_shots("2-way-weight", 16, 2, uniforms("shots"))
    statistic, critical = chi_square(found, RELEASED)
    assert statistic > 10 * critical, "control: the test can tell e^j from e^(j/2)"


@pytest.mark.parametrize(("count", "law"), [(100, PAPER_NEIGHBOURS), (36, RELEASED_NEIGHBOURS)])
def test_neighbours_follow_the_formula(count, law):
    found = strategies.pick_neighbour(count, uniforms("rank"))
    statistic, critical = chi_square(found, law)
    assert statistic < critical
    uniform = {j: 1 / count for j in range(count)}
    assert chi_square(found, uniform)[0] > 10 * critical, "control: a flat law fails"


def test_two_way_has_fixed_shots_and_bounds_are_checked():
    assert set(strategies.pick_shots("2-way", 16, 2, uniforms("shots"))) == {16}
    assert strategies.shot_probabilities("2-way", 3, 3).tolist() == [1.0]
    with pytest.raises(ValueError, match="5 to 4 shots"):
        strategies.shot_probabilities("2-way-random", 4, 5)
    assert strategies.shot_probabilities("2-way-weight", 2000, 1).sum() == pytest.approx(1), "no overflow"


@pytest.mark.P3
def test_one_uniform_number_is_that_of_the_many():
    assert uniforms("shots")[7] == strategies.uniform(draw(0, 0, 7, "shots"))
