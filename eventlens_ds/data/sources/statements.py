"""Reader of spatial statements: regions/vsr.jsonl, or the files of VSR (Liu et al. 2023) in regions/vsr/.

In: rows {"img_path", "statement", "label"} or VSR's own {"image", "caption", "label", ...}, label 1 true, 0 false.
Out: images with one record (kind "vsr") per row. Decision: files in regions/vsr/ are named as released (train, dev,
test), and rows without another split take dev as "val"; a file of all rows follows its pictures.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eventlens_ds.data.records import ImageRecord, Sample
from eventlens_ds.data.sources.layout import Problem, shown, text_problems
from eventlens_ds.data.sources.rows import RowSource, one_line

SPLIT_OF_FILE = {"train": "train", "dev": "val", "test": "test"}
ANSWERS = ("no", "yes")


class StatementSource(RowSource):
    """Statements on disk. Raises UserError when `root` holds no such file or no image folder."""

    name = "vsr"
    kind = "vsr"
    places = ("regions/vsr.jsonl", "vsr.jsonl", *(f"regions/vsr/{name}.jsonl" for name in SPLIT_OF_FILE))

    def find_files(self) -> list[Path]:
        return [p for p in (self.root / place for place in self.places) if p.is_file()]

    def split_of_file(self, path: Path) -> str:
        return SPLIT_OF_FILE.get(path.stem, "")

    def canonical(self, row: dict[str, Any], path: Path) -> dict[str, Any]:
        if "img_path" not in row and "image" in row:
            row = {**row, "img_path": self.locate(row["image"])}
        if "statement" not in row and "caption" in row:
            row = {**row, "statement": row["caption"]}
        part = self.split_of_file(path)
        return {**row, "part": part} if part else row

    def row_problems(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().row_problems(row)
        yield from text_problems(row, ("statement",))
        if isinstance(row.get("label"), bool) or row.get("label") not in (0, 1):
            yield Problem("field", f"'label' wants 1 (true) or 0 (false), got {shown(row.get('label'))}")

    def identity(self, row: Mapping[str, Any]) -> Hashable:
        return row["img_path"], row["statement"]


def samples(record: Mapping[str, Any], image: ImageRecord) -> tuple[Sample, ...]:
    """One sample whose target is yes or no: id "<image key>#<line>/vsr", of a released file "#<split>-<line>"."""
    label, part = int(record["label"]), record.get("part")
    sample = Sample(
        id=f"{image.key}#{f'{part}-' if part else ''}{record['line']}/vsr",
        source="vsr",
        task="vsr",
        images=(image.key,),
        turns=(("statement", (one_line(record["statement"]),)),),
        targets=((ANSWERS[label],),),
        fields=(("label", str(label)),),
    )
    return (sample,)
