"""Lengths of everything in a built folder, by arithmetic over piece lengths, and the groups they make.

In: a ShardSet, a tokenizer, an EncodeSpec. Out: a `SampleTable` (one line per sample: image, record, part, task,
tokens) and from it a `GroupIndex` whose `lengths` the plan packs. Decision: lengths are computed once, in parallel,
before any process group starts, and cached under a key of everything they depend on: shards, tokenizer, prompt
version, linking and vision shape. Encoding later checks that it yields exactly the planned number of tokens.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache as cache_results
from pathlib import Path

import numpy as np
from filelock import FileLock

from eventlens_ds.data import sources
from eventlens_ds.data.encode import EncodeSpec, group_lengths, instruction, rendered_group
from eventlens_ds.data.prompts import MAX_LISTED_REGIONS, PROMPT_VERSION
from eventlens_ds.data.question_tokenizer import question_tokenizer
from eventlens_ds.data.records import TASKS, Group, ImageRecord, Sample
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.data.tokenizer import PieceTokenizer, load_tokenizer
from eventlens_ds.errors import DataError

log = logging.getLogger(__name__)

COLUMNS = ("image", "record", "part", "task", "prefix", "stem", "leaves", "supervised", "blind", "alone", "asked")
LENGTHS_VERSION = 2
_CHUNK_IMAGES = 512


@dataclass(frozen=True)
class SampleTable:
    """Columns int32[N], sorted by (task, image, record, part). `prefix` is the prefix of the sample's own group
    when it stands alone; `blind` is 1 for a choice sample without a label; `alone` is 1 when the image has more
    regions than a prefix lists by itself, so that two samples need not share their prefix, and for an encoder-decoder,
    whose samples never do; `asked` tells instructions to a Q-Former apart (31 bits of a hash), 0 without one."""

    columns: np.ndarray
    fingerprint: str
    unread: tuple[tuple[str, str], ...] = ()
    """(member, reason) of records that cannot be read; such a table is not cached, so that a repair is seen."""

    def __len__(self) -> int:
        return self.columns.shape[1]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[COLUMNS.index(name)]


@dataclass(frozen=True)
class GroupIndex:
    """Groups as ranges of lines of a SampleTable. first, last int64[G]; lengths, supervised int32[G]."""

    first: np.ndarray
    last: np.ndarray
    lengths: np.ndarray
    task: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def read_image_samples(shards: ShardSet, image: int) -> tuple[ImageRecord, list[tuple[int, int, Sample]]]:
    """An image and all its samples as (record, part, sample). DataError where one of them cannot be read."""
    unread: list[tuple[str, str]] = []
    record, out = readable_samples(shards, image, unread)
    if unread or record is None:
        raise DataError(unread[0][1] if unread else f"{shards.folder}: image {image} cannot be read")
    return record, out


def readable_samples(
    shards: ShardSet, image: int, unread: list[tuple[str, str]]
) -> tuple[ImageRecord | None, list[tuple[int, int, Sample]]]:
    """`read_image_samples` of what can be read; `unread` gets (member, reason) of the records that cannot. None for an
    image whose metadata is damaged: none of its records can be used."""
    out: list[tuple[int, int, Sample]] = []
    try:
        record = shards.image(image)
    except DataError as error:
        unread += [(shards.record_name(j), str(error)) for j in shards.records_of(image)]
        return None, []
    for j in shards.records_of(image):
        try:
            out += [(j, part, s) for part, s in enumerate(sources.samples(shards.record(j), record))]
        except DataError as error:
            unread.append((shards.record_name(j), str(error)))
    return record, out


def sample_table(
    shards: ShardSet, tokenizer_path: str, spec: EncodeSpec, *, cache: Path | None = None, workers: int = 1
) -> SampleTable:
    """Lengths of every sample of a split, from the cache when nothing they depend on has changed."""
    tokenizer = load_tokenizer(tokenizer_path)
    fingerprint = _fingerprint(shards, tokenizer, spec)
    if cache is None or not _writable(cache):
        return _table(shards, tokenizer_path, spec, workers, fingerprint)
    path = cache / f"lengths-{fingerprint}.npy"
    # The ranks of a machine come here at the same time: one computes with all cores, the others wait and read.
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            try:
                return SampleTable(np.load(path), fingerprint)
            except (ValueError, OSError) as error:
                log.warning("%s is damaged (%s); lengths are computed again", path, error)
        table = _table(shards, tokenizer_path, spec, workers, fingerprint)
        if not table.unread:
            _save(path, table.columns)
    return table


def _table(shards: ShardSet, tokenizer_path: str, spec: EncodeSpec, workers: int, fingerprint: str) -> SampleTable:
    columns, unread = _compute(shards, tokenizer_path, spec, workers)
    if unread:
        told = "; ".join(reason for _, reason in unread[:3])
        log.warning("%s/%s: %d records cannot be read: %s", shards.folder, shards.split, len(unread), told)
    return SampleTable(columns, fingerprint, tuple(unread))


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("lengths cannot be kept in %s (%s) and are computed at every start", folder, error)
        return False
    return os.access(folder, os.W_OK)


def _compute(
    shards: ShardSet, tokenizer_path: str, spec: EncodeSpec, workers: int
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    starts = range(0, shards.num_images, _CHUNK_IMAGES)
    jobs = [(shards, tokenizer_path, spec, s, min(s + _CHUNK_IMAGES, shards.num_images)) for s in starts]
    if workers > 1 and len(jobs) > 1:
        fork = multiprocessing.get_context("fork")
        try:
            with ProcessPoolExecutor(min(workers, len(jobs)), fork, initializer=_end_on_sigterm) as pool:
                parts = list(pool.map(_lengths_job, jobs))
        except BrokenProcessPool:
            raise DataError(f"{shards.folder}: a worker that counts tokens was killed (out of memory?)") from None
    else:
        parts = [_lengths_job(job) for job in jobs]
    unread = [entry for _, entries in parts for entry in entries]
    columns = np.concatenate([*(part for part, _ in parts), np.zeros((len(COLUMNS), 0), np.int32)], axis=1)
    order = np.lexsort([columns[COLUMNS.index(c)] for c in ("part", "record", "image", "task")])
    return np.ascontiguousarray(columns[:, order]), unread


def _end_on_sigterm() -> None:
    """In a worker. The handler of a rank, inherited, would raise in whatever the worker waits for, or not at all."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fingerprint(shards: ShardSet, tokenizer: PieceTokenizer, spec: EncodeSpec) -> str:
    layout = (spec.linking, spec.style, spec.vision.tokens, spec.instruction_tokens)
    key: tuple[object, ...] = (LENGTHS_VERSION, PROMPT_VERSION, shards.fingerprint, tokenizer.fingerprint, layout)
    if spec.question_tokenizer:
        key += (question_tokenizer(spec.question_tokenizer).fingerprint,)
    if spec.encoder_decoder:
        key += ("encoder-decoder",)
    return hashlib.sha256(repr(key).encode()).hexdigest()[:20]


def _lengths_job(job: tuple[ShardSet, str, EncodeSpec, int, int]) -> tuple[np.ndarray, list[tuple[str, str]]]:
    shards, tokenizer_path, spec, start, end = job
    return _image_lengths(shards, _tokenizer(tokenizer_path), spec, start, end)


@cache_results
def _tokenizer(path: str) -> PieceTokenizer:
    """One tokenizer per process, with what it remembers of earlier chunks."""
    return load_tokenizer(path)


def _image_lengths(
    shards: ShardSet, tokenizer: PieceTokenizer, spec: EncodeSpec, start: int, end: int
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    lines: list[tuple[int, ...]] = []
    unread: list[tuple[str, str]] = []
    for i in range(start, end):
        image, found = readable_samples(shards, i, unread)
        for record, part, sample in found:
            assert image is not None
            rendered = rendered_group(Group(sample.task, (image,), (sample,)), tokenizer, spec)
            prefix, (length,) = group_lengths(rendered, tokenizer, spec)
            blind = int(bool(sample.candidates) and sample.label is None)
            listed = spec.style.list_objects and len(image.regions) > MAX_LISTED_REGIONS
            alone = int(listed or spec.encoder_decoder)
            asked = _hash(instruction(rendered.samples[0], tokenizer, spec))
            lines.append((i, record, part, TASKS.index(sample.task), prefix, *length, blind, alone, asked))
    return np.asarray(lines, np.int32).reshape(-1, len(COLUMNS)).T, unread


def _hash(ids: tuple[int, ...]) -> int:
    digest = hashlib.blake2b(np.asarray(ids, "<i8").tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1 if ids else 0


def _save(path: Path, columns: np.ndarray) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.save(file, columns)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def group_index(
    table: SampleTable, *, tasks: Sequence[str], max_tokens: int, max_image: int = 0, with_blind: bool = False
) -> GroupIndex:
    """Samples of a task on one image, in order, closed when the group would pass `max_tokens`.

    max_image > 0 keeps the first images only; with_blind keeps choice samples without a label.
    """
    chosen = np.isin(table["task"], [TASKS.index(t) for t in tasks])
    if not with_blind:
        chosen &= table["blind"] == 0
    if max_image:
        chosen &= table["image"] < max_image
    lines = np.flatnonzero(chosen)
    return GroupIndex(*_close_groups(table, lines, max_tokens))


def _close_groups(table: SampleTable, lines: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    names = ("image", "task", "asked", "prefix", "alone", "stem", "leaves")
    previous: tuple[int, int, int, int] | None = None
    first: list[int] = []
    last: list[int] = []
    lengths: list[int] = []
    for line, image, task, asked, prefix, alone, stem, leaves in zip(
        lines.tolist(), *(table[n][lines].tolist() for n in names)
    ):
        own = stem + leaves
        if previous == (image, task, asked, line - 1) and not alone and lengths[-1] + own <= max_tokens:
            last[-1] = line + 1
            lengths[-1] += own
        else:
            first.append(line)
            last.append(line + 1)
            lengths.append(prefix + own)
        previous = (image, task, asked, line)
    starts = np.asarray(first, np.int64)
    yield starts
    yield np.asarray(last, np.int64)
    yield np.asarray(lengths, np.int32)
    yield table["task"][starts] if len(starts) else np.zeros(0, np.int32)
