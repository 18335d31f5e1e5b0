"""Packing: from token lengths to rows of whole groups (P4).

In: a `GroupTable` per data set, which says how many tokens and images each group has, and the token budget of a row.
Out: index arrays, one per row, for a window of about 2,048 groups; `RowCounts`, the rows of every window of an epoch;
`sequential_rows`, all rows of an evaluation. Nothing here is random: the order of training is plan.py's.
Decision: best fit decreasing inside a window. Looking at a whole window fills rows to more than 95 % on realistic
mixes, while a window stays small enough to be packed again on demand in milliseconds: only row counts are ever
stored. The result depends on lengths and budget alone: ties go to the earlier group and the older row.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eventlens_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

Refused = list[tuple[int, int, str]]
"""(table, group, reason) of groups that are never planned; a table is given by its position."""


@dataclass(frozen=True, eq=False)
class GroupTable:
    """The groups of one data set, as the plan sees them.

    `fingerprint` must change with everything that `lengths` and `images` were computed from (data, tokenizer, prompt
    version, linking mode, vision size). `lengths` is int32[G] tokens per group, or a function of the epoch that
    returns it, because `draw` may pick another template in each epoch. `images` is int16[G], or such a function; then
    `groups` is G. `drawn`: group g is another one in every epoch (an episode), and a row of epoch e names it e * G + g.
    """

    name: str
    fingerprint: str
    lengths: np.ndarray | Callable[[int], np.ndarray]
    images: np.ndarray | Callable[[int], np.ndarray]
    groups: int = 0
    drawn: bool = False

    @property
    def size(self) -> int:
        return self.groups if callable(self.images) else int(self.images.shape[0])

    def images_in(self, epoch: int) -> np.ndarray:
        """int[G] images of every group in `epoch`."""
        return self.images(epoch) if callable(self.images) else self.images

    def lengths_in(self, epoch: int) -> np.ndarray:
        """int[G] tokens of every group in `epoch`. Raises DataError when there is not one length per group."""
        lengths = self.lengths(epoch) if callable(self.lengths) else self.lengths
        if lengths.shape != (self.size,) or lengths.dtype.kind not in "iu":
            raise DataError(
                f"data set {self.name}: lengths are {lengths.dtype}{list(lengths.shape)}, "
                f"but its index has {self.size} groups"
            )
        return lengths


@dataclass(frozen=True)
class Row:
    """One packed row: its place in the endless row stream, and its (table, group) pairs, tables by position."""

    index: int
    epoch: int
    groups: tuple[tuple[int, int], ...]
    tokens: int
    images: int


class JoinedTables:
    """Several tables end to end: a position is the offset of the table plus the group.

    `kept[t]` are the groups of table t that fit `row_tokens` in epoch 0 (None: all, which costs no memory), `sizes[t]`
    their number. Raises UserError for an empty table and for one of which nothing fits.
    """

    def __init__(self, tables: Sequence[GroupTable], row_tokens: int) -> None:
        if not tables:
            raise UserError("no data set is named: nothing to plan")
        self.tables, self.row_tokens = tuple(tables), row_tokens
        self.offsets = np.concatenate([[0], np.cumsum([table.size for table in tables])])
        self._static = not any(callable(table.lengths) or callable(table.images) for table in tables)
        self._images: dict[int, np.ndarray] = {}
        self._lengths: dict[int, np.ndarray] = {}
        self._expected: dict[int, bytes] = {}
        self.kept = [self._fitting(*pair) for pair in zip(tables, self._split(self.lengths_in(0)))]
        self.sizes = [table.size if kept is None else len(kept) for table, kept in zip(tables, self.kept)]

    def _split(self, joined: np.ndarray) -> list[np.ndarray]:
        return np.split(joined, self.offsets[1:-1])

    def _fitting(self, table: GroupTable, lengths: np.ndarray) -> np.ndarray | None:
        if not table.size:
            raise UserError(f"data set {table.name} has no groups: nothing to plan")
        fitting = fits(lengths, self.row_tokens)
        if not fitting.any():
            raise UserError(
                f"data set {table.name}: none of its {table.size} groups fits a row of {self.row_tokens} tokens; "
                f"the shortest needs {int(lengths.min())} (data.row_tokens)"
            )
        return None if fitting.all() else np.flatnonzero(fitting).astype(np.int32)

    def expect(self, epoch: int, digest: bytes) -> None:
        """Lengths of `epoch` must have this digest whenever they are loaded: a plan was already made from them."""
        self._expected[epoch] = digest

    def lengths_in(self, epoch: int) -> np.ndarray:
        """int[P] lengths of all tables. Two epochs are kept, for steps across a boundary.

        Raises DataError when lengths that depend on the epoch are not those the plan was made from.
        """
        epoch = 0 if self._static else epoch
        if epoch not in self._lengths:
            lengths = _end_to_end([table.lengths_in(epoch) for table in self.tables])
            if epoch in self._expected and array_digest(lengths) != self._expected[epoch]:
                names = ", ".join(table.name for table in self.tables if callable(table.lengths))
                raise DataError(f"data set {names}: lengths of epoch {epoch} changed, but its fingerprint did not")
            while len(self._lengths) >= 2:
                del self._lengths[next(iter(self._lengths))]
            self._lengths[epoch] = lengths
        return self._lengths[epoch]

    def images_in(self, epoch: int) -> np.ndarray:
        """int[P] images of all tables; two epochs are kept, as of lengths."""
        epoch = 0 if self._static else epoch
        if epoch not in self._images:
            while len(self._images) >= 2:
                del self._images[next(iter(self._images))]
            self._images[epoch] = _end_to_end([table.images_in(epoch) for table in self.tables])
        return self._images[epoch]

    def refused_in(self, epoch: int) -> Refused:
        """Groups not planned in `epoch`: those refused in epoch 0, then those too long in this epoch alone."""
        found: Refused = []
        for at in sorted({0, 0 if self._static else epoch}):
            for table, lengths in enumerate(self._split(self.lengths_in(at))):
                bad, kept = ~fits(lengths, self.row_tokens), self.kept[table]
                if at and kept is not None:
                    bad &= np.isin(np.arange(len(bad)), kept)
                groups = np.flatnonzero(bad).tolist()
                found += [(table, group, refusal(int(lengths[group]), self.row_tokens)) for group in groups]
        return found

    def row(self, index: int, epoch: int, positions: np.ndarray) -> Row:
        """The row that holds the groups at `positions` (int64[n])."""
        tables = np.searchsorted(self.offsets, positions, side="right") - 1
        groups = tuple(
            (table, group + epoch * self.tables[table].size if self.tables[table].drawn else group)
            for table, group in zip(tables.tolist(), (positions - self.offsets[tables]).tolist())
        )
        tokens = int(self.lengths_in(epoch)[positions].sum(dtype=np.int64))
        return Row(index, epoch, groups, tokens, int(self.images_in(epoch)[positions].sum(dtype=np.int64)))


def _end_to_end(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class Fill:
    """How well rows are filled: `tokens` real tokens in `rows` rows of `budget` tokens each."""

    rows: int
    tokens: int
    budget: int

    @property
    def share(self) -> float:
        """Real tokens per token of budget, 0 to 1; 1.0 when there are no rows."""
        return self.tokens / (self.rows * self.budget) if self.rows else 1.0


def best_fit_decreasing(lengths: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
    """Put every length, longest first, in the open row with the least room that still holds it.

    lengths: int[N], each in 1..budget. Returns the row of every item, int64[N], and the number of rows.
    Source: D. S. Johnson, Near-optimal bin packing algorithms (1973): at most 11/9 OPT + O(1) rows.
    Raises ValueError when a length is outside 1..budget: such a group has to be refused before it is packed.
    """
    count = int(lengths.shape[0])
    if count == 0:
        return np.empty(0, np.int64), 0
    if int(lengths.min()) < 1 or int(lengths.max()) > budget:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit rows of {budget} tokens")
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    needs = lengths[order].tolist()
    shortest = needs[-1]
    # Room and row number in one integer: the sorted list then orders by room first, by age of the row second.
    shift = count.bit_length()
    mask = (1 << shift) - 1
    open_rows: list[int] = []
    placed = [0] * count
    rows = 0
    for item, need in enumerate(needs):
        at = bisect_left(open_rows, need << shift)
        if at == len(open_rows):
            row, room = rows, budget - need
            rows += 1
        else:
            key = open_rows.pop(at)
            row, room = key & mask, (key >> shift) - need
        placed[item] = row
        if room >= shortest:
            insort(open_rows, room << shift | row)
    row_of = np.empty(count, np.int64)
    row_of[order] = placed
    return row_of, rows


def pack_window(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Rows of one window, each the ascending indices int64[n] into `lengths`, in the order of their first index."""
    row_of, rows = best_fit_decreasing(lengths, budget)
    members = np.argsort(row_of, kind="stable")
    ends = np.cumsum(np.bincount(row_of, minlength=rows))
    packed = np.split(members, ends[:-1]) if rows else []
    return sorted(packed, key=lambda row: int(row[0]))


def window_bounds(count: int, window: int) -> np.ndarray:
    """Ends of equal windows, int64[W + 1] from 0 to `count`, of about `window` items each.

    Equal sizes leave no stub at the end, whose few groups would fill a row badly.
    """
    windows = max(1, round(count / window)) if count else 0
    return np.arange(windows + 1, dtype=np.int64) * count // max(1, windows)


def measure_fill(lengths: np.ndarray, budget: int, window: int = 2048) -> Fill:
    """Fill of `lengths` (int[N]) packed in their own order by windows: what a plan would reach on this mix."""
    rows = sum(best_fit_decreasing(lengths[a:b], budget)[1] for a, b in spans(window_bounds(len(lengths), window)))
    return Fill(rows, int(lengths.sum(dtype=np.int64)), budget)


def spans(bounds: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, end) of each window in `bounds` (int64[W + 1])."""
    yield from zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)


def take_turns(rows: range, rank: int, world: int) -> list[int | None]:
    """Rows of one rank, one per micro-step: ranks take them in turn; None where the last turn runs out of rows.

    Every rank gets ceil(len(rows) / world) entries, so that all ranks enter the same collectives (P5).
    """
    assert 0 <= rank < world, f"rank {rank} of {world}"
    return [rows[at] if at < len(rows) else None for at in range(rank, -(-len(rows) // world) * world, world)]


def vision_calls(rows: Iterable[Row], chunk: int) -> int:
    """Calls of the vision tower that `rows`, one per rank, agree on: ceil(images / chunk) of the fullest, at least 1.

    A rank with fewer images, or with a missing row, fills the rest of its calls with a constant (P5).
    """
    return max([1, *(-(-row.images // chunk) for row in rows)])


def fits(lengths: np.ndarray, budget: int) -> np.ndarray:
    """bool[N]: groups that can be planned; the others are refused with `refusal`."""
    return (lengths > 0) & (lengths <= budget)


def refusal(need: int, budget: int) -> str:
    """Why a group of `need` tokens is refused."""
    return f"needs {need} tokens, a row holds {budget}" if need > 0 else f"has {need} tokens"


def array_digest(array: np.ndarray) -> bytes:
    """sha256 of the values of an integer array, the same for every integer type and layout."""
    digest = hashlib.sha256()
    for start in range(0, len(array), 1 << 20):
        digest.update(np.ascontiguousarray(array[start : start + (1 << 20)], dtype="<i8").data)
    return digest.digest()


@dataclass(frozen=True, eq=False)
class RowCounts:
    """Rows of every window of one epoch, int64[W], its real tokens, and the digest of the lengths they come from."""

    rows: np.ndarray
    tokens: int
    digest: bytes

    def save(self, path: Path, key: str) -> None:
        """Write under a temporary name, then rename. A cache that cannot be written costs time, so it only warns."""
        body = key.encode() + self.digest + self.tokens.to_bytes(8, "little") + self.rows.astype("<i8").tobytes()
        part = path.with_name(f"{path.name}.{secrets.token_hex(6)}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(hashlib.sha256(body).digest() + body)
            os.replace(part, path)
        except OSError as error:
            log.warning("plan cache %s was not written: %s", path, error)
            with contextlib.suppress(OSError):
                part.unlink()

    @classmethod
    def load(cls, path: Path, key: str, windows: int) -> RowCounts | None:
        """Read what `save` wrote; None when the file is absent, damaged or of another plan (the last two warn)."""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("plan cache %s cannot be read, counted again: %s", path, error)
            return None
        body, name = raw[32:], key.encode()
        if hashlib.sha256(body).digest() != raw[:32] or not body.startswith(name):
            log.warning("plan cache %s is damaged, counted again", path)
            return None
        facts = body[len(name) :]
        rows = np.frombuffer(facts[40:], "<i8").astype(np.int64)
        if len(rows) != windows:
            log.warning("plan cache %s has %d windows, not %d, counted again", path, len(rows), windows)
            return None
        return cls(rows, int.from_bytes(facts[32:40], "little"), facts[:32])


@dataclass(frozen=True)
class SequentialRows(Sequence[Row]):
    """Every group exactly once, for evaluation; `refused` lists those that no row holds."""

    rows: tuple[Row, ...]
    refused: Refused

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at):  # type: ignore[no-untyped-def]
        return self.rows[at]

    def rank_rows(self, rank: int, world: int) -> list[int | None]:
        """Per forward the row a rank reads, or None in the tail: every rank runs equally many forwards."""
        return take_turns(range(len(self.rows)), rank, world)

    def vision_calls(self, micro: int, world: int, chunk: int) -> int:
        """Calls of the vision tower in forward `micro`: the maximum over ranks (P5)."""
        return vision_calls(self.rows[micro * world : (micro + 1) * world], chunk)


def sequential_rows(tables: Sequence[GroupTable], *, row_tokens: int, window: int = 2048) -> SequentialRows:
    """Rows for evaluation: groups in table order, packed by windows, the same for every world size.

    Lengths that depend on the epoch are those of epoch 0. Raises UserError as `JoinedTables` does.
    """
    joined = JoinedTables(tables, row_tokens)
    lengths = joined.lengths_in(0)
    planned = np.flatnonzero(fits(lengths, row_tokens))
    rows: list[Row] = []
    for first, last in spans(window_bounds(len(planned), window)):
        positions = planned[first:last]
        for members in pack_window(lengths[positions], row_tokens):
            rows.append(joined.row(len(rows), 0, positions[members]))
    return SequentialRows(tuple(rows), joined.refused_in(0))
