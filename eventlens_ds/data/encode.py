"""Group -> EncodedGroup: the tokens of a group as a tree of segments, with slots for visual tokens and regions.

The stages of one group:
  1. prompts.render        structured text -> pieces
  2. _prefix               image slots, then "Objects: person1 person2 ..." (segment 0)
  3. _append per sample    a stem (child of 0) and its leaves (children of the stem)
  4. images                decode, resize, move the boxes along (data/transforms.py)
Decision: `add` marks the tokens of a mention with its region (in a continuation its last one); `insert` puts one
slot after the mention whose embedding is the region feature; `none` keeps the words alone. The same pieces serve all
three, so only the number of tokens differs, and `group_lengths` counts them without touching an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from eventlens_ds.data.episode_text import BOS, EOS
from eventlens_ds.data.prompts import (
    Piece,
    PromptStyle,
    RenderedGroup,
    RenderedSample,
    mentions,
    render,
    shorten_tags,
    text_of,
)
from eventlens_ds.data.question_tokenizer import question_tokenizer
from eventlens_ds.data.records import TASKS, EncodedGroup, Group
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.data.transforms import Resized
from eventlens_ds.errors import DataError

Linking = Literal["add", "insert", "none"]


class VisionSpec(NamedTuple):
    """What the data side must know of the vision tower: input size in pixels, visual tokens per image, statistics."""

    image_size: int
    tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class EncodeSpec:
    """Everything besides the data that decides how a group is laid out.

    instruction_tokens: tokens of the question that the Q-Former reads; above 0 samples with different questions do not
    share a group, because their visual tokens differ. question_tokenizer: folder of the tokenizer it reads them with;
    empty: the language model's. encoder_decoder: a stem is closed by the end token, as T5 reads text, and followed by
    the token at which the decoder starts (the padding token); samples do not share a group, because an encoder that
    looks both ways computes the prefix anew for every question."""

    vision: VisionSpec
    linking: Linking
    style: PromptStyle = PromptStyle()
    instruction_tokens: int = 0
    question_tokenizer: str = ""
    encoder_decoder: bool = False
    positions: int = 0
    """Positions that the language model reads (its RoPE was made for); 0: no limit of that kind."""


def pieces_length(pieces: Sequence[Piece], tokenizer: PieceTokenizer, spec: EncodeSpec) -> int:
    """Tokens of a run of pieces, by arithmetic."""
    inserted = 1 if spec.linking == "insert" else 0
    return sum(
        spec.vision.tokens
        if p.image >= 0
        else len(_marked(p, tokenizer) if p.mark else tokenizer.ids(p.text))
        + (inserted if p.region >= 0 else 0)
        + (1 if p.soft else 0)
        for p in pieces
    )


def _marked(piece: Piece, tokenizer: PieceTokenizer) -> tuple[int, ...]:
    """The special token that a piece stands for; empty where the tokenizer does not have it."""
    assert piece.mark is not None
    own = {BOS: tokenizer.bos, EOS: tokenizer.eos}
    token = own[piece.mark] if piece.mark in own else tokenizer.special(piece.mark.token)
    return () if token is None else (token,)


def rendered_group(group: Group, tokenizer: PieceTokenizer, spec: EncodeSpec) -> RenderedGroup:
    """`prompts.render` with the tags cut to their budget, which only a tokenizer can count."""
    rendered = render(group, spec.style)
    if spec.style.tag_tokens < 0:
        return rendered
    prefix = shorten_tags(rendered.prefix, lambda text: len(tokenizer.ids(text)), spec.style.tag_tokens)
    return rendered._replace(prefix=prefix)


def instruction(sample: RenderedSample, tokenizer: PieceTokenizer, spec: EncodeSpec) -> tuple[int, ...]:
    """What the Q-Former reads for a sample: the end of its bare question, without tags and without the "Answer:" that
    asks the language model to speak [released code]."""
    if not spec.instruction_tokens:
        return ()
    asked = text_of(sample.stem).removesuffix("Answer:").rstrip()
    if spec.question_tokenizer:
        return question_tokenizer(spec.question_tokenizer).ids(asked, spec.instruction_tokens)
    return tuple(tokenizer.ids(asked))[-spec.instruction_tokens :]


class SampleLength(NamedTuple):
    stem: int
    leaves: int
    supervised: int
    """Tokens that carry a loss or a score: the leaves with their end tokens."""


def group_lengths(
    rendered: RenderedGroup, tokenizer: PieceTokenizer, spec: EncodeSpec
) -> tuple[int, tuple[SampleLength, ...]]:
    """Tokens of the prefix and of each sample of a rendered group; `encode` yields exactly their sum."""
    prefix = pieces_length(rendered.prefix, tokenizer, spec) + (tokenizer.bos is not None)
    samples = []
    for sample in rendered.samples:
        leaves = sum(pieces_length(leaf, tokenizer, spec) + 1 for leaf in sample.leaves)
        stem = pieces_length(sample.stem, tokenizer, spec) + (2 if spec.encoder_decoder else 0)
        stem += sum(pieces_length((*turn.stem, *turn.answer), tokenizer, spec) for turn in sample.shown)
        samples.append(SampleLength(stem, leaves, leaves))
    return prefix, tuple(samples)


@dataclass
class _Segments:
    """Tokens and segments collected so far."""

    tokenizer: PieceTokenizer
    spec: EncodeSpec
    ids: list[int] = field(default_factory=list)
    image_slots: list[int] = field(default_factory=list)
    region_slots: list[int] = field(default_factory=list)
    soft_slots: list[bool] = field(default_factory=list)
    tag_slots: list[bool] = field(default_factory=list)
    start_slots: list[bool] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    bounds: list[tuple[int, int]] = field(default_factory=list)

    def add(
        self, pieces: Sequence[Piece], parent: int, *, bos: bool = False, stem: bool = False, leaf: bool = False
    ) -> int:
        """Append a segment and return its index. A leaf ends with the end token; so does the stem of an
        encoder-decoder, and the start of the decoder follows.

        In a leaf only the last token of a mention is linked: the tokens before it predict the rest of the name, and
        with the region already in them the name would be read off instead of being said.
        """
        start = len(self.ids)
        if bos and self.tokenizer.bos is not None:
            self._token(self.tokenizer.bos)
        for piece in pieces:
            if piece.image >= 0:
                tokens = self.spec.vision.tokens
                first = piece.image * tokens
                self.ids += [self.tokenizer.pad] * tokens
                self.image_slots += range(first, first + tokens)
                self.region_slots += [-1] * tokens
                self.soft_slots += [False] * tokens
                self.tag_slots += [False] * tokens
                self.start_slots += [False] * tokens
                continue
            if piece.soft:
                self._token(self.tokenizer.pad, soft=True)
                continue
            if piece.mark:
                for token in _marked(piece, self.tokenizer):
                    self._token(token)
                continue
            ids = self.tokenizer.ids(piece.text)
            linked = len(ids[-1:] if leaf else ids) if self.spec.linking == "add" else 0
            self.ids += ids
            self.image_slots += [-1] * len(ids)
            self.region_slots += [-1] * (len(ids) - linked) + [piece.region] * linked
            self.soft_slots += [False] * len(ids)
            self.tag_slots += [piece.tag >= 0] * len(ids)
            self.start_slots += [False] * len(ids)
            if piece.region >= 0 and self.spec.linking == "insert":
                self._token(self.tokenizer.pad, region=piece.region)
        starts = stem and self.spec.encoder_decoder
        if leaf or starts:
            self._token(self.tokenizer.eos)
        if starts:
            self._token(self.tokenizer.pad, start=True)
        self.parents.append(parent)
        self.bounds.append((start, len(self.ids)))
        return len(self.parents) - 1

    def _token(self, token: int, region: int = -1, soft: bool = False, start: bool = False) -> None:
        self.ids.append(token)
        self.image_slots.append(-1)
        self.region_slots.append(region)
        self.soft_slots.append(soft)
        self.tag_slots.append(False)
        self.start_slots.append(start)


ImageLoader = Callable[[int], Resized]
"""Image of the group -> its pixels float32[3, H, W] and boxes float32[regions of the image, 4] after resizing, with
the reason for every box that cannot be used. Raises DataError when the picture cannot be used."""


def encode(group: Group, tokenizer: PieceTokenizer, spec: EncodeSpec, load_image: ImageLoader) -> EncodedGroup:
    """Encode a group. A picture that cannot be decoded keeps the layout (the plan has counted its tokens) but is
    blank. Samples on it, and samples that mention a region with an unusable box, weigh nothing and are listed in
    `skipped`."""
    rendered = rendered_group(group, tokenizer, spec)
    asked = {instruction(text, tokenizer, spec) for text in rendered.samples}
    if len(asked) > 1:
        raise ValueError(f"group of {group.samples[0].id}: {len(asked)} instructions for one set of visual tokens")
    segments = _Segments(tokenizer, spec)
    root = segments.add(rendered.prefix, -1, bos=True)
    leaf_segment: list[int] = []
    leaf_sample: list[int] = []
    leaf_weight: list[float] = []
    choices: list[tuple[np.ndarray, int, int]] = []
    for s, (sample, text) in enumerate(zip(group.samples, rendered.samples)):
        before = root
        for turn in text.shown:
            # A chain: each answer is a leaf that the next question hangs on.
            before = segments.add(turn.answer, segments.add(turn.stem, before))
            leaf_segment.append(before)
            leaf_sample.append(s)
            leaf_weight.append(turn.weight)
        stem = segments.add(text.stem, before, stem=True)
        first = len(leaf_segment)
        is_choice = bool(sample.candidates)
        for leaf in text.leaves:
            leaf_segment.append(segments.add(leaf, stem, leaf=True))
            leaf_sample.append(s)
            leaf_weight.append(0.0 if is_choice else 1.0)
        if is_choice:
            label = -1 if sample.label is None else sample.label
            choices.append((np.arange(first, len(leaf_segment), dtype=np.int64), label, s))
    _check_links(group, rendered, segments)
    pixels, boxes, skipped = _images(group, rendered, spec, load_image)
    dead = {sample_id for sample_id, _ in skipped}
    leaf_weight = [0.0 if group.samples[s].id in dead else w for s, w in zip(leaf_sample, leaf_weight)]
    return EncodedGroup(
        task_id=TASKS.index(group.task),
        input_ids=np.asarray(segments.ids, np.int64),
        parents=np.asarray(segments.parents, np.int32),
        bounds=np.asarray(segments.bounds, np.int32).reshape(-1, 2),
        image_slots=np.asarray(segments.image_slots, np.int64),
        region_slots=np.asarray(segments.region_slots, np.int64),
        soft_slots=np.asarray(segments.soft_slots, np.bool_),
        start_slots=np.asarray(segments.start_slots, np.bool_),
        instruction=np.asarray(asked.pop(), np.int64),
        leaf_segment=np.asarray(leaf_segment, np.int32),
        leaf_sample=np.asarray(leaf_sample, np.int32),
        leaf_weight=np.asarray(leaf_weight, np.float32),
        choices=choices,
        pixel_values=pixels,
        boxes=boxes,
        sample_ids=[sample.id for sample in group.samples],
        skipped=skipped,
        regions_annotated=sum(len(image.regions) for image in group.images),
        tag_slots=np.asarray(segments.tag_slots, np.bool_),
    )


def _check_links(group: Group, rendered: RenderedGroup, segments: _Segments) -> None:
    """Every region that the rendered text mentions has a slot, and no other region has (P6)."""
    if segments.spec.linking == "none":
        return
    texts = (rendered.prefix, *(part for sample in rendered.samples for part in (sample.stem, *sample.leaves)))
    mentioned = {piece.region for text in texts for piece in text if piece.region >= 0}
    linked = {slot for slot in segments.region_slots if slot >= 0}
    if mentioned != linked:
        raise ValueError(
            f"group of {group.samples[0].id}: {len(mentioned)} regions mentioned, {len(linked)} have a region slot"
        )


def _images(
    group: Group, rendered: RenderedGroup, spec: EncodeSpec, load_image: ImageLoader
) -> tuple[list[np.ndarray], list[np.ndarray], list[tuple[str, str]]]:
    size = spec.vision.image_size
    pixels, boxes = [], []
    reasons: dict[str, str] = {}
    for m, image in enumerate(group.images):
        try:
            made = load_image(m)
        except DataError as error:
            whole = np.tile(np.asarray([0, 0, size, size], np.float32), (len(image.regions), 1))
            made = Resized(np.zeros((3, size, size), np.float32), whole, {})
            reasons |= {sample.id: str(error) for sample in group.samples}
        for sample in group.samples:
            for ref in mentions(sample):
                if ref.image == m and ref.box in made.invalid:
                    reasons.setdefault(sample.id, f"{image.img_fn}: region {ref.box}: {made.invalid[ref.box]}")
        pixels.append(made.pixels)
        boxes.append(made.boxes[list(rendered.regions[m])].reshape(-1, 4).astype(np.float32))
    return pixels, boxes, list(reasons.items())
