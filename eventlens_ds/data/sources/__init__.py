"""Readers of the formats people have on disk, one file per source.

A source yields `SourceImage`s: an image file, its metadata and the JSON records that point to it, in a canonical
form (object tags 0-based, converted once, here: P2). `samples` expands a stored record into `Sample`s. Decision:
the canonical record keeps every field of the source, so a shard can be rebuilt into what it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from eventlens_ds.data.records import ImageRecord, Sample

Record = dict[str, Any]
"""A canonical JSON record; `kind` names the reader that expands it (see `samples`)."""


@dataclass(frozen=True)
class SourceImage:
    """An image of a source: the file to store, its metadata and the records that point to it."""

    image: ImageRecord
    path: Path
    records: tuple[Record, ...]


class Source(Protocol):
    """What `data build` needs of a source."""

    name: str
    follows: bool
    """Its rows say nothing about splits: in company they take the split of their picture."""

    def splits(self) -> tuple[str, ...]:
        """Splits present on disk."""
        ...

    def images(self, split: str) -> Iterator[SourceImage]:
        """Images of a split in a fixed order. Raises DataError naming file:line on a broken line."""
        ...


@runtime_checkable
class NamesImages(Protocol):
    """A source that can name the images of a split without reading what is known of each."""

    def img_fns(self, split: str) -> Iterable[str]: ...


def samples(record: Mapping[str, Any], image: ImageRecord) -> tuple[Sample, ...]:
    """Expand a stored record into the samples it holds, always in the same order."""
    from eventlens_ds.data.sources import captions, expressions, lcl, pope, questions, statements, vcr, visualcomet

    readers: dict[str, Callable[[Mapping[str, Any], ImageRecord], tuple[Sample, ...]]] = {
        "vcr": vcr.samples,
        "event": visualcomet.samples,
        "caption": captions.samples,
        "expression": expressions.samples,
        "vqa": questions.samples,
        "vsr": statements.samples,
        "pope": pope.samples,
        "lcl": lcl.samples,
        "isekai": lcl.samples,
    }
    return readers[record["kind"]](record, image)
