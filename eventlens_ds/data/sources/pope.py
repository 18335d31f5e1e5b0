"""Reader of POPE (Li et al. 2023): questions whether an object is in the picture, one file per setting.

In: regions/pope/<name>_<setting>.json, JSON lines {"question_id", "image", "text", "label"}, label yes or no; settings
random, popular and adversarial. Out: images with one record (kind "pope") per row, which names its setting.
Decision: it is a benchmark, so a picture that nothing else places belongs to "val", never to "train".
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eventlens_ds.data.records import ImageRecord, Sample
from eventlens_ds.data.sources.layout import Problem, shown, text_problems
from eventlens_ds.data.sources.rows import RowSource, one_line
from eventlens_ds.errors import UserError

SETTINGS = ("random", "popular", "adversarial")

_FILE = re.compile(r".*_({})\.jsonl?".format("|".join(SETTINGS)))


class PopeSource(RowSource):
    """POPE on disk. Raises UserError when `root` holds no folder of it, or one with a file of no known setting."""

    name = "pope"
    kind = "pope"
    places = ("regions/pope", "pope")

    def __init__(self, root: str | Path, split: str = "val") -> None:
        super().__init__(root, split)

    def find_files(self) -> list[Path]:
        folder = next((self.root / place for place in self.places if (self.root / place).is_dir()), None)
        found = [] if folder is None else sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jsonl"))
        for path in found:
            if not _FILE.fullmatch(path.name):
                raise UserError(f"{path}: its name ends with no setting of POPE ({', '.join(SETTINGS)})")
        return sorted(found, key=lambda path: (SETTINGS.index(setting_of(path)), path.name))

    def canonical(self, row: dict[str, Any], path: Path) -> dict[str, Any]:
        named = {"img_path": self.locate(row["image"])} if "img_path" not in row and "image" in row else {}
        return {**row, **named, "setting": setting_of(path)}

    def row_problems(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().row_problems(row)
        yield from text_problems(row, ("text",))
        if row.get("label") not in ("yes", "no"):
            yield Problem("field", f"'label' wants yes or no, got {shown(row.get('label'))}")

    def identity(self, row: Mapping[str, Any]) -> Hashable:
        return row["setting"], row["img_path"], row["text"]


def setting_of(path: Path) -> str:
    """The setting that a checked file name ends with."""
    found = _FILE.fullmatch(path.name)
    assert found is not None
    return found[1]


def samples(record: Mapping[str, Any], image: ImageRecord) -> tuple[Sample, ...]:
    """One sample whose target is yes or no: id "<image key>#<setting>-<line>/pope"."""
    sample = Sample(
        id=f"{image.key}#{record['setting']}-{record['line']}/pope",
        source="pope",
        task="pope",
        images=(image.key,),
        turns=(("question", (one_line(record["text"]),)),),
        targets=((record["label"],),),
        fields=(("label", record["label"]), ("setting", record["setting"])),
    )
    return (sample,)
