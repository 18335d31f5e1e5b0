"""Evaluation episodes: every query with the first demonstrations of both classes, and the ablations of the paper.

In: four test classes of creatures as pairs and as ISEKAI rows. Out: episodes. Decision: conditions are compared with
the plain episode of the same query, because differences between them are paired.
"""

from __future__ import annotations

from collections import Counter

import pytest

from eventlens_ds.data.episodes import Rows
from eventlens_ds.data.listed_episodes import Ablation, Listed, questions
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.errors import DataError, UserError
from tests.creature_world import episode_run


def listed(creatures, split: str = "val", shots: int = 2, row_tokens: int = 1024, **more) -> Listed:
    run = episode_run(creatures)
    rows = Rows(ShardSet.open(creatures, split))
    return Listed(rows, questions(rows), shots, run.tokenizer, run.spec, row_tokens, **more)


def test_pairs_and_isekai_ask_the_same(creatures):
    pairs, isekai = listed(creatures), listed(creatures, "isekai")
    assert pairs.size == isekai.size == 48
    for made in (pairs, isekai):
        assert Counter(q.side for q in made.asked)[0] in (24, 48)
        right = Counter(q.names[q.side] for q in made.asked)
        assert len(right) == 4 and set(right.values()) == {12}, "each class is asked about equally often"
    answers = {(q.image, q.names[q.side]) for q in pairs.asked}
    assert answers == {(q.image, q.names[q.side]) for q in isekai.asked}


def test_the_first_context_images_are_shown(creatures):
    made = listed(creatures, shots=3)
    for number in (0, 11, 47):
        asked, episode = made.asked[number], made.draw(number)
        names = {i: made.rows.shards.image(i).img_fn for i in episode.images}
        for side in (0, 1):
            shown = [names[i] for i, s in zip(episode.images, episode.shown) if s == side]
            assert shown == list(asked.support[side][:3])
        assert names[episode.images[-1]] == asked.image and episode.labels == tuple(
            asked.names[s] for s in episode.shown
        )
    orders = {made.draw(n).shown for n in range(48)}
    assert len(orders) > 5, "in a random order"
    assert [made.draw(n) for n in range(48)] == [listed(creatures, shots=3).draw(n) for n in range(48)], (
        "and a fixed one"
    )


def test_label_ablations_change_the_names_and_nothing_else(creatures):
    plain = listed(creatures, shots=4)
    for correctness in (1.0, 0.75, 0.5, 0.0):
        made = listed(creatures, shots=4, ablation=Ablation(correctness=correctness))
        for number in range(48):
            one, other = plain.draw(number), made.draw(number)
            assert one._replace(labels=()) == other._replace(labels=())
            assert sum(a == b for a, b in zip(one.labels, other.labels)) == 8 * correctness
    shuffled = listed(creatures, shots=4, ablation=Ablation(shuffle=True))
    kept = 0
    for number in range(48):
        one, other = plain.draw(number), shuffled.draw(number)
        assert sorted(one.labels) == sorted(other.labels) and one.images == other.images
        kept += sum(a == b for a, b in zip(one.labels, other.labels))
    assert 0.35 < kept / (8 * 48) < 0.65


@pytest.mark.parametrize(("place", "where"), [("first", (0, 4)), ("middle", (2, 6)), ("last", (4, 8))])
def test_places_of_the_right_class(creatures, place, where):
    made = listed(creatures, shots=4, ablation=Ablation(place=place))
    for number in range(48):
        episode = made.draw(number)
        assert all((side == episode.side) == (where[0] <= at < where[1]) for at, side in enumerate(episode.shown))


def test_lengths_are_those_of_the_encoded_episode(creatures):
    from eventlens_ds.data.loader import RunData

    run = episode_run(creatures)
    for shots in (0, 1, 3):
        made = listed(creatures, "isekai", shots)
        data = RunData.of_episodes(
            str(creatures), made.rows.shards, made, config=run.config.data, tokenizer=run.tokenizer, spec=run.spec
        )
        batch = data.batch([(0, 0), (0, 30)], 0)
        assert batch.real_tokens == made.length(0) + made.length(30)
        assert batch.choice_labels.tolist() == [made.asked[0].side, made.asked[30].side]
        assert batch.pixel_values.shape[0] == 2 * (2 * shots + 1)


def test_what_cannot_be_asked(creatures):
    with pytest.raises(UserError, match=r"--shots 16: an episode of 33 images takes up to \d+ tokens"):
        listed(creatures, shots=16)
    with pytest.raises(
        DataError, match="no query can be asked with 17 shots, e.g. .*has 16 context images for 17 shots"
    ):
        listed(creatures, shots=17)
    with pytest.raises(DataError, match="holds no pairs and no ISEKAI rows"):
        questions(Rows(ShardSet.open(creatures, "train")))
    rows = Rows(ShardSet.open(creatures, "val"))
    rows.rows, rows.lines = rows.rows[1:], rows.lines[1:]
    with pytest.raises(DataError, match=r"\(line 2\) has no partner; pairs are two lines"):
        questions(rows)


def test_a_query_is_never_its_own_demonstration(creatures):
    rows = Rows(ShardSet.open(creatures, "val"))
    for row in rows.rows:
        row["test_samples"] = row["context_samples"][:1]
    run = episode_run(creatures)
    made = Listed(rows, questions(rows), 2, run.tokenizer, run.spec, 1024)
    for number in range(made.size):
        images = made.draw(number).images
        assert len(set(images)) == len(images) == 5
