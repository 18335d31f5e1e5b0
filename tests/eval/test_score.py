"""Scores of rows: layouts, ranks and controls, on a model of a few ten thousand parameters.

In: `small`, the small run of the session. Out: assertions on prediction rows and batches. Decision: layouts and
controls are compared through the whole way from shards to rows, so a difference anywhere on it is seen.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eventlens_ds.data import build
from eventlens_ds.data.controls import apply_control, permutable
from eventlens_ds.data.packing import sequential_rows
from eventlens_ds.data.sources import combined
from eventlens_ds.eval.score import Ranks, eval_data, score_choices, score_split, turns
from eventlens_ds.model.objective import leaf_scores
from tests.data.conftest import paint_vcr
from tests.small_world import SmallRun

ALONE = Ranks(0, 1, "cpu", 4)


@pytest.fixture(scope="module")
def model(small: SmallRun) -> Any:
    return small.model().eval()


def questions(small: SmallRun, *, limit: int = 3, **changes: Any) -> Any:
    """RunData of the questions of the first validation images."""
    config = replace(small.config, data=replace(small.config.data, **changes))
    return eval_data(config, small.tokenizer, small.spec, small.config.data.train[0], "val", limit=limit)


def spread(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> float:
    """Largest difference of a score; both sides hold the same samples, in whatever order."""
    other = {row["id"]: row["scores"] for row in second}
    assert {row["id"] for row in first} == set(other)
    return max(abs(a - b) for row in first for a, b in zip(row["scores"], other[row["id"]], strict=True))


@pytest.mark.P4
def test_tree_equals_flat(small: SmallRun, model: Any) -> None:
    tree = score_split(model, questions(small), ALONE).rows
    flat = score_split(model, questions(small, layout="flat"), ALONE).rows
    assert len(tree) > 8 and spread(tree, flat) < 1e-5
    assert spread(tree, score_split(small.model(seed=1).eval(), questions(small), ALONE).rows) > 1e-3


@pytest.mark.P4
def test_the_packing_changes_nothing(small: SmallRun, model: Any) -> None:
    one_row = score_split(model, questions(small, row_tokens=4096), ALONE).rows
    many = score_split(model, questions(small, row_tokens=320), ALONE).rows
    assert spread(one_row, many) < 1e-5


@pytest.mark.P5
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_rows_and_make_equally_many_forwards(small: SmallRun, size: int) -> None:
    data = questions(small)
    rows = sequential_rows(data.group_tables(), row_tokens=data.config.row_tokens)
    assert len(rows) % 2 == 1, "an odd number leaves a missing row for two ranks"
    made = [list(turns(rows, lambda m: data.batch(m, 0), Ranks(rank, size, "cpu", 1))) for rank in range(size)]
    assert {len(part) for part in made} == {-(-len(rows) // size)}
    assert sorted(t.place for part in made for t in part if t.members) == list(range(len(rows)))
    for together in zip(*made):
        assert len({turn.vision_calls for turn in together}) == 1
        assert together[0].vision_calls == max([1, *(t.batch.pixel_values.shape[0] for t in together)])
    assert all(bool(t.members) == bool(t.batch.real_tokens) for part in made for t in part)


def test_rows_hold_what_the_metrics_need(small: SmallRun, model: Any) -> None:
    data = questions(small)
    rows = score_choices(model, data, rank=0, world=1, device="cpu", vision_chunk=4)
    assert {row["task"] for row in rows} == {"vcr_answer", "vcr_rationale"}
    for row in rows:
        assert len(row["scores"]) == len(row["candidates"]) == len(row["tokens"]) == 4
        assert 0 <= row["label"] < 4 and row["key"] in [data.shards[0].key(i) for i in range(3)]
        assert ("given_answer" in row) == (row["task"] == "vcr_rationale")


def test_limit_takes_a_fixed_head(small: SmallRun, model: Any) -> None:
    data = questions(small)
    head = score_split(model, data, ALONE, limit=1).rows
    every = score_split(model, data, ALONE).rows
    assert 0 < len(head) < len(every) and head == every[: len(head)]


def scores_of(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return leaf_scores(model(batch, 1), batch)


def first_row(small: SmallRun) -> Any:
    """The batch of the first image whose questions mention two of its regions or more."""
    data = questions(small)
    for number in range(len(data.groups[0])):
        batch = data.batch([(0, number)], 0)
        if len(set(batch.region_slots[batch.region_slots >= 0].tolist())) > 1:
            return batch
    raise AssertionError("no question mentions two regions")


@pytest.mark.P6
def test_blank_hides_pixels_and_regions(small: SmallRun, model: Any) -> None:
    batch = first_row(small)
    other = replace(batch, pixel_values=torch.randn_like(batch.pixel_values), boxes=batch.boxes.flip(0))
    hidden = [scores_of(model, apply_control(b, "blank")) for b in (batch, other)]
    assert torch.equal(*hidden)
    seen = [scores_of(model, apply_control(b, "none")) for b in (batch, other)]
    assert not torch.allclose(*seen, atol=1e-4)


@pytest.mark.P6
def test_permute_changes_region_links_alone(small: SmallRun, model: Any) -> None:
    batch = first_row(small)
    permuted = apply_control(batch, "permute_regions")
    for name, value in vars(batch).items():
        same = (
            torch.equal(value, getattr(permuted, name)) if torch.is_tensor(value) else value == getattr(permuted, name)
        )
        assert same == (name != "boxes"), name
    assert sorted(batch.boxes.tolist()) == sorted(permuted.boxes.tolist())
    assert not torch.equal(scores_of(model, batch), scores_of(model, permuted))
    unlinked = [replace(b, region_slots=torch.full_like(b.region_slots, -1)) for b in (batch, permuted)]
    assert torch.equal(*(scores_of(model, b) for b in unlinked))


def test_questions_that_cannot_be_permuted_are_flagged(small: SmallRun, model: Any, tmp_path: Path) -> None:
    """Pictures of one to four objects; by hand, those with one cannot be permuted, nor those whose boxes are equal."""
    source = combined.open_source("vcr", paint_vcr(tmp_path / "raw", images=6, splits=("val",)))
    build.build(source, tmp_path / "built")
    data = eval_data(small.config, small.tokenizer, small.spec, str(tmp_path / "built"), "val")
    rows = score_split(model, data, ALONE, "permute_regions").rows
    number = {row["id"]: int(row["image"].partition("@")[2].partition(".")[0]) for row in rows}
    assert {row["flags"]["permuted"] for row in rows} == {True, False}
    assert all(row["flags"]["permuted"] == (number[row["id"]] % 4 > 0) for row in rows)
    plain = score_split(model, data, ALONE).rows
    assert all("permuted" not in row["flags"] for row in plain)
    before = {row["id"]: row["scores"] for row in plain}
    assert all(row["scores"] == before[row["id"]] for row in rows if not row["flags"]["permuted"])

    batch = first_row(small)
    assert permutable(batch) == [True]
    assert permutable(replace(batch, boxes=batch.boxes[:1].expand(len(batch.boxes), 4))) == [False]


def test_boxes_stay_with_their_image(small: SmallRun) -> None:
    data = questions(small)
    rows = sequential_rows(data.group_tables(), row_tokens=data.config.row_tokens)
    batch = data.batch(max(rows, key=lambda row: row.images).groups, 0)
    assert batch.pixel_values.shape[0] > 1
    permuted = apply_control(batch, "permute_regions")
    for start, end in zip(batch.box_offsets[:-1].tolist(), batch.box_offsets[1:].tolist()):
        assert sorted(batch.boxes[start:end].tolist()) == sorted(permuted.boxes[start:end].tolist())


def test_what_is_not_scored_is_listed(small: SmallRun, model: Any, world_folder: Path, tmp_path: Path) -> None:
    """A damaged picture and a group longer than a row: neither gets a row, both get a reason."""
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(world_folder, damaged)
    config = replace(small.config, data=replace(small.config.data, train=(str(damaged),), group_tokens=4096))
    data = eval_data(config, small.tokenizer, small.spec, str(damaged), "val", limit=3)
    shards = data.shards[0]
    offset, size, _ = shards._place("image", 0)
    with open(next((damaged / "val").glob("*.tar")), "r+b") as tar:
        tar.seek(offset + size // 2)
        tar.write(b"\0" * 64)
    whole = score_split(model, questions(small), ALONE)
    scored = score_split(model, data, ALONE)
    assert not whole.skipped and len(scored.rows) + len(scored.skipped) == len(whole.rows)
    assert {name.partition("/")[0] for name, _ in scored.skipped} and all("crc" in why for _, why in scored.skipped)
    assert {row["id"] for row in scored.rows} | {name for name, _ in scored.skipped} == {r["id"] for r in whole.rows}
    short = eval_data(
        replace(config, data=replace(config.data, row_tokens=256)),
        small.tokenizer,
        small.spec,
        str(world_folder),
        "val",
    )
    refused = score_split(model, short, ALONE).skipped
    assert refused and all("a row holds 256" in why for _, why in refused)
