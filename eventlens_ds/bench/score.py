"""`eventlens bench score DATA`: candidates scored with a shared prefix against one row per candidate.

In: a folder of `eventlens data build` and settings of the model. Out: one CSV line per layout in --out, and text.
Decision: both layouts score the same questions in the same process, interleaved, after one warm-up each; the CSV holds
medians and quartiles, and no ratio is printed unless the scores agree to 1e-4.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError

COLUMNS = (
    "layout", "questions", "tokens", "ms_p25", "ms_p50", "ms_p75", "repeats", "max_score_difference",
    "preset", "attention", "device", "threads", "torch", "commit", "date",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="eventlens bench score", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of `eventlens data build`")
    parser.add_argument("--config", default="tiny_vcr")
    parser.add_argument("--split", default="val")
    parser.add_argument("--rows", type=int, default=8, help="rows of questions to score")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    args, settings = parser.parse_known_args(argv)
    lines = measure(args.data, args.config, settings, split=args.split, rows=args.rows, repeats=args.repeats)
    if args.out:
        new = not args.out.exists()
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(lines)
    for line in lines:
        print(f"{line['layout']}: {line['questions']} questions, {line['tokens']} tokens, {line['ms_p50']} ms")
    print(f"flat / tree: {float(lines[1]['ms_p50']) / float(lines[0]['ms_p50']):.2f} (median time)")
    return 0


def measure(
    folder: Path, recipe: str, settings: Sequence[str], *, split: str, rows: int, repeats: int
) -> list[dict[str, Any]]:
    """One dict of COLUMNS per layout. Raises DataError when the layouts give different scores."""
    import torch

    from eventlens_ds.config.load import load
    from eventlens_ds.data.packing import sequential_rows
    from eventlens_ds.eval.score import eval_data
    from eventlens_ds.model.objective import leaf_scores
    from eventlens_ds.model.region_vlm import RegionVLM
    from eventlens_ds.runtime.build_model import describe
    from eventlens_ds.runtime.capsule import code

    config = load(recipe, settings)
    architecture, tokenizer, spec = describe(config, dry=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.train.seed)
    model = RegionVLM._from_config(architecture).eval().to(device)
    model.choose_kernels(config.model.kernels)
    data = eval_data(config, tokenizer, spec, str(folder), split)
    members = [row.groups for row in sequential_rows(data.group_tables(), row_tokens=data.config.row_tokens)][:rows]
    batches = {}
    for layout in ("tree", "flat"):
        data.config = replace(data.config, layout=layout)
        batches[layout] = [data.batch(m, 0).to(device) for m in members]

    def run(layout: str) -> torch.Tensor:
        with torch.no_grad():
            scored = [leaf_scores(model(batch), batch) for batch in batches[layout]]
        return torch.cat(scored).float().cpu()

    difference = float((run("tree") - run("flat")).abs().max())
    if difference > 1e-4:
        raise DataError(f"the layouts differ by {difference:.2g} in a score; no time is reported")
    times: dict[str, list[float]] = {"tree": [], "flat": []}
    for _ in range(repeats):
        for layout, taken in times.items():
            taken.append(_milliseconds(lambda name=layout: run(name)))  # type: ignore[misc]
    return [
        {
            "layout": layout,
            "questions": sum(len(b.choice_labels) for b in batches[layout]),
            "tokens": sum(b.real_tokens for b in batches[layout]),
            **dict(zip(("ms_p25", "ms_p50", "ms_p75"), (f"{q:.1f}" for q in statistics.quantiles(taken, n=4)))),
            "repeats": repeats,
            "max_score_difference": f"{difference:.2e}",
            "preset": config.model.preset,
            "attention": architecture.text_config._attn_implementation,
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": code().get("commit"),
            "date": datetime.now(UTC).date().isoformat(),
        }
        for layout, taken in times.items()
    ]


def _milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)
