"""The records that every part of the project shares.

A `Sample` is one thing to learn or to score, still structured (strings and `RegionRef`s, boxes in pixels of the
original image). `data/prompts.py` renders it to pieces, `data/encode.py` turns a `Group` of samples that share a
prefix into an `EncodedGroup`, and `data/collate.py` lays the groups of one `Row` end to end as a `Batch`.

Decision: these are plain dataclasses with tuples, frozen where they can be, so that a record read by a worker can
be hashed, compared and printed, and nothing downstream edits it in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

TASKS: tuple[str, ...] = ("caption", "event", "vcr_answer", "vcr_rationale", "rec", "reg", "vqa", "vsr", "pope", "lcl")
"""Names of the tasks in the order of their ids: the task id of a token picks its adapter."""

CHOICE_TASKS = frozenset({"vcr_answer", "vcr_rationale"})
LM_TASKS = frozenset(TASKS) - CHOICE_TASKS
REGION_TASKS = frozenset({"event", "vcr_answer", "vcr_rationale", "rec", "reg"})
"""Tasks about regions, LION's region level; all others are image level."""


class Box(NamedTuple):
    """Corners in pixels of the original image, x right and y down, x2 and y2 exclusive (P1)."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Region:
    """One annotated object of an image: its class name, box, detector score and outline."""

    name: str
    box: Box
    score: float = 1.0
    polygons: tuple[tuple[tuple[float, float], ...], ...] = ()


@dataclass(frozen=True)
class ImageRecord:
    """An image with its metadata, stored once in a shard.

    `key` is unique in the data set and safe as a tar key; `img_fn` is the name the source gives the file.
    """

    key: str
    img_fn: str
    width: int
    height: int
    regions: tuple[Region, ...]
    movie: str = ""
    split: str = ""
    tags: tuple[str, ...] = ()
    """What a tagger saw, the surest first; a prompt may list them (LION's soft prompt)."""


@dataclass(frozen=True)
class RegionRef:
    """A mention of one region: `image` counts the images of the sample, `box` the regions of it, both from 0."""

    image: int
    box: int


Tokens = tuple["str | RegionRef", ...]
"""Text in which mentions of regions stay structured until it is rendered (P2)."""


@dataclass(frozen=True)
class Sample:
    """One item: a VCR question (Q->A or QA->R), one relation of an event, a caption, an expression, a question.

    `turns` is what comes before the answer. A choice sample has `candidates` and `label` (None on a blind split);
    an LM sample has `targets`, alternatives that each follow `turns` on their own. `fields` carries what a
    template or a metric needs by name (relation, place, annot_id, which_person, ...), as strings:
      rec   turn expression, target the box as text; field box, four pixels as JSON
      reg   turn box (as text), targets every expression of that box; field box
      vqa   turn question, target the most frequent answer; fields answers (JSON list of 10 or 1), answer_type
      vsr   turn statement, target yes or no; field label, 1 or 0
      pope  turn question, target yes or no; fields label (yes or no), setting (random, popular, adversarial)
      lcl   examples, turn query about the image after theirs; target the label, or candidates those of both classes;
            an episode, drawn and not stored (data/episodes.py); fields shots, pair
    """

    id: str
    source: str
    task: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, Tokens], ...]
    """(role, text) pairs; roles: question, answer, event, place, relation, expression, box, statement, query."""
    targets: tuple[Tokens, ...] = ()
    candidates: tuple[Tokens, ...] = ()
    label: int | None = None
    tags: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    """Of an episode: the label of every demonstration; demonstration i shows image i of the sample."""
    example_weights: tuple[float, ...] = ()
    """Of an episode: loss weight of the answer of every demonstration; empty: only the last answer is learned."""
    fields: tuple[tuple[str, str], ...] = ()

    def field(self, name: str, default: str = "") -> str:
        return dict(self.fields).get(name, default)


@dataclass(frozen=True)
class Group:
    """Samples of one task on the same images: they share the prefix, and a group is never split."""

    task: str
    images: tuple[ImageRecord, ...]
    samples: tuple[Sample, ...]


@dataclass
class EncodedGroup:
    """A group as tokens: a tree of segments whose root is the shared prefix.

    All index arrays count tokens or segments inside this group, visual tokens and regions inside its images.

    input_ids      int64[T]
    parents        int32[S]  parent segment or -1; a parent comes before its children
    bounds         int32[S, 2]  start and end of each segment; segments tile [0, T) in order
    image_slots    int64[T]  index into the visual tokens of the group (image-major) or -1
    region_slots   int64[T]  index into the regions of the group or -1; many tokens may name one region (P6)
    soft_slots     bool[T]   where the soft prompt stands
    start_slots    bool[T]   where the decoder of an encoder-decoder starts: the last token of every stem, else nowhere
    instruction    int64[L']  what the Q-Former is told, the same for all images of the group; often empty
    leaf_segment   int32[L]  the segment of every scored or supervised continuation
    leaf_sample    int32[L]  the sample it belongs to
    leaf_weight    float32[L]  0 for a leaf that is shown but not trained on (an injured or a blind sample)
    choices        list of (leaf indices[K], label or -1, sample)
    """

    task_id: int
    input_ids: np.ndarray
    parents: np.ndarray
    bounds: np.ndarray
    image_slots: np.ndarray
    region_slots: np.ndarray
    soft_slots: np.ndarray
    start_slots: np.ndarray
    instruction: np.ndarray
    leaf_segment: np.ndarray
    leaf_sample: np.ndarray
    leaf_weight: np.ndarray
    choices: list[tuple[np.ndarray, int, int]]
    pixel_values: list[np.ndarray]
    """One float32[3, H, W] per image."""
    boxes: list[np.ndarray]
    """One float32[R, 4] per image, xyxy in pixels of the resized image."""
    sample_ids: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(sample id, reason) of samples whose loss weight was set to zero."""
    regions_annotated: int = 0
    """Regions of the images of the group, whether or not they are encoded."""
    tag_slots: np.ndarray | None = None
    """bool[T]: tokens of listed tags; None where nobody marked them."""

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass
class Batch:
    """One row, ready for the model. T tokens, S segments, N images, R regions, K supervised tokens, L leaves.

    input_ids     int64[1, T]      position_ids  int64[1, T]  restart at the end of the parent segment
    parents       int32[S]         bounds        int32[S, 2]
    task_ids      int64[T]         index into TASKS
    pixel_values  float32[N, 3, H, W]
    boxes         float32[R, 4]    sorted by image; box_offsets int64[N + 1]
    image_slots   int64[T]         index into N * P visual tokens (image-major) or -1
    region_slots  int64[T]         index into R or -1
    soft_slots    bool[T]          tokens whose embedding is the soft prompt
    start_slots   bool[T]          tokens at which the decoder of an encoder-decoder starts; none for a decoder alone
    instruction_ids int64[N, L']   what the Q-Former is told about each image; instruction_mask bool[N, L']
    target_from   int64[K]         position whose hidden state predicts the token (the parent's last token for the
                                   first token of a segment)
    target_ids    int64[K]         target_leaf int64[K]
    leaf_weight   float32[L]       leaf_task int64[L]
    choice_leaves int64[Q, C]      choice_labels int64[Q] (-1: blind), choice_weight float32[Q], choice_task int64[Q]
    seed          the dropout seed of the row (P3)
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    parents: torch.Tensor
    bounds: torch.Tensor
    task_ids: torch.Tensor
    pixel_values: torch.Tensor
    boxes: torch.Tensor
    box_offsets: torch.Tensor
    image_slots: torch.Tensor
    region_slots: torch.Tensor
    soft_slots: torch.Tensor
    start_slots: torch.Tensor
    instruction_ids: torch.Tensor
    instruction_mask: torch.Tensor
    target_from: torch.Tensor
    target_ids: torch.Tensor
    target_leaf: torch.Tensor
    leaf_weight: torch.Tensor
    leaf_task: torch.Tensor
    leaf_sample: torch.Tensor
    choice_leaves: torch.Tensor
    choice_labels: torch.Tensor
    choice_weight: torch.Tensor
    choice_task: torch.Tensor
    choice_sample: torch.Tensor
    seed: int
    sample_ids: list[str]
    image_keys: list[str]
    sample_image: list[int]
    """Index of the (first) image of every sample."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    real_tokens: int = 0
    """Tokens before padding; 0 marks a missing row, which is run and weighted zero."""
    tag_slots: torch.Tensor | None = None
    """bool[T]: tokens of listed tags, which the control blank hides; None where nobody marked them."""
    regions_used: int = 0
    """Regions that a region slot names."""
    regions_unused: int = 0
    """Annotated regions of the images (an image counts once per group) that no region slot names (P6)."""

    def to(self, device: str | torch.device) -> Batch:
        """The batch on a device. What describes its shape (segments, starts, box offsets) stays on the CPU: the forms
        of the attention and the RoI plan are made from it without a device synchronisation."""
        on_cpu = {"parents", "bounds", "start_slots", "box_offsets"}
        moved = dict(vars(self))
        for name, value in moved.items():
            if isinstance(value, torch.Tensor) and name not in on_cpu:
                moved[name] = value.to(device, non_blocking=True)
        return Batch(**moved)
