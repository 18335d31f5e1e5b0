"""Answers and events of a LION model, over the readers and the files of a real build.

In: the small world, whose pictures have tags, expressions, questions and statements; a small model with Q-Former, tags
in its prompt and a mixture of adapters. Out: rows and what the plan counted for them. Decision: the other tests of
these rows make their samples by hand; this one goes from the drawn files to the metric.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.config.load import load
from eventlens_ds.data.prompts import text_of
from eventlens_ds.data.records import LM_TASKS
from eventlens_ds.errors import UserError
from eventlens_ds.eval import event_rows, language_lines, language_rows
from eventlens_ds.eval.request import Decoding, _with_view
from eventlens_ds.eval.score import Ranks, eval_data
from tests.model.test_lion import awake, lion_config
from tests.small_world import SmallRun, small_run

ALONE = Ranks(0, 1, "cpu", 4)
# Events have continuations, episodes names: tests of their own.
ANSWERED = sorted(LM_TASKS - {"event", "lcl"})


@pytest.fixture(scope="module")
def lion(world_folder: Path) -> SmallRun:
    return small_run(world_folder, lion_config(world_folder))


def held_out(lion: SmallRun, task: str) -> Any:
    folder = lion.config.data.train[0]
    return eval_data(lion.config, lion.tokenizer, lion.spec, folder, "val", tasks=[task])


@pytest.mark.parametrize("task", ANSWERED)
def test_every_task_is_answered_and_scored(lion: SmallRun, task: str) -> None:
    data, model = held_out(lion, task), awake(lion).eval()
    found, without = language_rows.questions(data, task)
    assert found and not without
    made = language_rows.answer_rows(model, data, found[:4], ALONE, Decoding(max_new_tokens=3))
    assert [row["id"] for row in made.rows] == [q.sample.id for q in found[:4]] and not made.skipped
    assert language_lines.score(task, made.rows, java=False)["n"] == 4


@pytest.mark.parametrize("task", ["vqa", "rec"])
def test_the_plan_counts_what_is_encoded(lion: SmallRun, task: str) -> None:
    data = held_out(lion, task)
    found, _ = language_rows.questions(data, task)
    for piece in language_rows._pieces(data, found[:6], 0):
        made = data.encode(piece.group, *piece.member)
        assert made.num_tokens == piece.tokens and made.soft_slots.any() and len(made.instruction)
        # Of REC's question the Q-Former reads so little here that all of them look alike.
        assert task == "rec" or len(piece.group.samples) == 1, "each question has queries of its own"


def test_events_are_counted_with_their_tags(lion: SmallRun) -> None:
    data = held_out(lion, "event")
    found = event_rows.first_events(data, 4)
    groups, lengths = event_rows._by_image(data, found)
    assert [data.encode(group, *member).num_tokens for group, member in groups] == lengths
    pool = event_rows.events.candidate_pool(event_rows.inference_texts(data.shards[0], data.spec.style))
    ranking = event_rows.rank_candidates(found[0], pool, data.tokenizer, data.spec, 4096, 0)
    ((_, _, tokens),) = ranking.pieces
    assert data.encode(ranking.group(), *found[0].member).num_tokens == tokens


def test_tags_of_the_drawn_world_reach_the_prompt(lion: SmallRun) -> None:
    data = held_out(lion, "caption")
    group = data.group(0, 0)
    rendered = language_rows.rendered_group(group, data.tokenizer, data.spec)
    assert group.images[0].tags and ", ".join(group.images[0].tags) in text_of(rendered.prefix)


def test_a_run_with_both_branches_is_asked_through_either() -> None:
    config = load("tiny_lion_2")
    assert config.model.visual_input == "aggregator"
    for view in ("qformer", "all", "aggregator"):
        assert _with_view(config, view) == replace(config, model=replace(config.model, visual_input=view))
    assert _with_view(config, "") is config
    with pytest.raises(UserError, match="--visual-input projector: this run has qformer, aggregator, all"):
        _with_view(config, "projector")
    with pytest.raises(UserError, match="--visual-input qformer: this run has projector$"):
        _with_view(load("tiny_event"), "qformer")
