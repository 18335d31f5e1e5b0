"""From folders to batches: the mix fills its rows (P4), batches are what the plan names (P3), failures say where.

In: the small world. Out: rows, batches, errors. Decision: fill is measured on tokens that were really encoded, not on
planned ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eventlens_ds.data.loader import PlannedRows, RowDataset, RunData, rank_batches, row_seed
from eventlens_ds.data.records import Batch
from eventlens_ds.errors import DataError, UserError
from tests.small_world import SmallRun, small_run


def same(one: Batch, two: Batch) -> bool:
    pairs = [(getattr(one, name), getattr(two, name)) for name in vars(one)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.P4
def test_the_embedded_mix_fills_its_rows(world_folder: Path) -> None:
    run = small_run(world_folder, row_tokens=1024)
    plan = run.data.plan(seed=0, rows_per_step=4)
    assert plan.fill(0).share >= 0.95
    rows = [plan.row(number) for number in range(plan.num_rows(0))]
    tokens = [run.batch(row.groups).real_tokens for row in rows]
    assert max(tokens) <= 1024 and sum(tokens) / (1024 * len(tokens)) >= 0.95
    one_each = sum(int(n) for n in run.data.groups[0].lengths) / (1024 * len(run.data.groups[0]))
    assert one_each < 0.5  # negative control: a row per group


@pytest.mark.P3
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_rows_of_the_plan_in_order(small: SmallRun, workers: int) -> None:
    plan = small.data.plan(seed=3, rows_per_step=2)
    rows = PlannedRows(plan, rank=0, world=1, first_step=1, last_step=4, seed=3)
    made = list(rank_batches(RowDataset(small.data, rows), workers=workers, prefetch=2))
    expected = [
        small.batch(row.groups, seed=row_seed(3, step, slot))
        for step in (1, 2, 3)
        for slot, row in enumerate(plan.step(step))
    ]
    assert len(made) == 6 and all(same(a, b) for a, b in zip(made, expected))


@pytest.mark.parametrize("control", ["blank", "permute_regions"])
def test_a_control_is_applied_once_wherever_the_row_was_loaded(world_folder: Path, control: str) -> None:
    run = small_run(world_folder, control=control)
    members = run.groups_of("vcr_answer")[:2]
    (made,) = rank_batches(RowDataset(run.data, [(members, 0)]), workers=1, prefetch=2)
    assert same(made, run.batch(members)) and made.pixel_values.dtype == torch.float32
    assert not same(made, run.data.raw_batch(members, 0))
    assert bool(made.pixel_values.any()) == (control != "blank")


def test_rank_rows_with_a_missing_one(small: SmallRun) -> None:
    plan = small.data.plan(seed=0, rows_per_step=3)
    rows = PlannedRows(plan, rank=1, world=2, first_step=0, last_step=2, seed=0)
    assert rows.micro_steps == 2 and len(rows) == 4
    assert [bool(members) for members, _ in rows] == [True, False, True, False]
    assert len(PlannedRows(plan, rank=0, world=2, first_step=5, last_step=2, seed=0)) == 0


@pytest.mark.P3
def test_row_seeds_differ_by_seed_step_and_place() -> None:
    seeds = [row_seed(seed, step, slot) for seed in (0, 1) for step in range(20) for slot in range(8)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_a_batch_knows_the_image_of_every_sample(small: SmallRun) -> None:
    members = [small.groups_of("caption")[2], small.groups_of("vcr_answer")[5]]
    batch = small.batch(members)
    groups = [small.data.group(*member) for member in members]
    keys = [batch.image_keys[i] for i in batch.sample_image]
    assert keys == [group.images[0].key for group in groups for _ in group.samples]
    assert batch.sample_ids == [sample.id for group in groups for sample in group.samples]


def test_limit_and_tasks_choose_groups(world_folder: Path) -> None:
    run = small_run(world_folder, tasks=("caption",))
    assert len(run.data.groups[0]) == 40 and run.groups_of("event") == []


def test_a_picture_that_cannot_be_decoded_is_listed(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    (member,) = small.groups_of("vcr_answer")[:1]
    monkeypatch.setattr(type(small.data.shards[0]), "image_bytes", lambda self, index: b"not a picture")
    batch = small.batch([member])
    assert len(batch.skipped) == len(batch.sample_ids) and not batch.choice_weight.any()


def test_missing_folders_and_tasks_are_named(small: SmallRun, world_folder: Path, tmp_path: Path) -> None:
    options = {"config": small.config.data, "tokenizer": small.tokenizer, "tokenizer_path": "", "spec": small.spec}
    with pytest.raises(UserError, match="data.train: name at least one folder"):
        RunData([], "train", **options)
    with pytest.raises(UserError, match=str(tmp_path / "absent")):
        RunData([str(tmp_path / "absent")], "train", **options)
    few = replace(small.config.data, group_tokens=0)
    assert len(RunData([str(world_folder)], "train", **{**options, "config": few}, tasks=("caption",)).groups[0]) == 40
    with pytest.raises(DataError, match="holds no sample of the tasks event"):
        # No image of the validation split comes before image 0.
        RunData([str(world_folder)], "val", **options, tasks=("event",), limit=-1)
