"""Nonce creatures: classes that no word of any language names, to be learned from a context alone.

In: a seed. Out: `Creature`s, each a combination of five features with an invented name; `draw_creature`, a picture of
one individual. A class is what its features say and nothing else; place, size, tilt, background and shade differ from
picture to picture.
Decision: train and test classes are disjoint combinations of the same features, whatever the seed, each feature value
is in both, and the partner of a test class differs from it in one feature. So nothing but a look at the demonstrations
can tell which of two names a picture has; names are dealt out at random and say nothing about features.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from eventlens_ds.data.sources.world_draw import UNITS, Colour, Part, Polygon, paint
from eventlens_ds.data.sources.world_scene import scene_rng

FEATURES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "blue", "green", "yellow", "purple", "white"),
    "body": ("round", "square", "triangle", "cross"),
    "head": ("ears", "horns", "crown", "bare"),
    "mark": ("bars", "spot", "ring", "plain"),
    "feet": ("black", "lime", "cyan", "none"),
}
"""What a class is made of: 1,536 combinations."""

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES: tuple[str, ...] = tuple(c + v for c in CONSONANTS for v in VOWELS)

_BODY: dict[str, Colour] = {
    "red": (215, 40, 40),
    "blue": (45, 75, 220),
    "green": (40, 150, 60),
    "yellow": (240, 205, 40),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
}
_FEET: dict[str, Colour] = {"black": (20, 20, 20), "lime": (150, 230, 30), "cyan": (0, 200, 210)}
_DARK: Colour = (40, 30, 30)
_PINK, _ORANGE, _WHITE = (255, 120, 180), (255, 140, 20), (250, 250, 250)
_GROUND: tuple[Colour, ...] = ((200, 190, 170), (170, 190, 200), (190, 200, 170), (205, 180, 200), (150, 150, 150))


@dataclass(frozen=True)
class Creature:
    """A class: its features in the order of FEATURES, its invented name, and the split it belongs to."""

    features: tuple[str, ...]
    name: str
    split: str

    @property
    def key(self) -> str:
        """A name of the class that is free of its label, for files."""
        return "-".join(self.features)


def difference(one: Creature, other: Creature) -> int:
    """Features in which two classes differ."""
    return sum(a != b for a, b in zip(one.features, other.features))


def creatures(seed: int, train: int, test: int) -> tuple[list[Creature], list[Creature]]:
    """(train classes, test classes); test classes 2k and 2k + 1 differ in one feature and are each other's negative.

    Raises ValueError when there are not as many combinations, or `test` is odd.
    """
    rng = scene_rng(seed, "creatures", 0, "classes")
    every = list(itertools.product(*FEATURES.values()))
    order = [every[i] for i in rng.permutation(len(every))]
    learned = [features for features in order if not held_out(features)][:train]
    pairs = _pairs([features for features in order if held_out(features)], test, rng)
    if test % 2 or len(learned) < train or len(pairs) < test:
        raise ValueError(
            f"{train} + {test} classes: there are {len(learned)} to train on, {len(pairs)} in pairs to test"
        )
    names = _names(rng, train + test)
    made = [Creature(f, n, s) for f, n, s in zip([*learned, *pairs], names, ["train"] * train + ["test"] * test)]
    return made[:train], made[train:]


def held_out(features: Sequence[str]) -> bool:
    """Whether a combination is for testing alone, about one in four. The same for all seeds, so that a model stays
    untrained on it when it is scored on the world of another seed."""
    return hashlib.blake2b("-".join(features).encode(), digest_size=2).digest()[0] % 4 == 0


def _pairs(free: list[tuple[str, ...]], count: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """`count` combinations, each followed by one that differs from it in one feature; features take turns."""
    left = dict.fromkeys(free)
    kinds = list(FEATURES.values())
    made: list[tuple[str, ...]] = []
    while len(made) < count:
        at = len(made) // 2 % len(kinds)
        for one in left:
            near = [(*one[:at], value, *one[at + 1 :]) for value in kinds[at] if value != one[at]]
            if near := [other for other in near if other in left]:
                break
        else:
            return made
        other = near[int(rng.integers(len(near)))]
        made += [one, other]
        left.pop(one), left.pop(other)
    return made


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Invented names of two syllables, all different. The blank keeps a tokenizer from joining letters across."""
    size = len(SYLLABLES)
    return [f"{SYLLABLES[i // size]} {SYLLABLES[i % size]}" for i in rng.permutation(size * size)[:count].tolist()]


def words() -> list[str]:
    """What the embedded tokenizer should know of creatures: each syllable at either place, each word of a caption."""
    return [
        *SYLLABLES,
        *(f" {syllable}" for syllable in SYLLABLES),
        *(f" {value}" for values in FEATURES.values() for value in values),
    ]


def draw_creature(creature: Creature, seed: int, index: int, size: int) -> Image.Image:
    """RGB picture `index` of a class, size x size pixels; the same for the same arguments."""
    rng = scene_rng(seed, creature.key, index, "picture")
    ground = _GROUND[int(rng.integers(len(_GROUND)))]
    shade = 1 + 0.12 * float(rng.uniform(-1, 1))
    parts = [Part(None, [(0, 0), (UNITS, 0), (UNITS, UNITS), (0, UNITS)], ground)]
    for _ in range(int(rng.integers(0, 4))):
        x, y, r = (float(rng.uniform(a, b)) for a, b in ((0, UNITS), (0, UNITS), (4, 9)))
        parts.append(Part(None, _disc(x, y, r), _shaded(ground, 0.88)))
    angle, scale = math.radians(float(rng.uniform(-8, 8))), float(rng.uniform(0.9, 1.05))
    dx, dy = (float(v) for v in rng.uniform(-4, 4, 2))
    turn = (scale * math.cos(angle), scale * math.sin(angle))
    mirror = -1 if rng.integers(2) else 1
    for points, colour in _parts(creature):
        moved = [
            (48 + dx + turn[0] * mirror * x - turn[1] * y, 50 + dy + turn[1] * mirror * x + turn[0] * y)
            for x, y in points
        ]
        parts.append(Part(None, moved, _shaded(colour, shade)))
    return paint(parts, size)


def _parts(creature: Creature) -> list[tuple[Polygon, Colour]]:
    """Polygons of a creature around (0, 0), back to front, in units of 1/96 of the picture."""
    colour, body, head, mark, feet = creature.features
    made: list[tuple[Polygon, Colour]] = []
    if feet != "none":
        made += [(_rect(x - 8, 16, x + 8, 42), _FEET[feet]) for x in (-14, 14)]
    if head == "ears":
        made += [(_disc(x, -27, 12), _PINK) for x in (-17, 17)]
    elif head == "horns":
        made += [([(s * 4, -16), (s * 18, -16), (s * 22, -44)], _DARK) for s in (-1, 1)]
    elif head == "crown":
        made.append(([(-18, -14), (-18, -42), (-8, -30), (0, -44), (8, -30), (18, -42), (18, -14)], _ORANGE))
    shapes: dict[str, list[Polygon]] = {
        "round": [_disc(0, 0, 26)],
        "square": [_rect(-25, -23, 25, 25)],
        "triangle": [[(0, -32), (34, 25), (-34, 25)]],
        "cross": [_rect(-13, -28, 13, 28), _rect(-34, -9, 34, 13)],
    }
    made += [(points, _BODY[colour]) for points in shapes[body]]
    made += [(_disc(x, -10, 3.4), _DARK) for x in (-6, 6)]
    if mark == "bars":
        made += [(_rect(-12, y, 12, y + 5), _DARK) for y in (-3, 6, 15)]
    elif mark == "spot":
        made.append((_disc(0, 8, 12), _PINK))
    elif mark == "ring":
        made += [(_disc(0, 8, 13), _WHITE), (_disc(0, 8, 7), _DARK)]
    return made


def _disc(x: float, y: float, r: float) -> Polygon:
    return [(x + r * math.cos(2 * math.pi * i / 20), y + r * math.sin(2 * math.pi * i / 20)) for i in range(20)]


def _rect(x1: float, y1: float, x2: float, y2: float) -> Polygon:
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


def _shaded(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, max(0, round(value * factor))) for value in colour)
    return r, g, b


def describe(creature: Creature) -> str:
    """The class in words of the grammar: what a caption of one of its pictures says."""
    return " ".join(creature.features)


def neighbours(classes: Sequence[Creature], of: Creature, rng: np.random.Generator) -> list[Creature]:
    """The other classes, the most alike first, equals in a random order."""
    others = [c for c in classes if c.features != of.features]
    order = rng.permutation(len(others)).tolist()
    return sorted((others[i] for i in order), key=lambda c: difference(c, of))
