"""Prediction rows for eval/events.py: generated inferences, and 50 ranked candidates per (image, event, relation).

In: a forward, the event samples of a split. Out: generation rows and ranking rows, equal on every rank.
The stages of a ranking:
  1. pool          every inference of the split; `events.draw_candidates` completes the gold ones to 50
  2. link          names of regions in a candidate become mentions, gold or not, so that none is told by its links
  3. pieces        candidates as leaves of one prompt; what passes row_tokens is cut between leaves
  4. score         mean log-likelihood per token of every leaf
Decision: candidates are alternatives that do not see each other, so a cut repeats the prompt and changes no score.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from eventlens_ds.data.encode import EncodeSpec, group_lengths, rendered_group
from eventlens_ds.data.lengths import read_image_samples
from eventlens_ds.data.loader import RunData
from eventlens_ds.data.packing import GroupTable, sequential_rows
from eventlens_ds.data.prompts import PromptStyle, RenderedGroup, region_name, render, text_of
from eventlens_ds.data.records import Batch, EncodedGroup, Group, ImageRecord, RegionRef, Sample, Tokens
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.data.sources.visualcomet import RELATIONS
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.eval import events
from eventlens_ds.eval.generate import continue_row, region_mentions
from eventlens_ds.eval.score import Forward, Members, Ranks, Scored, in_order, turns
from eventlens_ds.model.objective import leaf_scores

GENERATIONS, TOP_P, NEW_TOKENS = 5, 0.9, 20
"""Decoding of VisualCOMET (Park et al. 2020): five samples by nucleus .9, of at most 20 tokens."""


class Event(NamedTuple):
    """One (image, event, relation) to complete. member: its (table, group); references: gold texts."""

    member: tuple[int, int]
    sample: Sample
    image: ImageRecord
    event: str
    references: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """What both kinds of rows begin with."""
        relation = self.sample.field("relation")
        return {"id": self.sample.id, "image": self.image.img_fn, "event": self.event, "relation": relation}


def first_events(data: RunData, count: int) -> list[Event]:
    """The first `count` inference samples (intent, before, after) in the order of the data.

    Raises DataError when there is none.
    """
    found: list[Event] = []
    for table, groups in enumerate(data.groups):
        for group_number in range(len(groups)):
            group = data.group(table, group_number)
            for sample in group.samples:
                if sample.field("relation") in RELATIONS and len(found) < count:
                    found.append(_event((table, group_number), sample, group.images[0], data.spec.style))
            if len(found) >= count:
                return found
    if not found:
        raise DataError(f"{data.shards[0].folder}/{data.split}: holds no event with intent, before or after")
    return found


def _event(member: tuple[int, int], sample: Sample, image: ImageRecord, style: PromptStyle) -> Event:
    event = render(Group(sample.task, (image,), (replace(sample, targets=(dict(sample.turns)["event"],)),)), style)
    return Event(member, sample, image, _texts(event)[0], _texts_of(sample, image, style))


def _texts(rendered: RenderedGroup) -> tuple[str, ...]:
    return tuple(text_of(leaf) for sample in rendered.samples for leaf in sample.leaves)


def _texts_of(sample: Sample, image: ImageRecord, style: PromptStyle) -> tuple[str, ...]:
    """The targets of a sample as a reader sees them."""
    return _texts(render(Group(sample.task, (image,), (sample,)), style))


def inference_texts(shards: ShardSet, style: PromptStyle) -> Iterator[str]:
    """Every inference (intent, before, after) of a split, people named as in prompts."""
    for i in range(shards.num_images):
        image, samples = read_image_samples(shards, i)
        for _, _, sample in samples:
            if sample.task == "event" and sample.field("relation") in RELATIONS:
                yield from _texts_of(sample, image, style)


def known_texts(folders: Sequence[str], split: str, style: PromptStyle) -> tuple[frozenset[str] | None, str]:
    """Training inferences as `events.mark_novel` wants them, or None and why there are none."""
    known: set[str] = set()
    for folder in folders:
        try:
            shards = ShardSet.open(folder, split)
        except UserError as error:
            return None, f"training texts: {error}"
        known |= {events.same_people(text) for text in inference_texts(shards, style)}
    return (frozenset(known), "") if known else (None, "training texts: the training data hold no inference")


def generation_rows(
    forward: Any,
    data: RunData,
    found: Sequence[Event],
    ranks: Ranks,
    *,
    num_samples: int = GENERATIONS,
    top_p: float = TOP_P,
    max_new_tokens: int = NEW_TOKENS,
    seed: int = 0,
) -> Scored:
    """Generation rows without novel marks, in the order of `found`, and the events that got none. A collective.

    forward: as generate.Forward. The events of one image are continued behind one prompt.
    """
    groups, lengths = _by_image(data, found)
    planned = sequential_rows([_table("events", lengths)], row_tokens=data.config.row_tokens)

    def batch_of(members: Members) -> Batch:
        return data.finish(data.collate([data.encode(groups[i][0], *groups[i][1]) for _, i in members], 0))

    made: list[Any] = []
    for turn in turns(planned, batch_of, ranks):
        texts = continue_row(
            forward,
            turn.batch,
            data.tokenizer,
            region_mentions([groups[i][0] for _, i in turn.members], data.tokenizer, data.spec.style),
            # No region reaches a row of a blind run, so a name that is generated must not fetch one.
            linking="none" if data.config.control == "blank" else data.spec.linking,
            device=ranks.device,
            vision_calls=turn.vision_calls,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            top_p=top_p,
            seed=seed,
        )
        injured = dict(turn.batch.skipped)
        made += [[turn.place, name, each, injured.get(name, "")] for name, each in zip(turn.batch.sample_ids, texts)]
    made = in_order(made)
    reasons = {s.id: why for _, i, why in planned.refused for s in groups[i][0].samples}
    reasons |= {name: reason for _, name, _, reason in made if reason}
    texts_of = {name: each for _, name, each, _ in made}
    rows = [
        {**e.row(), "references": list(e.references), "generations": texts_of[e.sample.id]}
        for e in found
        if e.sample.id not in reasons
    ]
    return Scored(rows, [(e.sample.id, f"generation: {reasons[e.sample.id]}") for e in found if e.sample.id in reasons])


def _by_image(data: RunData, found: Sequence[Event]) -> tuple[list[tuple[Group, tuple[int, int]]], list[int]]:
    """The events of every (table, group) as a group of their own, with their place in the data, and its tokens."""
    together: dict[tuple[int, int], list[Event]] = {}
    for event in found:
        together.setdefault(event.member, []).append(event)
    groups = [
        (Group("event", (some[0].image,), tuple(e.sample for e in some)), member) for member, some in together.items()
    ]
    lengths = []
    for group, _ in groups:
        prefix, samples = group_lengths(rendered_group(group, data.tokenizer, data.spec), data.tokenizer, data.spec)
        lengths.append(prefix + sum(s.stem + s.leaves for s in samples))
    return groups, lengths


class Ranking(NamedTuple):
    """An event with its candidates, gold ones first, and the pieces (first leaf, last leaf, tokens) that fit a row."""

    event: Event
    gold: tuple[str, ...]
    others: tuple[str, ...]
    pieces: tuple[tuple[int, int, int], ...]

    def group(self) -> Group:
        """One sample whose targets are all candidates."""
        image = self.event.image
        targets = tuple(linked(text, image) for text in (*self.gold, *self.others))
        return Group(self.event.sample.task, (image,), (replace(self.event.sample, targets=targets),))


def rank_candidates(
    event: Event, pool: Sequence[tuple[str, str]], tokenizer: PieceTokenizer, spec: EncodeSpec, budget: int, seed: int
) -> Ranking:
    """Draw the candidates of an event and cut them into pieces of at most `budget` tokens, prompt included."""
    # An inference given twice by the annotators is one candidate.
    gold = tuple({events.tokenize_python(text): text for text in event.references}.values())
    row = event.row()
    key = f"{row['image']}/{row['event']}/{row['relation']}"
    ranking = Ranking(event, gold, tuple(events.draw_candidates(gold, pool, seed=seed, key=key)), ())
    rendered = rendered_group(ranking.group(), tokenizer, spec)
    (sample,) = rendered.samples
    alone = [
        group_lengths(rendered._replace(samples=(sample._replace(leaves=(leaf,)),)), tokenizer, spec)
        for leaf in sample.leaves
    ]
    return ranking._replace(pieces=_cut(alone[0][0] + alone[0][1][0].stem, [s.leaves for _, (s,) in alone], budget))


def _cut(prompt: int, leaves: Sequence[int], budget: int) -> tuple[tuple[int, int, int], ...]:
    """(first, last, tokens) of runs of leaves; a leaf that does not fit by itself makes a piece that is refused."""
    pieces: list[tuple[int, int, int]] = []
    first, tokens = 0, prompt
    for i, length in enumerate(leaves):
        if i > first and tokens + length > budget:
            pieces.append((first, i, tokens))
            first, tokens = i, prompt
        tokens += length
    return (*pieces, (first, len(leaves), tokens))


def linked(text: str, image: ImageRecord) -> Tokens:
    """Text with the names of the image's regions ("person2") as mentions; any other name stays text."""
    named = {region_name(region.name, i): RegionRef(0, i) for i, region in enumerate(image.regions)}
    if not named:
        return (text,)
    pattern = "|".join(re.escape(name) for name in sorted(named, key=len, reverse=True))
    parts = re.split(rf"(?<!\w)({pattern})(?!\w)", text)
    return tuple(named[part] if i % 2 else part for i, part in enumerate(parts) if part)


def with_leaves(group: EncodedGroup, first: int, last: int) -> EncodedGroup:
    """The group with leaves first..last-1 only; prompt, images and regions stay as they are."""
    wanted = np.arange(first, last)
    keep = np.ones(len(group.parents), bool)
    keep[group.leaf_segment] = False
    keep[group.leaf_segment[wanted]] = True
    renumber = np.cumsum(keep) - 1
    index = np.concatenate([np.arange(start, end) for start, end in group.bounds[keep]])
    ends = np.cumsum(group.bounds[keep, 1] - group.bounds[keep, 0])
    parents = group.parents[keep]
    return replace(
        group,
        input_ids=group.input_ids[index],
        image_slots=group.image_slots[index],
        region_slots=group.region_slots[index],
        soft_slots=group.soft_slots[index],
        tag_slots=None if group.tag_slots is None else group.tag_slots[index],
        start_slots=group.start_slots[index],
        parents=np.where(parents >= 0, renumber[parents], -1).astype(np.int32),
        bounds=np.stack([np.concatenate([[0], ends[:-1]]), ends], 1).astype(np.int32),
        leaf_segment=renumber[group.leaf_segment[wanted]].astype(np.int32),
        leaf_sample=group.leaf_sample[wanted],
        leaf_weight=group.leaf_weight[wanted],
    )


def ranking_rows(forward: Forward, data: RunData, found: Sequence[Event], ranks: Ranks, *, seed: int = 0) -> Scored:
    """Ranking rows in the order of `found`, and the events that were not scored. A collective."""
    pool = events.candidate_pool(text for shards in data.shards for text in inference_texts(shards, data.spec.style))
    budget = data.config.row_tokens
    rankings = [rank_candidates(e, pool, data.tokenizer, data.spec, budget, seed) for e in found if e.references]
    pieces = [(r, first, last, tokens) for r, made in enumerate(rankings) for first, last, tokens in made.pieces]
    planned = sequential_rows([_table("candidates", [p[3] for p in pieces])], row_tokens=budget)

    def batch_of(members: Members) -> Batch:
        encoded = []
        for _, i in members:
            r, first, last, tokens = pieces[i]
            made = with_leaves(data.encode(rankings[r].group(), *rankings[r].event.member), first, last)
            if made.num_tokens != tokens:
                raise ValueError(f"candidates of {made.sample_ids[0]}: {made.num_tokens} tokens, planned {tokens}")
            encoded.append(made)
        return data.finish(data.collate(encoded, 0))

    scored: list[Any] = []
    with torch.no_grad():
        for turn in turns(planned, batch_of, ranks):
            moved = turn.batch.to(ranks.device)
            scores = leaf_scores(forward(moved, turn.vision_calls), moved).float().tolist()
            injured = dict(turn.batch.skipped)
            for _, i in turn.members:
                r, first, last, _ = pieces[i]
                reason = injured.get(rankings[r].event.sample.id, "")
                scored.append([turn.place, r, first, scores[: last - first], reason])
                scores = scores[last - first :]
    return _join(rankings, in_order(scored), {pieces[i][0]: reason for _, i, reason in planned.refused})


def _join(rankings: Sequence[Ranking], scored: list[Any], refused: dict[int, str]) -> Scored:
    """Rows of the rankings of which every piece was scored."""
    scores: dict[int, dict[int, list[float]]] = {}
    reasons = dict(refused)
    for _, r, first, values, reason in scored:
        scores.setdefault(r, {})[first] = values
        if reason:
            reasons[r] = reason
    rows = [
        {
            **made.event.row(),
            "candidates_gold": list(made.gold),
            "candidates_other": list(made.others),
            "scores": [s for _, part in sorted(scores[r].items()) for s in part],
        }
        for r, made in enumerate(rankings)
        if r not in reasons
    ]
    return Scored(rows, [(rankings[r].event.sample.id, f"candidates: {reasons[r]}") for r in sorted(reasons)])


def _table(name: str, lengths: Sequence[int] | np.ndarray) -> GroupTable:
    return GroupTable(name, "", np.asarray(lengths, np.int32), np.ones(len(lengths), np.int16))
