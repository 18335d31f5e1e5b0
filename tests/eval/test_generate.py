"""Generation: packed equals alone, equals one sequence grown by hand; links, counts of forwards, nucleus draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eventlens_ds.data.records import Batch
from eventlens_ds.errors import UserError
from eventlens_ds.eval import generate as generation
from eventlens_ds.eval.generate import choose, continue_row, generate, region_mentions
from tests.small_world import SmallRun, small_config, small_run

NEW = 5


class Counted:
    """The model's forward, and how often it was called with how many images; again without what the last call saw of
    them if `afresh`."""

    def __init__(self, model: Any, afresh: bool = False) -> None:
        self.model, self.afresh = model.eval(), afresh
        self.images: list[int] = []

    def __call__(self, batch: Batch, vision_calls: int, *, read: torch.Tensor, encoded: Any) -> Any:
        self.images.append(batch.pixel_values.shape[0])
        return self.model(batch, vision_calls, read=read, encoded=None if self.afresh else encoded)


class Scripted:
    """Logits that spell given answers: leaf n of the row continues as `answers[n]`. Keeps every row it was given."""

    def __init__(self, answers: list[list[int]], vocabulary: int) -> None:
        self.answers, self.vocabulary = answers, vocabulary
        self.rows: list[Batch] = []

    def __call__(self, batch: Batch, vision_calls: int, *, read: torch.Tensor, encoded: Any) -> Any:
        logits = torch.zeros(batch.input_ids.shape[1], self.vocabulary)
        grown = len(self.rows)
        self.rows.append(batch)
        alive = [a for a in self.answers if len(a) > grown]
        if grown == 0:
            ends = sorted(set(batch.bounds[batch.parents >= 0, 1].tolist()))
            places = [end - 1 for end in ends]
        else:
            places = [end - 1 for end in batch.bounds[-len(alive) :, 1].tolist()] if alive else []
        for place, answer in zip(places, alive):
            logits[place, answer[grown]] = 1.0
        return logits[read], None


def members(run: SmallRun, task: str, count: int = 2) -> list[tuple[int, int]]:
    return run.groups_of(task)[:count]


@pytest.mark.P4
@pytest.mark.parametrize("top_p", [0.0, 0.9])
def test_a_packed_row_generates_what_its_groups_do_alone(small: SmallRun, top_p: float) -> None:
    forward = Counted(small.model())
    settings: dict[str, Any] = {"device": "cpu", "max_new_tokens": NEW, "top_p": top_p, "num_samples": 2}
    row = [*members(small, "event"), *members(small, "vcr_answer", 1)]
    packed = generate(forward, small.data, row, **settings)
    alone = [texts for member in row for texts in generate(forward, small.data, [member], **settings)]
    assert packed == alone
    assert len(packed) == sum(len(small.data.group(*member).samples) for member in row)
    assert len({text for texts in packed for text in texts}) > 1


@pytest.mark.P4
def test_layouts_agree(small: SmallRun, world_folder: Any) -> None:
    flat = small_run(world_folder, layout="flat")
    forward = Counted(small.model())
    row = members(small, "event", 1)
    tree = generate(forward, small.data, row, device="cpu", max_new_tokens=NEW)
    assert generate(forward, flat.data, row, device="cpu", max_new_tokens=NEW) == tree


def test_images_are_encoded_once_and_read_by_every_step(small: SmallRun) -> None:
    model = small.model()
    seen: list[int] = []
    model.vision_tower.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[0]))
    row = [*members(small, "event"), *members(small, "vcr_answer", 1)]
    settings: dict[str, Any] = {"device": "cpu", "max_new_tokens": NEW}
    once = Counted(model)
    texts = generate(once, small.data, row, **settings)
    assert len(seen) == 1 and len(once.images) == NEW
    assert generate(Counted(model, afresh=True), small.data, row, **settings) == texts
    assert len(seen) == 1 + NEW


def test_greedy_equals_one_sequence_grown_by_hand(small: SmallRun) -> None:
    model = small.model().eval()
    member = members(small, "vcr_answer", 1)
    texts = generate(Counted(model), small.data, member, device="cpu", max_new_tokens=NEW)
    batch = small.batch(member)
    root, stem = batch.bounds[0].tolist(), batch.bounds[1].tolist()
    index = torch.cat([torch.arange(*root), torch.arange(*stem)])
    ids: list[int] = []
    for _ in range(NEW):
        length = len(index) + len(ids)
        fresh = torch.tensor(ids, dtype=torch.int64)
        blank = torch.full_like(fresh, -1)
        chain = Batch(
            **{
                **vars(batch),
                "input_ids": torch.cat([batch.input_ids[0, index], fresh])[None],
                "position_ids": torch.arange(length)[None],
                "parents": torch.tensor([-1], dtype=torch.int32),
                "bounds": torch.tensor([[0, length]], dtype=torch.int32),
                "task_ids": batch.task_ids[:1].expand(length),
                "image_slots": torch.cat([batch.image_slots[index], blank]),
                "region_slots": torch.cat([batch.region_slots[index], blank]),
                "soft_slots": torch.zeros(length, dtype=torch.bool),
                "start_slots": torch.zeros(length, dtype=torch.bool),
                "target_from": batch.target_from[:0],
                "target_ids": batch.target_ids[:0],
            }
        )
        with torch.no_grad():
            _, logits = model(chain, with_logits=True)
        ids.append(int(logits[-1].argmax()))
        if ids[-1] == small.tokenizer.eos:
            break
    assert texts[0] == [small.tokenizer.decode(ids)]


@pytest.mark.P6
@pytest.mark.parametrize("linking", ["add", "insert"])
def test_generated_names_meet_their_regions_as_written_ones_do(world_folder: Any, linking: str) -> None:
    config = small_config(world_folder)
    object.__setattr__(config.model, "linking", linking)
    run = small_run(world_folder, config)
    row = run.groups_of("vcr_answer")[:2]
    batch = run.batch(row)
    first = [int((batch.leaf_sample == s).nonzero()[0]) for s in range(len(batch.sample_ids))]
    answers = [batch.target_ids[batch.target_leaf == leaf].tolist() for leaf in first]
    groups = [run.data.group(*member) for member in row]
    mentions = region_mentions(groups, run.tokenizer, run.spec.style)
    longest = max(map(len, answers))

    def grown(used: Any) -> tuple[list[str], list[Batch]]:
        forward = Scripted(answers, len(run.tokenizer))
        settings: dict[str, Any] = {"linking": used, "device": "cpu", "max_new_tokens": longest}
        return [t for (t,) in continue_row(forward, batch, run.tokenizer, mentions, **settings)], forward.rows

    texts, rows = grown(linking)
    assert texts == [run.tokenizer.decode(a) for a in answers]
    # The last leaf of the last row: of the longest answers the last.
    whole = max(range(len(answers)), key=lambda n: (len(answers[n]), n))
    last = rows[longest - 1]
    start, end = last.bounds[-1].tolist()
    written = (batch.target_leaf == first[whole]).nonzero()[:-1, 0]
    at = batch.target_from[written[1:]]
    at = torch.cat([at, at[-1:] + 1])
    for name in ("input_ids", "position_ids"):
        assert torch.equal(getattr(last, name)[0, start:end], getattr(batch, name)[0, at]), name
    for name in ("region_slots", "image_slots", "task_ids"):
        assert torch.equal(getattr(last, name)[start:end], getattr(batch, name)[at]), name
    assert bool((batch.region_slots[at] >= 0).any()), "the answer must mention a region"
    # Without linking the names stay words.
    unlinked = grown("none")[1][longest - 1]
    assert not torch.equal(unlinked.region_slots[start:end], batch.region_slots[at])


@pytest.mark.P5
def test_a_missing_row_runs_as_often(small: SmallRun) -> None:
    forward = Counted(small.model())
    generate(forward, small.data, members(small, "event"), device="cpu", max_new_tokens=NEW)
    full = len(forward.images)
    assert generate(forward, small.data, [], device="cpu", max_new_tokens=NEW) == []
    assert full == NEW and len(forward.images) == 2 * NEW
    assert forward.images[NEW:] == [0] * NEW


@pytest.mark.P5
def test_finished_texts_still_keep_step(small: SmallRun) -> None:
    row = members(small, "vcr_answer", 1)
    batch = small.batch(row)
    answers = [[small.tokenizer.eos]] * len(batch.sample_ids)
    forward = Scripted(answers, len(small.tokenizer))
    spelled = region_mentions([small.data.group(*m) for m in row], small.tokenizer, small.spec.style)
    texts = continue_row(forward, batch, small.tokenizer, spelled, linking="add", device="cpu", max_new_tokens=NEW)
    assert texts == [[""]] * len(answers)
    assert [r.real_tokens > 0 for r in forward.rows] == [True] + [False] * (NEW - 1)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()[[2, 0, 3, 1]]
    drawn = [choose(scores, 0.7, (u + 0.5) / 1000) for u in range(1000)]
    assert {t: drawn.count(t) for t in set(drawn)} == {1: 625, 3: 375}
    assert set(choose(scores, 1.0, u / 1000) for u in range(1000)) == {0, 1, 2, 3}
    assert choose(scores, 0.01, 0.999) == 1 and choose(scores, 0.0, 0.999) == 1


@pytest.mark.P3
def test_draws_depend_on_seed_sample_and_number_only(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Counted(small.model())
    row = members(small, "event", 1)

    def texts(seed: int, number: int) -> list[list[str]]:
        settings: dict[str, Any] = {"device": "cpu", "max_new_tokens": 3, "top_p": 0.95}
        return generate(forward, small.data, row, num_samples=number, seed=seed, **settings)

    three = texts(0, 3)
    assert [t[:1] for t in three] == texts(0, 1)
    assert three != texts(1, 3)
    assert any(len(set(t)) > 1 for t in three)
    # A stream that remembers how often it was asked would change with the number of texts.
    state = iter(range(10**9))
    monkeypatch.setattr(generation, "draw", lambda *_: (next(state) * 0x9E3779B97F4A7C15) % 2**64)
    assert [t[:1] for t in texts(0, 3)] != texts(0, 1)


def test_impossible_settings_are_one_line(small: SmallRun) -> None:
    for wrong in ({"max_new_tokens": 0}, {"num_samples": 0}, {"top_p": 1.5}):
        with pytest.raises(UserError, match="generation: max_new_tokens"):
            generate(Counted(small.model()), small.data, [], device="cpu", **wrong)  # type: ignore[arg-type]
