"""From built folders to batches: the data of a run, its plan, and the loader of one rank.

The stages:
  1. RunData            folders -> ShardSets -> lengths -> groups -> Plan (all arithmetic, before process groups start)
  2. RunData.group      (table, group) of the plan -> Group with its samples, read by offset
  3. RunData.batch      row of the plan -> encoded groups -> Batch
  4. rank_batches       the rows of one rank in order, loaded by worker processes
Decision: a worker is asked for a row by number and keeps no state, so the order is the plan's whatever the number of
workers, and resuming is starting at another number (P3). A row leaves its worker with the pixels as bytes, a quarter
of their size as floats; they are normalised where they arrive.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from eventlens_ds.config.run_config import DataConfig
from eventlens_ds.data import sources, transforms
from eventlens_ds.data.collate import collate
from eventlens_ds.data.controls import apply_control
from eventlens_ds.data.encode import EncodeSpec, encode
from eventlens_ds.data.episodes import Drawn, Rows, holds_episodes
from eventlens_ds.data.lengths import COLUMNS, GroupIndex, SampleTable, group_index, sample_table
from eventlens_ds.data.listed_episodes import Listed
from eventlens_ds.data.plan import GroupTable, Plan, draw
from eventlens_ds.data.records import TASKS, Batch, EncodedGroup, Group
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.data.tag_noise import TagNoise
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.data.workers import heed_parent_alone
from eventlens_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

Episodes = Drawn | Listed
"""Drawn for training, listed for evaluation; both make a Group of a number."""


class RunData:
    """Everything about the samples of a run that is the same on every rank.

    Raises UserError when no folder is given, DataError when a folder has no sample of the wanted tasks.
    """

    def __init__(
        self,
        folders: Sequence[str],
        split: str,
        *,
        config: DataConfig,
        tokenizer: PieceTokenizer,
        tokenizer_path: str,
        spec: EncodeSpec,
        tasks: Sequence[str] = (),
        limit: int = 0,
        with_blind: bool = False,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        if not folders:
            raise UserError("data.train: name at least one folder made by `eventlens data build`")
        self.config, self.tokenizer, self.spec, self.split = config, tokenizer, spec, split
        self.tasks = tuple(tasks) or TASKS
        self.folders: list[str] = []
        self.shards: list[ShardSet] = []
        self.tables: list[SampleTable] = []
        self.groups: list[GroupIndex] = []
        self.episodes: list[Episodes | None] = []
        drawn: list[tuple[str, ShardSet]] = []
        budget = config.group_tokens or config.row_tokens
        for folder in folders:
            shards = ShardSet.open(Path(folder), split)
            cache = Path(folder) / split / "lengths"
            table = sample_table(shards, tokenizer_path, spec, cache=cache, workers=workers or _cores())
            groups = group_index(table, tasks=self.tasks, max_tokens=budget, max_image=limit, with_blind=with_blind)
            self._check_unread(folder, table)
            if "lcl" in self.tasks and not with_blind and holds_episodes(shards):
                drawn.append((folder, shards))
            elif not len(groups):
                raise DataError(f"{folder}/{split}: holds no sample of the tasks {', '.join(self.tasks)}")
            if len(groups):
                self._add(folder, shards, table, groups, None)
        if drawn and limit:
            raise UserError(f"data.limit {limit}: episodes are drawn from all images; data.episodes.per_epoch")
        self._draw_episodes(drawn, seed)
        noisy = config.tag_noise and spec.style.tag_tokens >= 0
        self.tag_noise = TagNoise(config.tag_noise, self.shards, tokenizer) if noisy else None

    @classmethod
    def of_episodes(
        cls, folder: str, shards: ShardSet, made: Episodes, *, config: DataConfig, tokenizer: PieceTokenizer,
        spec: EncodeSpec,
    ) -> RunData:  # fmt: skip
        """Nothing but these episodes of one split."""
        self = cls.__new__(cls)
        self.config, self.tokenizer, self.spec, self.split = config, tokenizer, spec, shards.split
        self.tasks, self.tag_noise = ("lcl",), None
        self.folders, self.shards, self.tables, self.groups, self.episodes = [], [], [], [], []
        self.add_episodes(folder, shards, made)
        return self

    def _add(
        self, folder: str, shards: ShardSet, table: SampleTable, groups: GroupIndex, episodes: Episodes | None
    ) -> None:
        """One more table: the samples of a folder, or its episodes."""
        self.folders.append(folder)
        self.shards.append(shards)
        self.tables.append(table)
        self.groups.append(groups)
        self.episodes.append(episodes)

    def add_episodes(self, folder: str, shards: ShardSet, made: Episodes) -> None:
        """Episodes of a folder as a table of their own, one group each."""
        task, first = TASKS.index("lcl"), np.arange(made.size, dtype=np.int64)
        columns = np.zeros((len(COLUMNS), made.size), np.int32)
        columns[COLUMNS.index("task")] = task
        lengths = np.asarray(made.table("").lengths_in(0), np.int32)
        groups = GroupIndex(first, first + 1, lengths, np.full(made.size, task, np.int32))
        self._add(folder, shards, SampleTable(columns, made.fingerprint), groups, made)

    def _check_unread(self, folder: str, table: SampleTable) -> None:
        """Records that cannot be read are not planned, within the budget of errors."""
        budget = max(1.0, self.config.error_budget * (len(table) + len(table.unread)))
        if len(table.unread) > budget:
            name, reason = table.unread[0]
            raise DataError(
                f"{folder}/{self.split}: {len(table.unread)} records cannot be read, more than data.error_budget "
                f"{self.config.error_budget}; the first: {reason}"
            )

    def unread(self) -> list[tuple[str, str]]:
        """(member, reason) of records that were not planned because they cannot be read."""
        return [entry for table in self.tables for entry in table.unread]

    def names(self, table: int, group: int) -> list[str]:
        """Ids of the samples of a group; for those that cannot be read, names of the members that hold them."""
        found, lost = self._read_group(table, group)
        return [*(sample.id for sample in (found.samples if found else ())), *(name for name, _ in lost)]

    def readable(self, members: Sequence[tuple[int, int]]) -> list[Group]:
        """The groups of a row as they are in its Batch: with the samples that can be read."""
        return [group for group, _ in (self._read_group(*member) for member in members) if group]

    def group_tables(self) -> list[GroupTable]:
        """What the plan needs to know."""
        return [
            GroupTable(f"{i}", table.fingerprint, groups.lengths, np.ones(len(groups), np.int16))
            if episodes is None
            else episodes.table(f"{i}")
            for i, (table, groups, episodes) in enumerate(zip(self.tables, self.groups, self.episodes))
        ]

    def _draw_episodes(self, drawn: Sequence[tuple[str, ShardSet]], seed: int) -> None:
        """Add the episodes of folders. With data.episodes.share an epoch has as many as make up their share, so that
        none of them comes twice. Raises UserError when the folders cannot give a share."""
        config = self.config.episodes
        made = [Drawn(Rows(x), config, self.tokenizer, self.spec, seed, self.config.row_tokens) for _, x in drawn]
        if config.share:
            others, classes = sum(map(len, self.groups)), sum(len(one.anchors) for one in made)
            if not others or not classes:
                what = "nothing but episodes" if classes else "no episodes"
                raise UserError(
                    f"data.episodes.share {config.share}: the folders of data.train hold {what} of the wanted tasks"
                )
            wanted = others * config.share / (1 - config.share)
            for one in made:
                one.size = max(1, round(wanted * len(one.anchors) / classes))
        for (folder, shards), one in zip(drawn, made):
            self.add_episodes(folder, shards, one)

    def weights(self) -> list[float]:
        """Weight of every table in the mixture; [] is by number of groups, which gives episodes their share. Exact
        integers beside episodes, so that an epoch takes each of them once.

        Raises UserError when data.weights leaves the weight of episodes open."""
        if not self.config.weights:
            return []
        given = dict(zip(self.config.train, (Fraction(repr(float(w))) for w in self.config.weights)))
        drawn = [made is not None for made in self.episodes]
        if not any(drawn):
            return list(self.config.weights)
        if not self.config.episodes.share:
            raise UserError("data.weights: episodes are weighted by data.episodes.share, so that none comes twice")
        plain = [given[folder] for folder, is_drawn in zip(self.folders, drawn) if not is_drawn]
        number = sum(len(groups) for groups, is_drawn in zip(self.groups, drawn) if not is_drawn)
        exact = [
            Fraction(len(groups)) if is_drawn else given[folder] * number / sum(plain)
            for folder, groups, is_drawn in zip(self.folders, self.groups, drawn)
        ]
        scale = math.lcm(*(weight.denominator for weight in exact))
        return [float(weight * scale) for weight in exact]

    def plan(self, *, seed: int, rows_per_step: int, cache_dir: Path | None = None) -> Plan:
        return Plan(
            self.group_tables(),
            weights=self.weights(),
            seed=seed,
            row_tokens=self.config.row_tokens,
            rows_per_step=rows_per_step,
            cache_dir=cache_dir,
        )

    def group(self, table: int, group: int) -> Group:
        """Read a group: its image, whose regions come without polygons, and its samples; or draw an episode, whose
        number counts on over epochs. DataError: damaged."""
        found, lost = self._read_group(table, group)
        if lost or found is None:
            raise DataError(lost[0][1])
        return found

    def _read_group(self, table: int, group: int) -> tuple[Group | None, list[tuple[str, str]]]:
        """A group with those of its samples that can be read (None: with none), and (name, reason) of the others."""
        if (episodes := self.episodes[table]) is not None:
            try:
                return episodes.group(group), []
            except DataError as error:
                return None, [(f"episode {group}", str(error))]
        lines, index, shards = self.tables[table], self.groups[table], self.shards[table]
        span = range(int(index.first[group]), int(index.last[group]))
        places = [(int(lines["record"][line]), int(lines["part"][line])) for line in span]
        try:
            image = shards.image(int(lines["image"][span[0]]), outlines=False)
        except DataError as error:
            return None, [(f"{shards.record_name(record)}/{part}", str(error)) for record, part in places]
        expanded: dict[int, tuple] = {}
        samples, lost = [], []
        for record, part in places:
            try:
                if record not in expanded:
                    expanded[record] = sources.samples(shards.record(record), image)
                samples.append(expanded[record][part])
            except DataError as error:
                lost.append((f"{shards.record_name(record)}/{part}", str(error)))
        if not samples:
            return None, lost
        return Group(TASKS[int(lines["task"][span[0]])], (image,), tuple(samples)), lost

    def batch(self, members: Sequence[tuple[int, int]], seed: int) -> Batch:
        """Encode the groups of a row. No members gives the missing row."""
        return self.finish(self.raw_batch(members, seed))

    def raw_batch(self, members: Sequence[tuple[int, int]], seed: int) -> Batch:
        """The row before `finish`: its pixel_values are uint8."""
        encoded, keys = [], []
        lost: list[tuple[str, str]] = []
        for table, number in members:
            # What cannot be read is left out; other samples of the row do not suffer, nor does the order of rows.
            group, unread = self._read_group(table, number)
            lost += unread
            if group is None:
                continue
            group = self.tag_noise(group, seed) if self.tag_noise else group
            made = self.encode(group, table, number, raw=True)
            made.pixel_values = [self._as_bytes(pixels) for pixels in made.pixel_values]
            episodes = self.episodes[table]
            planned = int(self.groups[table].lengths[number]) if episodes is None else episodes.length(number)
            if made.num_tokens != planned and not unread:
                raise ValueError(f"group of {made.sample_ids[0]}: {made.num_tokens} tokens, planned {planned}")
            encoded.append(made)
            keys += [image.key for image in group.images]
        batch = self.collate(encoded, seed)
        batch.image_keys = keys
        batch.skipped = [*batch.skipped, *lost]
        batch.sample_ids = [*batch.sample_ids, *(name for name, _ in lost)]
        return batch

    def finish(self, batch: Batch) -> Batch:
        """Normalise the pixels of a raw row, and show what the control of the run shows."""
        if batch.pixel_values.dtype == torch.uint8:
            vision = self.spec.vision
            pixels = transforms.normalise_rows(batch.pixel_values.numpy(), vision.mean, vision.std)
            batch.pixel_values = torch.from_numpy(pixels)
        return apply_control(batch, self.config.control)

    def _as_bytes(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels of an image. The zeros that stand in for one that cannot be decoded become the mean colour."""
        if pixels.dtype == np.uint8:
            return pixels
        mean = np.rint(255 * np.asarray(self.spec.vision.mean)).astype(np.uint8)
        return np.broadcast_to(mean[:, None, None], pixels.shape)

    def encode(self, group: Group, table: int, number: int, *, raw: bool = False) -> EncodedGroup:
        """Encode a group of samples on the image of group `number`, as `group` gave it or with other samples; `raw`
        leaves the pixels as bytes."""
        return encode(group, self.tokenizer, self.spec, partial(self._image, group, table, number, raw=raw))

    def collate(self, encoded: Sequence[EncodedGroup], seed: int) -> Batch:
        """Encoded groups as one row in the layout of the run."""
        return collate(
            encoded,
            visual_tokens=self.spec.vision.tokens,
            image_size=self.spec.vision.image_size,
            seed=seed,
            layout=self.config.layout,
            pad_id=self.tokenizer.pad,
        )

    def _image(self, group: Group, table: int, number: int, m: int, *, raw: bool = False) -> transforms.Resized:
        image, episodes = group.images[m], self.episodes[table]
        if episodes is None:
            stored = int(self.tables[table]["image"][int(self.groups[table].first[number])])
        else:
            stored = episodes.rows.numbers[image.img_fn]
        vision = self.spec.vision
        payload = self.shards[table].image_bytes(stored)
        return transforms.load(payload, image, vision.image_size, mean=vision.mean, std=vision.std, raw=raw)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class RowDataset(Dataset):
    """Rows by number: (members, seed) -> Batch, in a worker as `RunData.raw_batch` makes it."""

    def __init__(self, data: RunData, rows: Sequence[tuple[Sequence[tuple[int, int]], int]]) -> None:
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        members, seed = self.rows[index]
        made = self.data.raw_batch(members, seed)
        return made if get_worker_info() else self.data.finish(made)


class PlannedRows(Sequence):
    """The rows of one rank from a step on, looked up in the plan only when asked for.

    Index = (step - first_step) * micro_steps + micro_step.
    """

    def __init__(self, plan: Plan, *, rank: int, world: int, first_step: int, last_step: int, seed: int) -> None:
        self.plan, self.rank, self.world, self.seed = plan, rank, world, seed
        self.first_step, self.last_step = first_step, last_step
        self.micro_steps = -(-plan.rows_per_step // world)

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.micro_steps

    def __getitem__(self, index: int) -> tuple[Sequence[tuple[int, int]], int]:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, micro = divmod(index, self.micro_steps)
        step += self.first_step
        slot = micro * self.world + self.rank
        rows = self.plan.step(step)
        members = rows[slot].groups if slot < len(rows) else ()
        return members, row_seed(self.seed, step, slot)


def row_seed(seed: int, step: int, slot: int) -> int:
    """Dropout seed of a row: a function of (seed, step, place in the step), so it is the same on any rank (P3)."""
    return draw(seed, step, slot, "dropout") >> 2


def rank_batches(dataset: Dataset, *, workers: int, prefetch: int) -> Iterator[Batch]:
    """Batches in the order of the data set, those of a RowDataset finished."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        collate_fn=_packed if workers else None,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=partial(_start_worker, os.getpid()) if workers else None,
    )
    for item in loader:
        batch = _unpacked(item) if workers else item
        yield dataset.data.finish(batch) if workers and isinstance(dataset, RowDataset) else batch


def _packed(batch: Any) -> dict[str, Any]:
    """A batch as arrays, for the way out of a worker: torch would send each of its two dozen small tensors as a file
    descriptor of its own, which costs more than copying them."""
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in vars(batch).items()}


def _unpacked(fields: dict[str, Any]) -> Batch:
    tensors: dict[str, Any] = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in fields.items()}
    return Batch(**tensors)


def _start_worker(parent: int, _: int) -> None:
    torch.set_num_threads(1)
    heed_parent_alone(parent)
