"""Shards: webdataset tars that hold an image once, its metadata, and the records that point to it.

Members of one image follow each other: `{key}.jpg|png|webp` (bytes unchanged), `{key}.meta.json` (ImageRecord),
`{key}.r0000.json` ... (canonical records). `write_shard` makes a tar and its index table; `ShardSet` reads single
members through the index by offset, so one damaged byte costs the member it lies in and no other.

Decision: the bytes of a shard depend on its content alone (no time, user or worker in them), so a build can be
resumed, split over jobs and compared by hash.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from eventlens_ds.data.records import Box, ImageRecord, Region
from eventlens_ds.data.sources import Record, SourceImage
from eventlens_ds.data.tar_index import ImageEntry, RecordEntry, ShardTable, SplitIndex, parse_json
from eventlens_ds.data.tar_scan import BLOCK
from eventlens_ds.data.transforms import displayed_size, stored_size
from eventlens_ds.errors import DataError, UserError

IMAGE_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}
"""First bytes of a file -> member suffix; the name a file has on disk says nothing."""
MAX_IMAGE_BYTES = 256 << 20
OPEN_SHARDS = 64
"""File handles a reader keeps; a data set may have more shards than a process may open files."""


@dataclass(frozen=True)
class Skip:
    """An image that was not stored, and why; `records` are lost with it."""

    key: str
    img_fn: str
    reason: str
    records: int


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def canonical_json(data: Any) -> bytes:
    """Equal data gives equal bytes. Raises ValueError on NaN, infinity or what JSON cannot hold."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def image_to_json(image: ImageRecord) -> dict[str, Any]:
    """What JSON holds of an image. Tags are left out where there are none, so shards without them keep their hash."""
    regions = [{"name": r.name, "box": r.box, "score": r.score, "polygons": r.polygons} for r in image.regions]
    made = {**vars(image), "regions": regions}
    return made if image.tags else {name: value for name, value in made.items() if name != "tags"}


def image_from_json(data: Mapping[str, Any], *, outlines: bool = True) -> ImageRecord:
    """Inverse of image_to_json, without the polygons if they are not wanted: they are most of the metadata.

    Raises KeyError, TypeError or ValueError on a wrong layout.
    """
    regions = tuple(
        Region(
            name=region["name"],
            box=Box(*region["box"]),
            score=region["score"],
            polygons=tuple(tuple((x, y) for x, y in polygon) for polygon in region["polygons"]) if outlines else (),
        )
        for region in data["regions"]
    )
    return ImageRecord(**{**data, "regions": regions, "tags": tuple(data.get("tags", ()))})


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears as `path` whole or not at all: own temporary name, fsync, rename.

    Raises UserError naming path and cause when the disk is full or the folder cannot be written; nothing is left.
    """
    # Array tasks on other nodes may have our process id.
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from error
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


class _Refused(Exception):
    """Why an image file is not stored."""


def _read_image(path: Path) -> bytes:
    try:
        # stat first: opening a FIFO would wait for ever.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("not a regular file")
        if not 0 < status.st_size <= MAX_IMAGE_BYTES:
            raise _Refused(f"file of {status.st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        raise _Refused(f"cannot read: {error.strerror or error}") from error


def _check_header(payload: bytes, image: ImageRecord) -> tuple[str, int, int]:
    """(suffix, width, height) from the header alone; nothing is decoded.

    The size must be the annotation's, as stored or as turned by the EXIF tag; else its boxes have no meaning here.
    """
    suffix = next((name for magic, name in IMAGE_MAGIC.items() if payload.startswith(magic)), "")
    if not suffix or (suffix == "webp" and payload[8:12] != b"WEBP"):
        raise _Refused("neither JPEG, PNG nor WebP")
    named = (image.width, image.height)
    try:
        if named == stored_size(payload):
            return suffix, *named
        shown = displayed_size(payload)
    except DataError as error:
        raise _Refused(str(error)) from error
    if named not in (shown, (0, 0)):
        raise _Refused(f"is {shown[0]}x{shown[1]}, its annotation says {named[0]}x{named[1]}")
    return suffix, *shown


class ShardWriter:
    """Appends images to an open tar and keeps the table of what it wrote."""

    def __init__(self, file: BinaryIO, name: str):
        self.table = ShardTable(name, 0)
        self._file = file
        self._at = 0

    def add(self, image: ImageRecord, suffix: str, payload: bytes, records: Sequence[tuple[str, bytes]]) -> None:
        """Append an image with its records, given as (kind, canonical JSON)."""
        meta = canonical_json(image_to_json(image))
        self.table.images.append(
            ImageEntry(
                *(image.key, *self._member(f"{image.key}.{suffix}", payload)),
                *self._member(f"{image.key}.meta.json", meta),
                *(image.width, image.height, len(image.regions), len(records)),
            )
        )
        for number, (kind, text) in enumerate(records):
            self.table.records.append(RecordEntry(*self._member(f"{image.key}.r{number:04d}.json", text), kind))

    def _member(self, name: str, payload: bytes) -> tuple[int, int, int]:
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
        self._file.write(payload)
        self._file.write(bytes(-len(payload) % BLOCK))
        offset = self._at + BLOCK
        self._at = offset + -(-len(payload) // BLOCK) * BLOCK
        return offset, len(payload), zlib.crc32(payload)

    def close(self) -> ShardTable:
        """End the archive as tar does: two zero blocks, filled up to a record of 20 blocks."""
        end = 2 * BLOCK + -(self._at + 2 * BLOCK) % tarfile.RECORDSIZE
        self._file.write(bytes(end))
        self.table.size = self._at + end
        return self.table


def encode_records(item: SourceImage) -> list[tuple[str, bytes]]:
    """(kind, canonical JSON) of the records of an image. Raises DataError on a record that JSON cannot hold."""
    encoded = []
    for record in item.records:
        try:
            encoded.append((str(record["kind"]), canonical_json(record)))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{item.image.img_fn}: a record cannot be stored: {error!r}") from error
    return encoded


def write_shard(path: Path, split: str, first: int, items: Sequence[SourceImage]) -> tuple[ShardTable, list[Skip]]:
    """Write one shard; the images get the keys {split}-{first:08d} and on.

    A skipped image keeps its number, so one broken file renames no other. Raises UserError when writing fails.
    """
    skips: list[Skip] = []
    with replacing(path) as file:
        writer = ShardWriter(file, path.name)
        for number, item in enumerate(items, first):
            key = f"{split}-{number:08d}"
            records = encode_records(item)
            try:
                payload = _read_image(item.path)
                suffix, width, height = _check_header(payload, item.image)
            except _Refused as reason:
                skips.append(Skip(key, item.image.img_fn, str(reason), len(records)))
                continue
            image = replace(item.image, key=key, width=width, height=height, split=split)
            writer.add(image, suffix, payload, records)
        return writer.close(), skips


class _Handle:
    """An open shard; closed when the last reader lets go of it, also one that was evicted while in use."""

    def __init__(self, path: Path):
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class ShardSet:
    """Random access to one split of a built folder. I images, R records, both counted from 0.

    Every read is checked against the crc32 of the index; a mismatch, a short file or a missing one raises DataError
    naming shard, key and offset, and leaves all other members readable. Memory does not grow with the split.
    May be pickled and used after a fork: each process opens its own files.
    """

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        self.split = split
        self.index = SplitIndex.load(folder / split / "index")
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._pid = os.getpid()

    @classmethod
    def open(cls, folder: str | Path, split: str) -> ShardSet:
        """Open DIR/<split>. Raises UserError naming the splits there are, DataError when the index is unreadable."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; make it with `eventlens data build`")
        if not (folder / "dataset.json").exists() and (folder / "journal" / "build.json").exists():
            raise UserError(f"{folder}: the build is not finished; run the same `eventlens data build` again")
        if not (folder / split).is_dir():
            present = sorted(path.parent.name for path in folder.glob("*/index"))
            raise UserError(f"{folder}: has no split {split!r}, only {', '.join(present) or 'none'}")
        return cls(folder, split)

    def __getstate__(self) -> tuple[Path, str]:
        return self.folder, self.split

    def __setstate__(self, state: tuple[Path, str]) -> None:
        ShardSet.__init__(self, *state)

    @property
    def num_images(self) -> int:
        return self.index.num_images

    @property
    def num_records(self) -> int:
        return self.index.num_records

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.index.kinds

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint

    def key(self, image: int) -> str:
        return self.index.keys[image].decode()

    def image(self, image: int, *, outlines: bool = True) -> ImageRecord:
        """Metadata of an image, on request without the polygons of its regions."""
        start, size, crc = self._place("meta", image)
        where, payload = self._read(image, f"{self.key(image)}.meta.json", start, size, crc)
        try:
            return image_from_json(parse_json(payload, where), outlines=outlines)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}: not the metadata of an image: {error!r}") from error

    def image_bytes(self, image: int) -> bytes:
        """The image file as the source had it."""
        return self._read(image, self.key(image), *self._place("image", image))[1]

    def record(self, record: int) -> Record:
        """A canonical record as a new dict."""
        image, name = self.image_of(record), self.record_name(record)
        where, payload = self._read(image, name, *self._place("record", record))
        return parse_json(payload, where)

    def record_name(self, record: int) -> str:
        """Name of the member that holds a record."""
        image = self.image_of(record)
        return f"{self.key(image)}.r{record - self.records_of(image).start:04d}.json"

    def image_of(self, record: int) -> int:
        """The image a record points to."""
        return int(self.index.arrays["record_image"][record])

    def kind_of(self, record: int) -> str:
        return self.kinds[self.index.arrays["record_kind"][record]]

    def records_of(self, image: int) -> range:
        """Numbers of the records of an image."""
        first = self.index.arrays["first_record"]
        image = range(self.num_images)[image]
        return range(int(first[image]), int(first[image + 1]))

    def verify(self) -> Iterator[str]:
        """Read every member once; yields one line for each that cannot be read."""
        for name, size in self.index.shards:
            path = self.folder / self.split / name
            found = path.stat().st_size if path.is_file() else -1
            if found != size:
                yield f"{self.split}/{name}: " + (f"{found} bytes, indexed with {size}" if found >= 0 else "missing")
        for image in range(self.num_images):
            reads: list[tuple[Callable[[int], object], int]] = [(self.image, image), (self.image_bytes, image)]
            for read, number in reads + [(self.record, record) for record in self.records_of(image)]:
                try:
                    read(number)
                except DataError as error:
                    yield str(error)

    def _place(self, part: str, number: int) -> tuple[int, int, int]:
        offset, size, crc = (self.index.arrays[f"{part}_{name}"][number] for name in ("offset", "size", "crc"))
        return int(offset), int(size), int(crc)

    def _read(self, image: int, member: str, offset: int, size: int, crc: int) -> tuple[str, bytes]:
        shard = int(self.index.arrays["image_shard"][image])
        name = self.index.shards[shard][0]
        where = f"{self.split}/{name}: {member} at offset {offset}"
        try:
            payload = os.pread(self._handle(shard, name).fd, size, offset)
        except OSError as error:
            raise DataError(f"{where}: cannot read: {error.strerror or error}") from error
        if len(payload) != size:
            raise DataError(f"{where}: {len(payload)} of {size} bytes; the shard is truncated")
        if zlib.crc32(payload) != crc:
            raise DataError(f"{where}: crc32 {zlib.crc32(payload):08x}, index says {crc:08x}; the shard is damaged")
        return where, payload

    def _handle(self, shard: int, name: str) -> _Handle:
        if self._pid != os.getpid():
            self._handles, self._pid = OrderedDict(), os.getpid()
        handle = self._handles.pop(shard, None) or _Handle(self.folder / self.split / name)
        self._handles[shard] = handle
        while len(self._handles) > OPEN_SHARDS:
            self._handles.popitem(last=False)
        return handle
