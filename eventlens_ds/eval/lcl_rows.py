"""Prediction rows of episodes (task lcl): every query of a split, with each number of shots, under each condition.

In: a forward and a split that holds pairs or ISEKAI rows. Out: the rows of eval/lcl.py, equal on every rank and for
every number of ranks (conditions: eval/episode_conditions.py).
Decision: all conditions ask the same queries over the same demonstrations in the same order, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.data.controls import Control, apply_control
from eventlens_ds.data.encode import EncodeSpec
from eventlens_ds.data.episodes import Rows
from eventlens_ds.data.listed_episodes import Ablation, Listed, Question, questions
from eventlens_ds.data.loader import RunData
from eventlens_ds.data.packing import sequential_rows
from eventlens_ds.data.records import Batch
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.errors import DataError
from eventlens_ds.eval.episode_conditions import Condition
from eventlens_ds.eval.generate import Forward, continue_row
from eventlens_ds.eval.score import Members, Ranks, Scored, in_order, turns
from eventlens_ds.model.objective import leaf_scores
from eventlens_ds.runtime.distributed import all_agree

NEW_TOKENS = 24


class Split:
    """A split to evaluate episodes on. Raises DataError when it holds none."""

    def __init__(
        self, config: RunConfig, tokenizer: PieceTokenizer, spec: EncodeSpec, folder: str, split: str, limit: int
    ) -> None:
        self.folder, self.tokenizer, self.spec = folder, tokenizer, spec
        self.config = replace(config.data, row_tokens=config.eval.row_tokens or config.data.row_tokens)
        self.shards = [ShardSet.open(folder, split)]
        self.rows = Rows(self.shards[0])
        self.asked: list[Question] = questions(self.rows)
        if limit:
            self.asked = first_of_every_class(self.asked, limit)

    def data(
        self, shots: int, ablation: Ablation, *, candidates: bool = True, first: int = 0
    ) -> tuple[RunData, Listed]:
        """The episodes of `shots` as data to read; first: only so many queries (0: all)."""
        given = (self.rows, self.asked[: first or None], shots, self.tokenizer, self.spec, self.config.row_tokens)
        listed = Listed(*given, ablation=ablation, candidates=candidates)
        made = RunData.of_episodes(
            self.folder, self.shards[0], listed, config=self.config, tokenizer=self.tokenizer, spec=self.spec
        )
        return made, listed


def first_of_every_class(asked: Sequence[Question], limit: int) -> list[Question]:
    """About `limit` queries (an even number, at least 2), one of every class before a second of any, so that both
    classes of a pair are asked about equally often."""
    seen: dict[tuple[str, ...], int] = {}
    turns: list[tuple[int, int]] = []
    for at, question in enumerate(asked):
        key = (*sorted(question.names), question.names[question.side])
        seen[key] = turn = seen.get(key, -1) + 1
        turns.append((turn, at))
    return [asked[at] for at in sorted(at for _, at in sorted(turns)[: max(2, limit // 2 * 2)])]


def condition_rows(
    forward: Forward, split: Split, shots: Sequence[int], wanted: Condition, ranks: Ranks, answers: int = 0
) -> Scored:
    """Rows of all `shots` under one condition; the first `answers` queries are also answered in words. A collective."""
    rows: list[dict[str, Any]] = []
    skipped: list[tuple[str, str]] = []
    for count in shots:
        data, listed = split.data(count, wanted.ablation)
        made, broken = _scored(forward, data, listed, wanted.control, ranks)
        if answers:
            said = _answers(forward, split, count, wanted, ranks, answers)
            for row in made:
                if row["id"] in said:
                    row["answer"] = said[row["id"]]
        rows += made
        skipped += [(f"{name}@{count}", reason) for name, reason in [*listed.skipped, *broken]]
    if not rows:
        raise DataError(f"{split.folder}: no episode could be scored; {skipped[0][0]}: {skipped[0][1]}")
    return Scored(rows, skipped)


def _scored(forward: Forward, data: RunData, listed: Listed, control: Control, ranks: Ranks) -> Scored:
    planned = sequential_rows(data.group_tables(), row_tokens=data.config.row_tokens)
    found: list[Any] = []
    with torch.no_grad():
        for turn in turns(planned, lambda members: data.batch(members, 0), ranks):
            batch = apply_control(turn.batch, control).to(ranks.device)
            scores = leaf_scores(forward(batch, turn.vision_calls), batch).float().cpu()  # type: ignore[arg-type]
            lengths = torch.bincount(turn.batch.target_leaf, minlength=scores.numel())
            injured = dict(turn.batch.skipped)
            for (_, number), leaves in zip(turn.members, turn.batch.choice_leaves, strict=True):
                reason = injured.get(listed.asked[number].id, "")
                row = _row(listed, number, data) | {
                    "scores": scores[leaves].tolist(),
                    "tokens": lengths[leaves].tolist(),
                }
                found.append([number, row, reason])
    every = in_order(found)
    return Scored([row for _, row, why in every if not why], [(row["id"], why) for _, row, why in every if why])


def _row(listed: Listed, number: int, data: RunData) -> dict[str, Any]:
    asked, image = listed.asked[number], listed.rows.numbers[listed.asked[number].image]
    return {
        "id": asked.id,
        "task": "lcl",
        "shots": listed.shots,
        "names": list(asked.names),
        "label": asked.side,
        "pair": "/".join(sorted(asked.names)),
        "image": asked.image,
        "key": data.shards[0].key(image),
    }


def _answers(forward: Forward, split: Split, shots: int, wanted: Condition, ranks: Ranks, first: int) -> dict[str, str]:
    """Greedy answers of the first queries by their id; what was generated is behind the question alone."""
    data, _ = split.data(shots, wanted.ablation, candidates=False, first=first)
    room = data.config.row_tokens - NEW_TOKENS
    tables = data.group_tables()
    planned = sequential_rows(tables, row_tokens=max(room, int(tables[0].lengths_in(0).max())))
    found: list[Any] = []

    def batch_of(members: Members) -> Batch:
        return data.batch(members, 0)

    for turn in turns(planned, batch_of, ranks):
        batch = apply_control(turn.batch, wanted.control)
        texts = continue_row(
            forward,
            batch,
            data.tokenizer,
            [{}] * len(batch.sample_ids),
            linking=data.spec.linking,
            device=ranks.device,
            vision_calls=turn.vision_calls,
            max_new_tokens=NEW_TOKENS,
            finished=all_agree,
        )
        found += [[name, text] for name, (text,) in zip(batch.sample_ids, texts, strict=True)]
    return {name: text for name, text in in_order(found)}
