"""Reader of referring expressions in Shikra's form: regions/rec.jsonl with {"img_path", "expression", "bbox"}.

In: rows with bbox [x1, y1, x2, y2] as shares of width and height, optionally "width", "height", "split". Out: one
record (kind "expression") per image and box, which holds the rows of all its expressions; expanded, a `rec` sample per
expression and one `reg` sample per box. Other sources of expressions (refcoco, vg) store the same record.
Decision: a training row whose picture is in a val or test split of RefCOCO, RefCOCO+ or RefCOCOg is left out and
counted when their refs files lie in the same folder; without them a warning says that nothing was checked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.data import boxes
from eventlens_ds.data.records import Box, ImageRecord, Sample
from eventlens_ds.data.sources import Record, refcoco
from eventlens_ds.data.sources.layout import Problem
from eventlens_ds.data.sources.rows import Entry, RowSource, one_line

log = logging.getLogger(__name__)

REFS_PLACES = (".", "refer", "refer/data")
"""Where below a root the folders refcoco, refcoco+ and refcocog may lie."""


class ExpressionSource(RowSource):
    """Expressions on disk. Raises UserError when `root` holds no such file or no image folder."""

    name = "rec"
    kind = "expression"
    places = ("regions/rec.jsonl", "rec.jsonl")
    in_pixels = False
    """Boxes are in pixels, and every row has the size of its picture."""

    def __init__(self, root: str | Path, split: str = "train") -> None:
        super().__init__(root, split)
        self.held_out = held_out_images(self.root)
        """COCO number -> split of RefCOCO, None when there are no refs files to read it from."""
        self._warned = False

    def row_problems(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        yield from refcoco.line_problems(row)
        if ("width" in row) != ("height" in row):
            yield Problem("field", "one of 'width' and 'height' without the other")

    def refusal(self, row: Mapping[str, Any], split: str) -> str | None:
        size = self.size_of(row) if self.in_pixels else None
        if fault := boxes.problem(boxes.from_xyxy(row["bbox"]), *(size or (1, 1))):
            return f"box {fault}"
        return self.held_out_reason(self.coco_number(row)) if split == "train" else None

    def coco_number(self, row: Mapping[str, Any]) -> int | None:
        """COCO number of a row's picture, None for other pictures."""
        return refcoco.coco_number(row["img_path"])

    def held_out_reason(self, number: int | None) -> str | None:
        """Why a picture may not be trained on, or None."""
        if self.held_out is None:
            if number is not None and not self._warned:
                self._warned = True
                log.warning("%s: no refs files of RefCOCO below %s; nothing is checked", self.name, self.root)
            return None
        if number is None:
            return "no COCO number to check against RefCOCO"
        return f"held out by {self.held_out[number]}" if number in self.held_out else None

    def identity(self, row: Mapping[str, Any]) -> Hashable:
        return row["img_path"], row["expression"], tuple(row["bbox"])

    def size_of(self, row: Mapping[str, Any]) -> tuple[int, int] | None:
        return (row["width"], row["height"]) if "width" in row else None

    def records(self, image: ImageRecord, entries: Sequence[Entry]) -> Iterable[Record]:
        scale = (1, 1) if self.in_pixels else (image.width, image.height)
        placed = [(boxes.from_normalised(e.row["bbox"], *scale), {**e.row, "line": e.number}) for e in entries]
        return box_records(self.name, placed)


def held_out_images(root: Path) -> dict[int, str] | None:
    """Pictures of val and test splits by COCO number, None when no refs file lies below `root`.

    Raises UserError when there are refs files, but not of all three sets.
    """
    refs = refs_root(root)
    return None if refs is None else refcoco.val_test_images(refs)


def refs_root(root: Path) -> Path | None:
    """The folder that holds refcoco/refs(unc).p and the like, or None."""
    found = (root / place for place in REFS_PLACES if any(root.glob(f"{place}/refcoco*/refs(*).p")))
    return next(found, None)


def box_records(source: str, placed: Iterable[tuple[Box, Mapping[str, Any]]]) -> list[Record]:
    """One record per distinct box, in the order of its first row; rows hold "expression" and "line"."""
    rows_of: dict[Box, list[dict[str, Any]]] = {}
    for box, row in placed:
        rows_of.setdefault(box, []).append(dict(row))
    return [
        {"kind": "expression", "source": source, "line": rows[0]["line"], "box": list(box), "rows": rows}
        for box, rows in rows_of.items()
    ]


def samples(record: Mapping[str, Any], image: ImageRecord) -> tuple[Sample, ...]:
    """A rec sample per expression, then the reg sample: ids "<image key>#<source>-<line>/rec" and ".../reg".

    Targets of the reg sample are the different expressions of the box, in file order.
    """
    box = boxes.from_xyxy(record["box"])
    source, written = record["source"], boxes.to_text(box, image.width, image.height)
    fields = (("box", json.dumps(list(box))),)
    texts = [one_line(row["expression"]) for row in record["rows"]]
    made = [
        Sample(
            id=f"{image.key}#{source}-{row['line']}/rec",
            source=source,
            task="rec",
            images=(image.key,),
            turns=(("expression", (text,)),),
            targets=((written,),),
            fields=fields,
        )
        for row, text in zip(record["rows"], texts)
    ]
    described = Sample(
        id=f"{image.key}#{source}-{record['line']}/reg",
        source=source,
        task="reg",
        images=(image.key,),
        turns=(("box", (written,)),),
        targets=tuple((text,) for text in dict.fromkeys(texts)),
        fields=fields,
    )
    return (*made, described)
