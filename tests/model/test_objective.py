"""Objectives: hand-computed values, and sums that do not care how rows are cut (P8).

In: log-probabilities of a few tokens and a Batch of real rows. Out: numerators and denominators, compared with
numbers worked out by hand. Decision: the batch of the hand computation is small enough to check on paper.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from eventlens_ds.config.run_config import ObjectiveConfig
from eventlens_ds.data.records import TASKS, Batch
from eventlens_ds.model import objective
from tests.small_world import SmallRun

EVERYTHING = ObjectiveConfig(lm=1.0, choice=1.0, choice_lm=1.0)


def paper_batch(small: SmallRun) -> tuple[torch.Tensor, Batch]:
    """Leaf 0: a caption of two tokens. Leaves 1 and 2: the candidates of a question, one and two tokens, 2 is right."""
    logp = torch.tensor([-1.0, -2.0, -3.0, -1.0, -0.5], requires_grad=True)
    batch = replace(
        small.batch(()),
        target_leaf=torch.tensor([0, 0, 1, 2, 2]),
        target_ids=torch.zeros(5, dtype=torch.int64),
        leaf_weight=torch.tensor([1.0, 0.0, 0.0]),
        leaf_task=torch.tensor([0, 2, 2]),
        choice_leaves=torch.tensor([[1, 2]]),
        choice_labels=torch.tensor([1]),
        choice_weight=torch.tensor([1.0]),
        choice_task=torch.tensor([2]),
    )
    return logp, batch


@pytest.mark.P8
def test_by_hand(small: SmallRun) -> None:
    logp, batch = paper_batch(small)
    assert objective.counts(batch).tolist() == [2.0, 1.0, 2.0]
    assert objective.leaf_scores(logp, batch).tolist() == [-1.5, -3.0, -0.75]
    made = objective.row_sums(logp, batch, EVERYTHING)
    choice = math.log(1 + math.exp(-3.0 + 0.75))
    assert made.sums.tolist() == pytest.approx([3.0, choice, 1.5])
    others = [0.0] * (len(TASKS) - 3)
    assert made.task_sums.tolist() == pytest.approx([3.0, 0.0, choice, *others])
    assert made.task_counts.tolist() == [2.0, 0.0, 1.0, *others]
    loss = objective.step_loss(made.sums, objective.counts(batch), EVERYTHING)
    assert float(loss.detach()) == pytest.approx(1.5 + choice + 0.75)
    loss.backward()
    assert logp.grad is not None and logp.grad[:2].tolist() == [-0.5, -0.5]


def test_temperature_divides_the_scores(small: SmallRun) -> None:
    logp, batch = paper_batch(small)
    made = objective.row_sums(logp, batch, replace(EVERYTHING, temperature=0.5))
    assert float(made.sums[1].detach()) == pytest.approx(math.log(1 + math.exp((-3.0 + 0.75) / 0.5)))


def test_blind_and_injured_questions_weigh_nothing(small: SmallRun) -> None:
    logp, batch = paper_batch(small)
    blind = replace(batch, choice_labels=torch.tensor([-1]), choice_weight=torch.tensor([0.0]))
    assert objective.counts(blind).tolist() == [2.0, 0.0, 0.0]
    assert objective.row_sums(logp, blind, EVERYTHING).sums.tolist() == pytest.approx([3.0, 0.0, 0.0])


@pytest.mark.P5
def test_a_missing_row_is_zero_and_hangs_on_the_graph(small: SmallRun) -> None:
    batch, model = small.batch(()), small.model().train()
    made = objective.row_sums(model(batch), batch, EVERYTHING)
    assert objective.counts(batch).tolist() == [0.0, 0.0, 0.0] and made.sums.tolist() == [0.0, 0.0, 0.0]
    objective.step_loss(made.sums, torch.zeros(3, dtype=torch.float64), EVERYTHING).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    # What the tower computes behind the state that is read gets none, with pictures or without (model/stages.py).
    assert {n for n, _ in model.named_parameters()} - with_gradient == {
        f"vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")
    }
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def loss_of(small: SmallRun, rows: list[list[tuple[int, int]]]) -> float:
    model = small.model().eval()
    batches = [small.batch(row) for row in rows]
    denominators = torch.stack([objective.counts(batch) for batch in batches]).sum(0)
    with torch.no_grad():
        sums = torch.stack([objective.row_sums(model(b), b, EVERYTHING).sums for b in batches]).sum(0)
    return float(objective.step_loss(sums, denominators, EVERYTHING))


@pytest.mark.P8
def test_cutting_into_rows_changes_nothing(small: SmallRun) -> None:
    groups = [small.groups_of(task)[0] for task in small.architecture.tasks]
    together = loss_of(small, [groups])
    assert loss_of(small, [[group] for group in groups]) == pytest.approx(together, rel=1e-6)
    assert loss_of(small, [groups[:1], groups[1:], []]) == pytest.approx(together, rel=1e-6)


@pytest.mark.P8
def test_means_of_rows_would_change(small: SmallRun) -> None:
    """Negative control: the mean of each row's own loss depends on the cut."""
    groups = [small.groups_of("caption")[0], small.groups_of("event")[0]]
    apart = sum(loss_of(small, [[group]]) for group in groups) / 2
    assert abs(apart - loss_of(small, [groups])) > 1e-3
