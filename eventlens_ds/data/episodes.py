"""Training episodes of Link-Context Learning: drawn from (seed, epoch, index), measured by arithmetic, never stored.

In: a ShardSet whose records are class rows (data/sources/lcl.py), EpisodeConfig, tokenizer, spec, seed. Out: per epoch
tokens and images of every episode, for the plan, and any episode as a Group of one Sample over 2 * shots + 1 images.
The stages:
  1. Rows           class rows and the number of every image of a split
  2. Drawn.draw     classes, shots, labels, images and order of one episode: a few random numbers, no reading
  3. Drawn.tokens   its length, from the lengths of stored pieces (`Lengths`)
  4. Rows.group     its ImageRecords and turns; the loader reads the pixels
Decision: an episode's number runs over epochs, number = epoch * size + index, so whatever names a group in a row,
a ledger or a resumed run names the same episode (P3).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from eventlens_ds.config.run_config import EpisodeConfig
from eventlens_ds.data import episode_text, strategies
from eventlens_ds.data.encode import EncodeSpec, group_lengths
from eventlens_ds.data.packing import GroupTable
from eventlens_ds.data.plan import draw, generator
from eventlens_ds.data.prompts import PROMPT_VERSION, render
from eventlens_ds.data.records import Group, ImageRecord, Sample
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.data.sources.lcl import in_file_order
from eventlens_ds.data.sources.world_creature import SYLLABLES
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

KINDS = ("lcl", "isekai")
MAX_LETTERS = 10
TASK = "lcl"


class Episode(NamedTuple):
    """What an episode shows, before any image is read. Sides: 0 the anchor (positive) class, 1 the other.

    shown: side of every demonstration, in order; labels: the name each demonstration carries; names: the name of each
    side; images: image numbers of the demonstrations, then of the query.
    """

    id: str
    shown: tuple[int, ...]
    labels: tuple[str, ...]
    names: tuple[str, str]
    images: tuple[int, ...]
    side: int
    query: str
    fields: tuple[tuple[str, str], ...] = ()


class Rows:
    """The rows of a split in their own order, and the number of every image by its name."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.numbers = {shards.image(i, outlines=False).img_fn: i for i in range(shards.num_images)}
        found: list[tuple[str, int, dict[str, Any]]] = []
        for record in range(shards.num_records):
            if (kind := shards.kind_of(record)) in KINDS:
                made = shards.record(record)
                found.append((kind, int(made["line"]), in_file_order(made["row"])))
        found.sort(key=lambda entry: entry[1])
        self.kinds = {kind for kind, _, _ in found}
        self.rows = [row for _, _, row in found]
        self.lines = [line for _, line, _ in found]

    def present(self, names: Sequence[str]) -> list[int]:
        """Numbers of those images that were stored."""
        return [self.numbers[name] for name in names if name in self.numbers]

    def group(self, episode: Episode, candidates: bool, supervise_all: bool = False) -> Group:
        """The episode as a Group; candidates: scored by the answers with either name, else by the right one alone."""
        read: dict[int, ImageRecord] = {i: self.shards.image(i, outlines=False) for i in set(episode.images)}
        return Group(TASK, tuple(read[i] for i in episode.images), (sample_of(episode, candidates, supervise_all),))


def holds_episodes(shards: ShardSet) -> bool:
    return any(kind in KINDS for kind in shards.kinds)


def sample_of(episode: Episode, candidates: bool, supervise_all: bool = False) -> Sample:
    """Demonstrations, query, answer and fields of an episode; `images` are numbers of the split."""
    answer: dict[str, Any] = {"targets": ((episode.names[episode.side],),)}
    if candidates:
        answer = {"candidates": tuple((name,) for name in episode.names), "label": episode.side}
    weights: tuple[float, ...] = ()
    if supervise_all:
        weights = tuple(float(label in episode.labels[:i]) for i, label in enumerate(episode.labels))
    return Sample(
        id=episode.id,
        source="lcl",
        task=TASK,
        images=tuple(map(str, episode.images)),
        turns=(("query", (episode.query,)),),
        examples=episode.labels,
        example_weights=weights,
        fields=episode.fields,
        **answer,
    )


class Lengths:
    """Tokens of an episode from the lengths of its pieces: a constant per number of demonstrations, plus its labels."""

    def __init__(self, tokenizer: PieceTokenizer, spec: EncodeSpec) -> None:
        self.tokenizer, self.spec = tokenizer, spec
        self._stems: dict[tuple[str, bool], int] = {}
        name = "x"
        self._own = len(tokenizer.ids(name))
        measured = [self._measure(shown, episode_text.QUERY) for shown in range(3)]
        self._prefix = [measured[0][0], measured[1][0] - self._own]
        self._each = measured[2][0] - measured[1][0] - self._own
        self._leaf = measured[0][2] - self._own

    def _measure(self, shown: int, query: str) -> tuple[int, int, int]:
        episode = Episode("", (0,) * shown, ("x",) * shown, ("x", "y"), tuple(range(shown + 1)), 0, query)
        blank = ImageRecord("", "", 1, 1, ())
        group = Group(TASK, (blank,) * (shown + 1), (sample_of(episode, False),))
        prefix, (length,) = group_lengths(render(group, self.spec.style), self.tokenizer, self.spec)
        return prefix, length.stem, length.leaves

    def tokens(self, labels: Sequence[str], answers: Sequence[str], query: str) -> int:
        """Tokens of an episode with these labels on its demonstrations and these answers behind its question."""
        key = (query, bool(labels))
        if key not in self._stems:
            self._stems[key] = self._measure(int(bool(labels)), query)[1]
        count, ids = len(labels), self.tokenizer.ids
        prefix = self._prefix[0] if not count else self._prefix[1] + (count - 1) * self._each
        named = sum(len(ids(name)) for name in labels) + sum(len(ids(name)) for name in answers)
        return prefix + self._stems[key] + named + len(answers) * self._leaf


class _Class(NamedTuple):
    """A class that may be an anchor or a negative: images int64[n]; neighbours: classes, the nearest first."""

    id: str
    name: str
    images: np.ndarray
    neighbours: list[int]


class Drawn:
    """The training episodes of a split. Raises DataError when no class can be used, UserError when the shots do not fit
    a row or the positions of the language model."""

    def __init__(
        self, rows: Rows, config: EpisodeConfig, tokenizer: PieceTokenizer, spec: EncodeSpec, seed: int, row_tokens: int
    ) -> None:
        if config.supervise == "all" and spec.encoder_decoder:
            raise UserError(
                "data.episodes.supervise all: an encoder-decoder answers one question of a prompt; use last"
            )
        self.rows, self.config, self.seed = rows, config, seed
        self.lengths = Lengths(tokenizer, spec)
        self.queries = episode_text.queries(config.queries)
        self.classes, self.skipped = _classes(rows, config)
        self.anchors = [i for i, one in enumerate(self.classes) if one.neighbours or config.hard == 0]
        if len(self.classes) < 2 or not self.anchors:
            reason = f", e.g. {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            raise DataError(
                f"{rows.shards.folder}/{rows.shards.split}: no class can be the anchor of an episode{reason}"
            )
        if self.skipped:
            name, reason = self.skipped[0]
            log.warning("%d classes are in no episode, e.g. %s: %s", len(self.skipped), name, reason)
        self.size = config.per_epoch or len(self.anchors)
        self._check_fit(row_tokens)
        self.fingerprint = self._digest(tokenizer, spec)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _digest(self, tokenizer: PieceTokenizer, spec: EncodeSpec) -> str:
        layout = (spec.linking, spec.style, spec.vision.tokens, spec.encoder_decoder)
        facts = (PROMPT_VERSION, self.rows.shards.fingerprint, tokenizer.fingerprint, layout, self.config, self.queries)
        return hashlib.sha256(repr((*facts, self.seed)).encode()).hexdigest()[:20]

    def _check_fit(self, row_tokens: int) -> None:
        """The longest episode fits a row and the context of the language model."""
        names = [*(one.name for one in self.classes), "q" * MAX_LETTERS, "zu zu"]
        longest = max(names, key=lambda name: len(self.lengths.tokenizer.ids(name)))
        query = max(self.queries, key=lambda q: self.lengths.tokens((), (longest,), q))
        answers = (longest,) * (2 if self.config.objective == "choice" else 1)
        check_fit(self.lengths, self.config.shots, longest, answers, query, row_tokens)

    def draw(self, number: int) -> Episode:
        """Episode `number` = epoch * size + index: a pure function of (seed, epoch, index)."""
        epoch, index = divmod(number, self.size)
        config = self.config
        choose = {name: strategies.uniform(draw(self.seed, epoch, index, name)) for name in ("shots", "hard", "rank")}
        rng = generator(self.seed, epoch, index, "episode")
        anchor = self.anchors[index % len(self.anchors)]
        near = self.classes[anchor].neighbours[: config.neighbours]
        if choose["hard"] < config.hard and near:
            other = near[int(strategies.pick_neighbour(len(near), choose["rank"]))]
        else:
            other = int(rng.integers(len(self.classes) - 1))
            other += other >= anchor
        shots = self.shots_of(epoch, choose["shots"])
        side = int(rng.integers(2))
        order = rng.permutation(np.repeat([0, 1], shots))
        # One more of the class that is asked about: the query is never a demonstration.
        picked = [
            rng.choice(self.classes[c].images, shots + (s == side), replace=False).tolist()
            for s, c in enumerate((anchor, other))
        ]
        query_image = picked[side].pop()
        names = self._names(rng, anchor, other)
        return Episode(
            id=f"lcl/{self.rows.shards.split}/{epoch}/{index}",
            shown=tuple(order.tolist()),
            labels=tuple(names[s] for s in order.tolist()),
            names=names,
            images=(*(picked[s].pop() for s in order.tolist()), query_image),
            side=side,
            query=self.queries[int(rng.integers(len(self.queries)))],
            fields=(("shots", str(shots)), ("pair", f"{self.classes[anchor].id}/{self.classes[other].id}")),
        )

    def shots_of(self, epoch: int, uniform: float) -> int:
        """Shots per class of an episode of `epoch`."""
        config = self.config
        if config.strategy == "2-way" or epoch < config.fixed_epochs:
            return config.shots
        return int(strategies.pick_shots(config.strategy, config.shots, config.min_shots, uniform))

    def _names(self, rng: np.random.Generator, anchor: int, other: int) -> tuple[str, str]:
        """Names of both sides, different from each other."""
        config, made = self.config, [self.classes[anchor].name, self.classes[other].name]
        for side in {"anchor": (0,), "both": (0, 1), "none": ()}[config.random_labels]:
            made[side] = random_label(rng, config.label_form)
            while made[side] == made[1 - side]:
                made[side] = random_label(rng, config.label_form)
        return made[0], made[1]

    def tokens(self, episode: Episode) -> int:
        answers = episode.names if self.config.objective == "choice" else (episode.names[episode.side],)
        return self.lengths.tokens(episode.labels, answers, episode.query)

    def _measured(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32[size] and images int16[size] of an epoch; two epochs are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[next(iter(self._epochs))]
            every = [self.draw(epoch * self.size + index) for index in range(self.size)]
            tokens = np.asarray([self.tokens(episode) for episode in every], np.int32)
            self._epochs[epoch] = tokens, np.asarray([len(episode.images) for episode in every], np.int16)
        return self._epochs[epoch]

    def table(self, name: str) -> GroupTable:
        """What the plan needs to know."""
        return GroupTable(
            name=name,
            fingerprint=self.fingerprint,
            lengths=lambda epoch: self._measured(epoch)[0],
            images=lambda epoch: self._measured(epoch)[1],
            groups=self.size,
            drawn=True,
        )

    def group(self, number: int) -> Group:
        return self.rows.group(self.draw(number), self.config.objective == "choice", self.config.supervise == "all")

    def length(self, number: int) -> int:
        return self.tokens(self.draw(number))


def check_fit(
    lengths: Lengths, shots: int, name: str, answers: Sequence[str], query: str, row_tokens: int, what: str = ""
) -> None:
    """UserError naming the shots that would fit when an episode of `shots` per class does not, neither a row nor the
    positions of the language model. name: the longest label."""
    positions = lengths.spec.positions
    room = min(row_tokens, positions or row_tokens)
    need = lengths.tokens((name,) * (2 * shots), answers, query)
    if need <= room:
        return
    fitting = [s for s in range(shots) if lengths.tokens((name,) * (2 * s), answers, query) <= room]
    limit = (
        f"the language model reads {positions} positions" if room == positions else f"data.row_tokens is {row_tokens}"
    )
    fits = f"{fitting[-1]} shots per class would fit" if fitting else "not even a question without examples would fit"
    tokens = lengths.spec.vision.tokens
    raise UserError(
        f"{what or f'data.episodes.shots {shots}'}: an episode of {2 * shots + 1} images takes up to {need} tokens, "
        f"but {limit}; {fits} ({tokens} tokens an image; model.visual_pool gives fewer)"
    )


def random_label(rng: np.random.Generator, form: str) -> str:
    """A random string [released code: 1 to 10 lowercase letters], or two syllables [ours]."""
    if form == "syllables":
        first, second = rng.integers(len(SYLLABLES), size=2).tolist()
        return f"{SYLLABLES[first]} {SYLLABLES[second]}"
    letters = rng.integers(26, size=int(rng.integers(1, MAX_LETTERS + 1)))
    return "".join(chr(ord("a") + letter) for letter in letters.tolist())


def _classes(rows: Rows, config: EpisodeConfig) -> tuple[list[_Class], list[tuple[str, str]]]:
    """Classes with enough images, their neighbours among those, and (class, reason) of every other one."""
    usable: dict[str, _Class] = {}
    skipped: list[tuple[str, str]] = []
    near: dict[str, list[str]] = {}
    for row in rows.rows:
        if "neighbors" not in row:
            continue
        images = sorted(set(rows.present(row["samples"])))
        if len(images) <= config.shots:
            skipped.append((row["class_name"], f"{len(images)} images for {config.shots} shots and a query"))
            continue
        usable[row["class_id"]] = _Class(row["class_id"], row["class_name"], np.asarray(images, np.int64), [])
        near[row["class_id"]] = [entry[0] for entry in row["neighbors"]]
    made, at = list(usable.values()), {key: i for i, key in enumerate(usable)}
    for one in made:
        one.neighbours.extend(at[key] for key in dict.fromkeys(near[one.id]) if key in at and key != one.id)
        if not one.neighbours and config.hard > 0:
            skipped.append((one.name, "none of its neighbours can be used, so it is never an anchor"))
    return made, skipped
