"""Reader of Visual Genome's region descriptions (Krishna et al. 2017) as referring expressions.

In: region_descriptions.json, [{"id", "regions": [{"region_id", "image_id", "x", "y", "width", "height", "phrase"}]}],
in the root or in vg/, and beside it image_data.json, which gives sizes, folders and COCO numbers when it is there.
Out: the records of `expressions`. Decision: by itself it is read one image at a time, so the text is held and 5.4
million regions are not (in company `CombinedSource` holds the rows of every follower). Half of the pictures are
COCO's, so RefCOCO's held-out pictures are left out here too, which needs the COCO numbers of image_data.json.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eventlens_ds.data import boxes
from eventlens_ds.data.sources import SourceImage, visualcomet
from eventlens_ds.data.sources.expressions import ExpressionSource
from eventlens_ds.data.sources.layout import Problem, image_file, raise_first, shown, text_problems
from eventlens_ds.data.sources.rows import Entry
from eventlens_ds.data.transforms import displayed_size
from eventlens_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

FOLDERS = ("VG_100K", "VG_100K_2", "")
CORNER_AND_SIDES = ("x", "y", "width", "height")


class RegionDescriptionSource(ExpressionSource):
    """Region descriptions on disk. Raises UserError when `root` holds no such file or no image folder, or when there
    are refs files of RefCOCO but no image_data.json to check pictures against them."""

    name = "vg"
    places = ("region_descriptions.json", "vg/region_descriptions.json")
    in_pixels = True

    def __init__(self, root: str | Path, split: str = "train") -> None:
        super().__init__(root, split)
        self._data: dict[int, dict[str, Any]] | None = None
        self._image_data = self.files[0].with_name("image_data.json")
        if self.held_out is not None and not self._image_data.is_file():
            raise UserError(f"{self._image_data}: not there; it holds the COCO numbers of RefCOCO's pictures")

    def splits(self) -> tuple[str, ...]:
        return (self.default_split,)

    def images(self, split: str) -> Iterator[SourceImage]:
        refused: Counter[str] = Counter()
        group: list[Entry] = []
        for entry in self._checked_or_end():
            if entry is None or (group and entry.row["img_path"] != group[0].row["img_path"]):
                if group:
                    yield self._image(group, split)
                group = []
            if entry is not None:
                if reason := self.refusal(entry.row, split):
                    refused[reason] += 1
                else:
                    group.append(entry)
        if refused:
            listed = ", ".join(f"{reason} {count}" for reason, count in sorted(refused.items()))
            log.warning("%s: %d regions left out: %s", self.name, refused.total(), listed)

    def _checked_or_end(self) -> Iterator[Entry | None]:
        yield from self.checked()
        yield None

    def _image(self, group: list[Entry], split: str) -> SourceImage:
        row, where = group[0].row, group[0].where
        path = image_file(self.image_dir, row["img_path"], where)
        image = self.picture(path, row["img_path"], split, where, self.size_of(row))
        return SourceImage(image, path, tuple(self.records(image, group)))

    def entries_of(self, path: Path) -> Iterator[Entry]:
        try:
            for line, _, entry in visualcomet.rows_in(visualcomet.read_text(path), path):
                yield from self._regions(entry, f"{path}:{line}")
        except DataError as fault:
            # Beyond broken JSON nothing of a list can be read.
            yield Entry(f"{path}:1", 1, {}, fault)

    def _regions(self, entry: Mapping[str, Any], where: str) -> Iterator[Entry]:
        number, regions = entry.get("id"), entry.get("regions")
        if isinstance(number, bool) or not isinstance(number, int) or not isinstance(regions, list):
            fault = f"'id' and 'regions' want an integer and a list, got {shown(number)} and {shown(regions)}"
            yield Entry(where, 0, {}, DataError(f"{where}: {fault}"))
            return
        if not regions:
            return
        try:
            img_path, size = self._picture(number, where)
        except DataError as fault:
            yield Entry(where, 0, {}, fault)
            return
        for region in regions:
            at = f"{where}: image {number}"
            try:
                raise_first(region_problems(region), at)
            except DataError as fault:
                yield Entry(where, 0, {}, fault)
                continue
            row = {
                "img_path": img_path,
                "expression": region["phrase"],
                "bbox": list(boxes.from_xywh([region[key] for key in CORNER_AND_SIDES])),
                "width": size[0],
                "height": size[1],
                "image_id": number,
                "region_id": region["region_id"],
            }
            yield Entry(where, region["region_id"], row)

    def _picture(self, number: int, where: str) -> tuple[str, tuple[int, int]]:
        """Name below the image folder and size of a picture of Visual Genome."""
        known = self._known().get(number, {})
        url = known.get("url")
        hinted = str(url).split("/")[-2] if isinstance(url, str) and url.count("/") > 1 else ""
        names = [f"{folder}/{number}.jpg".lstrip("/") for folder in (hinted, *FOLDERS)]
        img_path = next((name for name in names if (self.image_dir / name).is_file()), f"{FOLDERS[0]}/{number}.jpg")
        size = (known.get("width"), known.get("height"))
        if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in size):
            path = image_file(self.image_dir, img_path, where)
            size = displayed_size(path.read_bytes())
        return img_path, size  # type: ignore[return-value]

    def _known(self) -> dict[int, dict[str, Any]]:
        """image_data.json by image id, {} where there is none."""
        if self._data is None:
            path, self._data = self._image_data, {}
            for line, _, row in visualcomet.rows_in(visualcomet.read_text(path), path) if path.is_file() else ():
                number = row.get("image_id", row.get("id"))
                if isinstance(number, bool) or not isinstance(number, int):
                    raise DataError(f"{path}:{line}: no integer 'image_id'")
                self._data[number] = {key: row.get(key) for key in ("width", "height", "url", "coco_id")}
        return self._data

    def row_problems(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        return iter(())

    def coco_number(self, row: Mapping[str, Any]) -> int | None:
        found = self._known().get(row["image_id"], {}).get("coco_id")
        return found if isinstance(found, int) else None

    def held_out_reason(self, number: int | None) -> str | None:
        # A picture without a COCO number is one of Flickr's, not in COCO.
        return None if number is None and self.held_out is not None else super().held_out_reason(number)

    def identity(self, row: Mapping[str, Any]) -> Hashable:
        return row["region_id"]


def region_problems(region: Any) -> Iterator[Problem]:
    """Faults of one region in region_descriptions.json; the geometry of its box is not judged."""
    if not isinstance(region, dict):
        yield Problem("field", f"a region wants an object, got {shown(region)}")
        return
    number = region.get("region_id")
    if isinstance(number, bool) or not isinstance(number, int):
        yield Problem("field", f"'region_id' wants an integer, got {shown(number)}")
    for fault in text_problems(region, ("phrase",)):
        yield Problem(fault.code, f"region {shown(number)}: {fault.message}")
    if absent := [key for key in CORNER_AND_SIDES if key not in region]:
        yield Problem("field", f"region {shown(number)}: no {absent[0]!r}")
        return
    try:
        boxes.from_xywh([region[key] for key in CORNER_AND_SIDES])
    except DataError as error:
        yield Problem("field", f"region {shown(number)}: {error}")
