"""The words of Link-Context Learning's episodes, as its released code renders them.

In: a Sample of task lcl, whose turns are ("example", (ImageRef, label)) ... ("query", (ImageRef, question)). Out: runs
of text, `ImageRef`s and `Mark`s for the context, the question and each answer; data/prompts.py makes pieces of them.
A label is a piece of its own, so lengths are sums of stored pieces whatever the label (P4).
Decision: byte for byte the form of the released code [released code, `causal_v1.0`]: every turn starts with <s>, of
the demonstrations only the first ends with </s>. What differs is named in docs/FIDELITY.md: visual tokens stand alone,
without <im_start> and <im_end>, which only Shikra's vocabulary has.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Literal

from eventlens_ds.data.records import ImageRef, Sample, Tokens
from eventlens_ds.errors import UserError

EpisodeForm = Literal["released", "plain"]
"""released: the conversation of the released code. plain: questions and answers alone, for language models that were
tuned on no conversation and for short contexts [ours]."""

IMAGE = "<image>"
LABEL = "{label}"
TASK = (
    "You should find the causal relationship between the examples I am going to show you. "
    "And use that to answer to the [FINAL QUESTION]."
)
FINAL = "[FINAL QUESTION]: "
EXAMPLE_QUESTION = f"[BEGIN EXAMPLE] What is in the image {IMAGE}?"
EXAMPLE_ANSWER = f'there is "{LABEL}" in the image. [END EXAMPLE]'
QUERY = f"Based on the previous examples, what is in the image {IMAGE}?"
"""What evaluation asks [released code], and training too unless data.episodes.queries names a file."""
ANSWER = f'there is "{LABEL}" in the image.'
PLAIN_QUESTION = f"What is in the image {IMAGE}?"


class Mark(Enum):
    """A special token inside a prompt; nothing where the tokenizer has none."""

    BOS = "bos"
    EOS = "eos"


Part = str | ImageRef | Mark


def context(sample: Sample, form: EpisodeForm) -> list[Part]:
    """Everything before the query turn. The token that begins a row is not part of it."""
    examples = [tokens for role, tokens in sample.turns if role == "example"]
    if form == "plain":
        return [part for shown in examples for part in _turn(shown, PLAIN_QUESTION, ANSWER, " ", " ")]
    # Without demonstrations the released code has the final turn alone, and its head stands in for the context.
    made: list[Part] = [TASK if examples else FINAL]
    for i, shown in enumerate(examples):
        made += [Mark.BOS] if i else []
        made += _turn(shown, EXAMPLE_QUESTION, EXAMPLE_ANSWER, " USER: ", " ASSISTANT: ")
        made += [] if i else [Mark.EOS]
    return made


def question(sample: Sample, form: EpisodeForm) -> list[Part]:
    """The query turn up to where the answer begins."""
    ((image, text),) = (tokens for role, tokens in sample.turns if role == "query")
    assert isinstance(image, ImageRef) and isinstance(text, str)
    head, tail = text.split(IMAGE)
    if form == "plain":
        return [f" {head}", image, tail]
    shown = any(role == "example" for role, _ in sample.turns)
    start: list[Part] = [Mark.BOS, FINAL] if shown else []
    return [*start, f" USER: {head}", image, f"{tail} ASSISTANT:"]


def answer(label: Tokens) -> list[Part]:
    """` there is "label" in the image.`"""
    (name,) = label
    assert isinstance(name, str)
    head, tail = ANSWER.split(LABEL)
    return [f" {head}", name, tail]


def _turn(shown: Tokens, asked: str, said: str, user: str, assistant: str) -> list[Part]:
    image, label = shown
    assert isinstance(image, ImageRef) and isinstance(label, str)
    before, after = asked.split(IMAGE)
    head, tail = said.split(LABEL)
    return [f"{user}{before}", image, f"{after}{assistant}{head}", label, tail]


def queries(path: str) -> tuple[str, ...]:
    """Questions that training draws from: a JSON list of strings with one <image> each, as the released ICL.json is;
    without a file the one question of evaluation. Raises UserError naming what is wrong with the file."""
    if not path:
        return (QUERY,)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.episodes.queries {path}: {error}") from None
    if not isinstance(found, list) or not found or not all(isinstance(q, str) for q in found):
        raise UserError(f"data.episodes.queries {path}: wants a JSON list of strings")
    for number, text in enumerate(found):
        if text.count(IMAGE) != 1:
            raise UserError(f"data.episodes.queries {path}: question {number} has {text.count(IMAGE)} {IMAGE}, not one")
    return tuple(found)


def template_words() -> list[str]:
    """The templates as text, for the embedded tokenizer."""
    shown = [
        TASK,
        f" USER: {EXAMPLE_QUESTION} ASSISTANT: {EXAMPLE_ANSWER}",
        f"{FINAL} USER: {QUERY} ASSISTANT:",
        " USER:",
    ]
    return [text.replace(IMAGE, " ").replace(LABEL, " ") for text in shown]
