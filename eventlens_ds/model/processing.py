"""RegionVLMProcessor: a picture, named boxes and a question become the Batch that a RegionVLM takes.

In: what a user has: an image, boxes in its pixels, text that mentions boxes as [1] or person1. Out: a `Batch` built by
data/prompts, data/encode and data/collate, as training builds it; there is no second prompt path. Saved as
processor_config.json beside the tokenizer. Decision: the image settings are plain numbers here instead of an image
processor of transformers, because resizing moves the boxes too and data/transforms.py does both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

from eventlens_ds.data import boxes as box_math
from eventlens_ds.data import transforms
from eventlens_ds.data.collate import collate
from eventlens_ds.data.encode import EncodeSpec, Linking, VisionSpec, encode, rendered_group
from eventlens_ds.data.prompts import RELATION_QUESTIONS, PromptStyle
from eventlens_ds.data.question_tokenizer import question_tokenizer
from eventlens_ds.data.records import Batch, Box, Group, ImageRecord, Region, RegionRef, Sample, Tokens
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.model.configuration import RegionVLMConfig

QUESTIONS = "question_tokenizer"
"""Folder of a saved processor that holds the tokenizer of a Q-Former's questions."""

Picture = str | Path | bytes | Image.Image | np.ndarray
"""A file, its bytes, an opened image, or RGB uint8 [H, W, 3]."""

_NAME = re.compile(r"[A-Za-z_]+")
_MENTION = re.compile(r"\[\s*(?P<index>\d+)\s*\]|(?<![A-Za-z0-9_])(?P<name>[A-Za-z_]+)(?P<number>\d+)(?![A-Za-z0-9_])")


class RegionVLMProcessor(ProcessorMixin):
    """Prepares one image for a RegionVLM.

    image_size in pixels per side; visual_tokens per image; linking add | insert | none; list_objects and event_context
    as in config.DataConfig; tag_tokens of a soft prompt (-1: none) and instruction_tokens of a Q-Former (0: none), read
    with the tokenizer in the folder question_words (empty: the language model's); encoder_decoder: the language model
    is one; positions that it reads (0: no limit). They must be those of training, so a processor is made by `eventlens
    export` or `from_spec`, rarely by hand.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        image_size: int = 0,
        visual_tokens: int = 0,
        image_mean: Sequence[float] = transforms.CLIP_MEAN,
        image_std: Sequence[float] = transforms.CLIP_STD,
        linking: str = "add",
        list_objects: bool = True,
        event_context: str = "event",
        tag_tokens: int = -1,
        instruction_tokens: int = 0,
        question_words: str = "",
        encoder_decoder: bool = False,
        positions: int = 0,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.image_size, self.visual_tokens = image_size, visual_tokens
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.linking, self.list_objects, self.event_context = linking, list_objects, event_context
        self.tag_tokens, self.instruction_tokens = tag_tokens, instruction_tokens
        self.question_words = question_words
        self.encoder_decoder, self.positions = encoder_decoder, positions
        self._pieces: PieceTokenizer | None = None

    @classmethod
    def from_spec(cls, tokenizer: PieceTokenizer, spec: EncodeSpec) -> RegionVLMProcessor:
        """The processor that lays out prompts as `spec` does in training."""
        return cls(
            tokenizer.hf,
            image_size=spec.vision.image_size,
            visual_tokens=spec.vision.tokens,
            image_mean=spec.vision.mean,
            image_std=spec.vision.std,
            linking=spec.linking,
            list_objects=spec.style.list_objects,
            event_context=spec.style.event_context,
            tag_tokens=spec.style.tag_tokens,
            instruction_tokens=spec.instruction_tokens,
            question_words=spec.question_tokenizer,
            encoder_decoder=spec.encoder_decoder,
            positions=spec.positions,
        )

    @property
    def spec(self) -> EncodeSpec:
        mean, std = ((x[0], x[1], x[2]) for x in (self.image_mean, self.image_std))
        style = PromptStyle(self.list_objects, cast(Any, self.event_context), self.tag_tokens)
        vision = VisionSpec(self.image_size, self.visual_tokens, mean, std)
        linking = cast(Linking, self.linking)
        asked = (self.instruction_tokens, self.question_words)
        return EncodeSpec(vision, linking, style, *asked, self.encoder_decoder, self.positions)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As ProcessorMixin; a tokenizer of questions goes into a folder of its own, and no path of this machine."""
        own = self.question_words
        if own:
            question_tokenizer(own).hf.save_pretrained(Path(save_directory) / QUESTIONS)
            self.question_words = QUESTIONS
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            self.question_words = own

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        made = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if made.question_words:
            made.question_words = str(Path(pretrained_model_name_or_path) / QUESTIONS)
        return made

    @property
    def pieces(self) -> PieceTokenizer:
        """The tokenizer as training uses it: piece by piece, without special tokens."""
        if self._pieces is None:
            self._pieces = PieceTokenizer(self.tokenizer)
        return self._pieces

    def __call__(  # type: ignore[override]
        self,
        image: Picture,
        boxes: Sequence[Sequence[float]] = (),
        names: Sequence[str] = (),
        question: str = "",
        choices: Sequence[str] = (),
        relation: str = "",
        event: str | Tokens = (),
        place: str | Tokens = (),
        tags: Sequence[str] = (),
    ) -> Batch:
        """A row of one sample: a question (scored against `choices`, or to be continued) or a relation of an event.

        boxes [R, 4] xyxy in pixels of the image as displayed; names one class each, e.g. "person". relation is place,
        event, intent, before or after; event and place are what the last three are conditioned on. tags of the image,
        the surest first, need a model with a soft prompt. Raises UserError
        for a mention or box that does not fit and for tags without one, DataError for an image that cannot be decoded.
        """
        group = self.group(image, boxes, names, question, choices, relation, event, place, tags)
        return self.encode(group, image)

    def group(
        self,
        image: Picture,
        boxes: Sequence[Sequence[float]] = (),
        names: Sequence[str] = (),
        question: str = "",
        choices: Sequence[str] = (),
        relation: str = "",
        event: str | Tokens = (),
        place: str | Tokens = (),
        tags: Sequence[str] = (),
    ) -> Group:
        """The structured sample behind `__call__`. Without choices its only continuation is empty."""
        if bool(question) == bool(relation):
            raise UserError("give either a question or a relation")
        if tags and self.tag_tokens < 0:
            raise UserError(f"tags {', '.join(tags)[:60]}: the model was trained without a soft prompt")
        record = replace(image_record(picture_size(image), boxes, names), tags=tuple(tags))
        turns: list[tuple[str, Tokens]] = []
        targets: tuple[Tokens, ...] = ()
        candidates: tuple[Tokens, ...] = ()
        if relation:
            if relation not in RELATION_QUESTIONS:
                raise UserError(f"relation {relation!r}: known are {', '.join(RELATION_QUESTIONS)}")
            for role, text in (("event", event), ("place", place)):
                tokens = parse_mentions(text, names) if isinstance(text, str) else text
                turns += [(role, tokens)] if tokens else []
            turns.append(("relation", (relation,)))
            targets = tuple(parse_mentions(c, names) for c in choices) or ((),)
        else:
            turns.append(("question", parse_mentions(question, names)))
            candidates = tuple(parse_mentions(c, names) for c in choices) or ((),)
        task = "event" if relation else "vcr_answer"
        sample = Sample("asked", "user", task, (record.key,), tuple(turns), targets, candidates)
        return Group(task, (record,), (sample,))

    def tags_left_out(self, tags: Sequence[str]) -> int:
        """How many of these tags the budget of the prompt cuts off."""
        record = ImageRecord("image", "image", 1, 1, (), tags=tuple(tags))
        sample = Sample("asked", "user", "vqa", ("image",), (("question", ("?",)),), ((),))
        pieces = rendered_group(Group("vqa", (record,), (sample,)), self.pieces, self.spec).prefix
        return len(tags) - sum(piece.tag >= 0 for piece in pieces) if self.tag_tokens >= 0 else 0

    def encode(self, group: Group, image: Picture) -> Batch:
        """A group on one image as a row. Raises DataError when the image cannot be decoded."""
        made = self.resize(image, group.images[0])
        encoded = encode(group, self.pieces, self.spec, lambda _: made)
        batch = collate(
            [encoded],
            visual_tokens=self.visual_tokens,
            image_size=self.image_size,
            seed=0,
            pad_id=self.pieces.pad,
        )
        batch.image_keys = [group.images[0].key]
        return batch

    def resize(self, image: Picture, record: ImageRecord) -> transforms.Resized:
        """Pixels as the tower wants them, boxes moved along."""
        if isinstance(image, (str, Path, bytes)):
            payload = _bytes(image)
            return transforms.load(payload, record, self.image_size, mean=self.image_mean, std=self.image_std)
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        boxes = box_math.as_array(region.box for region in record.regions)
        return transforms.resize_with_boxes(
            picture.convert("RGB"), boxes, self.image_size, mean=self.image_mean, std=self.image_std
        )


def parse_mentions(text: str, names: Sequence[str], *, strict: bool = True) -> Tokens:
    """Text with [k] or <class><k> (k from 1) as RegionRefs: "why is [2] near dog3?".

    A word with digits counts as a mention only when its letters are one of `names`. A number out of range or of
    another class raises UserError; with strict off (text that a model wrote) it stays text.
    """
    out: list[str | RegionRef] = []
    at = 0
    for found in _MENTION.finditer(text):
        name = found["name"]
        if name is not None and name not in names:
            continue
        number = int(found["index"] or found["number"])
        wrong = ""
        if not 1 <= number <= len(names):
            wrong = f"names box {number}, there are {len(names)} (counted from 1)"
        elif name is not None and names[number - 1] != name:
            wrong = f"box {number} is a {names[number - 1]}"
        if wrong and strict:
            raise UserError(f"{found[0]} in {text!r}: {wrong}")
        if not wrong:
            out += [text[at : found.start()], RegionRef(0, number - 1)]
            at = found.end()
    return tuple(t for t in (*out, text[at:]) if t != "")


def image_record(size: tuple[int, int], boxes: Sequence[Sequence[float]], names: Sequence[str]) -> ImageRecord:
    """Metadata of an image of (width, height) pixels with named boxes. Raises UserError naming a box that is wrong."""
    if len(boxes) != len(names):
        raise UserError(f"{len(boxes)} boxes but {len(names)} names")
    width, height = size
    regions = []
    for number, (name, corners) in enumerate(zip(names, boxes), 1):
        if not _NAME.fullmatch(name):
            raise UserError(f"box {number}: the name {name!r} must be one word of letters, such as person")
        box = box_math.from_xyxy(list(map(float, corners)))
        wrong = box_math.problem(box, width, height)
        if wrong:
            raise UserError(f"box {number} ({name} {', '.join(f'{v:g}' for v in box)}): {wrong}, {width}x{height}")
        regions.append(Region(name, Box(*box)))
    return ImageRecord("image", "image", width, height, tuple(regions))


def picture_size(image: Picture) -> tuple[int, int]:
    """(width, height) in pixels as displayed."""
    if isinstance(image, Image.Image):
        return image.size
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    try:
        return transforms.displayed_size(_bytes(image))
    except DataError as error:
        raise DataError(f"{image if not isinstance(image, bytes) else 'image'}: {error}") from None


def _bytes(image: str | Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise UserError(f"{image}: {error.strerror or error}") from None


def register() -> None:
    """Makes AutoProcessor know folders of a RegionVLM. Idempotent."""
    AutoProcessor.register(RegionVLMConfig, RegionVLMProcessor, exist_ok=True)
