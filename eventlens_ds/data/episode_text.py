"""The words of Link-Context Learning's episodes, as its released code renders them.

In: a Sample of task lcl: the labels of its demonstrations, and the query turn. Out: runs of text, `ImageRef`s and
`Mark`s for the opening, each demonstration, the question and each answer; data/prompts.py makes pieces of them. A label
is a piece of its own, so lengths are sums of stored pieces whatever the label (P4).
Decision: byte for byte the form of the released code [released code, `causal_v1.0`]: every turn starts with <s>, of
the demonstrations only the first ends with </s>. What differs is named in docs/FIDELITY.md: visual tokens stand alone,
without <im_start> and <im_end>, which only Shikra's vocabulary has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from eventlens_ds.data.records import Sample, Tokens
from eventlens_ds.errors import UserError

EpisodeForm = Literal["released", "plain", "short", "chat"]
"""released: the conversation of the released code. Ours: plain, questions and answers alone, for language models that
were tuned on no conversation; short, each image with its name and no question, for the smallest contexts; chat, turns
of the tokenizer's own chat template."""

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
SHORT_ANSWER = f"{LABEL}."
"""Nothing stands between an image and its name, so that what follows an image is what followed one like it."""


class ImageRef(NamedTuple):
    """The place of an image of the sample, counted from 0."""

    image: int


class Mark(NamedTuple):
    """A special token inside a prompt, by its text. BOS and EOS are the tokenizer's own, whatever their text, and
    nothing where it has none."""

    token: str


BOS, EOS = Mark("<s>"), Mark("</s>")

Part = str | ImageRef | Mark


class ChatWords(NamedTuple):
    """What a chat template puts around turns: before the first question, between a question and its answer, between an
    answer and the next question, and between the last question and where the answer begins."""

    first: tuple[Part, ...]
    said: tuple[Part, ...]
    asked: tuple[Part, ...]
    last: tuple[Part, ...]


def context(sample: Sample, form: EpisodeForm, chat: ChatWords | None = None) -> list[Part]:
    """Everything before the query turn. The token that begins a row is not part of it."""
    turns = demonstrations(sample, form, chat)
    return [*opening(sample, form, chat), *(part for turn in turns for side in turn for part in side)]


def opening(sample: Sample, form: EpisodeForm, chat: ChatWords | None = None) -> list[Part]:
    """What comes before the first demonstration."""
    if form == "chat":
        assert chat is not None, "form chat without the words of a template"
        # In the first question, because not every template has a system turn.
        return [*chat.first, f"{TASK} "]
    if form == "released":
        # Without demonstrations the released code has the final turn alone, and its head stands in for the context.
        return [TASK if sample.examples else FINAL]
    return []


def demonstrations(
    sample: Sample, form: EpisodeForm, chat: ChatWords | None = None
) -> list[tuple[list[Part], list[Part]]]:
    """(question, answer) of every demonstration; an answer ends with what stands before the next question."""
    made: list[tuple[list[Part], list[Part]]] = []
    for i, label in enumerate(sample.examples):
        image = ImageRef(i)
        if form == "released":
            head, tail = _split(EXAMPLE_QUESTION, IMAGE)
            asked: list[Part] = [*([BOS] if i else []), f" USER: {head}", image, f"{tail} ASSISTANT:"]
            said = [*_answer(label, f" {EXAMPLE_ANSWER}"), *([] if i else [EOS])]
        elif form == "short":
            asked, said = [image], _answer(label, SHORT_ANSWER)
        elif form == "plain":
            head, tail = _split(PLAIN_QUESTION, IMAGE)
            asked, said = [f" {head}", image, tail], _answer(label, f" {ANSWER}")
        else:
            assert chat is not None, "form chat without the words of a template"
            head, tail = _split(PLAIN_QUESTION, IMAGE)
            asked, said = [head, image, tail, *chat.said], [*_answer(label, ANSWER), *chat.asked]
        made.append((asked, said))
    return made


def question(sample: Sample, form: EpisodeForm, chat: ChatWords | None = None) -> list[Part]:
    """The query turn up to where the answer begins."""
    (text,) = dict(sample.turns)["query"]
    image = ImageRef(len(sample.examples))
    assert isinstance(text, str)
    head, tail = _split(text, IMAGE)
    if form == "short":
        return [image]
    if form == "plain":
        return [f" {head}", image, tail]
    if form == "chat":
        assert chat is not None, "form chat without the words of a template"
        return [head, image, tail, *chat.last]
    start: list[Part] = [BOS, FINAL] if sample.examples else []
    return [*start, f" USER: {head}", image, f"{tail} ASSISTANT:"]


def answer(label: Tokens, form: EpisodeForm = "released") -> list[Part]:
    """` there is "label" in the image.`, without the blank where a chat template has its own."""
    (name,) = label
    assert isinstance(name, str)
    if form == "short":
        return _answer(name, SHORT_ANSWER)
    return _answer(name, ANSWER if form == "chat" else f" {ANSWER}")


def _answer(label: str, form: str) -> list[Part]:
    head, tail = _split(form, LABEL)
    return [part for part in (head, label, tail) if part]


def _split(text: str, at: str) -> tuple[str, str]:
    head, tail = text.split(at)
    return head, tail


def chat_words(tokenizer: Any, where: str) -> ChatWords:
    """What the chat template of a Hugging Face tokenizer puts around turns. Raises UserError when it has none, or one
    that changes what is said."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"data.episodes.form chat: {where} has no chat template; use released or plain")
    said = ("QUESTIONONE", "ANSWERONE", "QUESTIONTWO")
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, said)]
    made = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    pieces = re.split("|".join(said), made)
    if len(pieces) != 4:
        raise UserError(f"data.episodes.form chat: the chat template of {where} does not keep three turns as they are")
    words = [_marked(piece, tokenizer.all_special_tokens) for piece in pieces]
    if words[0] and words[0][0] == Mark(str(tokenizer.bos_token)):
        # Every row begins with it anyhow.
        words[0] = words[0][1:]
    return ChatWords(*words)


def _marked(text: str, special: Sequence[str]) -> tuple[Part, ...]:
    """Text as plain runs and special tokens."""
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    found = re.split(f"({pattern})", text)
    return tuple(Mark(part) if i % 2 else part for i, part in enumerate(found) if part)


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
