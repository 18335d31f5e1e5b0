"""Build a folder of shards from a source, with any number of processes, jobs and restarts.

In: a Source and DIR. Out: DIR/dataset.json, DIR/<split>/shard-NNNNNN.tar, DIR/<split>/index, DIR/<split>/skipped.jsonl
and DIR/journal, which `build` resumes from. Stages: 1 claim the folder (`_claim`), 2 cut the images into shards
(`_Slices`), 3 write each in a worker process (`_build_shard`), 4 join the tables (`finish`).

Decision: a shard is a pure function of its slice of the source and is entered in the journal, with a hash of its
inputs, only after its rename; so a restart keeps what is finished, and array jobs take every n-th shard.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from eventlens_ds.data.manifest import describe, read_json, write_dataset, write_json
from eventlens_ds.data.shards import (
    Skip,
    canonical_json,
    encode_records,
    image_to_json,
    replacing,
    shard_name,
    write_shard,
)
from eventlens_ds.data.sources import Source, SourceImage
from eventlens_ds.data.taggers import load_tagger, tagged
from eventlens_ds.data.tar_index import FORMAT, ShardTable, SplitIndex
from eventlens_ds.data.workers import leave_with_parent
from eventlens_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

SPLIT = re.compile(r"[A-Za-z0-9_-]{1,32}")


@dataclass(frozen=True)
class BuildProgress:
    """How far this process is: images over all its splits."""

    split: str
    images: int
    """Images whose shard is finished, including kept and skipped ones."""
    total: int
    kept: int
    """Images in shards that an earlier run had finished."""
    skipped: int
    seconds: float

    @property
    def rate(self) -> float:
        """Images per second written in this run."""
        return (self.images - self.kept) / max(self.seconds, 1e-9)

    @property
    def eta(self) -> float:
        """Seconds left at this rate; infinite before the first shard is written."""
        return (self.total - self.images) / self.rate if self.rate > 0 else float("inf")


@dataclass(frozen=True)
class _ShardTask:
    out: Path
    split: str
    number: int
    first: int
    items: tuple[SourceImage, ...]
    tagger: str = ""


@dataclass(frozen=True)
class _ShardResult:
    images: int
    skipped: int
    kept: bool


def build(
    source: Source,
    out: str | Path,
    *,
    splits: Sequence[str] | None = None,
    limit: int = 0,
    workers: int = 1,
    shard_images: int = 1000,
    shard_bytes: int = 0,
    arguments: Mapping[str, Any] | None = None,
    part: tuple[int, int] | None = None,
    tagger: str = "",
    progress: Callable[[BuildProgress], None] | None = None,
) -> dict[str, Any]:
    """Write the splits of `source` to the folder `out`; run again after an interruption to continue.

    splits: None takes all. limit: images per split, 0 for all. A shard is closed at `shard_images` images, or
    earlier when its image files reach `shard_bytes` (0: no limit). arguments: what identifies the source (root,
    seed); it is recorded, and a folder built with other arguments is refused. part (k, n): write only the shards
    k, k + n, ...; call `finish` when all n parts are done. tagger: module:function that gives every image its tags
    (data/taggers.py); it is recorded with the arguments. progress: called after every shard; it needs a first pass
    over the annotations to count the images. Returns dataset.json, or {} for a part.

    Raises UserError (other arguments, foreign folder, no space left), DataError (broken source, no image usable).
    """
    out = Path(out)
    chosen = _choose_splits(source, splits)
    k, n = part or (0, 1)
    if workers < 1 or shard_images < 1 or shard_bytes < 0 or limit < 0 or not 0 <= k < n:
        raise UserError(f"workers={workers} shard_images={shard_images} limit={limit} part={k}/{n}: out of range")
    settings: dict[str, Any] = {"splits": chosen, "limit": limit, "shard_images": shard_images}
    settings |= {"shard_bytes": shard_bytes}
    if tagger:
        load_tagger(tagger)
        settings["tagger"] = tagger
    _claim(out, {"format": FORMAT, "source": source.name, "arguments": {**settings, **(arguments or {})}})
    (out / "dataset.json").unlink(missing_ok=True)
    slices = {split: _Slices(source, split, limit, shard_images, shard_bytes, (k, n)) for split in chosen}
    # The ETA costs a pass over the annotations; it also reports a broken line before an hour of writing.
    total = sum(len(items) for cuts in slices.values() for _, _, items in cuts) if progress is not None else 0
    counter = _Counter(total, progress)
    for split, cuts in slices.items():
        for folder in (out / split, out / "journal" / split):
            folder.mkdir(parents=True, exist_ok=True)
        for result in _run((_ShardTask(out, split, *cut, tagger) for cut in cuts), workers):
            counter.add(split, result)
        if cuts.shards == 0:
            raise DataError(f"source {source.name}: split {split!r} has no images")
        write_json(out / "journal" / split / "total.json", {"images": cuts.images, "shards": cuts.shards})
    return finish(out) if part is None else {}


def _choose_splits(source: Source, splits: Sequence[str] | None) -> list[str]:
    present = list(source.splits())
    chosen = list(splits) if splits is not None else present
    for split in chosen:
        if split not in present:
            raise UserError(f"source {source.name} has no split {split!r}, only {', '.join(present) or 'none'}")
        if not SPLIT.fullmatch(split) or split in ("index", "journal"):
            raise UserError(f"source {source.name}: split name {split!r} cannot be a folder name")
    if not chosen or len(set(chosen)) != len(chosen):
        raise UserError(f"source {source.name}: splits {chosen} to build: none, or one twice")
    return chosen


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Mark an empty folder as ours, or check that it is ours and was started with the same settings."""
    claim = out / "journal" / "build.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not claim.exists():
            foreign = sorted(path.name for path in out.iterdir() if path.name != "journal")
            # Another part may have claimed the folder, and made one for its split, since we looked.
            if foreign and not claim.exists():
                raise UserError(f"{out}: is not empty ({foreign[0]}) and was not made by `eventlens data build`")
            claim.parent.mkdir(exist_ok=True)
            if not claim.exists():
                write_json(claim, settings)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error
    found, wanted = read_json(claim), json.loads(canonical_json(settings))
    for was, now in ((found, wanted), (found.get("arguments", {}), wanted["arguments"])):
        for name in sorted(was.keys() | now.keys()):
            if name != "arguments" and was.get(name) != now.get(name):
                values = f"{name}={json.dumps(was.get(name))}, not {json.dumps(now.get(name))}"
                raise UserError(f"{out}: was begun with {values}; use another folder or remove this one")


class _Slices:
    """Cuts a split into (shard number, number of its first image, images), and passes on every n-th from k on.

    After a pass `shards` and `images` count the whole split, whatever the part.
    """

    def __init__(
        self, source: Source, split: str, limit: int, shard_images: int, shard_bytes: int, part: tuple[int, int]
    ):
        self._source, self._split, self._limit = source, split, limit
        self._shard_images, self._shard_bytes, self._part = shard_images, shard_bytes, part
        self.shards = self.images = 0

    def __iter__(self) -> Iterator[tuple[int, int, tuple[SourceImage, ...]]]:
        k, n = self._part
        self.shards = self.images = 0
        for items in self._cut():
            if self.shards % n == k:
                yield self.shards, self.images, tuple(items)
            self.shards, self.images = self.shards + 1, self.images + len(items)

    def _cut(self) -> Iterator[list[SourceImage]]:
        size, items = 0, list[SourceImage]()
        for item in islice(self._source.images(self._split), self._limit or None):
            items.append(item)
            if self._shard_bytes:
                with suppress(OSError):
                    size += item.path.stat().st_size
            if len(items) == self._shard_images or (self._shard_bytes and size >= self._shard_bytes):
                yield items
                size, items = 0, []
        if items:
            yield items


class _Counter:
    """Adds up results and reports them."""

    def __init__(self, total: int, progress: Callable[[BuildProgress], None] | None):
        self._total, self._progress, self._start = total, progress, time.monotonic()
        self._images = self._kept = self._skipped = 0

    def add(self, split: str, result: _ShardResult) -> None:
        self._images += result.images
        self._kept += result.images if result.kept else 0
        self._skipped += result.skipped
        if self._progress is not None:
            seconds = time.monotonic() - self._start
            self._progress(BuildProgress(split, self._images, self._total, self._kept, self._skipped, seconds))


def _run(tasks: Iterator[_ShardTask], workers: int) -> Iterator[_ShardResult]:
    """Results as they come; at most two shards per worker wait, so memory does not grow with the source."""
    if workers == 1:
        yield from map(_build_shard, tasks)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    pending: set[Future[_ShardResult]] = set()
    with ProcessPoolExecutor(workers, context, leave_with_parent, (os.getpid(),)) as pool:
        try:
            for task in tasks:
                pending.add(pool.submit(_build_shard, task))
                if len(pending) >= 2 * workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in pending)
        except BrokenProcessPool as error:
            raise UserError("a build process died (killed, or out of memory); run the same command again") from error
        finally:
            for future in pending:
                future.cancel()


def _build_shard(task: _ShardTask) -> _ShardResult:
    """Write one shard, unless the journal says that it is there and was made from the same inputs."""
    path = task.out / task.split / shard_name(task.number)
    entry = task.out / "journal" / task.split / f"{path.stem}.json"
    inputs = _hash_inputs(task)
    kept = _kept(entry, path, inputs)
    if kept is not None:
        return _ShardResult(len(task.items), len(kept["skipped"]), kept=True)
    # The entry goes first: an old entry beside a new tar would vouch for bytes it has never seen.
    entry.unlink(missing_ok=True)
    items = tagged(task.items, task.tagger) if task.tagger else task.items
    table, skips = write_shard(path, task.split, task.first, items)
    write_json(entry, {"inputs": inputs, "table": table.to_json(), "skipped": [asdict(skip) for skip in skips]})
    return _ShardResult(len(task.items), len(skips), kept=False)


def _kept(entry: Path, path: Path, inputs: str) -> dict[str, Any] | None:
    """The journal entry of a shard that need not be written again."""
    try:
        known = read_json(entry)
        whole = known["inputs"] == inputs and known["table"]["size"] == path.stat().st_size
    except (DataError, OSError, KeyError):
        return None
    return known if whole else None


def _hash_inputs(task: _ShardTask) -> str:
    """sha256 of annotations, file sizes and times: cheap, and a rewritten image file is seen without reading it."""
    digest = sha256(canonical_json([FORMAT, task.split, task.first]))
    for item in task.items:
        try:
            status = item.path.stat()
            state = [status.st_size, status.st_mtime_ns]
        except OSError:
            state = []
        digest.update(canonical_json([image_to_json(item.image), state, len(item.records)]))
        for _, text in encode_records(item):
            digest.update(text)
    return digest.hexdigest()


def finish(out: str | Path) -> dict[str, Any]:
    """Join the shards of a build into indexes, skipped.jsonl and dataset.json, and return the last.

    Called by `build`; after array jobs (`part`) it is called once by hand. Raises DataError naming the shards that
    are missing, or the first reason when no image of a split could be stored.
    """
    out = Path(out)
    settings = read_json(out / "journal" / "build.json")
    described = {}
    for split in settings["arguments"]["splits"]:
        total = read_json(out / "journal" / split / "total.json")
        _drop_stale(out, split, total["shards"])
        skips: list[Skip] = []
        index = SplitIndex.from_tables(_journalled(out, split, total["shards"], skips))
        if index.num_images == 0:
            raise DataError(
                f"split {split!r}: none of {len(skips)} images could be stored; {skips[0].img_fn}: {skips[0].reason}"
            )
        if skips:
            log.warning("%s: %d of %d images skipped, see skipped.jsonl", split, len(skips), total["images"])
        with replacing(out / split / "skipped.jsonl") as file:
            file.writelines(canonical_json(asdict(skip)) + b"\n" for skip in skips)
        index.save(out / split / "index")
        described[split] = describe(index, len(skips))
    return write_dataset(out, settings["source"], settings["arguments"], described)


def _journalled(out: Path, split: str, shards: int, skips: list[Skip]) -> Iterator[ShardTable]:
    """Tables of all shards in order; their skipped images are added to `skips`."""
    folder = out / "journal" / split
    missing = [n for n in range(shards) if not (folder / f"shard-{n:06d}.json").exists()]
    if missing:
        some = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        raise DataError(f"{out}: split {split!r} lacks {len(missing)} of {shards} shards ({some}); run their parts")
    for number in range(shards):
        entry = read_json(folder / f"shard-{number:06d}.json")
        table = ShardTable.from_json(entry["table"])
        path = out / split / table.name
        if not path.exists() or path.stat().st_size != table.size:
            raise DataError(f"{path}: missing or not {table.size} bytes; run the same `eventlens data build` again")
        skips.extend(Skip(**skip) for skip in entry["skipped"])
        yield table


def _drop_stale(out: Path, split: str, shards: int) -> None:
    """Remove temporaries of killed builds, and shards beyond the end of a source that has become shorter."""
    for path in (*(out / split).glob(".*.tmp"), *(out / "journal" / split).glob(".*.tmp")):
        if path.is_file():
            path.unlink(missing_ok=True)
    for entry in (out / "journal" / split).glob("shard-*.json"):
        if int(entry.stem.removeprefix("shard-")) >= shards:
            log.warning("%s: removing shard %s, the source has %d shards now", split, entry.stem, shards)
            (out / split / f"{entry.stem}.tar").unlink(missing_ok=True)
            entry.unlink()
