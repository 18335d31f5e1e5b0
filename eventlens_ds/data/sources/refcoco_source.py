"""RefCOCO, RefCOCO+ and RefCOCOg (Yu et al. 2016; Mao et al. 2016) as a source for `data build`.

In: <set>/refs(<variant>).p and <set>/instances.json below the root, in refer/ or in refer/data/, read by
data/sources/refcoco.py, and COCO's train2014 pictures below images/. Out: the records of `expressions`. Splits: one
"train" for the three sets, and one per set and split for scoring, as in refcoco_val, refcocoplus_testA, refcocog_test.
Decision: the splits are UNC's and UMD's, which LION and Shikra report. The sets cut the same pictures differently, so
"train" holds no picture that is in a val or test split of any of them; what that costs is counted in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eventlens_ds.data.sources import SourceImage, refcoco
from eventlens_ds.data.sources.expressions import REFS_PLACES, box_records, refs_root
from eventlens_ds.data.sources.layout import existing_root, find_images, image_file
from eventlens_ds.data.sources.refcoco import Expression
from eventlens_ds.data.sources.rows import find_coco, read_image
from eventlens_ds.errors import UserError

log = logging.getLogger(__name__)

VARIANTS = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}


class RefCocoSource:
    """RefCOCO on disk. Raises UserError when one of the three sets or the image folder is missing."""

    name = "refcoco"
    follows = False

    def __init__(self, root: str | Path) -> None:
        self.root = existing_root(root)
        refs = refs_root(self.root)
        if refs is None:
            wanted = self.root / REFS_PLACES[0] / "refcoco" / "refs(unc).p"
            raise UserError(f"{self.root}: no refcoco; expected {wanted} and its like")
        self.refs = refs
        for dataset, variant in VARIANTS.items():
            if not refcoco.refs_file(refs, dataset, variant).is_file():
                raise UserError(f"{refcoco.refs_file(refs, dataset, variant)}: no such file; all three sets are needed")
        self.image_dir = find_images(self.root, refs)

    def splits(self) -> tuple[str, ...]:
        return ("train", *_scored())

    def images(self, split: str) -> Iterator[SourceImage]:
        """Images in the order of their first ref, the three sets one after another."""
        found = self._train() if split == "train" else refcoco.read_refs(self.refs, *_scored()[split])
        of_image: dict[str, list[Expression]] = {}
        for expression in found:
            of_image.setdefault(expression.image, []).append(expression)
        for name, expressions in of_image.items():
            first = expressions[0]
            where = f"{refcoco.refs_file(self.refs, first.dataset, first.variant)}: ref_id {first.ref_id}"
            img_fn = find_coco(self.image_dir, name)
            path = image_file(self.image_dir, img_fn, where)
            image = read_image(path, img_fn, split, where, (first.width, first.height))
            yield SourceImage(image, path, tuple(box_records(self.name, ((e.box, _row(e)) for e in expressions))))

    def _train(self) -> Iterator[Expression]:
        held_out = refcoco.val_test_images(self.refs)
        for dataset, variant in VARIANTS.items():
            found = refcoco.read_refs(self.refs, dataset, variant, ("train",))
            kept, dropped = refcoco.without_held_out(found, held_out)
            if dropped:
                listed = ", ".join(f"{split} {count}" for split, count in sorted(dropped.items()))
                log.warning("%s, train: %d expressions left out, their image is held out: %s",
                            dataset, sum(dropped.values()), listed)  # fmt: skip
            yield from kept


def _scored() -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Name of a split for scoring -> (set, variant, splits), arguments of read_refs."""
    return {
        f"{dataset.replace('+', 'plus')}_{split}": (dataset, variant, (split,))
        for dataset, variant in VARIANTS.items()
        for split in refcoco.SPLITS[dataset, variant]
        if split != "train"
    }


def _row(expression: Expression) -> dict[str, Any]:
    return {
        "expression": expression.text,
        "line": f"{expression.dataset}-{expression.sentence_id}",
        "ref_id": expression.ref_id,
        "dataset": expression.dataset,
        "split": expression.split,
    }
