"""`make lion-ablation`: `make lion-demo` with several seeds and more steps; what of LION's claims holds on this world.

In: an output folder, seeds. Out: OUT/seed-N of each demo, OUT/summary.json (every number of every seed, and mean,
smallest and largest over the seeds), OUT/table.txt. Decision: no verdict is computed. With three seeds a difference
smaller than the spread is no finding, so both stand side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.errors import UserError
from eventlens_ds.launch import lion_demo
from eventlens_ds.launch.lion_demo import NUMBERS, STAGES


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make lion-ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lion-ablation"))
    parser.add_argument("--seeds", default="0,1,2", help="of world and training, with commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--steps", type=float, default=3.0, help="steps of every recipe times this number")
    args = parser.parse_args(argv)
    try:
        seeds = _seeds(args.seeds)
        for seed in seeds:
            lion_demo.run(args.out / f"seed-{seed}", seed, args.ranks, args.images, args.steps)
        summary = summarise(args.out, seeds)
    except UserError as error:
        print(f"lion-ablation: error: {error}", file=sys.stderr)
        return error.code
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    text = "\n".join(table(summary)) + "\n"
    (args.out / "table.txt").write_text(text)
    print(f"\n{text}")
    return 0


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts) or len({int(part) for part in parts}) != len(parts):
        raise UserError(f"--seeds {text}: different whole numbers with commas")
    return [int(part) for part in parts]


def summarise(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """{"seeds": {seed: summary of its demo}, "arms": {arm: {number: [mean, smallest, largest]}}}."""
    found = {seed: json.loads((out / f"seed-{seed}" / "summary.json").read_text()) for seed in seeds}
    arms: dict[str, list[dict[str, float]]] = {}
    for summary in found.values():
        arms.setdefault("start", []).append(summary["start"])
        for n in STAGES:
            arms.setdefault(f"stage {n}", []).append(summary["stages"][n])
        arms.setdefault("single stage, equal steps", []).append(summary["single_stage"])
        arms.setdefault("stages 1-4, no router", []).append(summary["no_router"])
    spread = {
        arm: {number: _spread([values[number] for values in each]) for number in NUMBERS} for arm, each in arms.items()
    }
    return {"seeds": {str(seed): summary for seed, summary in found.items()}, "arms": spread}


def _spread(values: Sequence[float]) -> list[float]:
    return [sum(values) / len(values), min(values), max(values)]


def table(summary: dict[str, Any]) -> list[str]:
    """mean (smallest - largest) of every number and arm."""
    lines = [f"{'mean (range over seeds)':<26} " + " ".join(f"{number:>24}" for number in NUMBERS)]
    for arm, values in summary["arms"].items():
        cells = ("{:.3f} ({:.3f} - {:.3f})".format(*values[number]) for number in NUMBERS)
        lines.append(f"{arm:<26} " + " ".join(f"{cell:>24}" for cell in cells))
    return [*lines, f"seeds {', '.join(summary['seeds'])}; numbers of a diagnostic world that the package draws"]


if __name__ == "__main__":
    sys.exit(main())
