"""Objectives: sums over a row, to be divided by the denominators of the whole optimizer step (P8).

K supervised tokens, L leaves, Q questions, C candidates.
  LM       - sum_k w_leaf(k) log p_k                              / supervised tokens of the step
  choice   - sum_q w_q log softmax_c(score_q / temperature)[label] / questions of the step
  balance  sum_g n_g B_g, mean over layers                         / tokens of the step   (router topk alone)
  score_qc = mean over the tokens of candidate c of log p          (length-normalised log-likelihood)
Decision: a row yields sums and counts, never means. The loss of a step is the weighted sum of objective means over
all ranks and micro-steps, so accumulation, packing and world size change neither loss nor gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eventlens_ds.config.run_config import ObjectiveConfig, RunConfig
from eventlens_ds.data.records import TASKS, Batch

OBJECTIVES = ("lm", "choice", "choice_lm", "load_balance")
"""In the order of sums and denominators; the last only where `balances`."""


@dataclass
class RowSums:
    """sums float32[3], or [4] where balances: the numerator of each objective, with gradient.
    task_sums, task_counts float64[tasks]: the same loss split by task, for the log; no gradient."""

    sums: torch.Tensor
    task_sums: torch.Tensor
    task_counts: torch.Tensor


def balances(config: RunConfig) -> bool:
    """Whether the load-balance loss is a part of the objective of this run."""
    return config.model.adapters.router == "topk" and config.objective.load_balance > 0


def counts(batch: Batch, *, balance: bool = False) -> torch.Tensor:
    """Denominators float64[3] that this row adds: supervised LM tokens, questions, tokens of correct candidates; with
    `balance` a fourth, all its tokens."""
    lm_tokens = batch.leaf_weight[batch.target_leaf].sum()
    correct = _correct_leaf_weight(batch)
    found = [lm_tokens.double(), batch.choice_weight.sum().double(), correct[batch.target_leaf].sum().double()]
    return torch.stack([*found, lm_tokens.new_tensor(batch.real_tokens).double()] if balance else found)


def leaf_scores(token_logp: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean log-probability per token of every leaf, float32[L]."""
    leaves = batch.leaf_weight.numel()
    usable = token_logp[: batch.target_leaf.numel()]
    total = usable.new_zeros(leaves).index_add(0, batch.target_leaf, usable)
    length = torch.bincount(batch.target_leaf, minlength=leaves).clamp(min=1)
    return total / length


def row_sums(
    token_logp: torch.Tensor, batch: Batch, config: ObjectiveConfig, balance: torch.Tensor | None = None
) -> RowSums:
    """Numerators of a row. A row without work gives zeros that still hang on the graph (P5). balance: what
    RegionVLM.forward returns `with_balance`."""
    anchor = token_logp.sum() * 0.0
    usable = token_logp[: batch.target_leaf.numel()]
    nll = -usable
    lm_weight = batch.leaf_weight[batch.target_leaf]
    task_sums = torch.zeros(len(TASKS), dtype=torch.float64, device=token_logp.device)
    task_counts = torch.zeros_like(task_sums)
    lm_terms = nll * lm_weight
    token_task = batch.leaf_task[batch.target_leaf]
    task_sums.index_add_(0, token_task, lm_terms.detach().double())
    task_counts.index_add_(0, token_task, lm_weight.double())
    choice = choice_lm = anchor
    if batch.choice_leaves.numel():
        scores = leaf_scores(token_logp, batch)[batch.choice_leaves]
        logp = (scores / config.temperature).log_softmax(-1)
        terms = -logp.gather(1, batch.choice_labels.clamp(min=0)[:, None])[:, 0] * batch.choice_weight
        choice = choice + terms.sum()
        task_sums.index_add_(0, batch.choice_task, terms.detach().double())
        task_counts.index_add_(0, batch.choice_task, batch.choice_weight.double())
        choice_lm = choice_lm + (nll * _correct_leaf_weight(batch)[batch.target_leaf]).sum()
    sums = [anchor + lm_terms.sum(), choice, choice_lm, *([] if balance is None else [balance])]
    return RowSums(torch.stack(sums), task_sums, task_counts)


def step_loss(sums: torch.Tensor, denominators: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Weighted sum of objective means: sums float[3] over denominators of the step float64[3]; [4] where balances."""
    weights = sums.new_tensor([getattr(config, name) for name in OBJECTIVES[: len(sums)]])
    return (weights * sums / denominators.to(sums).clamp(min=1.0)).sum()


def _correct_leaf_weight(batch: Batch) -> torch.Tensor:
    """float32[L]: 1 on the correct candidate of every labelled question."""
    weight = torch.zeros_like(batch.leaf_weight)
    if batch.choice_leaves.numel():
        correct = batch.choice_leaves.gather(1, batch.choice_labels.clamp(min=0)[:, None])[:, 0]
        weight.index_add_(0, correct, batch.choice_weight)
    return weight
