"""The one place that converts, clips, checks, normalises, moves and prints boxes (P1).

In: boxes as sources and prompts write them (xyxy, xywh, shares of the image, text). Out: `Box`, or arrays [R, 4] of
xyxy, in pixels of the image the box was drawn on; x2 and y2 are exclusive, so width = x2 - x1.
Decision: an unusable box is described, never repaired in silence: `problem` gives the reason, and whoever drops the
box counts it. Array functions take and return numpy or torch alike, so a transform and a model share them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch

from eventlens_ds.data.records import Box
from eventlens_ds.errors import DataError

Array = TypeVar("Array", np.ndarray, torch.Tensor)

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_QUADRUPLE = re.compile(r"{0}\s*,\s*{0}\s*,\s*{0}\s*,\s*{0}".format(r"[0-9]*\.?[0-9]+"))


def from_xyxy(values: Sequence[Any]) -> Box:
    """Box from [x1, y1, x2, y2] in pixels; further entries (a detector score) are ignored.

    Raises DataError when these are not four numbers. Geometry is not judged here: see `problem`.
    """
    return Box(*_four(values))


def from_xywh(values: Sequence[Any]) -> Box:
    """Box from the COCO form [left, top, width, height] in pixels. Raises DataError as `from_xyxy`."""
    x, y, w, h = _four(values)
    return Box(x, y, x + w, y + h)


def from_normalised(values: Sequence[Any], width: float, height: float) -> Box:
    """Box from [x1, y1, x2, y2] given as shares of width and height (REC files). Raises DataError as `from_xyxy`."""
    x1, y1, x2, y2 = _four(values)
    return Box(x1 * width, y1 * height, x2 * width, y2 * height)


def clip(box: Box, width: float, height: float) -> Box:
    """The part of a box inside an image; a box outside it collapses to zero area on the border."""
    return Box(
        min(max(box.x1, 0.0), width),
        min(max(box.y1, 0.0), height),
        min(max(box.x2, 0.0), width),
        min(max(box.y2, 0.0), height),
    )


def problem(box: Box, width: float, height: float) -> str | None:
    """Why a box cannot be used on an image of this size, or None: not finite, inverted, zero area, outside.

    A box that overlaps the image in part is usable (public readers clip it); `overhang` measures the rest.
    """
    if not all(math.isfinite(v) for v in box):
        return "not finite"
    if box.x2 < box.x1 or box.y2 < box.y1:
        return "inverted"
    if box.x2 == box.x1 or box.y2 == box.y1:
        return "zero area"
    inside = clip(box, width, height)
    if inside.x2 <= inside.x1 or inside.y2 <= inside.y1:
        return "outside the image"
    return None


def overhang(box: Box, width: float, height: float) -> float:
    """Largest distance in pixels by which a side of the box lies outside the image; 0 when it lies inside."""
    return max(-box.x1, -box.y1, box.x2 - width, box.y2 - height, 0.0)


def as_array(boxes: Iterable[Box]) -> np.ndarray:
    """Boxes as float32[R, 4]; R may be 0."""
    return np.asarray(list(boxes), dtype=np.float32).reshape(-1, 4)


def clip_array(boxes: Array, width: float, height: float) -> Array:
    """`clip` for [R, 4]."""
    limit = _row(boxes, (width, height, width, height))
    if isinstance(boxes, torch.Tensor):
        return torch.minimum(boxes.clamp(min=0), limit)
    return np.minimum(np.maximum(boxes, 0), limit)


def normalise(boxes: Array, width: float, height: float) -> Array:
    """Pixels to shares of the image, [R, 4] -> [R, 4]; boxes inside the image land in [0, 1]."""
    return boxes / _row(boxes, (width, height, width, height))


def move(boxes: Array, scale: tuple[float, float], offset: tuple[float, float] = (0.0, 0.0)) -> Array:
    """Follow an image that was scaled by (sx, sy) and then shifted by (dx, dy) pixels: [R, 4] -> [R, 4]."""
    return boxes * _row(boxes, (*scale, *scale)) + _row(boxes, (*offset, *offset))


def to_text(box: Box, width: float, height: float) -> str:
    """Shares of the image with 3 decimals, "[0.440,0.060,0.650,0.367]", the form of Shikra, LCL and LION.

    The box is clipped to the image first, so the text always reads back as a box inside it.
    """
    x1, y1, x2, y2 = clip(box, width, height)
    return f"[{x1 / width:.3f},{y1 / height:.3f},{x2 / width:.3f},{y2 / height:.3f}]"


class ParsedBoxes(NamedTuple):
    """Boxes read from a text, in its order, and why each further candidate in it is no box."""

    boxes: tuple[Box, ...]
    refused: tuple[str, ...]

    @property
    def reason(self) -> str | None:
        """None when a box was read, else why not: the reason of the first candidate, or that there is none."""
        return None if self.boxes else self.refused[0]


def parse_boxes(text: str, width: float, height: float) -> ParsedBoxes:
    """The boxes printed in a text as shares of the image, in pixels of an image of this size (1, 1 keeps shares).

    Read: "[x1,y1,x2,y2]" anywhere, with blanks, after words ("Answer:"), and several boxes in one bracket with ";"
    between them (Shikra's form). Refused with a reason, never repaired [ours]: "empty answer", "no box" (no numbers in
    brackets), "no closed brackets" (four numbers without them: a cut-off answer), "not four numbers", "percent",
    "above 1" (pixels, or shares of 100 or 1000: which of them the text does not say), "below 0", and the reasons of
    `problem` ("inverted" for swapped corners, "zero area"). `refused` is for the caller to count.
    """
    found: list[Box] = []
    refused: list[str] = []
    for inner in _BRACKETS.findall(text):
        # Brackets without a digit are words ("[END EXAMPLE]"), not a failed box.
        for part in inner.split(";") if any(c.isdigit() for c in inner) else ():
            shares = _shares(part)
            box = shares if isinstance(shares, str) else from_normalised(shares, width, height)
            fault = box if isinstance(box, str) else problem(box, width, height)
            if isinstance(box, str) or fault is not None:
                refused.append(str(fault))
            else:
                found.append(box)
    if not found and not refused:
        unclosed = "no closed brackets" if _QUADRUPLE.search(text) else "no box"
        refused.append(unclosed if text.strip() else "empty answer")
    return ParsedBoxes(tuple(found), tuple(refused))


def from_text(text: str, width: float, height: float) -> Box | None:
    """The first box that `parse_boxes` reads, in pixels, or None; inverse of `to_text` to 0.0005."""
    found = parse_boxes(text, width, height).boxes
    return found[0] if found else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 when they do not touch or have no area."""
    return float(pairwise_iou(np.asarray([a], np.float64), np.asarray([b], np.float64))[0, 0])


def pairwise_iou(a: Array, b: Array) -> Array:
    """Intersection over union of every box of a[R, 4] with every box of b[S, 4] -> [R, S]; 0 for empty unions."""
    xp: Any = torch if isinstance(a, torch.Tensor) else np
    low, high = xp.maximum(a[:, None, :2], b[None, :, :2]), xp.minimum(a[:, None, 2:], b[None, :, 2:])
    side = xp.clip(high - low, 0, None)
    inter = side[..., 0] * side[..., 1]
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    union = area_a[:, None] + area_b[None, :] - inter
    # An empty union divides by 1 instead, so that no NaN appears even in a branch that is selected out.
    return cast(Array, xp.where(union > 0, inter / xp.where(union > 0, union, xp.ones_like(union)), 0 * union))


def _four(values: Sequence[Any]) -> tuple[float, float, float, float]:
    numbers = (
        [v for v in values[:4] if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if (isinstance(values, (list, tuple)))
        else []
    )
    if len(numbers) != 4:
        raise DataError(f"a box wants four numbers, got {str(values)[:60]}")
    try:
        x1, y1, x2, y2 = (float(v) for v in numbers)
    except OverflowError:
        raise DataError(f"a box number is too large: {str(values)[:60]}") from None
    return x1, y1, x2, y2


def _shares(part: str) -> list[float] | str:
    """Four numbers of 0..1 from "a, b, c, d", or the reason why it is not that."""
    if "%" in part:
        return "percent"
    fields = [field.strip() for field in part.split(",")]
    if len(fields) != 4 or not all(_NUMBER.fullmatch(field) for field in fields):
        return "not four numbers"
    shares = [float(field) for field in fields]
    if max(shares) > 1:
        return "above 1"
    return "below 0" if min(shares) < 0 else shares


def _row(like: Array, values: tuple[float, ...]) -> Array:
    if isinstance(like, torch.Tensor):
        return like.new_tensor(values, dtype=like.dtype if like.is_floating_point() else torch.float32)
    dtype = like.dtype if np.issubdtype(like.dtype, np.floating) else np.float32
    return np.asarray(values, dtype=dtype)
