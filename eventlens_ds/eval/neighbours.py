"""`eventlens data neighbours`: which classes look alike, and the pairs file of Link-Context Learning made from it.

In: classes with images and an encoder, a CLIP folder or a run of ours. Out: rows in the released form
{class_id, class_name, samples, neighbors [[class_id, name, image]]}. The stages:
  1. classes     rows of the released forms: [class_id, name, [paths]] or {class_id, class_name, samples}
  2. features    per class the mean of raw image features and the feature of its bare name, both then of length 1
  3. similarity  S = 0.5 TT + 0.8 (IT + TI) + 0.5 II                                   [released code]
  4. neighbours  one random class of each of N bins (released code), or the N nearest
Decision: the released rule spreads its N picks over all classes, so of 36 "neighbours" about two are near; `nearest`
is the default here, `bins` is theirs. Every random choice is drawn by (seed, class), so the file can be made again.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from eventlens_ds.data import transforms
from eventlens_ds.data.plan import draw as drawn
from eventlens_ds.data.plan import generator, permuted
from eventlens_ds.data.records import ImageRecord
from eventlens_ds.data.sources.layout import inside, lines
from eventlens_ds.data.sources.lcl import write_rows
from eventlens_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

RULES = ("nearest", "bins")
BATCH = 64
TEXT_TEXT, IMAGE_TEXT, IMAGE_IMAGE = 0.5, 0.8, 0.5


class ImageClass(NamedTuple):
    id: str
    name: str
    samples: list[str]


class Encoder(Protocol):
    """Features of images and names; `texts` is None where an encoder has no text side."""

    @property
    def size(self) -> int: ...

    @property
    def mean(self) -> Sequence[float]: ...

    @property
    def std(self) -> Sequence[float]: ...

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32[N, 3, H, W] -> float32[N, D]."""
        ...

    def texts(self, names: Sequence[str]) -> torch.Tensor | None:
        """Names -> float32[N, D]."""
        ...


def read_classes(path: Path) -> list[ImageClass]:
    """Classes of a JSON lines file in either released form. Raises DataError naming file:line."""
    made, seen = [], set()
    for line in lines(path):
        where = f"{path}:{line.number}"
        try:
            row = json.loads(line.raw)
        except ValueError as error:
            raise DataError(f"{where}: broken JSON: {error}") from None
        if isinstance(row, dict):
            row = [row.get("class_id"), row.get("class_name"), row.get("samples")]
        good = isinstance(row, list) and len(row) == 3 and isinstance(row[0], str | int) and isinstance(row[1], str)
        if not good or not isinstance(row[2], list) or not all(isinstance(name, str) for name in row[2]):
            raise DataError(
                f"{where}: wants [class_id, name, [images]] or an object with class_id, class_name, samples"
            )
        if not row[2]:
            raise DataError(f"{where}: class {row[1]!r} has no images")
        if str(row[0]) in seen:
            raise DataError(f"{where}: class_id {row[0]} comes a second time")
        seen.add(str(row[0]))
        made.append(ImageClass(str(row[0]), row[1], row[2]))
    if len(made) < 2:
        raise DataError(f"{path}: {len(made)} classes; neighbours need at least 2")
    return made


def split_classes(classes: Sequence[ImageClass], test: int, seed: int) -> tuple[list[ImageClass], list[ImageClass]]:
    """(train, test) classes, drawn by the seed; the released split had none. UserError when `test` is odd or all."""
    if test % 2 or not 0 <= test < len(classes) - 1:
        raise UserError(f"--test-classes {test} of {len(classes)}: an even number that leaves at least 2 to train on")
    order = permuted(drawn(seed, 0, "classes", "lcl split"), len(classes), np.arange(len(classes))).tolist()
    chosen = set(order[:test])
    return [c for i, c in enumerate(classes) if i not in chosen], [classes[i] for i in order[:test]]


def features(
    classes: Sequence[ImageClass], images: Path, encoder: Encoder, per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray | None, list[tuple[str, str]]]:
    """Image and text features float64[C, D] of length 1, and (image, reason) of those that could not be read.

    Raises DataError for a class of which no image could be read."""
    skipped: list[tuple[str, str]] = []
    means = []
    for one in classes:
        rng = generator(seed, 0, one.id, "similarity")
        order = rng.permutation(len(one.samples))[:per_class].tolist()
        read = list(_pixels([one.samples[i] for i in order], images, encoder, skipped))
        if not read:
            raise DataError(f"class {one.name!r}: none of its {len(order)} images can be read; {skipped[-1][1]}")
        with torch.no_grad():
            parts = [
                encoder.images(torch.from_numpy(np.stack(read[i : i + BATCH]))) for i in range(0, len(read), BATCH)
            ]
        means.append(torch.cat(parts).double().mean(0).numpy())
    with torch.no_grad():
        named = encoder.texts([one.name for one in classes])
    return _unit(np.stack(means)), None if named is None else _unit(named.double().numpy()), skipped


def _pixels(
    names: Sequence[str], folder: Path, encoder: Encoder, skipped: list[tuple[str, str]]
) -> Iterator[np.ndarray]:
    for name in names:
        try:
            payload = inside(folder, name).read_bytes()
            image = ImageRecord("", name, 0, 0, ())
            yield transforms.load(payload, image, encoder.size, mean=encoder.mean, std=encoder.std).pixels
        except (OSError, DataError) as error:
            skipped.append((name, str(error)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def similarity(images: np.ndarray, texts: np.ndarray | None) -> np.ndarray:
    """float64[C, C]; with images alone 0.5 II."""
    made = IMAGE_IMAGE * images @ images.T
    if texts is None:
        return made
    across = images @ texts.T
    return made + TEXT_TEXT * texts @ texts.T + IMAGE_TEXT * (across + across.T)


def ranked(scores: np.ndarray) -> np.ndarray:
    """int64[C, C - 1]: the other classes of each, the most alike first, the earlier one among equals."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return order[order != np.arange(len(scores))[:, None]].reshape(len(scores), -1)


def pick(order: np.ndarray, count: int, rule: str, rng: np.random.Generator) -> list[int]:
    """`count` of the classes int64[C - 1] in `order`: the nearest, or one of each bin of ceil(C / count)."""
    if rule == "nearest":
        return order[:count].tolist()
    size = math.ceil((len(order) + 1) / count)
    # The class itself stands first in the released list, so its first bin is one shorter.
    starts = [0, *range(size - 1, len(order), size)]
    ends = [*starts[1:], len(order)]
    return [int(order[rng.integers(start, end)]) for start, end in zip(starts, ends) if end > start]


def neighbour_rows(
    classes: Sequence[ImageClass], scores: np.ndarray, *, count: int, rule: str, seed: int, samples: int = 0
) -> list[dict[str, Any]]:
    """Rows in the released form; samples: images listed per class (0: all)."""
    order = ranked(scores)
    rows = []
    for at, one in enumerate(classes):
        rng = generator(seed, 0, one.id, "neighbours")
        near = [classes[i] for i in pick(order[at], count, rule, rng)]
        shown = one.samples if not samples else [one.samples[i] for i in rng.permutation(len(one.samples))[:samples]]
        listed = [[c.id, c.name, c.samples[int(rng.integers(len(c.samples)))]] for c in near]
        rows.append({"class_id": one.id, "class_name": one.name, "samples": shown, "neighbors": listed})
    return rows


def pair_rows(classes: Sequence[ImageClass], scores: np.ndarray, context: int) -> list[dict[str, Any]]:
    """Rows of the form pairs: the most alike two classes are a pair, then the most alike two of the rest, and so on.

    The first `context` images of a class are shown, the others asked about. Raises DataError for a class without both.
    """
    left = list(range(len(classes)))
    upper = [(-scores[i, j], i, j) for i in left for j in left if i < j]
    rows: list[dict[str, Any]] = []
    free = set(left)
    for _, i, j in sorted(upper):
        if {i, j} <= free:
            free -= {i, j}
            rows += [_pair_row(classes[i], context), _pair_row(classes[j], context)]
    return rows


def _pair_row(one: ImageClass, context: int) -> dict[str, Any]:
    if len(one.samples) <= context:
        raise DataError(f"class {one.name!r}: {len(one.samples)} images, {context} are shown and at least one is asked")
    shown, asked = one.samples[:context], one.samples[context:]
    return {"class_id": one.id, "class_name": one.name, "context_samples": shown, "test_samples": asked}


def main(
    classes: Path, images: Path, out: Path, *, clip: str = "", run: str = "", count: int = 36, rule: str = "nearest",
    per_class: int = 100, samples: int = 0, test_classes: int = 0, context: int = 32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Mine and write `out`, and with test_classes beside it <out>_test.jsonl. Returns what was done, as numbers."""
    if bool(clip) == bool(run):
        raise UserError("name one encoder: --clip DIR or --run RUN")
    if rule not in RULES:
        raise UserError(f"--rule {rule}: unknown; there are: {', '.join(RULES)}")
    for option, value in (("--number", count), ("--images-per-class", per_class), ("--context", context)):
        if value < 1:
            raise UserError(f"{option} {value}: must be at least 1")
    from eventlens_ds.eval import encoders

    train, test = split_classes(read_classes(classes), test_classes, seed)
    encoder = encoders.Clip(clip) if clip else encoders.Tower(run)
    skipped: list[tuple[str, str]] = []
    done: dict[str, Any] = {"classes": len(train), "rule": rule, "texts": bool(clip)}
    for name, some in (("train", train), ("test", test)):
        if not some:
            continue
        pictures, texts, broken = features(some, images, encoder, per_class, seed)
        scores = similarity(pictures, texts)
        skipped += broken
        if name == "train":
            write_rows(out, neighbour_rows(some, scores, count=count, rule=rule, seed=seed, samples=samples))
        else:
            path = out.with_name(f"{out.stem}_test.jsonl")
            write_rows(path, pair_rows(some, scores, context))
            done |= {"test_classes": len(some), "test": str(path)}
    if skipped:
        log.warning("%d images could not be read, e.g. %s: %s", len(skipped), *skipped[0])
    return done | {"out": str(out), "unreadable": len(skipped)}
