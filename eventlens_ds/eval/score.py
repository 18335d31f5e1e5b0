"""Score rows with a model: candidate log-likelihoods as prediction rows, the same forwards on every rank.

In: a forward (engine or model), RunData of an evaluation split, a control. Out: prediction rows on every rank, in the
order of the data. Decision: an evaluation is a likelihood of given text, never a generation, so it needs one forward
per row, and ranks without a row run the missing row (P5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.data.controls import Control, apply_control, permutable
from eventlens_ds.data.encode import EncodeSpec
from eventlens_ds.data.loader import RunData, rank_batches
from eventlens_ds.data.packing import Row, sequential_rows, take_turns, vision_calls
from eventlens_ds.data.prompts import PromptStyle, render, text_of
from eventlens_ds.data.records import CHOICE_TASKS, Batch, Group
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.model.objective import leaf_scores
from eventlens_ds.runtime.build_model import tokenizer_path
from eventlens_ds.runtime.distributed import gather_objects

Forward = Callable[[Batch, int], torch.Tensor]
Members = Sequence[tuple[int, int]]
"""(table, group) pairs of a row."""


class Ranks(NamedTuple):
    """How the rows of an evaluation are shared: this rank of `size`, its device, images per call of the vision tower
    and loader processes."""

    rank: int
    size: int
    device: str
    vision_chunk: int
    workers: int = 0


class Turn(NamedTuple):
    """One forward of a rank: the row's place among all rows, its (table, group) pairs, its batch, the agreed calls of
    the vision tower. A missing row has no members."""

    place: int
    members: Members
    batch: Batch
    vision_calls: int


class Scored(NamedTuple):
    """Prediction rows, and (sample id, reason) of every sample that got none."""

    rows: list[dict[str, Any]]
    skipped: list[tuple[str, str]]


def turns(rows: Sequence[Row], batch_of: Callable[[Members], Batch], ranks: Ranks) -> Iterator[Turn]:
    """Every forward of this rank, equally many on all of them (P5): ranks take rows in turn, and the last turn may be
    the missing row."""
    mine: list[Members] = [() if i is None else rows[i].groups for i in take_turns(range(len(rows)), *ranks[:2])]
    batches = rank_batches(_Batches(batch_of, mine), workers=ranks.workers, prefetch=2)
    for turn, (members, batch) in enumerate(zip(mine, batches)):
        first = turn * ranks.size
        calls = vision_calls(rows[first : first + ranks.size], ranks.vision_chunk)
        yield Turn(first + ranks.rank, members, batch, calls)


class _Batches(Dataset):
    """Rows by number, made by a function."""

    def __init__(self, batch_of: Callable[[Members], Batch], rows: Sequence[Members]) -> None:
        self.batch_of, self.rows = batch_of, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.batch_of(self.rows[index])


def eval_data(
    config: RunConfig,
    tokenizer: PieceTokenizer,
    spec: EncodeSpec,
    folder: str,
    split: str,
    *,
    tasks: Iterable[str] = CHOICE_TASKS,
    limit: int = 0,
) -> RunData:
    """Samples of the tasks in a folder, blind ones too, in rows of eval.row_tokens. limit: images (0: all).

    Raises DataError when the split holds no sample of the tasks.
    """
    rows = replace(config.data, row_tokens=config.eval.row_tokens or config.data.row_tokens, tag_noise=0.0)
    return RunData(
        [folder],
        split,
        config=rows,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path(config),
        spec=spec,
        tasks=sorted(tasks),
        limit=limit,
        with_blind=True,
    )


def score_choices(
    forward: Forward,
    data: RunData,
    *,
    rank: int,
    world: int,
    device: str,
    vision_chunk: int,
    control: Control = "none",
    limit: int = 0,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """Prediction rows of all choice samples (a fixed subset of about `limit` when given), in the order of the data."""
    return score_split(forward, data, Ranks(rank, world, device, vision_chunk, workers), control, limit).rows


def score_split(forward: Forward, data: RunData, ranks: Ranks, control: Control = "none", limit: int = 0) -> Scored:
    """`score_choices` with the samples that were not scored: those of groups that no row holds, and those whose
    picture or box cannot be used. A collective; the result is the same on every rank and for every number of ranks."""
    planned = sequential_rows(data.group_tables(), row_tokens=data.config.row_tokens)
    rows = _head(planned, data, limit) if limit else planned
    found: list[dict[str, Any]] = []
    skipped: list[Any] = []
    with torch.no_grad():
        for turn in turns(rows, lambda members: data.batch(members, 0), ranks):
            batch = apply_control(turn.batch, control)
            moved = batch.to(ranks.device)
            scores = leaf_scores(forward(moved, turn.vision_calls), moved).float().cpu()
            groups = data.readable(turn.members)
            made = prediction_rows(batch, scores, groups, turn.place, data.spec.style)
            if control == "permute_regions":
                changed = permutable(turn.batch)
                for row, sample in zip(made, batch.choice_sample.tolist(), strict=True):
                    row["flags"]["permuted"] = changed[batch.sample_image[sample]]
            found += made
            skipped += [[turn.place, *entry] for entry in batch.skipped]
    reasons = {name: reason for _, name, reason in in_order(skipped)}
    refused = [
        (sample.id, reason) for table, group, reason in planned.refused for sample in data.group(table, group).samples
    ]
    every = sorted((row for part in gather_objects(found) for row in part), key=lambda row: row.pop("place"))
    return Scored([row for row in every if row["id"] not in reasons], [*refused, *reasons.items()])


def in_order(entries: list[Any]) -> list[Any]:
    """The lists of all ranks as one, sorted by their first entries, the places of their rows. A collective."""
    return sorted((entry for part in gather_objects(entries) for entry in part), key=lambda entry: entry[0])


def prediction_rows(
    batch: Batch, scores: torch.Tensor, groups: Sequence[Group], place: int, style: PromptStyle
) -> list[dict[str, Any]]:
    """One JSON-able row per choice sample of a batch; see eval/vcr.py for the keys."""
    lengths = torch.bincount(batch.target_leaf, minlength=scores.numel())
    texts = list(_texts(groups, style))
    rows = []
    for i, sample_index in enumerate(batch.choice_sample.tolist()):
        group, sample, question, candidates = texts[sample_index]
        leaves = batch.choice_leaves[i]
        label = int(batch.choice_labels[i])
        row = {
            "place": [place, i],
            "id": sample.id,
            "task": sample.task,
            "annot_id": sample.field("annot_id"),
            "image": group.images[0].img_fn,
            "key": group.images[0].key,
            "label": None if label < 0 else label,
            "scores": [float(x) for x in scores[leaves]],
            "tokens": lengths[leaves].tolist(),
            "flags": {
                name: sample.field(name) not in ("", "0", "false", "False") for name in ("which_person", "held_out")
            },
            "question": question,
            "candidates": candidates,
        }
        if sample.field("conditioned"):
            row["given_answer"] = int(sample.field("conditioned"))
        rows.append(row)
    return rows


def _texts(groups: Sequence[Group], style: PromptStyle) -> Iterator[tuple[Group, Any, str, list[str]]]:
    for group in groups:
        rendered = render(group, style)
        for sample, text in zip(group.samples, rendered.samples):
            yield group, sample, text_of(text.stem), [text_of(leaf) for leaf in text.leaves]


def _head(rows: Iterable[Row], data: RunData, limit: int) -> list[Row]:
    """The first rows that together hold `limit` samples: a fixed subset, as rows are in the order of the data."""
    kept: list[Row] = []
    samples = 0
    for row in rows:
        if samples >= limit:
            break
        kept.append(row)
        samples += sum(int(data.groups[t].last[g] - data.groups[t].first[g]) for t, g in row.groups)
    return kept
