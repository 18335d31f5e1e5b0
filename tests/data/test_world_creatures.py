"""The creatures of the embedded world: unseen classes, near pairs, names that say nothing, the same files for a seed.

In: seeds. Out: classes, rows, pictures. Decision: what makes the task need its context is measured here.
"""

from __future__ import annotations

import filecmp
import math
from collections import Counter

import numpy as np
import pytest

from eventlens_ds.data.sources import combined, world_creatures
from eventlens_ds.data.sources.world_creature import FEATURES, creatures, difference, draw_creature, neighbours
from eventlens_ds.data.tokenizer import load_tokenizer
from eventlens_ds.errors import UserError


def test_train_and_test_classes_are_disjoint_and_pairs_are_near():
    train, test = creatures(3, 600, 100)
    assert len({c.features for c in (*train, *test)}) == 700 == len({c.name for c in (*train, *test)})
    assert all(difference(a, b) == 1 for a, b in zip(test[::2], test[1::2]))
    apart = Counter(
        next(i for i, (x, y) in enumerate(zip(a.features, b.features)) if x != y) for a, b in zip(test[::2], test[1::2])
    )
    assert sorted(apart) == [0, 1, 2, 3, 4] and min(apart.values()) >= 9, "pairs differ in every feature alike"
    for at, values in enumerate(FEATURES.values()):
        assert {c.features[at] for c in train} == set(values) == {c.features[at] for c in test}
    assert creatures(3, 600, 100) == (train, test) != creatures(4, 600, 100)
    other, _ = creatures(4, 1000, 2)
    assert not {c.features for c in other} & {c.features for c in test}, "nor in the world of another seed"


def test_names_say_nothing_about_features():
    """Mutual information of first syllable and colour is that of names dealt out at random."""
    train, _ = creatures(0, 1000, 100)
    joint = Counter((c.name[:2], c.features[0]) for c in train)
    first, colour = Counter(c.name[:2] for c in train), Counter(c.features[0] for c in train)
    n = len(train)
    found = sum(k / n * math.log(k * n / (first[a] * colour[b])) for (a, b), k in joint.items())
    rng = np.random.default_rng(0)
    dealt = []
    for _ in range(20):
        colours = rng.permutation([c.features[0] for c in train]).tolist()
        joint = Counter((c.name[:2], b) for c, b in zip(train, colours))
        dealt.append(sum(k / n * math.log(k * n / (first[a] * colour[b])) for (a, b), k in joint.items()))
    assert abs(found - np.mean(dealt)) < 4 * np.std(dealt)


def test_neighbours_come_nearest_first():
    train, _ = creatures(0, 200, 10)
    near = neighbours(train, train[0], np.random.default_rng(0))
    apart = [difference(train[0], other) for other in near]
    assert apart == sorted(apart) and train[0] not in near and len(near) == 199


def test_names_are_few_tokens_that_training_has_seen():
    tokenizer = load_tokenizer("")
    train, test = creatures(0, 300, 100)
    seen = {token for c in train for token in tokenizer.ids(c.name)}
    assert all(len(tokenizer.ids(c.name)) == 2 and set(tokenizer.ids(c.name)) <= seen for c in test)


def test_pictures_of_a_class_differ_and_repeat_for_their_seed():
    (one, *_), _ = creatures(0, 10, 2)
    first, again, other = (np.asarray(draw_creature(one, 0, i, 48), int) for i in (0, 0, 1))
    assert (first == again).all() and (first != other).mean() > 0.2
    assert (np.asarray(draw_creature(one, 1, 0, 48)) != first).any()


@pytest.mark.P3
def test_files_depend_on_the_seed_alone(creatures, tmp_path):
    combined.draw_creatures(tmp_path / "again", seed=0, train=12, test=4, image_size=48, workers=2)
    raw = creatures.with_name(creatures.name + "-raw")
    compared = filecmp.dircmp(raw, tmp_path / "again")
    files = sorted(path.relative_to(raw) for path in raw.rglob("*") if path.is_file())
    assert not compared.left_only and not compared.right_only and len(files) > 300
    assert not filecmp.cmpfiles(raw, tmp_path / "again", map(str, files), shallow=False)[1]


def test_isekai_rows_ask_about_both_classes(creatures):
    from eventlens_ds.data.sources import lcl

    rows = lcl.read_rows(creatures.with_name(creatures.name + "-raw") / "lcl" / "isekai.jsonl")
    assert len(rows) == 4 * world_creatures.TEST
    asked = Counter(row["label_name"] == row["positive_promt"] for row in rows)
    assert asked[True] == asked[False]


@pytest.mark.parametrize("wrong", [{"test": 3}, {"train": 1}, {"image_size": 16}, {"train": 1500, "test": 100}])
def test_impossible_worlds_are_refused(tmp_path, wrong):
    with pytest.raises(UserError):
        combined.draw_creatures(tmp_path / "x", **{"seed": 0, "train": 10, "test": 4, "image_size": 48, **wrong})


def test_pictures_are_legible_at_the_size_of_the_demo():
    """The nearest mean of raw pixels over four demonstrations names most queries of the near pairs, in every feature
    better than chance: what the demo asks for is in the pictures."""
    _, test = creatures(0, 600, 100)
    hits: dict[str, list[bool]] = {}
    for pair in zip(test[::2], test[1::2]):
        changed = next(name for name, x, y in zip(FEATURES, pair[0].features, pair[1].features) if x != y)
        means = [np.mean([np.asarray(draw_creature(c, 0, i, 36), float) for i in range(4)], 0) for c in pair]
        for side, one in enumerate(pair):
            for index in range(16, 22):
                far = [np.abs(mean - np.asarray(draw_creature(one, 0, index, 36), float)).mean() for mean in means]
                hits.setdefault(changed, []).append((far[0] < far[1]) == (side == 0))
    shares = {name: np.mean(found) for name, found in hits.items()}
    assert np.mean([hit for found in hits.values() for hit in found]) > 0.7 and min(shares.values()) > 0.58, shares
