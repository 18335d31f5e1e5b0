"""Reader of image tags: regions/tags.jsonl with rows {"img_path", "tags": [...]}, the surest first.

In: rows of a tagger for pictures that other sources have; other keys are ignored. Out: images without records whose
`ImageRecord.tags` are set; merged with other sources they give the tags to the picture, wherever it is.
Decision: tags are no samples. A picture that only tags name is left out by `CombinedSource`, with a line in the log.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from eventlens_ds.data.records import ImageRecord
from eventlens_ds.data.sources import Record
from eventlens_ds.data.sources.layout import Problem, shown
from eventlens_ds.data.sources.rows import Entry, RowSource, one_line


class TagSource(RowSource):
    """Tags on disk. Raises UserError when `root` holds no tags file or no image folder."""

    name = "tags"
    kind = ""
    places = ("regions/tags.jsonl", "tags.jsonl")

    def row_problems(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().row_problems(row)
        tags = row.get("tags")
        if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
            yield Problem("field", f"'tags' wants a list of strings, got {shown(tags)}")

    def identity(self, row: Mapping[str, Any]) -> Hashable:
        return row["img_path"]

    def described(self, image: ImageRecord, entries: Sequence[Entry]) -> ImageRecord:
        tags = dict.fromkeys(one_line(tag) for entry in entries for tag in entry.row["tags"])
        return replace(image, tags=tuple(tags))

    def records(self, image: ImageRecord, entries: Sequence[Entry]) -> Iterable[Record]:
        return ()
