"""Random choices of the plan: draws by (seed, epoch, id, salt) and permutations of any size (P3).

In: seeds, ids, sizes. Out: uniform numbers that depend on their arguments alone, every entry of a permutation once.
Decision: laws are tested by chi-square with bounds that a fair draw passes by far and a skewed one does not.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from eventlens_ds.data import plan as plan_module
from eventlens_ds.data.plan import draw, draw_many, generator, id_bits, permuted


@pytest.mark.P3
def test_draw_depends_on_every_argument_and_nothing_else():
    base = (0, 1, "vcr-17", "template")
    value = draw(*base)
    assert draw(1, 1, "other") is not None and draw(*base) == value
    others = [draw(1, 1, "vcr-17", "template"), draw(0, 2, "vcr-17", "template"), draw(0, 1, "vcr-18", "template")]
    others += [draw(0, 1, "vcr-17", "shots"), draw(0, 1, 17), draw(0, 1, -17), draw(0, 1, "17")]
    assert len({value, *others}) == 8 and all(0 <= one < 2**64 for one in others)
    names = ["a", "b", 5, 2**64 - 1]
    many = draw_many(7, 3, np.array([id_bits(name) for name in names], np.uint64), "tags")
    assert many.tolist() == [draw(7, 3, name, "tags") for name in names]
    assert draw_many(7, 3, np.arange(4)).tolist() == [draw(7, 3, at) for at in range(4)]
    assert generator(0, 1, "a").integers(1 << 40) == generator(0, 1, "a").integers(1 << 40)
    assert generator(0, 1, "a").integers(1 << 40) != generator(0, 1, "b").integers(1 << 40)


def test_splitmix64_matches_its_published_first_output():
    """The first output of the reference implementation (Vigna, splitmix64.c) from state 0."""
    assert plan_module._mix(0) == 0xE220A8397B1DCDAF


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against equal counts, in standard deviations from its mean."""
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_draws_are_uniform():
    values = draw_many(0, 0, np.arange(200_000))
    assert abs(chi_square(np.bincount((values % np.uint64(97)).astype(np.int64)))) < 5
    assert abs(chi_square(np.bincount((values >> np.uint64(57)).astype(np.int64)))) < 5
    assert chi_square(np.bincount(np.arange(200_000) ** 2 % 97)) > 50, "control: a poor hash is seen"


@pytest.mark.P3
@pytest.mark.parametrize("size", [1, 2, 3, 17, 1 << 14, (1 << 14) + 1, 16_900, 16_901, 99_991])
def test_permutations_hold_every_entry_once(size):
    whole = permuted(5, size, np.arange(size))
    assert (np.sort(whole) == np.arange(size)).all()
    at = np.array([size - 1, 0, size // 2])
    assert permuted(5, size, at).tolist() == whole[at].tolist()
    assert size < 4 or (permuted(6, size, np.arange(size)) != whole).any()


@pytest.mark.parametrize("size", [16_000, 99_991])
def test_permutations_look_random(size):
    """Where blocks of entries come from, and the step between neighbours, for both ways to permute."""
    blocks, steps = np.zeros((16, 16)), np.zeros(16)
    for key in range(20):
        whole = permuted(key, size, np.arange(size))
        np.add.at(blocks, (np.arange(size) * 16 // size, whole * 16 // size), 1)
        steps += np.bincount(np.diff(whole) % size * 16 // size, minlength=16)
    assert chi_square(blocks.ravel()) < 5 and chi_square(steps) < 5
    shift = (np.arange(size) + 12_345) % size
    assert chi_square(np.bincount(np.diff(shift) % size * 16 // size, minlength=16)) > 50, "control: a rotation"


def test_small_permutations_are_all_equally_likely():
    counts = Counter(tuple(permuted(draw(0, 0, key), 4, np.arange(4)).tolist()) for key in range(4800))
    assert len(counts) == 24 and chi_square(np.array(list(counts.values()))) < 5
