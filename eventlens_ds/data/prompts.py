"""All prompt text of the project: a group of samples becomes pieces of text, regions still named by index.

In: a `Group` (structured text). Out: a `RenderedGroup`: the pieces of the shared prefix and, per sample, those of
the stem and of every continuation. A piece is tokenised on its own, so the length of a prompt is the sum of the
stored lengths of its pieces (P4). Decision: pretraining asks questions in the form that VCR asks them, because the
EventLens abstract uses instruct-style prompts in both stages to narrow the gap between them; the wording is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from eventlens_ds.data import episode_text
from eventlens_ds.data.episode_text import ChatWords, EpisodeForm, ImageRef, Mark, Part
from eventlens_ds.data.records import Group, RegionRef, Sample, Tokens

PROMPT_VERSION = 3
"""Raise it with any change of wording: lengths and plans are keyed by it."""

MAX_LISTED_REGIONS = 24
"""Regions named in the prefix; a region mentioned by a sample is listed even beyond it."""

RELATION_QUESTIONS: dict[str, tuple[str, str]] = {
    "place": ("Where is this?", "Where is this?"),
    "event": ("What is happening?", "What is {} doing?"),
    "intent": ("What is the intent?", "What does {} want?"),
    "before": ("What happened before?", "What did {} do before?"),
    "after": ("What happens next?", "What will {} do next?"),
}
"""Question of each relation without and with a subject, the first region that the event mentions."""

STEMS: dict[str, tuple[str, str, str]] = {
    "caption": (" Describe the picture. Answer:", "", ""),
    "rec": (" Can you locate ", "expression", " and let me know its coordinates? Answer:"),
    "reg": (" Describe the region ", "box", ". Answer:"),
    "vqa": (" ", "question", " Answer:"),
    "pope": (" ", "question", " Answer:"),
    "vsr": (" ", "statement", " Is this true? Answer:"),
}
"""Tasks that ask in one form: what stands before a turn of the sample, the turn's name or "" for none, what follows."""

HINT = (" According to", ", you are allowed to use or partially use the following tags: [", "].")
"""LION's head before the soft prompt, after it, and the end of the list [released code]."""


class PromptStyle(NamedTuple):
    """Choices of wording that a run makes (DataConfig explains them); part of every length and plan.

    tag_tokens: tokens that the tags of an image may take behind the soft prompt; -1: tags are not listed.
    episode, chat: the words of an episode, and of the chat template in form chat (data/episode_text.py)."""

    list_objects: bool = True
    event_context: Literal["event", "subject"] = "event"
    tag_tokens: int = -1
    episode: EpisodeForm = "released"
    chat: ChatWords | None = None


class Piece(NamedTuple):
    """Text that is tokenised on its own. `region` is the region it mentions, counted over the images of the
    group, or -1; `image` is the image whose visual tokens stand here, or -1 (then `text` is empty). `soft`: one
    token, the soft prompt (`text` is empty). `tag`: a tag of image `tag`, which may be left out, or -1.
    `mark`: a special token (`text` is empty), no token where the tokenizer has none."""

    text: str
    region: int = -1
    image: int = -1
    soft: bool = False
    tag: int = -1
    mark: Mark | None = None


class ShownTurn(NamedTuple):
    """A question and its answer before the stem; the answer carries a loss of this weight."""

    stem: tuple[Piece, ...]
    answer: tuple[Piece, ...]
    weight: float


class RenderedSample(NamedTuple):
    stem: tuple[Piece, ...]
    leaves: tuple[tuple[Piece, ...], ...]
    shown: tuple[ShownTurn, ...] = ()
    """Turns between prefix and stem whose answers are learned too (episodes); empty: they are part of the prefix."""


class RenderedGroup(NamedTuple):
    prefix: tuple[Piece, ...]
    samples: tuple[RenderedSample, ...]
    regions: tuple[tuple[int, ...], ...]
    """Per image: the annotated regions that reach the model, in the order of their slots."""


def region_name(name: str, box: int) -> str:
    """Name of a region in a prompt: class name and 1-based index among the boxes of its image, e.g. person2."""
    return f"{name}{box + 1}"


def used_regions(group: Group, style: PromptStyle) -> tuple[tuple[int, ...], ...]:
    """Regions of each image that reach the model: every one mentioned, and those that the prefix lists. An episode
    lists none."""
    listed = MAX_LISTED_REGIONS if style.list_objects and group.task != "lcl" else 0
    mentioned: list[set[int]] = [set() for _ in group.images]
    for sample in group.samples:
        for ref in mentions(sample):
            mentioned[ref.image].add(ref.box)
    return tuple(
        tuple(i for i in range(len(image.regions)) if i < listed or i in seen)
        for image, seen in zip(group.images, mentioned)
    )


def mentions(sample: Sample) -> Iterable[RegionRef]:
    """Every mention of a region in a sample, in reading order."""
    for tokens in (*(t for _, t in sample.turns), *sample.targets, *sample.candidates):
        yield from (t for t in tokens if isinstance(t, RegionRef))


def render(group: Group, style: PromptStyle = PromptStyle()) -> RenderedGroup:  # noqa: B008 - immutable
    """Render a group. All images stand in the prefix, each followed by the names of its regions if they are listed; in
    an episode they stand where its turns have them."""
    regions = used_regions(group, style)
    if group.task == "lcl":
        return _render_episodes(group, style, regions)
    slot = {(m, box): i for i, (m, box) in enumerate((m, b) for m, boxes in enumerate(regions) for b in boxes)}

    def pieces(*parts: str | Tokens) -> tuple[Piece, ...]:
        out: list[Piece] = []
        for part in parts:
            for token in (part,) if isinstance(part, str) else part:
                if isinstance(token, RegionRef):
                    name = group.images[token.image].regions[token.box].name
                    out.append(Piece(region_name(name, token.box), slot[token.image, token.box]))
                else:
                    out.append(Piece(token))
        return tuple(_lead_with_space(out))

    prefix: list[Piece] = []
    for m, boxes in enumerate(regions):
        prefix.append(Piece("", image=m))
        named: list[str | RegionRef] = ["Objects:"]
        for box in boxes:
            named += [" ", RegionRef(m, box)]
        prefix += pieces(tuple(named)) if style.list_objects else ()
        prefix += _tags(m, group.images[m].tags) if style.tag_tokens >= 0 else ()
    rendered = tuple(
        RenderedSample(
            pieces(*_stem(sample, style)),
            tuple(pieces((" ", *leaf)) for leaf in sample.targets or sample.candidates),
        )
        for sample in group.samples
    )
    return RenderedGroup(tuple(prefix), rendered, regions)


def _render_episodes(group: Group, style: PromptStyle, regions: tuple[tuple[int, ...], ...]) -> RenderedGroup:
    """The context as prefix, the query turn as stem. Samples share a group when they share the whole context; where
    answers of the context are learned, its turns stand between prefix and stem."""
    form, chat = style.episode, style.chat
    prefixes = set()
    samples = []
    for sample in group.samples:
        shown: tuple[ShownTurn, ...] = ()
        if sample.example_weights:
            turns = zip(episode_text.demonstrations(sample, form, chat), sample.example_weights, strict=True)
            shown = tuple(ShownTurn(_episode_pieces(q), _episode_pieces(a), weight) for (q, a), weight in turns)
        before = episode_text.opening if shown else episode_text.context
        prefixes.add(_episode_pieces(before(sample, form, chat)))
        stem = _episode_pieces(episode_text.question(sample, form, chat))
        leaves = tuple(_episode_pieces(episode_text.answer(x, form)) for x in sample.targets or sample.candidates)
        samples.append(RenderedSample(stem, leaves, shown))
    if len(prefixes) > 1:
        raise ValueError(f"group of {group.samples[0].id}: {len(prefixes)} contexts for one prefix")
    return RenderedGroup(prefixes.pop(), tuple(samples), regions)


def _episode_pieces(parts: Iterable[Part]) -> tuple[Piece, ...]:
    """Texts as they are: no blank moves, because the form is somebody else's, byte for byte."""
    made = []
    for part in parts:
        if isinstance(part, ImageRef):
            made.append(Piece("", image=part.image))
        else:
            made.append(Piece("", mark=part) if isinstance(part, Mark) else Piece(part))
    return tuple(made)


def _tags(m: int, tags: Sequence[str]) -> list[Piece]:
    """LION's soft prompt for image m [released code]; without tags there is nothing to hint at."""
    if not tags:
        return []
    listed = [Piece(f", {tag}" if i else tag, tag=m) for i, tag in enumerate(tags)]
    before, after, end = HINT
    return [Piece(before), Piece("", soft=True), Piece(after), *listed, Piece(end)]


def shorten_tags(pieces: Sequence[Piece], length: Callable[[str], int], budget: int) -> tuple[Piece, ...]:
    """The pieces with the tags of every image cut from the end of its list until they fit `budget` tokens.

    Nothing else is ever left out: neither the head with the soft prompt nor the question."""
    left: dict[int, int] = {}
    kept: list[Piece] = []
    for piece in pieces:
        if piece.tag >= 0:
            # Once one does not fit, no later one of this image is listed: the order says how sure the tagger was.
            room = left.get(piece.tag, budget) - length(piece.text)
            left[piece.tag] = room if room >= 0 else -1
            if room < 0:
                continue
        kept.append(piece)
    return tuple(kept)


def _stem(sample: Sample, style: PromptStyle) -> list[str | Tokens]:
    turns = dict(sample.turns)
    if sample.task == "vcr_answer":
        return [" ", turns["question"], " Answer:"]
    if sample.task == "vcr_rationale":
        return [" ", turns["question"], " Answer: ", turns["answer"], " Why?"]
    if sample.task == "event":
        return _event_stem(sample, turns, style)
    if sample.task in STEMS:
        before, turn, after = STEMS[sample.task]
        return [before, turns[turn], after] if turn else [before]
    raise ValueError(f"sample {sample.id}: no prompt for task {sample.task!r}")


def _event_stem(sample: Sample, turns: dict[str, Tokens], style: PromptStyle) -> list[str | Tokens]:
    relation = str(turns["relation"][0])
    plain, asked = RELATION_QUESTIONS[relation]
    event = turns.get("event", sample.targets[0] if relation == "event" else ())
    subject = next((t for t in event if isinstance(t, RegionRef)), None)
    context: list[str | Tokens] = []
    if style.event_context == "event" and relation not in ("event", "place"):
        context = [
            part
            for name, label in (("event", " Event: "), ("place", " Place: "))
            if name in turns
            for part in (label, turns[name])
        ]
    if style.event_context == "event" or subject is None or relation == "place":
        return [*context, f" {plain} Answer:"]
    before, after = asked.split("{}")
    return [f" {before}", (subject,), f"{after} Answer:"]


def _lead_with_space(pieces: Sequence[Piece]) -> list[Piece]:
    """Move blanks at the end of a piece to the start of the next, as byte-level BPE expects, and drop empty pieces."""
    out: list[Piece] = []
    carry = ""
    for piece in pieces:
        text = carry + piece.text
        stripped = text.rstrip(" ")
        carry = " " if len(stripped) < len(text) else ""
        if stripped:
            out.append(piece._replace(text=stripped))
        elif piece.region >= 0:
            raise ValueError("a region without a name cannot be rendered")
    return out


def text_of(pieces: Iterable[Piece]) -> str:
    """The text of pieces as a reader sees it, e.g. for prediction rows and previews."""
    shown = ("<image>" if p.image >= 0 else " <hint>" if p.soft else p.mark.token if p.mark else p.text for p in pieces)
    return "".join(shown).strip()
