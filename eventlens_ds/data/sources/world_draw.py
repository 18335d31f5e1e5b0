"""Draws a scene of the embedded world: an RGB picture and, per region, its box and outline.

In: a `Scene` and a picture size. Out: `Drawing` with polygons in pixels and boxes that are the extents of those
very polygons, so box, outline and drawing agree by construction (P1).

Decision: one geometry in units of 1/96 of the picture, drawn several times too large and averaged down, so that 64
and 448 pixels show the same scene. Figures are large, objects more than a third of a person, shirts and objects
share no colour, and every pose brings limbs around its object so that the person's box covers both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

from eventlens_ds.data.sources.world_scene import COLUMNS, ROWS, Person, Scene, Thing

Point = tuple[float, float]
Polygon = list[Point]
Colour = tuple[int, int, int]

UNITS = 96.0
SLOT_W, SLOT_H = UNITS / COLUMNS, UNITS / ROWS
OBJECT = 13.0
"""Side of an object in units; a standing person is 31 units tall."""
GROUND = SLOT_H - 1.5

SKIN, HAIR, TROUSERS = (238, 190, 150), (70, 40, 25), (35, 40, 80)
SHIRT_COLOURS: dict[str, Colour] = {
    "black": (15, 15, 15),
    "orange": (255, 125, 0),
    "teal": (0, 160, 150),
    "pink": (255, 120, 190),
    "brown": (125, 70, 25),
    "grey": (140, 140, 145),
}
SKY_AND_GROUND: dict[str, tuple[Colour, Colour]] = {
    "park": ((195, 225, 250), (160, 205, 125)),
    "beach": ((120, 185, 230), (242, 222, 165)),
    "street": ((215, 195, 180), (178, 178, 184)),
    "kitchen": ((250, 238, 190), (235, 235, 235)),
    "stage": ((190, 85, 95), (205, 160, 115)),
    "pool": ((150, 220, 230), (150, 220, 230)),
    "snow": ((215, 228, 246), (250, 250, 253)),
    "cave": ((92, 88, 120), (120, 112, 140)),
}


@dataclass(frozen=True)
class Part:
    """A filled polygon; `owner` is the region it belongs to, None for the background."""

    owner: int | None
    points: Polygon
    colour: Colour


@dataclass(frozen=True)
class Drawing:
    """A picture, `boxes[i]` = (x1, y1, x2, y2) in pixels and `polygons[i]`, the outlines of region i."""

    image: Image.Image
    boxes: list[tuple[float, float, float, float]]
    polygons: list[list[Polygon]]


def _disc(x: float, y: float, r: float, n: int = 16) -> Polygon:
    return [(x + r * math.cos(2 * math.pi * i / n), y + r * math.sin(2 * math.pi * i / n)) for i in range(n)]


def _rect(x1: float, y1: float, x2: float, y2: float) -> Polygon:
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


def _bar(a: Point, b: Point, width: float) -> Polygon:
    """A thick line as a quadrilateral."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    k = width / 2 / max(math.hypot(dx, dy), 1e-9)
    nx, ny = -dy * k, dx * k
    return [(a[0] + nx, a[1] + ny), (b[0] + nx, b[1] + ny), (b[0] - nx, b[1] - ny), (a[0] - nx, a[1] - ny)]


def _body(y: float, shirt: Colour) -> list[tuple[Polygon, Colour]]:
    """Head and torso of a figure whose hips are at height y (up is negative)."""
    head = y - 16.0
    cap = [p for p in _disc(0, head, 4.6, 24) if p[1] <= head - 0.6]
    return [(_rect(-5.2, y - 12.5, 5.2, y + 0.8), shirt), (_disc(0, head, 4.4), SKIN), (cap, HAIR)]


def figure(pose: str, shirt: Colour) -> tuple[list[tuple[Polygon, Colour]], Point]:
    """Parts of a person with the feet at (0, 0), and the centre of the object it holds."""
    half = OBJECT / 2
    legs = [(_rect(-4.6, -11, -0.6, 0), TROUSERS), (_rect(0.6, -11, 4.6, 0), TROUSERS)]
    if pose == "lift":
        arms = [(_bar((s * 5, -22.5), (s * 8.2, -33), 3.0), SKIN) for s in (-1, 1)]
        hands = [(_bar((s * 8.2, -32), (s * 8.2, -41.5), 2.6), SKIN) for s in (-1, 1)]
        return legs + _body(-11, shirt) + arms + hands, (0.0, -31.8 - half)
    if pose == "show":
        arms = [(_bar((4, -20), (19.5, -17.5), 3.2), SKIN), (_bar((-5.5, -22), (-7.5, -11.5), 2.8), SKIN)]
        return legs + _body(-11, shirt) + arms, (6.6 + half, -19.6 - half)
    if pose == "kick":
        kick = [legs[0], (_bar((1.5, -9.5), (19.5, -2.5), 4.0), TROUSERS)]
        arms = [(_bar((-5, -22), (-10.5, -16), 2.8), SKIN), (_bar((4.5, -22), (7.5, -17.5), 2.8), SKIN)]
        return kick + _body(-11, shirt) + arms, (7.4 + half, -6.2 - half)
    if pose == "sit":
        bent = [(_bar((s * 2, -13), (s * 9, -13), 4.0), TROUSERS) for s in (-1, 1)]
        shins = [(_bar((s * 8.6, -14), (s * 8.6, 0), 3.6), TROUSERS) for s in (-1, 1)]
        arms = [(_bar((s * 5.4, -25), (s * 8.4, -16), 2.8), SKIN) for s in (-1, 1)]
        return _body(-14.2, shirt) + bent + shins + arms, (0.0, -half)
    raise ValueError(f"unknown pose {pose!r}")


def thing_parts(name: str, x: float, y: float) -> list[tuple[Polygon, Colour]]:
    """Parts of an object of OBJECT units centred at (x, y); the first polygon is its outline's bulk."""
    h = OBJECT / 2
    if name == "apple":
        leaf = [(x, y - h + 1.6), (x + 3.6, y - h), (x + 2.2, y - h + 2.8)]
        return [(_disc(x, y + 0.7, h - 0.7, 20), (225, 20, 25)), (leaf, (20, 120, 20))]
    if name == "book":
        pages = [_rect(x - h + 3, y - 3.4, x + h - 2, y - 1.9), _rect(x - h + 3, y + 0.4, x + h - 2, y + 1.9)]
        return [(_rect(x - h, y - 5, x + h, y + 5), (20, 50, 225))] + [(p, (250, 250, 250)) for p in pages]
    if name == "bottle":
        neck = _rect(x - 1.5, y - h, x + 1.5, y - h + 4.5)
        return [(_rect(x - 3.6, y - h + 4, x + 3.6, y + h), (10, 150, 40)), (neck, (10, 150, 40))]
    if name == "banana":
        outer = [(x + h * math.cos(a), y - 3.4 + (h + 2.6) * math.sin(a)) for a in _angles(0, math.pi, 12)]
        inner = [(x + 4.6 * math.cos(a), y - 4.6 + 4.2 * math.sin(a)) for a in _angles(math.pi, 0, 8)]
        return [(outer + inner, (255, 225, 0))]
    if name == "clock":
        hands = [_bar((x, y + 0.6), (x, y - 4.0), 1.4), _bar((x - 0.6, y), (x + 3.2, y), 1.4)]
        return [(_disc(x, y, h, 20), (10, 10, 10)), (_disc(x, y, h - 1.7, 20), (255, 255, 255))] + [
            (p, (10, 10, 10)) for p in hands
        ]
    if name == "kite":
        diamond = [(x, y - h), (x + 5.6, y - 0.8), (x, y + h), (x - 5.6, y - 0.8)]
        return [(diamond, (150, 0, 200)), (_bar((x, y - h + 1), (x, y + h - 1), 1.1), (255, 190, 255))]
    raise ValueError(f"unknown object {name!r}")


def _angles(start: float, stop: float, n: int) -> list[float]:
    return [start + (stop - start) * i / (n - 1) for i in range(n)]


def _extent(parts: list[tuple[Polygon, Colour]]) -> tuple[float, float, float, float]:
    xs = [p[0] for points, _ in parts for p in points]
    ys = [p[1] for points, _ in parts for p in points]
    return min(xs), min(ys), max(xs), max(ys)


def _place_person(person: Person, thing: Thing) -> list[Part]:
    """Parts of a person and its object in picture units: jittered, scaled and kept inside the slot."""
    body, (ox, oy) = figure(person.pose, SHIRT_COLOURS[person.shirt])
    held = thing_parts(thing.name, ox, oy)
    scale = 0.92 + 0.08 * person.scale
    mirror = -scale if person.flip else scale
    x1, y1, x2, _ = _extent(body + held)
    left, right = sorted((x1 * mirror, x2 * mirror))
    column, row = person.slot % COLUMNS, person.slot // COLUMNS
    spare_x = (SLOT_W - (right - left)) / 2 - 0.5
    x0 = column * SLOT_W + SLOT_W / 2 - (left + right) / 2 + person.dx * min(max(spare_x, 0.0), 2.5)
    spare_y = GROUND + y1 * scale
    y0 = row * SLOT_H + GROUND - (person.dy + 1) / 2 * min(max(spare_y, 0.0), 6.0)

    def move(points: Polygon) -> Polygon:
        return [(x0 + mirror * x, y0 + scale * y) for x, y in points]

    return [Part(person.box, move(p), c) for p, c in body] + [Part(thing.box, move(p), c) for p, c in held]


def _place_loose(thing: Thing) -> list[Part]:
    x = (thing.slot % COLUMNS + 0.5) * SLOT_W + 4 * thing.dx
    y = (thing.slot // COLUMNS + 0.62) * SLOT_H + 5 * thing.dy
    return [Part(thing.box, p, c) for p, c in thing_parts(thing.name, x, y)]


def background(place: str) -> list[Part]:
    """The place: sky or wall above, ground below, and one large pattern of its own."""
    top, ground = SKY_AND_GROUND[place]
    horizon = 34.0
    polygons: list[tuple[Polygon, Colour]] = [(_rect(0, 0, 96, 96), top), (_rect(0, horizon, 96, 96), ground)]
    if place == "park":
        polygons += [(_disc(x, 30, 8), (120, 180, 100)) for x in (8, 30, 52, 74, 96)]
    elif place == "beach":
        polygons += [(_rect(0, y, 96, y + 2.5), (225, 240, 250)) for y in (10, 20, 31.5)]
    elif place == "street":
        polygons += [(_rect(x, 60, x + 9, 64), (255, 255, 255)) for x in (2, 22, 42, 62, 82)]
        polygons += [(_rect(0, y, 96, y + 1.2), (235, 220, 210)) for y in (8, 16, 24)]
    elif place == "kitchen":
        cells = [(8 * i, 34 + 8 * j) for i in range(12) for j in range(8) if (i + j) % 2]
        polygons += [(_rect(x, y, x + 8, y + 8), (200, 215, 205)) for x, y in cells]
    elif place == "stage":
        polygons += [(_rect(x, 0, x + 5, horizon), (165, 60, 75)) for x in range(0, 96, 10)]
        polygons += [(_rect(0, y, 96, y + 1), (180, 135, 90)) for y in range(40, 96, 7)]
    elif place == "pool":
        polygons += [(_rect(0, y, 96, y + 2.5), (250, 250, 255)) for y in (14, 38, 62, 86)]
    elif place == "snow":
        polygons += [(_disc(9 * i + 4, (i * 37) % 92 + 2, 1.6, 8), (190, 205, 230)) for i in range(11)]
    else:
        polygons += [([(x, 0), (x + 12, 0), (x + 6, 14)], (70, 66, 96)) for x in range(0, 96, 16)]
    return [Part(None, points, colour) for points, colour in polygons]


def scene_parts(scene: Scene) -> list[Part]:
    """Everything to draw, back to front, in units of 1/96 of the picture."""
    parts = background(scene.place)
    for thing in scene.things:
        if thing.held_by < 0:
            parts += _place_loose(thing)
    held = {thing.held_by: thing for thing in scene.things if thing.held_by >= 0}
    for person in scene.people:
        parts += _place_person(person, held[person.box])
    return parts


def paint(parts: list[Part], size: int) -> Image.Image:
    """Fill the parts in order on a size x size RGB picture, with smooth edges."""
    over = 4 if size <= 128 else 2
    scale = size * over / UNITS
    image = Image.new("RGB", (size * over, size * over))
    canvas = ImageDraw.Draw(image)
    for part in parts:
        canvas.polygon([(x * scale - 0.5, y * scale - 0.5) for x, y in part.points], fill=part.colour)
    return image.reduce(over)


Boxes = list[tuple[float, float, float, float]]


def outline(scene: Scene, parts: list[Part], size: int) -> tuple[Boxes, list[list[Polygon]]]:
    """Boxes and polygons of every region in pixels. Boxes are clipped to the picture; polygons are left as drawn."""
    scale = size / UNITS
    outlines: list[list[Polygon]] = [[] for _ in scene.names]
    for part in parts:
        if part.owner is not None:
            outlines[part.owner].append([(x * scale, y * scale) for x, y in part.points])
    boxes = []
    for polygons in outlines:
        xs = [min(max(x, 0.0), float(size)) for polygon in polygons for x, _ in polygon]
        ys = [min(max(y, 0.0), float(size)) for polygon in polygons for _, y in polygon]
        boxes.append((min(xs), min(ys), max(xs), max(ys)))
    return boxes, outlines


def draw(scene: Scene, size: int) -> Drawing:
    """Draw a scene at `size` pixels per side."""
    parts = scene_parts(scene)
    return Drawing(paint(parts, size), *outline(scene, parts, size))
