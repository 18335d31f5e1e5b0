"""Expressions, questions, statements and tags of the embedded world: the rows of regions/ without picture names.

In: a `Scene` and the boxes of its regions. Out: rows in the form that data/sources/{expressions,questions,statements,
pope,tags}.py read. Decision: an expression holds for exactly one region, or it is not said. The rest is blind by
construction: yes or no is a coin, places, shirts, poses and objects are equally likely, and people are counted less
often where their number is frequent. Every purpose has its own stream of random numbers, so the other files of a world
do not depend on these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from eventlens_ds.data.sources.world_scene import COLUMNS, OBJECTS, PEOPLE_WEIGHTS, POSES, Person, Scene
from eventlens_ds.data.sources.world_text import DOING

POPE_SETTINGS = ("random", "popular", "adversarial")
POPE_NEGATIVES = 3
"""Absent objects asked about per picture and setting, and as many present ones, where a picture has so many."""

ACTIONS = {"lift": "lifting", "show": "showing", "kick": "kicking", "sit": "sitting"}


def ways_to_say(scene: Scene, person: Person) -> list[str]:
    """Expressions that hold for this person and for no other region of the scene."""
    shirts = Counter(other.shirt for other in scene.people)
    poses = Counter(other.pose for other in scene.people)
    both = Counter((other.shirt, other.pose) for other in scene.people)
    verb = DOING[person.pose].split()[0]
    ways = [f"person who {DOING[person.pose]} the {person.object}", f"person with the {person.object}"]
    if shirts[person.shirt] == 1:
        ways += [f"person in {person.shirt}", f"person in {person.shirt} with the {person.object}"]
    if poses[person.pose] == 1:
        ways.append(f"person who {verb}")
    if both[person.shirt, person.pose] == 1:
        ways.append(f"person in {person.shirt} who {verb}")
    return ways


def expressions(scene: Scene, boxes: Sequence[Sequence[float]], size: int) -> Iterator[dict[str, Any]]:
    """Rows of rec.jsonl in region order: two different expressions per person, one per object; boxes to whole pixels,
    as Visual Genome's are."""
    rng = scene.rng("expressions")
    said: list[tuple[int, str, bool]] = []
    for person in scene.people:
        ways = ways_to_say(scene, person)
        said += [(person.box, ways[i], person.held_out) for i in rng.choice(len(ways), 2, replace=False)]
    said += [(thing.box, thing.name, False) for thing in scene.things]
    for box, text, held_out in said:
        shares = [round(round(value) / size, 3) for value in boxes[box]]
        row = {"expression": text, "bbox": shares, "width": size, "height": size}
        yield {**row, "held_out": held_out}


def questions(scene: Scene) -> Iterator[dict[str, Any]]:
    """Rows of vqa.jsonl: the place, how many people, an object that is or is not there, where every object is, and one
    of every person, who is named by what nobody else has."""
    rng = scene.rng("vqa")
    yield _asked("where is this?", scene.place, "other")
    if rng.random() < min(PEOPLE_WEIGHTS) / PEOPLE_WEIGHTS[len(scene.people) - 2]:
        yield _asked("how many people are there?", str(len(scene.people)), "number")
    present = [thing.name for thing in scene.things]
    absent = [name for name in OBJECTS if name not in present]
    if absent:
        there = bool(rng.integers(2))
        name = _one(rng, present if there else absent)
        yield _asked(f"is there {article(name)}?", "yes" if there else "no", "yes/no")
    for thing in scene.things:
        yield _asked(f"where is the {thing.name}?", part_of_picture(thing.slot), "other")
    for person in scene.people:
        by_shirt = [("what is the person in {} doing?", ACTIONS[person.pose]),
                    ("what object is with the person in {}?", person.object)]  # fmt: skip
        by_object = [("what is the shirt color of the person with the {}?", person.shirt),
                     ("what is the person with the {} doing?", ACTIONS[person.pose])]  # fmt: skip
        kind = int(rng.integers(4))
        if kind < 2:
            asked, answer = by_object[kind]
            yield _asked(asked.format(person.object), answer, "other")
        elif _alone(scene, person):
            asked, answer = by_shirt[kind - 2]
            yield _asked(asked.format(person.shirt), answer, "other")


def part_of_picture(slot: int) -> str:
    """Where a slot is: "up left", "up", ... "down right"."""
    row, column = divmod(slot, COLUMNS)
    return f"{'down' if row else 'up'} {('left', '', 'right')[column]}".strip()


def statements(scene: Scene) -> Iterator[dict[str, Any]]:
    """Rows of vsr.jsonl: a true and a false one about left and right, and a true and a false one about an event."""
    rng = scene.rng("vsr")
    ends = [(thing.name, thing.slot % COLUMNS) for thing in scene.things]
    ends += [(f"person in {p.shirt}", p.slot % COLUMNS) for p in scene.people if _alone(scene, p)]
    pairs = [(a, b) for a in ends for b in ends if a[1] != b[1]]
    for label in rng.permutation(2).tolist() if pairs else ():
        (one, column), (other, beside) = _one(rng, pairs)
        side = "left" if (column < beside) == bool(label) else "right"
        yield {"statement": f"The {one} is {side} of the {other}.", "label": label, "relation": f"{side} of"}
    known = [person for person in scene.people if _alone(scene, person)]
    for label in rng.permutation(2).tolist() if known else ():
        person = _one(rng, known)
        thing = person.object if label else _one(rng, [p.object for p in scene.people if p.box != person.box])
        said = f"The person in {person.shirt} {DOING[person.pose]} the {thing}."
        yield {"statement": said, "label": label, "relation": "holding"}


def tags(scene: Scene) -> list[str]:
    """Objects in class order, the place, and the poses in their order."""
    poses = {person.pose for person in scene.people}
    return [*_present(scene), scene.place, *(pose for pose in POSES if pose in poses)]


def corpus() -> list[str]:
    """Every form above with words of the grammar: beside world_text.corpus, all that a tokenizer must know."""
    forms = [
        "where is this?", "how many people are there?", "is there a cup?", "Is there an apple in the image?", "yes no",
        "what is the shirt color of the person with the cup?", "what is the person in red doing?",
        "what object is with the person in red?", "The cup is left of the apple.", "The person in red lifts the cup.",
        "The apple is right of the cup.", "person with the cup", "person in red who",
    ]  # fmt: skip
    forms += [f"person who {done} the cup" for done in DOING.values()] + list(ACTIONS.values())
    return [" " + form for form in forms]


class ObjectCounts:
    """How often objects occur in the scenes of a split, alone and together: what POPE's settings are drawn by."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.alone: Counter[str] = Counter()
        self.together: Counter[tuple[str, str]] = Counter()
        for scene in scenes:
            present = _present(scene)
            self.alone.update(present)
            self.together.update((a, b) for a in present for b in present if a != b)

    def absent(self, scene: Scene, setting: str, count: int) -> list[str]:
        """`count` objects that the scene lacks: at random, the most frequent, or those most often with its own."""
        present = _present(scene)
        names = [name for name in OBJECTS if name not in present]
        if setting == "random":
            return [names[i] for i in scene.rng("pope random").choice(len(names), count, replace=False)]
        if setting == "popular":
            return sorted(names, key=lambda name: -self.alone[name])[:count]
        return sorted(names, key=lambda name: -max(self.together[own, name] for own in present))[:count]


def pope(scene: Scene, counts: ObjectCounts, setting: str) -> Iterator[dict[str, str]]:
    """Rows of one file of POPE: as many present as absent objects, in turn. The present ones are those of every
    setting; a picture with all objects has no rows."""
    present = _present(scene)
    number = min(POPE_NEGATIVES, len(present), len(OBJECTS) - len(present))
    if not number:
        return
    there = [present[i] for i in scene.rng("pope").choice(len(present), number, replace=False)]
    for yes, no in zip(there, counts.absent(scene, setting, number)):
        for name, label in ((yes, "yes"), (no, "no")):
            yield {"text": f"Is there {article(name)} in the image?", "label": label}


def article(name: str) -> str:
    """The name after "a" or "an"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _asked(question: str, answer: str, answer_type: str) -> dict[str, Any]:
    return {"question": question, "answer": answer, "answer_type": answer_type}


def _present(scene: Scene) -> list[str]:
    """Objects of the scene in class order."""
    names = {thing.name for thing in scene.things}
    return [name for name in OBJECTS if name in names]


def _alone(scene: Scene, person: Person) -> bool:
    """Nobody else wears that shirt."""
    return sum(other.shirt == person.shirt for other in scene.people) == 1


def _one(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]
