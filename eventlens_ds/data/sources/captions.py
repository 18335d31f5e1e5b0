"""Reader of captions: regions/captions.jsonl with rows {"img_path", "caption"} and an optional "split".

In: a folder as data/sources/rows.py describes it. Out: images with one record (kind "caption") per row.
Decision: a caption follows its picture into the split that VCR or VisualCOMET gives it (see there).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from eventlens_ds.data.records import ImageRecord, Sample
from eventlens_ds.data.sources.layout import Problem, text_problems
from eventlens_ds.data.sources.rows import RowSource, one_line


class CaptionSource(RowSource):
    """Captions on disk. Raises UserError when `root` holds no captions file or no image folder."""

    name = "captions"
    kind = "caption"
    places = ("regions/captions.jsonl", "captions.jsonl")

    def row_problems(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().row_problems(row)
        yield from text_problems(row, ("caption",))

    def identity(self, row: Mapping[str, Any]) -> Hashable:
        return row["img_path"], row["caption"]


def samples(record: Mapping[str, Any], image: ImageRecord) -> tuple[Sample, ...]:
    """One sample with the caption as target: id "<image key>#<line>/caption"."""
    sample = Sample(
        id=f"{image.key}#{record['line']}/caption",
        source="captions",
        task="caption",
        images=(image.key,),
        turns=(),
        targets=((one_line(record["caption"]),),),
    )
    return (sample,)
