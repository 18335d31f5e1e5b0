"""Nonce creatures: classes that no word of any language names, to be learned from a context alone.

In: a seed. Out: `Creature`s, each a combination of five features with an invented name; `draw_creature`, a picture of
one individual. A class is what its features say and nothing else; place, size, tilt, background and shade differ from
picture to picture.
Decision: train and test classes are disjoint combinations of the same features, each feature value is in both, and the
partner of a test class differs from it in one feature. So nothing but a look at the demonstrations can tell which of
two names a picture has; names are dealt out at random and say nothing about features.
"""

from __future__ import annotations

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
    "feet": ("black", "orange", "cyan", "none"),
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
_FEET: dict[str, Colour] = {"black": (20, 20, 20), "orange": (255, 130, 0), "cyan": (0, 190, 200)}
_DARK: Colour = (40, 30, 30)
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
    if test % 2 or train + test > len(every):
        raise ValueError(f"{train} + {test} classes of {len(every)} combinations; test classes come in pairs")
    order = [every[i] for i in rng.permutation(len(every))]
    left = dict.fromkeys(order)
    pairs: list[tuple[str, ...]] = []
    kinds = list(FEATURES.values())
    while len(pairs) < test:
        one = next(iter(left))
        at = len(pairs) // 2 % len(kinds)
        others = [(*one[:at], value, *one[at + 1 :]) for value in kinds[at] if value != one[at]]
        free = [other for other in others if other in left]
        left.pop(one)
        if free:
            other = free[int(rng.integers(len(free)))]
            left.pop(other)
            pairs += [one, other]
    rest = [features for features in order if features in left][:train]
    if len(rest) < train:
        raise ValueError(f"{train} + {test} classes of {len(every)} combinations leave {len(rest)} for training")
    names = _names(rng, train + test)
    made = [Creature(f, n, s) for f, n, s in zip([*rest, *pairs], names, ["train"] * train + ["test"] * test)]
    return made[:train], made[train:]


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Invented words of two syllables, all different. The hyphen keeps a tokenizer from joining letters across."""
    size = len(SYLLABLES)
    return [f"{SYLLABLES[i // size]}-{SYLLABLES[i % size]}" for i in rng.permutation(size * size)[:count].tolist()]


def words() -> list[str]:
    """What the embedded tokenizer should know of creatures: each syllable, and each word of a caption."""
    return [*SYLLABLES, *(f" {value}" for values in FEATURES.values() for value in values)]


def draw_creature(creature: Creature, seed: int, index: int, size: int) -> Image.Image:
    """RGB picture `index` of a class, size x size pixels; the same for the same arguments."""
    rng = scene_rng(seed, creature.key, index, "picture")
    ground = _GROUND[int(rng.integers(len(_GROUND)))]
    shade = 1 + 0.12 * float(rng.uniform(-1, 1))
    parts = [Part(None, [(0, 0), (UNITS, 0), (UNITS, UNITS), (0, UNITS)], ground)]
    for _ in range(int(rng.integers(0, 4))):
        x, y, r = (float(rng.uniform(a, b)) for a, b in ((0, UNITS), (0, UNITS), (4, 9)))
        parts.append(Part(None, _disc(x, y, r), _shaded(ground, 0.88)))
    angle, scale = math.radians(float(rng.uniform(-15, 15))), float(rng.uniform(0.85, 1.05))
    dx, dy = (float(v) for v in rng.uniform(-7, 7, 2))
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
        made += [(_rect(x - 5, 18, x + 5, 38), _FEET[feet]) for x in (-13, 13)]
    if head == "ears":
        made += [(_disc(x, -24, 9), _BODY[colour]) for x in (-14, 14)]
    elif head == "horns":
        made += [([(x, -16), (x + s * 10, -16), (x + s * 12, -40)], _DARK) for x, s in ((-8, -1), (8, 1))]
    elif head == "crown":
        made.append(([(-14, -16), (-14, -38), (-6, -28), (0, -40), (6, -28), (14, -38), (14, -16)], (255, 150, 30)))
    shapes: dict[str, list[Polygon]] = {
        "round": [_disc(0, 0, 25)],
        "square": [_rect(-23, -23, 23, 23)],
        "triangle": [[(0, -30), (30, 24), (-30, 24)]],
        "cross": [_rect(-11, -28, 11, 28), _rect(-28, -11, 28, 11)],
    }
    made += [(points, _BODY[colour]) for points in shapes[body]]
    made += [(_disc(x, -7, 3.4), _DARK) for x in (-6, 6)]
    if mark == "bars":
        made += [(_rect(-11, y, 11, y + 3.4), _DARK) for y in (1, 8, 15)]
    elif mark == "spot":
        made.append((_disc(0, 9, 8), _DARK))
    elif mark == "ring":
        made += [(_disc(0, 9, 9.5), (250, 250, 250)), (_disc(0, 9, 6), (255, 120, 180))]
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
