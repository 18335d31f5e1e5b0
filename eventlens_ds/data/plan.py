"""The plan: which groups form optimizer step k, as arithmetic (P3).

In: one `GroupTable` per data set (token and image counts of its groups), mixture weights, seed, row budget and rows
per step. Out: `Row`s of (table, group), for any step, in any process, without replaying the steps before it.
An epoch is a virtual sequence: slot -> permutation -> (table, group). Windows of about 2,048 slots are packed into
rows on demand (packing.py); only the number of rows of each window is computed ahead, and cached on disk.
Decision: nothing here depends on rank, world size or worker count. Ranks take the rows of a step in turn, so the
state of the data is one integer, the step, and every rank has the same number of micro-steps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np

from eventlens_ds.data.packing import (
    Fill,
    GroupTable,
    JoinedTables,
    Refused,
    Row,
    RowCounts,
    array_digest,
    best_fit_decreasing,
    fits,
    pack_window,
    spans,
    take_turns,
    vision_calls,
    window_bounds,
)
from eventlens_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when the same inputs would give another order, so that no old cache or checkpoint is mistaken for it."""
CACHE_MIN_GROUPS = 20_000
"""Epochs of fewer groups are counted again in milliseconds and leave no file."""
_WINDOWS_KEPT = 8
_EXACT = 1 << 14
"""Up to this size a permutation is a sorted table, above it a Feistel network that needs no memory."""
_FEISTEL_ROUNDS = 8
_MASK = (1 << 64) - 1


def draw(seed: int, epoch: int, id: int | str, salt: str = "") -> int:
    """A uniform integer of 64 bits for one random choice about one sample; `salt` names the choice.

    Depends on nothing but its arguments, so a choice is the same on every rank, worker and restart (P3). A few
    outcomes: `draw(...) % n`. Longer streams: `generator(...)`. Many ids at once: `draw_many(...)`.
    """
    return _mix(_mix(id_bits(id)) ^ _stream_key(seed, epoch, salt))


def draw_many(seed: int, epoch: int, ids: np.ndarray, salt: str = "") -> np.ndarray:
    """`draw` of every id in `ids` (uint64[N], from `id_bits` or integer ids): uint64[N]."""
    return _mix_array(_mix_array(ids.astype(np.uint64)) ^ np.uint64(_stream_key(seed, epoch, salt)))


def generator(seed: int, epoch: int, id: int | str, salt: str = "") -> np.random.Generator:
    """A numpy generator seeded by `draw`: for choices that need more than one number."""
    return np.random.Generator(np.random.PCG64(draw(seed, epoch, id, salt)))


def id_bits(id: int | str) -> int:
    """64 bits of an id: an integer as it is (modulo 2^64), a string hashed."""
    if isinstance(id, str):
        return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")
    return int(id) & _MASK


@lru_cache(maxsize=256)
def _stream_key(seed: int, epoch: int, salt: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{salt}".encode(), digest_size=8).digest(), "little")


def _mix(x: int) -> int:
    """splitmix64: G. L. Steele, D. Lea, C. H. Flood, Fast splittable pseudorandom number generators (2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_array(x: np.ndarray) -> np.ndarray:
    """`_mix` of uint64[N]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(key: int, size: int, at: np.ndarray) -> np.ndarray:
    """Entries `at` (int64[N], each below `size`) of the permutation of range(size) that `key` names: int64[N].

    Large sizes walk cycles of an alternating Feistel network over Z_a x Z_b, a * b >= size (J. Black, P. Rogaway,
    Ciphers with arbitrary finite domains, 2002): any entry costs the same and nothing is stored.
    """
    if size <= _EXACT:
        return _sorted_permutation(key, size)[at]
    wide = math.isqrt(size - 1) + 1
    high = -(-size // wide)
    out: np.ndarray = _feistel(key, wide, high, at.astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = _feistel(key, wide, high, out[outside])
    return out.astype(np.int64)


@lru_cache(maxsize=64)
def _sorted_permutation(key: int, size: int) -> np.ndarray:
    return np.argsort(_mix_array(_mix_array(np.arange(size, dtype=np.uint64)) ^ np.uint64(key)), kind="stable")


def _feistel(key: int, wide: int, high: int, x: np.ndarray) -> np.ndarray:
    a, b = np.uint64(wide), np.uint64(high)
    left: np.ndarray = x % a
    right: np.ndarray = x // a
    for turn in range(_FEISTEL_ROUNDS):
        salt = np.uint64(_mix(key ^ turn))
        if turn % 2:
            right = (right + _mix_array(left ^ salt) % b) % b
        else:
            left = (left + _mix_array(right ^ salt) % a) % a
    return right * a + left


@dataclass(frozen=True)
class Share:
    """One data set in a range of steps: the configured share of groups, and what was planned."""

    table: str
    configured: float
    actual: float
    groups: int
    tokens: int


@dataclass(frozen=True)
class _Epoch:
    """`starts` int64[T + 1]: slots of each table; `bounds` int64[W + 1]: slots of each window; `row_ends` int64[W]."""

    starts: np.ndarray
    bounds: np.ndarray
    row_ends: np.ndarray
    tokens: int

    @property
    def rows(self) -> int:
        return int(self.row_ends[-1]) if len(self.row_ends) else 0


@dataclass(frozen=True)
class _Window:
    """A packed window: positions in the joined tables int64[n], and the indices into them of each row."""

    positions: np.ndarray
    rows: list[np.ndarray]


class Plan:
    """The order of training data. Without `weights` an epoch holds every group exactly once.

    With `weights` an epoch draws as many groups as the tables hold, shared out by weight: a table walks through its
    own consecutive permutations, so a small one repeats and a large one goes on in the next epoch where it stopped.
    A group that is longer than `row_tokens` in epoch 0 is refused for good (`refused`); one that only passes it in a
    later epoch sits that epoch out (`refused_in`). Rows run over epoch boundaries without a gap.
    Raises UserError for an empty table, a table of which nothing fits, or impossible settings.
    """

    def __init__(
        self,
        tables: Sequence[GroupTable],
        *,
        weights: Sequence[float] = (),
        seed: int,
        row_tokens: int,
        rows_per_step: int,
        window: int = 2048,
        shuffle: bool = True,
        cache_dir: Path | None = None,
    ) -> None:
        for name, value in (("row_tokens", row_tokens), ("rows_per_step", rows_per_step), ("window", window)):
            if value < 1:
                raise UserError(f"{name} is {value}, must be at least 1")
        self.tables = tuple(tables)
        self.seed, self.row_tokens, self.rows_per_step = seed, row_tokens, rows_per_step
        self.window, self.shuffle, self.cache_dir = window, shuffle, cache_dir
        self._shares = _exact_shares(weights, self.tables)
        self._joined = JoinedTables(tables, row_tokens)
        self._sizes, self._kept, self._offsets = self._joined.sizes, self._joined.kept, self._joined.offsets
        self._epochs: list[_Epoch] = []
        self._first_rows = [0]
        self._windows: dict[tuple[int, int], _Window] = {}
        self.fingerprint = self._digest()

    def _digest(self) -> str:
        """sha256 of everything that decides the order; names of data sets do not, so folders may move."""
        facts = {
            "format": FORMAT,
            "tables": [[table.fingerprint, table.size] for table in self.tables],
            "shares": [str(share) for share in self._shares],
            "settings": [self.seed, self.row_tokens, self.rows_per_step, self.window, self.shuffle],
        }
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(array_digest(self._joined.lengths_in(0)) + array_digest(self._joined.images_in(0)))
        return digest.hexdigest()

    @property
    def refused(self) -> Refused:
        """Groups that are never planned, with the reason; empty when everything fits."""
        return self._joined.refused_in(0)

    def refused_in(self, epoch: int) -> Refused:
        """Groups that are not planned in `epoch`: `refused`, and those too long in this epoch alone."""
        return self._joined.refused_in(epoch)

    def _taken(self, table: int, epoch: int) -> int:
        """Groups a weighted table has given before `epoch`; rounding is exact and never drifts from the weights."""
        return math.floor(self._shares[table] * sum(self._sizes) * epoch + Fraction(1, 2))

    def _starts(self, epoch: int) -> np.ndarray:
        """int64[T + 1] first slot of every table before the epoch is shuffled."""
        quotas = self._sizes
        if self._shares:
            quotas = [self._taken(t, epoch + 1) - self._taken(t, epoch) for t in range(len(self.tables))]
        return np.concatenate([[0], np.cumsum(quotas)]).astype(np.int64)

    def _members(self, epoch: int, starts: np.ndarray, first: int, last: int) -> np.ndarray:
        """Groups in slots [first, last) of an epoch, as positions int64[N] in the joined tables."""
        slots = np.arange(first, last)
        if self.shuffle:
            slots = permuted(draw(self.seed, epoch, "slots", "plan"), int(starts[-1]), slots)
        tables = np.searchsorted(starts, slots, side="right") - 1
        for table in np.unique(tables).tolist():
            here = tables == table
            at = slots[here] - starts[table]
            if self._shares:
                at = self._walk(table, at + self._taken(table, epoch))
            kept = self._kept[table]
            slots[here] = self._offsets[table] + (at if kept is None else kept[at])
        return slots

    def _walk(self, table: int, at: np.ndarray) -> np.ndarray:
        """Positions int64[N] in the endless walk through a table -> its groups, a new permutation each lap."""
        size = self._sizes[table]
        laps, at = np.divmod(at, size)
        if self.shuffle:
            for lap in np.unique(laps).tolist():
                here = laps == lap
                at[here] = permuted(draw(self.seed, lap, table, "plan"), size, at[here])
        return at

    def _load_epoch(self, epoch: int) -> _Epoch:
        """Everything known ahead about an epoch; the epochs before it are loaded first, to know where it starts."""
        while len(self._epochs) <= epoch:
            at = len(self._epochs)
            starts = self._starts(at)
            bounds = window_bounds(int(starts[-1]), self.window)
            counts = self._row_counts(at, starts, bounds)
            ends = np.cumsum(counts.rows, dtype=np.int64)
            self._joined.expect(at, counts.digest)
            self._epochs.append(_Epoch(starts, bounds, ends, counts.tokens))
            self._first_rows.append(self._first_rows[-1] + self._epochs[at].rows)
            recent = self._first_rows[-len(self.tables) - 3 :]
            if len(recent) == len(self.tables) + 3 and recent[0] == recent[-1]:
                # Rounding leaves at most len(tables) epochs in a row without a draw: here every length is refused.
                raise DataError(f"epochs up to {at} are empty: every group is refused there")
        return self._epochs[epoch]

    def _row_counts(self, epoch: int, starts: np.ndarray, bounds: np.ndarray) -> RowCounts:
        """Rows of every window of an epoch, from the cache or by packing all of it once."""
        path = self.cache_dir / f"plan-{self.fingerprint[:16]}-{epoch}.rows" if self.cache_dir else None
        if path and starts[-1] >= CACHE_MIN_GROUPS:
            known = RowCounts.load(path, self.fingerprint, len(bounds) - 1)
            if known:
                return known
        began = time.monotonic()
        lengths = self._joined.lengths_in(epoch)
        rows, tokens = np.zeros(len(bounds) - 1, np.int64), 0
        for window, (first, last) in enumerate(spans(bounds)):
            sizes = lengths[self._members(epoch, starts, first, last)]
            sizes = sizes[fits(sizes, self.row_tokens)]
            rows[window] = best_fit_decreasing(sizes, self.row_tokens)[1]
            tokens += int(sizes.sum(dtype=np.int64))
        counts = RowCounts(rows, tokens, array_digest(lengths))
        log.debug("epoch %d: %d groups packed in %.1f s", epoch, int(starts[-1]), time.monotonic() - began)
        if path and starts[-1] >= CACHE_MIN_GROUPS:
            counts.save(path, self.fingerprint)
        return counts

    def _packed(self, epoch: int, window: int) -> _Window:
        """One window, packed; the last few are kept, and any other costs a few milliseconds."""
        if (epoch, window) not in self._windows:
            known = self._load_epoch(epoch)
            positions = self._members(epoch, known.starts, *known.bounds[window : window + 2].tolist())
            lengths = self._joined.lengths_in(epoch)[positions]
            planned = fits(lengths, self.row_tokens)
            rows = pack_window(lengths[planned], self.row_tokens)
            if self.shuffle:
                key = draw(self.seed, epoch, window, "rows")
                rows = [rows[at] for at in permuted(key, len(rows), np.arange(len(rows))).tolist()]
            while len(self._windows) >= _WINDOWS_KEPT:
                del self._windows[next(iter(self._windows))]
            self._windows[epoch, window] = _Window(positions[planned], rows)
        return self._windows[epoch, window]

    def prepare(self, steps: int) -> None:
        """Count the rows of every epoch that the first `steps` steps touch, once, before processes start."""
        self.epoch_of_row(steps * self.rows_per_step - 1)

    def num_rows(self, epoch: int) -> int:
        """Rows of one epoch."""
        return self._load_epoch(epoch).rows

    def fill(self, epoch: int) -> Fill:
        """How well the rows of one epoch are filled."""
        known = self._load_epoch(epoch)
        return Fill(known.rows, known.tokens, self.row_tokens)

    def epoch_of_row(self, row: int) -> int:
        """The epoch a row of the endless stream belongs to."""
        while self._first_rows[-1] <= row:
            self._load_epoch(len(self._epochs))
        return bisect_right(self._first_rows, row) - 1

    def epoch_of_step(self, step: int) -> int:
        """The epoch of the first row of a step."""
        return self.epoch_of_row(step * self.rows_per_step)

    def row(self, row: int) -> Row:
        """A row of the endless stream, counted from the start of training."""
        assert row >= 0, f"row {row}"
        epoch = self.epoch_of_row(row)
        ends, local = self._epochs[epoch].row_ends, row - self._first_rows[epoch]
        window = int(np.searchsorted(ends, local, side="right"))
        packed = self._packed(epoch, window)
        members = packed.rows[local - (int(ends[window - 1]) if window else 0)]
        return self._joined.row(row, epoch, packed.positions[members])

    def rows_of_step(self, step: int) -> range:
        """Indices of the rows of optimizer step `step`, counted from 0."""
        return range(step * self.rows_per_step, (step + 1) * self.rows_per_step)

    def step(self, step: int) -> tuple[Row, ...]:
        """The rows of optimizer step `step`: always `rows_per_step` of them."""
        return tuple(self.row(row) for row in self.rows_of_step(step))

    def rank_rows(self, step: int, rank: int, world: int) -> list[int | None]:
        """Per micro-step the row a rank reads, or None for a missing row; see `packing.take_turns`."""
        return take_turns(self.rows_of_step(step), rank, world)

    def vision_calls(self, step: int, micro: int, world: int, chunk: int) -> int:
        """Calls of the vision tower in one micro-step, of `chunk` images each: the maximum over ranks (P5)."""
        return vision_calls((self.row(row) for row in self.rows_of_step(step)[micro * world :][:world]), chunk)

    def mixture(self, steps: range) -> list[Share]:
        """Configured and planned share of every data set in `steps`, by groups."""
        groups, tokens = [0] * len(self.tables), [0] * len(self.tables)
        for row in (row for step in steps for row in self.step(step)):
            lengths = self._joined.lengths_in(row.epoch)
            for table, group in row.groups:
                groups[table] += 1
                tokens[table] += int(lengths[self._offsets[table] + group % self.tables[table].size])
        wanted = self._shares or [Fraction(size, sum(self._sizes)) for size in self._sizes]
        every = max(1, sum(groups))
        return [
            Share(table.name, float(wanted[at]), groups[at] / every, groups[at], tokens[at])
            for at, table in enumerate(self.tables)
        ]


def _exact_shares(weights: Sequence[float], tables: Sequence[GroupTable]) -> list[Fraction]:
    """Weights as exact shares that sum to 1, as written in decimal; empty without weights."""
    if not weights:
        return []
    if len(weights) != len(tables):
        raise UserError(f"data.weights has {len(weights)} values for {len(tables)} data sets")
    for table, weight in zip(tables, weights):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"data.weights gives data set {table.name} {weight}, must be above 0")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    return [share / sum(exact) for share in exact]
