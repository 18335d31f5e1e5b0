"""Several sources over one set of images, merged so that each image is stored once with all its records.

In: names such as "vcr,visualcomet,captions" and a root folder, or the arguments of an embedded world, which is drawn
first and then read by the same readers. Out: a Source for `data build`.
Decision: a picture takes the split of the sources that have splits (VCR, VisualCOMET, RefCOCO), and rows that say
nothing about splits (`Source.follows`: captions, expressions, questions, ...) follow their picture: a caption of a
validation picture in "train" would be a leak. Tags follow the picture wherever any other source has it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eventlens_ds.data.records import ImageRecord
from eventlens_ds.data.sources import NamesImages, Record, Source, SourceImage
from eventlens_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

NAMES = ("vcr", "visualcomet", "captions", "rec", "refcoco", "vg", "vqa", "vsr", "pope", "tags", "lcl")
WORLD_NAMES = ("vcr", "visualcomet", "captions", "rec", "vqa", "vsr", "pope", "tags")
"""What an embedded world holds."""
UNKNOWN = (0, 0)
"""Size of an image whose header only the build reads."""
WORLD_MARK = "world.json"
"""Written beside a world when it is complete: the arguments that drew it."""


class CombinedSource:
    """The images of all `sources`; the first one that has an image gives its metadata and place in the order."""

    follows = False

    def __init__(self, name: str, sources: Sequence[Source]) -> None:
        self.name = name
        self.primary = [source for source in sources if not source.follows]
        self.followers = [source for source in sources if source.follows]
        self._followed: dict[str, dict[str, dict[str, SourceImage]]] | None = None

    def splits(self) -> tuple[str, ...]:
        """Splits of the primary sources, then splits that only followers have."""
        known = list(dict.fromkeys(split for source in self.primary for split in source.splits()))
        alone = {split for split in self._follow() if split not in known}
        return (*known, *sorted(alone))

    def images(self, split: str) -> Iterator[SourceImage]:
        """Images in the order of the first source, then those that only the next one has, and so on.

        An image without records, which only tags name, is left out. Raises DataError when two sources describe one
        image differently.
        """
        empty = 0
        for named, item in self._merged(split):
            if item.records or named:
                yield item
            else:
                empty += 1
        if empty:
            log.warning("%s: %d images that only tags name are left out", split, empty)

    def _merged(self, split: str) -> Iterator[tuple[bool, SourceImage]]:
        """Images, and whether a source with splits names them: its rows may need more images than carry a record."""
        readers = [(source.name, source.images(split)) for source in self.primary if split in source.splits()]
        rest = [(name, {item.image.img_fn: item for item in reader}) for name, reader in readers[1:]]
        rest += [(name, dict(items)) for name, items in self._follow().get(split, {}).items()]
        if readers:
            for item in readers[0][1]:
                yield True, _merge(readers[0][0], item, rest)
        alone = {source.name for source in self.followers}
        while rest:
            name, items = rest.pop(0)
            for img_fn in list(items):
                yield name not in alone, _merge(name, items.pop(img_fn), rest)

    def _follow(self) -> dict[str, dict[str, dict[str, SourceImage]]]:
        """Split -> source -> img_fn -> image of every follower, with the split of its picture where that has one."""
        if self._followed is None:
            self._followed = {}
            placed = self._placed() if self.followers else {}
            held: dict[str, set[str]] = {img_fn: set(splits) for img_fn, splits in placed.items()}
            found = [(s.name, split, item) for s in self.followers for split in s.splits() for item in s.images(split)]
            # Tags come last: they go where the records of the others have put the picture.
            for name, split, item in sorted(found, key=lambda entry: not entry[2].records):
                img_fn = item.image.img_fn
                for chosen in sorted((placed if item.records else held).get(img_fn, {split})):
                    items = self._followed.setdefault(chosen, {}).setdefault(name, {})
                    known = items.get(img_fn)
                    items[img_fn] = item if known is None else replace(known, records=known.records + item.records)
                    held.setdefault(img_fn, set()).add(chosen)
        return self._followed

    def _placed(self) -> dict[str, set[str]]:
        """img_fn -> splits of the primary sources that hold it."""
        placed: dict[str, set[str]] = {}
        for source in self.primary:
            for split in source.splits():
                names: Iterable[str] = (
                    source.img_fns(split)
                    if isinstance(source, NamesImages)
                    else (item.image.img_fn for item in source.images(split))
                )
                for img_fn in names:
                    placed.setdefault(img_fn, set()).add(split)
        return placed


def _merge(name: str, item: SourceImage, rest: list[tuple[str, dict[str, SourceImage]]]) -> SourceImage:
    """`item` with the records that the other sources have for the same image, which are taken out of `rest`."""
    records: tuple[Record, ...] = item.records
    tags = item.image.tags
    for other_name, items in rest:
        other = items.pop(item.image.img_fn, None)
        if other is None:
            continue
        one, two = item.image, other.image
        # A follower knows no regions when there is no metadata file.
        sizes = [(image.width, image.height) for image in (one, two)]
        # Rows of LCL say nothing about the size of an image.
        if (sizes[0] != sizes[1] and UNKNOWN not in sizes) or (two.regions and one.regions not in ((), two.regions)):
            raise DataError(f"{item.path}: {name} and {other_name} describe it differently (size or regions)")
        if sizes[0] == UNKNOWN:
            item = replace(item, image=two)
        records += other.records
        tags = tags or two.tags
    return SourceImage(replace(item.image, tags=tags), item.path, records)


def open_sources(names: str, root: str | Path) -> list[Source]:
    """The sources called `names` (of NAMES, with commas) in the folder `root`."""
    from eventlens_ds.data.sources.captions import CaptionSource
    from eventlens_ds.data.sources.expressions import ExpressionSource
    from eventlens_ds.data.sources.lcl import LclSource
    from eventlens_ds.data.sources.pope import PopeSource
    from eventlens_ds.data.sources.questions import QuestionSource
    from eventlens_ds.data.sources.refcoco_source import RefCocoSource
    from eventlens_ds.data.sources.rows import RowSource
    from eventlens_ds.data.sources.statements import StatementSource
    from eventlens_ds.data.sources.tags import TagSource
    from eventlens_ds.data.sources.vcr import VcrSource
    from eventlens_ds.data.sources.vg import RegionDescriptionSource
    from eventlens_ds.data.sources.visualcomet import VisualCometSource

    makers: dict[str, Callable[[Path], Source]] = {
        "vcr": VcrSource,
        "visualcomet": VisualCometSource,
        "captions": CaptionSource,
        "rec": ExpressionSource,
        "refcoco": RefCocoSource,
        "vg": RegionDescriptionSource,
        "vqa": QuestionSource,
        "vsr": StatementSource,
        "pope": PopeSource,
        "tags": TagSource,
        "lcl": LclSource,
    }
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in makers:
            raise UserError(f"--source {name}: unknown; known: {', '.join(NAMES)}, several with commas, or world alone")
    if len(set(wanted)) != len(wanted):
        raise UserError(f"--source {names}: one is named twice")
    made = [makers[name](Path(root)) for name in wanted]
    shared: dict[str, ImageRecord] = {}
    for source in made if len(made) > 1 else ():
        if isinstance(source, RowSource):
            source.pictures = shared
    return made


def open_source(names: str, root: str | Path) -> Source:
    """One source, or several merged by image."""
    sources = open_sources(names, root)
    if [source.name for source in sources] == ["tags"]:
        raise UserError("--source tags: tags are no samples; name a source with pictures too, such as captions,tags")
    if len(sources) == 1:
        return sources[0]
    return CombinedSource("+".join(source.name for source in sources), sources)


def draw_world(
    root: Path, *, seed: int, num_images: int, image_size: int, val_images: int | None = None, workers: int = 1
) -> CombinedSource:
    """Draw the embedded world below `root`, unless it is there already, and open it.

    Raises UserError when `root` holds a world of other arguments, or files of something else.
    """
    from eventlens_ds.data.sources.world import render_world

    wanted: dict[str, Any] = {
        "seed": seed,
        "num_images": num_images,
        "image_size": image_size,
        "val_images": val_images,
    }
    # A world without questions was drawn by an earlier version; the same arguments give the same pictures.
    whole = (root / "regions" / "pope").is_dir()
    _draw_once(root, wanted, whole, lambda: render_world(root, **wanted, workers=workers))
    return CombinedSource("world", open_sources(",".join(WORLD_NAMES), root))


def draw_creatures(
    root: Path, *, seed: int, train: int, test: int, image_size: int, workers: int = 1
) -> CombinedSource:
    """The creatures of the embedded world (data/sources/world_creatures.py), as `draw_world`."""
    from eventlens_ds.data.sources.world_creatures import render_creatures

    wanted: dict[str, Any] = {"creatures": True, "seed": seed, "train": train, "test": test, "image_size": image_size}
    arguments = {name: value for name, value in wanted.items() if name != "creatures"}
    _draw_once(root, wanted, True, lambda: render_creatures(root, **arguments, workers=workers))
    return CombinedSource("creatures", open_sources("lcl,captions", root))


def _draw_once(root: Path, wanted: dict[str, Any], whole: bool, draw: Callable[[], None]) -> None:
    """Draw below `root` unless a mark says that the same was drawn and `whole` that nothing is missing."""
    mark = root / WORLD_MARK
    started = root / f".{WORLD_MARK}"
    if mark.is_file() or started.is_file():
        found = json.loads((mark if mark.is_file() else started).read_text())
        if found != wanted:
            raise UserError(f"{root}: holds a world of {found}, not {wanted}; use another folder or remove this one")
    elif root.is_dir() and any(root.iterdir()):
        raise UserError(f"{root}: is not empty and holds no world; name another folder with --root")
    if mark.is_file() and whole:
        return
    root.mkdir(parents=True, exist_ok=True)
    started.write_text(json.dumps(wanted))
    mark.unlink(missing_ok=True)
    draw()
    started.rename(mark)
