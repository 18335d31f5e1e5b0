"""Prediction rows of the tasks that are answered in words: caption, rec, reg, vqa, vsr, pope.

In: a forward, RunData of one task. Out: rows {"id", "task", "image", "key": key of the image in its shard, "question":
the prompt, "answer" ("caption" for caption and reg)} with the gold that the metric reads, equal on every rank:
  caption  "references": every caption of the image     rec  "box", "width", "height", "split"
  reg      "references": every expression of the box    vqa  "answers", "answer_type"
  vsr      "label": 1 or 0                              pope "label": yes or no, "split": its setting
Decision: one row per question, but one per image for captions: the first sample of an image asks, and the others are
its references. Questions on one image share its prompt, and pieces are cut so that prompts and what may be generated
behind them fit a row. Ranks stop a row together, when the last of their texts has ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from eventlens_ds.data.controls import Control, apply_control, permutable
from eventlens_ds.data.encode import group_lengths, rendered_group
from eventlens_ds.data.lengths import read_image_samples
from eventlens_ds.data.loader import RunData
from eventlens_ds.data.packing import GroupTable, sequential_rows
from eventlens_ds.data.prompts import PromptStyle, render, text_of
from eventlens_ds.data.records import Batch, Group, ImageRecord, Sample
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.eval import captions
from eventlens_ds.eval.beams import Search, search_row
from eventlens_ds.eval.generate import Forward, continue_row, region_mentions
from eventlens_ds.eval.request import Decoding
from eventlens_ds.eval.score import Members, Ranks, Scored, in_order, turns
from eventlens_ds.runtime.distributed import all_agree

DESCRIBED = ("caption", "reg")
"""Tasks scored by eval/captions.py, whose rows say "caption"."""


class Question(NamedTuple):
    """A sample that is asked, and the gold of its row. member: its (table, group)."""

    member: tuple[int, int]
    sample: Sample
    image: ImageRecord
    gold: dict[str, Any]


def questions(data: RunData, task: str) -> tuple[list[Question], list[tuple[str, str]]]:
    """What is asked, in the order of the data, and (sample id, reason) of samples that have nothing to compare with.

    Raises DataError when no sample has, or naming the sample whose field cannot be read.
    """
    found: list[Question] = []
    without: list[tuple[str, str]] = []
    references: dict[tuple[int, str], list[str]] = {}
    for member, sample, image in _samples(data, task):
        at = (member[0], image.key)
        if task == "caption" and at in references:
            references[at] += texts_of(sample, image, data.spec.style)
            continue
        gold = _gold(sample, image, data)
        if isinstance(gold, dict) and task == "caption":
            references[at] = gold["references"]
        if isinstance(gold, str):
            without.append((sample.id, gold))
        else:
            found.append(Question(member, sample, image, gold))
    if not found:
        where = f"{data.shards[0].folder}/{data.split}"
        reason = f", e.g. {without[0][0]}: {without[0][1]}" if without else ""
        raise DataError(f"{where}: no sample of {task} can be scored{reason}")
    return found, without


def _samples(data: RunData, task: str) -> Iterator[tuple[tuple[int, int], Sample, ImageRecord]]:
    for table, groups in enumerate(data.groups):
        for number in range(len(groups)):
            group = data.group(table, number)
            yield from (((table, number), s, group.images[0]) for s in group.samples if s.task == task)


def texts_of(sample: Sample, image: ImageRecord, style: PromptStyle) -> list[str]:
    """The targets of a sample as a reader sees them."""
    (made,) = render(Group(sample.task, (image,), (sample,)), style).samples
    return [text_of(leaf) for leaf in made.leaves]


_FIELDS = {"rec": "box", "vqa": "answers", "vsr": "label", "pope": "label"}
"""The field that holds the gold of a task."""


def _gold(sample: Sample, image: ImageRecord, data: RunData) -> dict[str, Any] | str:
    """The gold of a row, or why there is none (a blind split)."""
    if not sample.targets:
        return "has no target"
    if sample.task in DESCRIBED:
        return {"references": texts_of(sample, image, data.spec.style)}
    name = _FIELDS[sample.task]
    if not (text := sample.field(name)):
        return f"field {name} is empty"
    if sample.task == "pope":
        return {"label": text, "split": sample.field("setting")}
    try:
        value = json.loads(text)
    except ValueError:
        raise DataError(f"{sample.id}: field {name} is no JSON: {ascii(text)[:60]}") from None
    if sample.task == "rec":
        split = sample.field("split") or image.split or data.split
        return {"box": value, "width": image.width, "height": image.height, "split": split}
    if sample.task == "vqa":
        return {"answers": value, "answer_type": sample.field("answer_type")} if value else "has no answer"
    return {"label": value}


def answer_rows(
    forward: Forward,
    data: RunData,
    found: Sequence[Question],
    ranks: Ranks,
    decoding: Decoding,
    control: Control = "none",
) -> Scored:
    """Rows in the order of `found`, and the questions that got none. A collective.

    forward: as generate.Forward. Under the control permute_regions, "permuted" says of a row
    whether its image has regions that could trade places. Raises UserError when no prompt fits a row.
    """
    task = found[0].sample.task
    pieces = _pieces(data, found, decoding.beams * decoding.max_new_tokens)
    table = GroupTable(task, "", np.asarray([p.tokens for p in pieces], np.int32), np.ones(len(pieces), np.int16))
    planned = sequential_rows([table], row_tokens=data.config.row_tokens)

    def batch_of(members: Members) -> Batch:
        return data.finish(data.collate([data.encode(pieces[i].group, *pieces[i].member) for _, i in members], 0))

    answer = _answerer(forward, data, ranks, decoding, control)
    made: list[Any] = []
    for turn in turns(planned, batch_of, ranks):
        batch = apply_control(turn.batch, control)
        texts = answer(batch, [pieces[i].group for _, i in turn.members], turn.vision_calls)
        injured, moved = dict(batch.skipped), permutable(turn.batch)
        for name, text, image in zip(batch.sample_ids, texts, batch.sample_image, strict=True):
            made.append([turn.place, name, text, injured.get(name, ""), moved[image]])
    made = in_order(made)
    reasons = {s.id: why for _, i, why in planned.refused for s in pieces[i].group.samples}
    answers = {name: (text, permuted) for _, name, text, why, permuted in made if not why}
    reasons |= {name: why for _, name, _, why, _ in made if why}
    rows = [_row(q, *answers[q.sample.id], data, control) for q in found if q.sample.id in answers]
    return Scored(rows, [(q.sample.id, reasons[q.sample.id]) for q in found if q.sample.id in reasons])


def _row(question: Question, text: str, permuted: bool, data: RunData, control: Control) -> dict[str, Any]:
    sample, image = question.sample, question.image
    (rendered,) = render(Group(sample.task, (image,), (sample,)), data.spec.style).samples
    row = {"id": sample.id, "task": sample.task, "image": image.img_fn, "key": image.key}
    row |= {"question": text_of(rendered.stem), "caption" if sample.task in DESCRIBED else "answer": text}
    row |= {k: v for k, v in question.gold.items() if v != ""}
    return row | ({"permuted": permuted} if control == "permute_regions" else {})


def _answerer(
    forward: Forward, data: RunData, ranks: Ranks, decoding: Decoding, control: Control
) -> Callable[[Batch, Sequence[Group], int], list[str]]:
    """answer(batch, its groups, vision calls) -> the text of every sample."""
    # No region reaches a blank row, so a name that is generated must not fetch one.
    unseen = "blank" in (control, data.config.control)
    shared: dict[str, Any] = {"linking": "none" if unseen else data.spec.linking, "device": ranks.device}
    shared["finished"] = all_agree
    new = decoding.max_new_tokens
    search = Search(decoding.beams, new, decoding.length_penalty, decoding.repetition_penalty)

    def answer(batch: Batch, groups: Sequence[Group], calls: int) -> list[str]:
        mentions = region_mentions(groups, data.tokenizer, data.spec.style)
        given = (forward, batch, data.tokenizer, mentions)
        if decoding.beams > 1:
            return search_row(*given, search, vision_calls=calls, **shared)
        return [text for (text,) in continue_row(*given, vision_calls=calls, max_new_tokens=new, **shared)]

    return answer


class _Piece(NamedTuple):
    """Questions on one image that stand in a row together. tokens: what the plan counts for them."""

    group: Group
    member: tuple[int, int]
    tokens: int


def _pieces(data: RunData, found: Sequence[Question], growth: int) -> list[_Piece]:
    """Questions by (table, group), cut so that prompts and `growth` tokens behind each fit a row. A question that
    fits only without its growth stands alone in a row."""
    budget = data.config.row_tokens
    together: dict[tuple[int, int], list[Question]] = {}
    for question in found:
        together.setdefault(question.member, []).append(question)
    made: list[_Piece] = []
    for member, some in together.items():
        # The answer is not read, but a sample is encoded with one.
        samples = tuple(replace(q.sample, targets=q.sample.targets[:1]) for q in some)
        group = Group(samples[0].task, (some[0].image,), samples)
        prefix, lengths = group_lengths(rendered_group(group, data.tokenizer, data.spec), data.tokenizer, data.spec)
        first, needed, grown = 0, prefix, prefix
        for i, length in enumerate(lengths):
            own = length.stem + max(length.leaves, growth)
            if i > first and grown + own > budget:
                made.append(_Piece(replace(group, samples=samples[first:i]), member, max(needed, min(grown, budget))))
                first, needed, grown = i, prefix, prefix
            needed += length.stem + length.leaves
            grown += own
        made.append(_Piece(replace(group, samples=samples[first:]), member, max(needed, min(grown, budget))))
    return made


def training_floor(folders: Sequence[str], split: str, task: str, style: PromptStyle) -> tuple[str | None, str]:
    """The most frequent training text of caption or reg, or None and why there is none."""

    def texts() -> Iterator[str]:
        for folder in folders:
            shards = ShardSet.open(folder, split)
            for i in range(shards.num_images):
                image, samples = read_image_samples(shards, i)
                for _, _, sample in samples:
                    if sample.task == task:
                        yield from texts_of(sample, image, style)

    try:
        constant = captions.most_frequent(texts())
    except UserError as error:
        return None, f"training texts: {error}"
    return constant, "" if constant is not None else f"training texts: the training data hold no {task}"
