"""Evaluation episodes of Link-Context Learning: every query of a split with the first demonstrations of both classes.

In: `Rows` in the form pairs or isekai, shots per class. Out: `Listed`, the same interface as episodes.Drawn: one Group
per query, scored by the answers with either name.
Decision: as in the released code the first `shots` context images of each class are shown, and as there in a random
order; ours is seeded by the query's id, so that every condition shows the same episode. Both classes of a pair are
asked about equally often, so a model that only prefers a name scores one half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from eventlens_ds.data import episode_text
from eventlens_ds.data.encode import EncodeSpec
from eventlens_ds.data.episodes import Episode, Lengths, Rows, check_fit
from eventlens_ds.data.packing import GroupTable
from eventlens_ds.data.plan import generator
from eventlens_ds.data.records import Group
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.errors import DataError

Place = Literal["any", "first", "middle", "last"]
"""Where the demonstrations of the class that is asked about stand in the context."""
PLACES: tuple[Place, ...] = get_args(Place)


class Question(NamedTuple):
    """A query: support: image names of the positive and of the negative class, in the order of the file."""

    id: str
    names: tuple[str, str]
    support: tuple[tuple[str, ...], tuple[str, ...]]
    image: str
    side: int


class Ablation(NamedTuple):
    """What is done to the demonstrations of an episode. correctness: share of the labels that stay, the others become
    the name of the other class. shuffle: the labels trade places at random."""

    correctness: float = 1.0
    shuffle: bool = False
    place: Place = "any"


def questions(rows: Rows) -> list[Question]:
    """Every query of a split. Raises DataError when its rows are no evaluation rows, or are odd in number."""
    where = f"{rows.shards.folder}/{rows.shards.split}"
    if rows.kinds == {"isekai"}:
        return [_isekai(row, line) for row, line in zip(rows.rows, rows.lines)]
    if not rows.rows or "context_samples" not in rows.rows[0]:
        raise DataError(f"{where}: holds no pairs and no ISEKAI rows to evaluate episodes on")
    # A class whose images are all broken is gone from the shards; its partner's line says so.
    by_line = dict(zip(rows.lines, rows.rows))
    made = []
    for line, row in by_line.items():
        partner = by_line.get(line ^ 1)
        if partner is None:
            raise DataError(
                f"{where}: class {row['class_name']!r} (line {line + 1}) has no partner; pairs are two lines"
            )
        support = (tuple(row["context_samples"]), tuple(partner["context_samples"]))
        names = (row["class_name"], partner["class_name"])
        made += [
            Question(f"{row['class_id']}/{i}", names, support, image, 0) for i, image in enumerate(row["test_samples"])
        ]
    return made


def _isekai(row: dict[str, Any], line: int) -> Question:
    names = (row["positive_promt"], row["negative_promt"])
    support = (tuple(row["positive_list"]), tuple(row["negative_list"]))
    return Question(f"isekai/{line}", names, support, row["image_name"], names.index(row["label_name"]))


class Listed:
    """Episodes of `asked` with `shots` per class. `skipped`: (id, reason) of queries that cannot be asked.

    Raises UserError when the shots do not fit a row or the positions of the language model, DataError when nothing is
    left to ask.
    """

    def __init__(
        self,
        rows: Rows,
        asked: Sequence[Question],
        shots: int,
        tokenizer: PieceTokenizer,
        spec: EncodeSpec,
        row_tokens: int,
        *,
        seed: int = 0,
        ablation: Ablation = Ablation(),  # noqa: B008 - immutable
        candidates: bool = True,
    ) -> None:
        self.rows, self.shots, self.seed, self.ablation, self.candidates = rows, shots, seed, ablation, candidates
        self.lengths = Lengths(tokenizer, spec)
        self.asked: list[Question] = []
        self.skipped: list[tuple[str, str]] = []
        for question in asked:
            if reason := self._unusable(question):
                self.skipped.append((question.id, reason))
            else:
                self.asked.append(question)
        if not self.asked:
            some = f", e.g. {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            raise DataError(f"{rows.shards.folder}/{rows.shards.split}: no query can be asked with {shots} shots{some}")
        names = {name for question in self.asked for name in question.names}
        longest = max(sorted(names), key=lambda name: len(tokenizer.ids(name)))
        answers = (longest, longest) if candidates else (longest,)
        check_fit(self.lengths, shots, longest, answers, episode_text.QUERY, row_tokens, f"--shots {shots}")
        facts = (rows.shards.fingerprint, tokenizer.fingerprint, spec, shots, seed, ablation, candidates, self.asked)
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:20]
        self.size = len(self.asked)

    def _unusable(self, question: Question) -> str:
        if question.image not in self.rows.numbers:
            return f"its image {question.image} was not stored"
        for name, support in zip(question.names, question.support):
            found = len(self._support(support, question.image))
            if found < self.shots:
                return f"class {name!r} has {found} context images for {self.shots} shots"
        return ""

    def _support(self, names: Sequence[str], query: str) -> list[int]:
        """Numbers of the stored context images; never the query itself."""
        return self.rows.present([name for name in names if name != query])

    def draw(self, number: int) -> Episode:
        question = self.asked[number]
        rng = generator(self.seed, 0, question.id, "order")
        order = self._order(rng, question.side)
        labels = [question.names[side] for side in order]
        if self.ablation.shuffle:
            labels = [labels[i] for i in rng.permutation(len(labels))]
        wrong = round((1 - self.ablation.correctness) * len(labels))
        for i in rng.permutation(len(labels))[:wrong].tolist():
            labels[i] = question.names[1 - question.names.index(labels[i])]
        left = [self._support(support, question.image)[: self.shots][::-1] for support in question.support]
        return Episode(
            id=question.id,
            shown=tuple(order),
            labels=tuple(labels),
            names=question.names,
            images=(*(left[side].pop() for side in order), self.rows.numbers[question.image]),
            side=question.side,
            query=episode_text.QUERY,
            fields=(("shots", str(self.shots)),),
        )

    def _order(self, rng: np.random.Generator, side: int) -> list[int]:
        """Sides of the demonstrations in the order in which they are shown."""
        own, other = [side] * self.shots, [1 - side] * self.shots
        if self.ablation.place == "any":
            return rng.permutation(np.asarray(own + other, np.int64)).tolist()
        before = {"first": 0, "middle": self.shots // 2, "last": self.shots}[self.ablation.place]
        return [*other[:before], *own, *other[before:]]

    def length(self, number: int) -> int:
        episode = self.draw(number)
        answers = episode.names if self.candidates else (episode.names[episode.side],)
        return self.lengths.tokens(episode.labels, answers, episode.query)

    def table(self, name: str) -> GroupTable:
        """What a plan needs to know."""
        lengths = np.asarray([self.length(i) for i in range(self.size)], np.int32)
        return GroupTable(name, self.fingerprint, lengths, np.full(self.size, 2 * self.shots + 1, np.int16))

    def group(self, number: int) -> Group:
        return self.rows.group(self.draw(number), self.candidates)
