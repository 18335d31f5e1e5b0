"""`eventlens bench loader DATA`: our loader against a plain Pillow loop over the same images.

In: a folder of `eventlens data build` and settings of the model. Out: one CSV line per number of workers, and text.
The arms, one after the other, again and again:
  ours   the rows of the plan as training gets them: read, decode, resize with boxes, encode the text, collate, send
  plain  Image.open(file).convert("RGB").resize((side, side)) and numpy.asarray of every image, in as many processes,
         which keep what they made
Decision: plain does nothing that a loader could be without, not even hand its pixels over, so the ratio holds all that
ours adds. It is the median over pairs of neighbouring runs, because a busy machine changes both. No ratio is reported
unless the two make the same pictures.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from eventlens_ds.errors import DataError, UserError

COLUMNS = (
    "data", "workers", "images", "megapixels", "side", "tokens", "ours_img_s", "plain_img_s", "ratio_p25", "ratio_p50",
    "ratio_p75", "repeats", "difference", "preset", "machine", "cores", "torch", "pillow", "commit", "date",
)  # fmt: skip

TARGET = 0.9
"""Share of the plain loop's rate that the loader is meant to reach."""
TOLERANCE = 3.0
"""Largest mean difference of a picture in grey levels (0-255): ours decodes a large JPEG at a half or a quarter."""
CHECKED = 8
"""Pictures that are compared."""


class Work(NamedTuple):
    """Rows of the plan, and a file with every image they load, in order, as often as they load it."""

    data: Any
    rows: list[tuple[Sequence[tuple[int, int]], int]]
    files: list[Path]
    side: int


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="eventlens bench loader", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of `eventlens data build`")
    parser.add_argument("--config", default="tiny_vcr", help="recipe of the model; settings may follow")
    parser.add_argument("--split", default="train")
    parser.add_argument("--workers", default="0,1,2", metavar="A,B", help="loader processes (default 0,1,2)")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="images of a run, at least")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="pairs of runs (default 7)")
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    args, settings = parser.parse_known_args(argv)
    try:
        counts = [int(word) for word in args.workers.split(",")]
    except ValueError:
        raise UserError(f"--workers {args.workers}: write numbers with commas, such as 0,1,2") from None
    if args.repeats < 2 or args.images < 1 or min(counts) < 0:
        raise UserError("--repeats must be at least 2, --images at least 1, --workers at least 0")
    lines = measure(args.data, args.config, settings, args.split, counts, images=args.images, repeats=args.repeats)
    if args.out:
        _append(args.out, lines)
    for line in lines:
        print(
            f"{line['workers']} workers, {line['images']} images to {line['side']} px: ours {line['ours_img_s']}/s, "
            f"with {line['tokens']} tokens in all; plain {line['plain_img_s']}/s; ours / plain {line['ratio_p50']} "
            f"({line['ratio_p25']} - {line['ratio_p75']}, target {TARGET})"
        )
    return 0


def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(lines)


def measure(
    folder: Path, recipe: str, settings: Sequence[str], split: str, workers: Sequence[int], *, images: int, repeats: int
) -> list[dict[str, Any]]:
    """One dict of COLUMNS per number of workers. Raises DataError when the arms do not make the same pictures."""
    import PIL
    import torch

    from eventlens_ds.config.load import load
    from eventlens_ds.runtime.capsule import code

    config = load(recipe, [*settings, f"--data.train=[{folder}]", f"--data.split={split}"])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as files:
        work = prepare(config, images, Path(files))
        difference = compare(work)
        common = {
            "data": folder.name,
            "images": len(work.files),
            "megapixels": f"{_megapixels(work.files):.3f}",
            "side": work.side,
            "repeats": repeats,
            "difference": f"{difference:.2f}",
            "preset": config.model.preset,
            "machine": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "commit": code().get("commit"),
            "date": datetime.now(UTC).date().isoformat(),
        }
        return [{**common, "workers": count, **_pairs(work, count, repeats)} for count in workers]


def prepare(config: Any, images: int, files: Path) -> Work:
    """The first rows of the plan that load at least `images` images together, the images written below `files`."""
    from eventlens_ds.runtime.build_model import describe
    from eventlens_ds.train.run import training_data

    architecture, tokenizer, spec = describe(config, dry=True)
    data = training_data(config, tokenizer, spec)
    plan = data.plan(seed=config.train.seed, rows_per_step=1)
    rows: list[tuple[Sequence[tuple[int, int]], int]] = []
    paths: list[Path] = []
    written: dict[tuple[int, int], Path] = {}
    while len(paths) < images:
        members = plan.row(len(rows)).groups
        rows.append((members, len(rows)))
        for table, group in members:
            number = int(data.tables[table]["image"][int(data.groups[table].first[group])])
            if (table, number) not in written:
                written[table, number] = files / f"{table}-{number}"
                written[table, number].write_bytes(data.shards[table].image_bytes(number))
            paths.append(written[table, number])
    return Work(data, rows, paths, architecture.vision_config.image_size)


def plain(file: Path, side: int) -> Any:
    """One image of the plain loop: uint8[side, side, 3]."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


def compare(work: Work) -> float:
    """Median over pictures of the mean difference between the arms, in grey levels; DataError above TOLERANCE."""
    import numpy as np

    vision = work.data.spec.vision
    mean, std = (np.asarray(x)[:, None, None] for x in (vision.mean, vision.std))
    found: list[float] = []
    for members, seed in work.rows:
        for picture in work.data.batch(members, seed).pixel_values.numpy():
            ours = (picture * std + mean) * 255
            found.append(float(np.abs(ours - plain(work.files[len(found)], work.side).transpose(2, 0, 1)).mean()))
        if len(found) >= CHECKED:
            break
    middle = statistics.median(found)
    if middle > TOLERANCE:
        raise DataError(f"the loader's pictures differ from the plain ones by {middle:.1f} of 255; no rate is reported")
    return middle


def _pairs(work: Work, workers: int, repeats: int) -> dict[str, Any]:
    """Rates and ratios of `repeats` pairs of runs after a warm-up of both; which arm goes first alternates."""
    tokens = run_ours(work, workers)[1]
    run_plain(work, workers)
    ours, others = [], []
    for repeat in range(repeats):
        for arm in ("ours", "plain") if repeat % 2 else ("plain", "ours"):
            if arm == "ours":
                ours.append(len(work.files) / run_ours(work, workers)[0])
            else:
                others.append(len(work.files) / run_plain(work, workers))
    low, middle, high = statistics.quantiles((a / b for a, b in zip(ours, others)), n=4)
    return {
        "tokens": tokens,
        "ours_img_s": f"{statistics.median(ours):.0f}",
        "plain_img_s": f"{statistics.median(others):.0f}",
        "ratio_p25": f"{low:.3f}",
        "ratio_p50": f"{middle:.3f}",
        "ratio_p75": f"{high:.3f}",
    }


def run_ours(work: Work, workers: int) -> tuple[float, int]:
    """(seconds, tokens) of all rows, processes started and ended included."""
    from eventlens_ds.data.loader import RowDataset, rank_batches

    started = time.perf_counter()
    images = tokens = 0
    prefetch = work.data.config.prefetch
    for batch in rank_batches(RowDataset(work.data, work.rows), workers=workers, prefetch=prefetch):
        images += len(batch.pixel_values)
        tokens += batch.real_tokens
    taken = time.perf_counter() - started
    assert images == len(work.files), f"{images} images loaded, {len(work.files)} expected"
    return taken, tokens


def run_plain(work: Work, workers: int) -> float:
    """Seconds of the plain loop, processes started and ended included."""
    started = time.perf_counter()
    if not workers:
        _plain_share(work.files, work.side)
        return time.perf_counter() - started
    context = multiprocessing.get_context("fork")
    shares = [work.files[first::workers] for first in range(workers)]
    processes = [context.Process(target=_plain_share, args=(share, work.side)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise DataError("the plain loop failed on an image; see above")
    return time.perf_counter() - started


def _plain_share(files: Sequence[Path], side: int) -> None:
    for file in files:
        plain(file, side)


def _megapixels(files: Sequence[Path]) -> float:
    """Mean size of the images as stored."""
    from PIL import Image

    sizes = []
    for file in files:
        with Image.open(file) as picture:
            sizes.append(picture.size[0] * picture.size[1] / 1e6)
    return statistics.mean(sizes)
