"""A folder with every task that is answered in words, from a source that exists for tests alone.

In: a folder. Out: shards of six images with samples of caption, rec, reg, vqa, vsr and pope, in the form that
records.Sample describes. Decision: the samples are spelled out here, so what a row must hold can be read beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eventlens_ds.data import boxes, build, sources
from eventlens_ds.data.records import Box, ImageRecord, Region, Sample
from eventlens_ds.data.sources import SourceImage

TASKS = ("caption", "rec", "reg", "vqa", "vsr", "pope")
SIZE = (60, 40)
SPLITS = {"train": 3, "val": 6}
THINGS = ["Is there a dog?", "A man?", "Do you see red?", "Where are two?", "Who runs?", "What color is the hat?"]
ANSWERS = ["red", "red", "red", "blue", "green", "red", "red", "red", "red", "red"]


class LanguageSource:
    """Two captions, two expressions of one box, one question of each other kind per image; image 0 has one more."""

    name = "language"

    def __init__(self, root: Path) -> None:
        self.root = root

    def splits(self) -> tuple[str, ...]:
        return tuple(SPLITS)

    def images(self, split: str) -> Iterator[SourceImage]:
        for n in range(SPLITS[split]):
            path = self.root / f"{split}{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", SIZE, (40 * n, 90, 160)).save(path)
            regions = (Region("dog", Box(0, 0, 30, 20)), Region("cat", Box(30, 20, 60, 40)))
            # The last image has one region, which has no other to trade places with.
            image = ImageRecord(f"{split}{n}", f"{split}{n}.png", *SIZE, regions[: 1 if n == 5 else 2], split=split)
            kinds = [*TASKS, *(["vqa"] if n == 0 else []), "caption"]
            records = [{"kind": "language", "task": t, "number": i, "n": n} for i, t in enumerate(kinds)]
            yield SourceImage(image, path, tuple(records))


def samples(record: Mapping[str, Any], image: ImageRecord) -> tuple[Sample, ...]:
    """What a reader of sources makes of one record."""
    task, number, n = record["task"], record["number"], record["n"]
    box = json.dumps(list(image.regions[0].box))
    shown = boxes.to_text(image.regions[0].box, *SIZE)
    yes = n % 2 == 0
    turns, targets, fields = {
        "caption": ((), ["a dog and a cat" if number == 0 and n < 2 else f"a dog, picture {n}"], ()),
        "rec": ((("expression", ("the dog",)),), [shown], (("box", box),)),
        "reg": ((("box", (shown,)),), ["the dog", "dog on the left"], (("box", box),)),
        "vqa": (
            (("question", (THINGS[-1 - n],)),),
            ["red"],
            (("answers", json.dumps(ANSWERS)), ("answer_type", "other")),
        ),
        "vsr": (
            (("statement", ("The dog is left of the cat.",)),),
            ["yes" if yes else "no"],
            (("label", str(int(yes))),),
        ),
        "pope": (
            (("question", (THINGS[n],)),),
            ["yes" if yes else "no"],
            (("label", "yes" if yes else "no"), ("setting", "random" if n < 3 else "popular")),
        ),
    }[task]
    made = Sample(
        id=f"{image.key}#{number}/{task}",
        source="language",
        task=task,
        images=(image.key,),
        turns=turns,  # type: ignore[arg-type]
        targets=tuple((text,) for text in targets),
        fields=fields,  # type: ignore[arg-type]
    )
    return (made,)


def build_language(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Shards below `folder`. Records of this source are read as long as `patch` holds."""
    usual = sources.samples
    patch.setattr(
        sources, "samples", lambda record, image: (samples if record["kind"] == "language" else usual)(record, image)
    )
    built = folder / "built"
    build.build(LanguageSource(folder / "raw"), built)
    return built
