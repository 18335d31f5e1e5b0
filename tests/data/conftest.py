"""A small VCR folder on disk, painted and annotated from a seed, for tests that build shards.

In: number of images and questions, size. Out: root/vcr/<split>.jsonl, root/images/ with metadata, as VcrSource reads.
Decision: real JPEG files through the real reader; nothing between the test and the shard is a stand-in.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw


def paint_vcr(
    root: Path,
    *,
    images: int = 12,
    questions: int = 2,
    size: tuple[int, int] = (48, 32),
    splits: tuple[str, ...] = ("train",),
    seed: int = 0,
) -> Path:
    """Write the folder and return `root`. Image n has 1 + n % 4 objects and `questions` rows, in shuffled order."""
    (root / "vcr").mkdir(parents=True, exist_ok=True)
    for split in splits:
        rng = random.Random(f"{seed}/{split}")
        rows: list[dict[str, Any]] = []
        for n in range(images):
            rows += _paint_image(root, f"movie_{split}/00.{n:04d}.5@{n}", n, questions, size, rng)
        rng.shuffle(rows)
        (root / "vcr" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _paint_image(
    root: Path, name: str, n: int, questions: int, size: tuple[int, int], rng: random.Random
) -> list[dict[str, Any]]:
    width, height = size
    names = ["person", "dog", "chair", "person"][: 1 + n % 4]
    boxes = []
    picture = Image.new("RGB", size, (n % 256, 90, 160))
    for _ in names:
        x, y = rng.randrange(width // 2), rng.randrange(height // 2)
        boxes.append([float(x), float(y), x + width / 4, y + height / 4, 0.9])
        ImageDraw.Draw(picture).rectangle(boxes[-1][:4], fill=(rng.randrange(256), 40, 40))
    path = root / "images" / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=85)
    meta = {"boxes": boxes, "segms": [[] for _ in names], "names": names, "width": width, "height": height}
    path.with_suffix(".json").write_text(json.dumps(meta))
    return [
        {
            "annot_id": f"{name}-{q}",
            "img_fn": f"{name}.jpg",
            "metadata_fn": f"{name}.json",
            "movie": "movie",
            "objects": names,
            "question": ["Why", "is", [0], "here", "?"],
            "answer_choices": [[[0], "waits", str(k)] for k in range(4)],
            "answer_label": (n + q) % 4,
            "rationale_choices": [[[0], "sits", str(k)] for k in range(4)],
            "rationale_label": q % 4,
        }
        for q in range(questions)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def paint(root: Path, *names: str, size: tuple[int, int] = (20, 10)) -> Path:
    """Grey pictures below root/images; returns `root`."""
    for name in names:
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (90, 90, 90)).save(path)
    return root


@pytest.fixture
def vcr_root(tmp_path: Path) -> Path:
    """Twelve images with two questions each, split train."""
    return paint_vcr(tmp_path / "vcr_source")


@pytest.fixture
def shared() -> Path:
    """The folder of real files ($EVENTLENS_SHARED); skips where it is missing."""
    folder = Path(os.environ.get("EVENTLENS_SHARED", Path(__file__).parents[3] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real files at {folder}; set EVENTLENS_SHARED")
    return folder
