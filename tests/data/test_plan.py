"""The plan: order is arithmetic (P3), whole groups in rows (P4), equal micro-steps on every rank (P5).

In: thousands of small random plans, a few large ones, fresh interpreters. Out: the same ids for every world size,
restart and process, every group once per epoch, mixture shares within rounding. Checks come with a control that
breaks the rule, to show that they can fail.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from eventlens_ds.data import plan as plan_module
from eventlens_ds.data.packing import GroupTable, Row, RowCounts
from eventlens_ds.data.plan import Plan, draw_many
from eventlens_ds.errors import DataError, UserError

CASES = 2000
REPO = Path(__file__).resolve().parents[2]


def table(lengths, name: str = "world", images=None) -> GroupTable:
    if not callable(lengths):
        lengths = np.asarray(lengths, np.int32)
        images = np.ones(len(lengths), np.int16) if images is None else np.asarray(images, np.int16)
    return GroupTable(name, f"fingerprint of {name}", lengths, images)


def random_tables(rng: np.random.Generator, budget: int) -> list[GroupTable]:
    """One to three tables of 1..50 groups, a few of them too long."""
    sizes = rng.integers(1, 51, int(rng.integers(1, 4)))
    longest = budget + int(rng.integers(0, 3))
    tables = [table([1, *rng.integers(1, longest + 1, size - 1)], f"t{at}") for at, size in enumerate(sizes)]
    return tables


def ids(plan: Plan, steps: range) -> list[tuple]:
    return [row.groups for step in steps for row in plan.step(step)]


def read_by_ranks(plan: Plan, steps: range, world: int, turns=Plan.rank_rows) -> list[int]:
    """Rows in the order in which `world` ranks read them; ranks must have equally many micro-steps."""
    order: list[int] = []
    for step in steps:
        ranks = [turns(plan, step, rank, world) for rank in range(world)]
        assert len({len(rows) for rows in ranks}) == 1, "ranks would wait for each other forever"
        order += [row for micro in zip(*ranks) for row in micro if row is not None]
    return order


def epoch_rows(plan: Plan, epoch: int) -> list[Row]:
    first = sum(plan.num_rows(before) for before in range(epoch))
    rows = [plan.row(row) for row in range(first, first + plan.num_rows(epoch))]
    assert {row.epoch for row in rows} <= {epoch}
    return rows


def epoch_groups(plan: Plan, epoch: int) -> list[tuple[int, int]]:
    return [pair for row in epoch_rows(plan, epoch) for pair in row.groups]


def check_each_group_once(plan: Plan, epoch: int, groups: list[tuple[int, int]]) -> None:
    wanted = {(at, group) for at, one in enumerate(plan.tables) for group in range(one.size)}
    assert sorted(groups) == sorted(wanted - {(at, group) for at, group, _ in plan.refused_in(epoch)})


@pytest.mark.P3
@pytest.mark.P4
@pytest.mark.P5
def test_random_plans_keep_every_promise():
    rng = np.random.default_rng(4)
    differ = 0
    for case in range(CASES):
        budget = int(rng.integers(2, 40))
        tables = random_tables(rng, budget)
        settings = {
            "row_tokens": budget,
            "rows_per_step": int(rng.integers(1, 9)),
            "window": int(rng.choice([1, 7, 20, 60], p=[0.05, 0.35, 0.3, 0.3])),
            "shuffle": bool(rng.integers(0, 4)),
            "weights": rng.integers(1, 9, len(tables)).tolist() if case % 4 == 3 else (),
        }
        plan = Plan(tables, seed=case, **settings)
        steps = range(-(-plan.num_rows(0) // plan.rows_per_step) + 1)
        rows = [row for step in steps for row in plan.step(step)]
        for row in rows:
            assert row.tokens == sum(int(tables[at].lengths[group]) for at, group in row.groups) <= budget
            assert row.images == len(row.groups) > 0
        if not settings["weights"]:
            check_each_group_once(plan, 0, [pair for row in rows if row.epoch == 0 for pair in row.groups])
        if case % 8 == 0:
            check_each_group_once(plan, 1, epoch_groups(plan, 1))
        world = int(rng.integers(1, 9))
        assert read_by_ranks(plan, steps, world) == [row.index for row in rows] == list(range(len(rows)))
        assert len(plan.rank_rows(0, 0, world)) == -(-plan.rows_per_step // world)
        restart = int(rng.integers(0, len(steps)))
        again = Plan(tables, seed=case, **settings).step(restart)
        assert again == tuple(rows[restart * plan.rows_per_step :][: plan.rows_per_step])
        if case % 4 == 0:
            differ += Plan(tables, seed=case + 1, **settings).step(restart) != again
    assert differ > CASES // 8, "control: another seed gives another order"


@pytest.mark.P3
@pytest.mark.P5
def test_control_other_ways_to_share_rows_are_caught():
    plan = Plan([table(np.arange(1, 31))], seed=0, row_tokens=30, rows_per_step=5)
    steps, in_order = range(3), list(range(15))
    assert read_by_ranks(plan, steps, 2) == in_order

    def strides(plan: Plan, step: int, rank: int, world: int) -> list[int]:
        return list(plan.rows_of_step(step))[rank::world]

    def without_the_rest(plan: Plan, step: int, rank: int, world: int) -> list[int]:
        return strides(plan, step, rank, world)[: plan.rows_per_step // world]

    with pytest.raises(AssertionError, match="wait"):
        read_by_ranks(plan, steps, 2, strides)
    assert read_by_ranks(plan, steps, 2, without_the_rest) != in_order
    groups = epoch_groups(plan, 0)
    for broken in (groups[1:], [*groups, groups[0]]):
        with pytest.raises(AssertionError):
            check_each_group_once(plan, 0, broken)


@pytest.mark.P3
def test_steps_cross_epochs_without_a_gap():
    plan = Plan([table([4, 4, 4])], seed=0, row_tokens=4, rows_per_step=2)
    rows = [row for step in range(6) for row in plan.step(step)]
    assert [row.index for row in rows] == list(range(12))
    assert [row.epoch for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [plan.epoch_of_step(step) for step in range(6)] == [0, 0, 1, 2, 2, 3]
    larger = Plan([table([4, 4, 4])], seed=0, row_tokens=4, rows_per_step=7)
    assert [row.groups for row in larger.step(0)] == [row.groups for row in rows[:7]]
    assert larger.fingerprint != plan.fingerprint


@pytest.mark.P3
def test_rows_hold_other_groups_in_each_epoch_and_for_each_seed():
    lengths = np.random.default_rng(5).integers(10, 100, 600)
    plans = [Plan([table(lengths)], seed=seed, row_tokens=100, rows_per_step=1, window=64) for seed in (0, 1)]
    first, second, other = (
        {frozenset(row.groups) for row in epoch_rows(plan, epoch)}
        for plan, epoch in ((plans[0], 0), (plans[0], 1), (plans[1], 0))
    )
    assert max(len(first & second), len(first & other)) < len(first) // 4
    plain = Plan([table(lengths)], seed=0, row_tokens=100, rows_per_step=1, shuffle=False)
    assert epoch_groups(plain, 0) == epoch_groups(plain, 1), "control: in order when shuffle is off"


@pytest.mark.P3
def test_a_weighted_table_draws_other_groups_in_each_lap_and_for_each_seed():
    tables = [table(np.ones(100)), table(np.ones(100), "second")]
    plans = [Plan(tables, weights=(1, 3), seed=seed, row_tokens=4, rows_per_step=1) for seed in (0, 1)]
    quarter = [{group for at, group in epoch_groups(plans[0], epoch) if at == 0} for epoch in range(4)]
    assert [len(groups) for groups in quarter] == [50] * 4
    assert quarter[0] | quarter[1] == quarter[2] | quarter[3] == set(range(100)), "two epochs are a lap"
    assert quarter[2] not in quarter[:2]
    assert {group for at, group in epoch_groups(plans[1], 0) if at == 0} not in quarter[:2]


@pytest.mark.P3
def test_the_place_of_a_row_says_nothing_about_its_groups():
    """Packing leaves a trend inside every window (here: rows of many short groups late); the plan shuffles it away."""
    lengths = np.random.default_rng(5).integers(10, 100, 20_000)

    def trend(shuffle: bool) -> float:
        plan = Plan([table(lengths)], seed=0, row_tokens=500, rows_per_step=1, shuffle=shuffle)
        ends = plan._load_epoch(0).row_ends
        windows = np.split(np.array([len(row.groups) for row in epoch_rows(plan, 0)]), ends[:-1])
        return float(np.mean([np.corrcoef(np.arange(len(sizes)), sizes)[0, 1] for sizes in windows]))

    assert abs(trend(shuffle=True)) < 0.06, "three standard errors: 10 windows of about 220 rows"
    assert abs(trend(shuffle=False)) > 0.06, "control"


@pytest.mark.P3
def test_any_step_in_another_process_is_the_same(tmp_path):
    program = """
import sys, numpy as np
from eventlens_ds.data.plan import Plan
from eventlens_ds.data.packing import GroupTable
lengths = np.arange(5000, dtype=np.int32) * 7919 % 300 + 20
table = GroupTable("a", "f", lengths, np.ones(5000, np.int16))
plan = Plan([table, table], weights=(0.3, 0.7), seed=3, row_tokens=512, rows_per_step=8, window=256)
print(plan.fingerprint, [row.groups for row in plan.step({step})])
assert not {{"torch", "deepspeed", "transformers"}} & set(sys.modules)
"""
    lengths = np.arange(5000, dtype=np.int32) * 7919 % 300 + 20
    one = GroupTable("elsewhere", "f", lengths, np.ones(5000, np.int16))
    settings = {"weights": (0.3, 0.7), "row_tokens": 512, "rows_per_step": 8, "window": 256}
    plan = Plan([one, one], seed=3, **settings)
    for step in (0, 1234):
        here = f"{plan.fingerprint} {[row.groups for row in plan.step(step)]}\n"
        env = os.environ | {"PYTHONHASHSEED": str(step), "PYTHONPATH": str(REPO)}
        run = [sys.executable, "-c", program.format(step=step)]
        assert subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == here
        assert ids(pickle.loads(pickle.dumps(plan)), range(step, step + 2)) == ids(plan, range(step, step + 2))
        assert ids(Plan([one, one], seed=4, **settings), range(step, step + 1)) != ids(plan, range(step, step + 1))


@pytest.mark.P3
def test_order_of_this_format_is_pinned():
    """A change of the order must raise plan.FORMAT, or runs would resume into another order in silence."""
    lengths = np.arange(40_000, dtype=np.int32) * 7919 % 300 + 20
    plan = Plan([table(lengths), table(lengths[:70], "small")], weights=(3, 1), seed=3, row_tokens=512, rows_per_step=8)
    digest = hashlib.sha256(repr(ids(plan, range(0, 1000, 50))).encode()).hexdigest()
    assert (plan_module.FORMAT, digest[:16]) == (1, "6790ddef57cbf8cc")


@pytest.mark.P3
def test_fingerprint_changes_with_everything_that_decides_the_order():
    base = {"weights": (1, 3), "seed": 0, "row_tokens": 64, "rows_per_step": 4, "window": 32, "shuffle": True}
    lengths = np.arange(1, 50)
    tables = [table(lengths), table(lengths, "second")]
    fingerprint = Plan(tables, **base).fingerprint
    changes = {"weights": (1, 2), "seed": 1, "row_tokens": 65, "rows_per_step": 5, "window": 33, "shuffle": False}
    others = {Plan(tables, **(base | {key: value})).fingerprint for key, value in changes.items()}
    others |= {
        Plan([tables[0], changed], **base).fingerprint
        for changed in (table(lengths, "third"), table(lengths[::-1], "second"), table(lengths, "second", lengths))
    }
    others.add(Plan(tables[::-1], **base).fingerprint)
    assert len(others) == len(changes) + 4 and fingerprint not in others
    assert Plan(tables, **(base | {"weights": (0.1, 0.3)})).fingerprint == fingerprint, "the same shares"
    renamed = [GroupTable("moved", one.fingerprint, one.lengths, one.images) for one in tables]
    assert Plan(renamed, **base).fingerprint == fingerprint, "a folder may move"


def test_mixture_shares_are_within_rounding():
    rng = np.random.default_rng(6)
    for case in range(200):
        tables = random_tables(rng, 20)
        weights = [round(float(weight), 2) for weight in rng.uniform(0.01, 1, len(tables))]
        plan = Plan(tables, weights=weights, seed=case, row_tokens=20, rows_per_step=2, window=16)
        sizes = [one.size - sum(at == bad for bad, _, _ in plan.refused) for at, one in enumerate(tables)]
        taken: Counter = Counter()
        for epoch in range(4):
            taken.update(epoch_groups(plan, epoch))
            for at, size in enumerate(sizes):
                uses = [count for (from_table, _), count in taken.items() if from_table == at]
                wanted = weights[at] / sum(weights) * sum(sizes) * (epoch + 1)
                assert abs(sum(uses) - wanted) <= 0.5 + 1e-9, "the share never drifts"
                uses += [0] * (size - len(uses))
                assert max(uses) - min(uses) <= 1, "a table is walked through before a group comes again"


def test_mixture_reports_configured_and_planned_shares():
    tables = [table(np.full(300, 10), "large"), table(np.full(20, 5), "small")]
    plan = Plan(tables, weights=(0.7, 0.3), seed=0, row_tokens=40, rows_per_step=4, window=64)
    steps = range(-(-plan.num_rows(0) // 4))
    large, small = plan.mixture(steps)
    assert (large.table, large.configured, small.table, small.configured) == ("large", 0.7, "small", 0.3)
    assert abs(small.actual - 0.3) < 0.02 and large.actual + small.actual == pytest.approx(1)
    assert (large.tokens, small.tokens) == (10 * large.groups, 5 * small.groups)
    quarters = [plan.mixture(range(at, at + len(steps) // 4))[1].actual for at in range(0, len(steps) - 4, 10)]
    assert min(quarters) > 0.05, "interleaved, not one data set after the other"
    unweighted = Plan(tables, seed=0, row_tokens=40, rows_per_step=4).mixture(steps)
    assert unweighted[1].configured == 20 / 320


@pytest.mark.P5
def test_vision_calls_are_the_maximum_over_ranks():
    rng = np.random.default_rng(7)
    images = rng.integers(0, 12, 60)
    plan = Plan([table(rng.integers(5, 30, 60), images=images)], seed=0, row_tokens=30, rows_per_step=5)
    for step in range(8):
        for world in (1, 2, 3, 8):
            for micro in range(-(-5 // world)):
                rows = [plan.rank_rows(step, rank, world)[micro] for rank in range(world)]
                own = [max(1, -(-plan.row(row).images // 4)) for row in rows if row is not None]
                assert plan.vision_calls(step, micro, world, 4) == max(own)
    empty = Plan([table([5, 5], images=[0, 0])], seed=0, row_tokens=30, rows_per_step=5)
    assert empty.vision_calls(0, 0, 2, 4) == 1, "the tower runs at least once"


@pytest.mark.P4
def test_refused_groups_are_listed_and_never_planned():
    plan = Plan([table([5, 31, 30, 0]), table([99, 1], "b")], seed=0, row_tokens=30, rows_per_step=2)
    too_long = "needs {} tokens, a row holds 30"
    assert plan.refused == [(0, 1, too_long.format(31)), (0, 3, "has 0 tokens"), (1, 0, too_long.format(99))]
    assert sorted(epoch_groups(plan, 0)) == [(0, 0), (0, 2), (1, 1)]
    assert Plan([table([30, 30])], seed=0, row_tokens=30, rows_per_step=2).refused == []


@pytest.mark.P3
def test_lengths_may_depend_on_the_epoch():
    def lengths(epoch: int) -> np.ndarray:
        values = (np.arange(200) * 31 + draw_many(0, epoch, np.arange(200)) % np.uint64(9)) % 30 + 1
        return values.astype(np.int32)

    one = table(lengths, images=np.ones(200, np.int16))
    plan = Plan([one], seed=0, row_tokens=28, rows_per_step=3, window=32)
    for epoch in range(4):
        check_each_group_once(plan, epoch, epoch_groups(plan, epoch))
    never = {group for _, group, _ in plan.refused}
    assert never == set(np.flatnonzero(lengths(0) > 28).tolist())
    assert {group for _, group, _ in plan.refused_in(3)} == never | set(np.flatnonzero(lengths(3) > 28).tolist())
    for row in plan.step(150):
        assert row.epoch > 0 and row.tokens == sum(int(lengths(row.epoch)[group]) for _, group in row.groups) <= 28
    again = Plan([one], seed=0, row_tokens=28, rows_per_step=3, window=32)
    assert ids(again, range(150, 160)) == ids(plan, range(150, 160))


def test_later_epochs_in_which_nothing_fits_end_in_an_error():
    one = table(lambda epoch: np.full(3, 5 if epoch == 0 else 50), images=np.ones(3, np.int16))
    plan = Plan([one], seed=0, row_tokens=5, rows_per_step=1)
    assert len(plan.step(2)) == 1
    with pytest.raises(DataError, match="every group is refused"):
        plan.step(3)


@pytest.mark.P3
def test_cache_is_read_checked_and_made_again(tmp_path, caplog):
    lengths = np.random.default_rng(8).integers(10, 100, plan_module.CACHE_MIN_GROUPS)
    settings = {"seed": 0, "row_tokens": 128, "rows_per_step": 8}
    plan = Plan([table(lengths)], **settings)
    steps = range(700, 703)
    wanted = ids(plan, steps)
    assert ids(Plan([table(lengths)], cache_dir=tmp_path, **settings), steps) == wanted
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with caplog.at_level(logging.WARNING):
        assert ids(Plan([table(lengths)], cache_dir=tmp_path, **settings), steps) == wanted
    assert "damaged" in caplog.text and path.read_bytes() == good
    known = RowCounts.load(path, plan.fingerprint, len(good[32 + 64 + 40 :]) // 8)
    assert known is not None
    RowCounts(known.rows + 1, known.tokens, known.digest).save(path, plan.fingerprint)
    wrong = Plan([table(lengths)], cache_dir=tmp_path, **settings)
    assert wrong.num_rows(0) > plan.num_rows(0), "control: the cache is what a second open reads"
    Plan([table(lengths)], cache_dir=tmp_path, **(settings | {"seed": 1})).prepare(1)
    assert len(list(tmp_path.iterdir())) == 2, "another plan has its own file"


@pytest.mark.P3
def test_lengths_that_change_under_an_unchanged_fingerprint_are_refused(tmp_path):
    size = plan_module.CACHE_MIN_GROUPS

    def plan(late: int) -> Plan:
        one = table(lambda epoch: np.full(size, 10 + (late if epoch else 0)), images=np.ones(size, np.int16))
        return Plan([one], seed=0, row_tokens=100, rows_per_step=1000, cache_dir=tmp_path)

    assert [row.epoch for row in plan(5).step(2)[:1]] == [1]
    assert plan(5).step(2) == plan(5).step(2)
    with pytest.raises(DataError, match="world: lengths of epoch 1 changed, but its fingerprint did not"):
        plan(6).step(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (1,)}, "data.weights has 1 values for 2 data sets"),
        ({"weights": (1, 0)}, "data.weights gives data set photos 0, must be above 0"),
        ({"weights": (1, float("nan"))}, "photos nan"),
        ({"row_tokens": 0}, "row_tokens is 0"),
        ({"rows_per_step": 0}, "rows_per_step is 0"),
        ({"window": -1}, "window is -1"),
        ({"row_tokens": 6}, "photos: none of its 1 groups fits a row of 6 tokens; the shortest needs 7"),
    ],
)
def test_impossible_settings_are_one_clear_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        Plan([table([5]), table([7], "photos")], **{"seed": 0, "row_tokens": 10, "rows_per_step": 1, **change})
    assert "\n" not in str(caught.value)


def test_empty_tables_are_named():
    with pytest.raises(UserError, match="data set photos has no groups"):
        Plan([table([5]), table([], "photos")], seed=0, row_tokens=10, rows_per_step=1)
    with pytest.raises(UserError, match="no data set"):
        Plan([], seed=0, row_tokens=10, rows_per_step=1)


@pytest.mark.slow
def test_ten_million_groups(tmp_path):
    """Limits of the design, in CPU time, which other work on the machine does not lengthen; figures are in LOG.md."""
    lengths = np.random.default_rng(9).integers(40, 600, 10_000_000).astype(np.int32)
    tables = [table(lengths[:9_000_000]), table(lengths[9_000_000:], "second")]
    settings = {"weights": (0.8, 0.2), "seed": 0, "row_tokens": 4096, "rows_per_step": 64, "cache_dir": tmp_path}
    for limit in (60, 2):
        began = time.process_time()
        plan = Plan(tables, **settings)
        plan.prepare(10_000)
        assert time.process_time() - began < limit
    assert plan.fill(0).share >= 0.95
    for step in range(0, 12_000, 400):
        began = time.process_time()
        plan.step(step)
        assert time.process_time() - began < 0.05
