"""A tagger of the user at `data build --tagger module:function`: its tags go into the records of the images.

In: a name, and the images of a shard. Out: the same images with `ImageRecord.tags` set, one line each, without
repetitions, in the tagger's order (the surest first). The function takes a list of RGB Pillow images and returns a list
of tag lists of the same length. Decision: it runs shard by shard in the process that writes the shard, so a build that
is continued tags only what is missing; a picture that cannot be decoded is not shown to it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from eventlens_ds.data.sources import SourceImage
from eventlens_ds.data.transforms import decode_image
from eventlens_ds.errors import DataError, UserError

BATCH = 32
"""Most pictures per call."""

Tagger = Callable[[list[Image.Image]], Sequence[Sequence[str]]]


@cache
def load_tagger(name: str) -> Tagger:
    """The callable `module:function`; the working folder is searched last. Raises UserError saying what is wrong."""
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise UserError(f"--tagger {name}: write MODULE:FUNCTION, such as my_package.ram:tag")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"--tagger {name}: {module_name} cannot be imported: {_said(error)}") from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise UserError(f"--tagger {name}: {module_name} has no {attribute}")
    if not callable(found):
        raise UserError(f"--tagger {name}: {attribute} is a {type(found).__name__}, not callable")
    return found  # type: ignore[no-any-return]


def tagged(items: Iterable[SourceImage], name: str) -> tuple[SourceImage, ...]:
    """Images with the tags that the tagger `name` gives them, instead of any they had.

    Raises UserError from `load_tagger`; DataError naming the tagger when it fails, returns another number of lists, or
    a tag that is no text.
    """
    tagger = load_tagger(name)
    given = list(items)
    out: list[SourceImage] = []
    for start in range(0, len(given), BATCH):
        part = given[start : start + BATCH]
        pictures = [_picture(item) for item in part]
        shown = [picture for picture in pictures if picture is not None]
        tags = iter(_ask(tagger, name, shown, part[0].image.img_fn) if shown else ())
        for item, picture in zip(part, pictures):
            own = _clean(next(tags), name, item.image.img_fn) if picture is not None else ()
            out.append(replace(item, image=replace(item.image, tags=own)))
    return tuple(out)


def _ask(tagger: Tagger, name: str, shown: list[Image.Image], first: str) -> list[Any]:
    try:
        tags = list(tagger(shown))
    except Exception as error:  # whatever the user's function raises
        raise DataError(f"tagger {name}: failed on {len(shown)} pictures from {first} on: {_said(error)}") from error
    if len(tags) != len(shown):
        raise DataError(f"tagger {name}: {len(tags)} results for {len(shown)} pictures from {first} on")
    return tags


def _clean(tags: Any, name: str, img_fn: str) -> tuple[str, ...]:
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise DataError(f"tagger {name}: {img_fn}: {str(tags)[:40]!r} is not a list of tags")
    listed = list(tags)
    for tag in listed:
        if not isinstance(tag, str) or not tag.strip():
            raise DataError(f"tagger {name}: {img_fn}: the tag {str(tag)[:40]!r} ({type(tag).__name__}) is not a text")
    return tuple(dict.fromkeys(" ".join(tag.split()) for tag in listed))


def _picture(item: SourceImage) -> Image.Image | None:
    """The picture as displayed; None when it cannot be read, which the shard's writer reports."""
    try:
        return decode_image(item.path.read_bytes()).convert("RGB")
    except (OSError, DataError):
        return None


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
