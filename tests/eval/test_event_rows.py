"""Rows of event generation and ranking: candidates, cuts, links, and what an untrained model must score.

In: `small`, the small run of the session. Out: assertions on rows. Decision: a cut ranking is compared with an uncut
one of the same candidates, because the metric must not depend on the row budget.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from eventlens_ds.data.prompts import PromptStyle, render, text_of
from eventlens_ds.data.records import Box, ImageRecord, Region, RegionRef
from eventlens_ds.errors import DataError
from eventlens_ds.eval import event_rows, events
from eventlens_ds.eval.score import Ranks, eval_data
from tests.small_world import SmallRun

ALONE = Ranks(0, 1, "cpu", 4)


@pytest.fixture(scope="module")
def model(small: SmallRun) -> Any:
    return small.model().eval()


def event_data(small: SmallRun, row_tokens: int = 512) -> Any:
    config = replace(small.config, data=replace(small.config.data, row_tokens=row_tokens))
    return eval_data(config, small.tokenizer, small.spec, small.config.data.train[0], "val", tasks=["event"])


def picture(names: tuple[str, ...]) -> ImageRecord:
    regions = tuple(Region(name, Box(0, 0, 4, 4)) for name in names)
    return ImageRecord("key", "a.jpg", 8, 8, regions)


def test_first_events_are_inferences_in_order(small: SmallRun) -> None:
    found = event_rows.first_events(event_data(small), 5)
    assert [e.sample.field("relation") for e in found[:3]] == ["intent", "before", "after"]
    assert len(found) == 5 and found == event_rows.first_events(event_data(small), 9)[:5]
    assert all(e.references and e.event for e in found)


def test_links_are_found_by_name_and_nothing_else() -> None:
    image = picture(("person", "dog", *["chair"] * 9, "person"))
    tokens = event_rows.linked("person12 gives dog2's bone to person1, not person2 or sperson1", image)
    assert tokens == (
        RegionRef(0, 11), " gives ", RegionRef(0, 1), "'s bone to ", RegionRef(0, 0), ", not person2 or sperson1",
    )  # fmt: skip
    assert event_rows.linked("person1 waits", picture(())) == ("person1 waits",)


def test_linked_text_renders_as_the_original_does(small: SmallRun) -> None:
    data = event_data(small)
    mentions = 0
    for number in range(len(data.groups[0])):
        group = data.group(0, number)
        original = render(group, data.spec.style)
        texts = [tuple(text_of(leaf) for leaf in sample.leaves) for sample in original.samples]
        again = tuple(
            replace(s, targets=tuple(event_rows.linked(text, group.images[0]) for text in each))
            for s, each in zip(group.samples, texts)
        )
        assert render(replace(group, samples=again), data.spec.style) == original
        mentions += sum(p.region >= 0 for sample in original.samples for leaf in sample.leaves for p in leaf)
    assert mentions > 10


@pytest.mark.P4
def test_a_cut_between_candidates_changes_no_score(small: SmallRun, model: Any) -> None:
    whole_data, cut_data = event_data(small, 4096), event_data(small, 160)
    found = event_rows.first_events(whole_data, 4)
    whole = event_rows.ranking_rows(model, whole_data, found, ALONE)
    cut = event_rows.ranking_rows(model, cut_data, [replace_member(e, cut_data) for e in found], ALONE)
    assert not whole.skipped and not cut.skipped
    for a, b in zip(whole.rows, cut.rows, strict=True):
        assert {**a, "scores": 0} == {**b, "scores": 0} and len(a["scores"]) == 50
        assert max(abs(x - y) for x, y in zip(a["scores"], b["scores"])) < 1e-5
        assert np.std(a["scores"]) > 1e-3, "scores that are all alike could not show a mistake in their order"


def replace_member(event: event_rows.Event, data: Any) -> event_rows.Event:
    """The same event as another grouping of the data names it."""
    return next(e for e in event_rows.first_events(data, 10_000) if e.sample.id == event.sample.id)


def test_pieces_cover_all_leaves_within_the_budget() -> None:
    assert event_rows._cut(10, [5, 5, 5], 100) == ((0, 3, 25),)
    assert event_rows._cut(10, [5, 5, 5], 20) == ((0, 2, 20), (2, 3, 15))
    assert event_rows._cut(10, [50, 5], 20) == ((0, 1, 60), (1, 2, 15))


def test_a_ranking_that_fits_no_row_is_listed(small: SmallRun, model: Any) -> None:
    """Candidates as long as a row: their piece is refused, the others are ranked."""
    data = event_data(small, 4096)
    found = event_rows.first_events(data, 3)
    rows = event_rows.ranking_rows(model, data, found, ALONE)
    long = found[1]._replace(references=("person1 waits " * 900,))
    scored = event_rows.ranking_rows(model, data, [found[0], long, found[2]], ALONE)
    assert [name for name, _ in scored.skipped] == [long.sample.id]
    assert "a row holds 4096" in scored.skipped[0][1]
    assert [row["id"] for row in scored.rows] == [rows.rows[0]["id"], rows.rows[2]["id"]]


def test_a_constant_model_is_at_chance(small: SmallRun) -> None:
    data = event_data(small)
    found = event_rows.first_events(data, 6)
    scored = event_rows.ranking_rows(lambda batch, calls: -torch.ones(len(batch.target_ids)), data, found, ALONE)
    result = events.score_ranking(scored.rows)
    assert result["short"] == 0 and math.isclose(result["acc50"], result["chance"])
    # A model that knows the gold candidates, which come first, is right every time.
    for row in scored.rows:
        row["scores"] = [float(i < len(row["candidates_gold"])) for i in range(50)]
    assert events.score_ranking(scored.rows)["acc50"] == 1.0


def test_gold_candidates_are_not_repeated(small: SmallRun) -> None:
    data = event_data(small)
    (event,) = event_rows.first_events(data, 1)
    pool = events.candidate_pool(event_rows.inference_texts(data.shards[0], data.spec.style))
    twice = event._replace(references=(*event.references, event.references[0].upper()))
    drawn = [event_rows.rank_candidates(e, pool, data.tokenizer, data.spec, 512, 0) for e in (event, twice)]
    assert len(drawn[0].gold) == len(drawn[1].gold) and drawn[0].others == drawn[1].others
    forms = {events.tokenize_python(t) for t in drawn[0].gold}
    assert not forms & {events.tokenize_python(t) for t in drawn[0].others}


def test_generation_continues_the_asked_events_alone(small: SmallRun, model: Any) -> None:
    data = event_data(small)
    found = event_rows.first_events(data, 4)
    options: dict[str, Any] = {"num_samples": 2, "top_p": 0.9, "max_new_tokens": 3}
    made = event_rows.generation_rows(model, data, found, ALONE, **options)
    assert [row["id"] for row in made.rows] == [e.sample.id for e in found] and not made.skipped
    assert all(len(row["generations"]) == 2 and row["references"] for row in made.rows)
    alone = event_rows.generation_rows(model, data, found[1:2], ALONE, **options)
    assert alone.rows == made.rows[1:2]
    assert alone.rows != event_rows.generation_rows(model, data, found[1:2], ALONE, **options, seed=1).rows


def test_a_run_that_never_saw_a_pixel_is_shown_none(small: SmallRun, model: Any) -> None:
    for control in ("blank", "none"):
        data, seen = event_data(small), []
        data.config = replace(data.config, control=control)

        def forward(batch: Any, calls: int, seen: list[Any] = seen, **options: Any) -> Any:
            seen.append(bool(batch.pixel_values.any()) or bool((batch.region_slots >= 0).any()))
            return model(batch, calls, **options)

        found = event_rows.first_events(data, 2)
        event_rows.ranking_rows(forward, data, found, ALONE)
        event_rows.generation_rows(forward, data, found, ALONE, num_samples=1, max_new_tokens=3)
        assert any(seen) == (control == "none") and seen


def test_known_texts_mark_what_was_trained_on(small: SmallRun) -> None:
    style = PromptStyle()
    folder = small.config.data.train[0]
    known, reason = event_rows.known_texts([folder], "train", style)
    assert known and not reason
    text = next(event_rows.inference_texts(small.data.shards[0], style))
    assert events.mark_novel([text, text + " in the volcano"], known) == [False, True]
    nothing, why = event_rows.known_texts([folder, "/nowhere"], "train", style)
    assert nothing is None and "/nowhere: no such folder" in why


def test_a_split_without_inferences_is_named(small: SmallRun) -> None:
    data = event_data(small)
    data.groups = [data.groups[0].__class__(*(a[:0] for a in vars(data.groups[0]).values()))]
    with pytest.raises(DataError, match="val: holds no event with intent, before or after"):
        event_rows.first_events(data, 3)
