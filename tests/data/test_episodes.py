"""Episodes as a data type: drawn from (seed, epoch, index), measured without reading, planned like any group.

In: twelve classes of creatures. Out: draws, lengths, rows. Decision: every promise is checked on real shards through
the functions that training calls.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from eventlens_ds.config.run_config import EpisodeConfig
from eventlens_ds.data.episodes import Drawn, Rows, random_label
from eventlens_ds.data.packing import GroupTable
from eventlens_ds.data.plan import Plan
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.errors import DataError, UserError
from tests.creature_world import TRAIN, episode_run


def drawn(run, seed: int = 0, row_tokens: int = 1024, **changes) -> Drawn:
    made = run.data.episodes[0]
    config = replace(made.config, **changes)
    return Drawn(made.rows, config, run.tokenizer, run.spec, seed, row_tokens)


@pytest.mark.P3
def test_an_episode_is_a_function_of_seed_epoch_and_index(creatures):
    run = episode_run(creatures, strategy="2-way-random")
    one, again, other = drawn(run), drawn(run), drawn(run, seed=1)
    numbers = range(3 * one.size)
    assert [one.draw(n) for n in numbers] == [again.draw(n) for n in reversed(numbers)][::-1]
    assert all(one.draw(n) != other.draw(n) for n in numbers)
    first, second = one.draw(5), one.draw(5 + one.size)
    assert first.id == "lcl/train/0/5" and second.id == "lcl/train/1/5" and first.images != second.images


def test_what_an_episode_holds(creatures):
    run = episode_run(creatures, random_labels="anchor")
    made = drawn(run)
    asked = Counter()
    for number in range(200):
        episode = made.draw(number)
        assert len(episode.shown) == 4 and sorted(episode.shown) == [0, 0, 1, 1]
        assert len(set(episode.images)) == 5, "the query is no demonstration, and no image comes twice"
        assert episode.labels == tuple(episode.names[side] for side in episode.shown)
        anchor, other = (next(c for c in made.classes if c.id == i) for i in dict(episode.fields)["pair"].split("/"))
        of = {side: (anchor, other)[side] for side in (0, 1)}
        for side, image in zip((*episode.shown, episode.side), episode.images):
            assert image in of[side].images
        assert episode.names[1] == other.name and 1 <= len(episode.names[0]) <= 10 and episode.names[0].isalpha()
        assert made.classes.index(other) in anchor.neighbours
        asked[episode.side] += 1
    assert 70 < asked[0] < 130, "either class is asked about"
    anchors = Counter(dict(made.draw(n).fields)["pair"].split("/")[0] for n in range(made.size))
    assert set(anchors.values()) == {1} and made.size == TRAIN, "an epoch is one episode per class"


def test_labels_of_either_kind():
    rng = np.random.default_rng(0)
    lengths = Counter(len(random_label(rng, "letters")) for _ in range(2000))
    assert set(lengths) == set(range(1, 11)) and min(lengths.values()) > 140
    assert all(len(random_label(rng, "syllables")) == 5 for _ in range(50))


def test_names_of_both_classes_or_of_none(creatures):
    run = episode_run(creatures)
    names = {one.name for one in run.data.episodes[0].classes}
    assert not names & {n for k in range(30) for n in drawn(run, random_labels="both").draw(k).names}
    assert names >= {n for k in range(30) for n in drawn(run, random_labels="none").draw(k).names}


@pytest.mark.P4
@pytest.mark.parametrize("form", ["released", "plain"])
@pytest.mark.parametrize("objective", ["answer", "choice"])
def test_lengths_by_arithmetic_are_those_of_the_encoded_episode(creatures, form, objective):
    run = episode_run(creatures, strategy="2-way-random", shots=3, form=form, objective=objective)
    made = run.data.episodes[0]
    for number in range(20):
        group = run.data.group(0, number)
        encoded = run.data.encode(group, 0, number)
        assert encoded.num_tokens == made.length(number)
        assert len(encoded.pixel_values) == len(group.images) == 2 * int(dict(group.samples[0].fields)["shots"]) + 1
        leaves = 2 if objective == "choice" else 1
        assert len(encoded.leaf_weight) == leaves and sum(encoded.leaf_weight) == (0 if objective == "choice" else 1)


@pytest.mark.P3
def test_rows_name_the_episode_of_their_epoch(creatures):
    run = episode_run(creatures, strategy="2-way-random", shots=3)
    plan = run.data.plan(seed=0, rows_per_step=2)
    made = run.data.episodes[0]
    for epoch in (0, 1, 4):
        first = sum(plan.num_rows(e) for e in range(epoch))
        rows = [plan.row(first + i) for i in range(plan.num_rows(epoch))]
        numbers = sorted(number for row in rows for _, number in row.groups)
        assert numbers == list(range(epoch * made.size, (epoch + 1) * made.size))
        for row in rows:
            assert row.images == sum(len(made.draw(n).images) for _, n in row.groups)
            assert row.tokens == sum(made.length(n) for _, n in row.groups) <= 1024
    assert plan.mixture(range(6))[0].groups > 0


@pytest.mark.P3
def test_rows_would_repeat_episodes_if_numbers_did_not_count_on(creatures):
    """Control of the test above: a table that is not `drawn` gives every epoch the numbers of the first."""
    made = episode_run(creatures).data.episodes[0]
    table = replace(made.table("0"), drawn=False)
    plan = Plan([table], seed=0, row_tokens=1024, rows_per_step=1)
    row = plan.row(plan.num_rows(0))
    assert row.epoch == 1 and all(number < made.size for _, number in row.groups)


def test_images_may_depend_on_the_epoch():
    table = GroupTable("a", "f", np.full(3, 5), lambda epoch: np.full(3, epoch + 1, np.int16), groups=3, drawn=True)
    plan = Plan([table], seed=0, row_tokens=5, rows_per_step=1)
    assert [plan.row(i).images for i in range(7)] == [1, 1, 1, 2, 2, 2, 3]
    assert plan.vision_calls(3, 0, 1, 1) == 2


def test_shots_that_do_not_fit_name_those_that_would(creatures):
    run = episode_run(creatures)
    with pytest.raises(UserError, match=r"shots 16: an episode of 33 images .* data.row_tokens is 1000; (\d+) shots"):
        drawn(run, shots=16, row_tokens=1000)
    narrow = replace(run, spec=replace(run.spec, positions=400))
    with pytest.raises(UserError, match="the language model reads 400 positions; 2 shots per class would fit"):
        drawn(narrow, shots=16, row_tokens=4096)
    assert drawn(narrow, shots=2, row_tokens=4096).size == TRAIN, "and they do fit"
    assert run.spec.positions == 2048, "the limit comes from the language model"


def test_fixed_epochs_come_before_the_law(creatures):
    made = drawn(episode_run(creatures), strategy="2-way-random", shots=4, fixed_epochs=2)
    shots = [{dict(made.draw(e * made.size + i).fields)["shots"] for i in range(made.size)} for e in range(6)]
    assert shots[:2] == [{"4"}, {"4"}] and len(set.union(*shots[2:])) > 1


class Changed(Rows):
    """Rows of a folder with some of them changed before anything is drawn."""

    def __init__(self, shards, change) -> None:
        super().__init__(shards)
        self.rows = [change(dict(row)) for row in self.rows]


def test_classes_that_cannot_be_used_are_counted(creatures):
    run = episode_run(creatures)
    shards = ShardSet.open(creatures, "train")

    def few(row):
        return row | ({"samples": row["samples"][:2]} if row["class_id"] == "1" else {})

    made = Drawn(Changed(shards, few), EpisodeConfig(shots=2), run.tokenizer, run.spec, 0, 1024)
    assert made.skipped == [(Rows(shards).rows[0]["class_name"], "2 images for 2 shots and a query")]
    assert len(made.classes) == TRAIN - 1 and all(dict(made.draw(n).fields)["pair"] for n in range(40))

    def alone(row):
        return row | ({"neighbors": []} if row["class_id"] == "3" else {})

    made = Drawn(Changed(shards, alone), EpisodeConfig(shots=2), run.tokenizer, run.spec, 0, 1024)
    assert [reason for _, reason in made.skipped] == ["none of its neighbours can be used, so it is never an anchor"]
    with pytest.raises(DataError, match="no class can be the anchor of an episode, e.g. .*: 0 images for 2 shots"):
        Drawn(Changed(shards, lambda r: r | {"samples": []}), EpisodeConfig(shots=2), run.tokenizer, run.spec, 0, 1024)


@pytest.mark.P3
@pytest.mark.parametrize("weights", [(), (1.0, 2.5)])
def test_share_of_episodes_in_a_mixture(creatures, world_folder, weights):
    run = episode_run(creatures, world_folder, tasks=("lcl", "caption"), share=0.4)
    run.data.config = replace(run.data.config, weights=weights)
    tables = [(folder == str(creatures), made is not None) for folder, made in zip(run.data.folders, run.data.episodes)]
    assert tables == [(True, False), (False, False), (True, True)]
    plan = run.data.plan(seed=0, rows_per_step=2)
    first = 0
    for epoch in range(4):
        rows = [plan.row(first + i) for i in range(plan.num_rows(epoch))]
        first += len(rows)
        numbers = [number for row in rows for table, number in row.groups if table == 2]
        every = sum(len(row.groups) for row in rows)
        assert len(set(numbers)) == len(numbers) == run.data.episodes[2].size, "none twice, whatever the weights"
        assert abs(len(numbers) / every - 0.4) < 0.01


def test_shares_that_cannot_be(creatures, world_folder):
    with pytest.raises(UserError, match=r"share 0.5: .* hold nothing but episodes"):
        episode_run(creatures, share=0.5)
    with pytest.raises(UserError, match=r"share 0.5: .* hold no episodes"):
        episode_run(world_folder, tasks=("lcl", "caption"), share=0.5)
    run = episode_run(creatures, world_folder, tasks=("lcl", "caption"))
    run.data.config = replace(run.data.config, weights=(1.0, 2.0))
    with pytest.raises(UserError, match="data.weights: episodes are weighted by data.episodes.share"):
        run.data.weights()
