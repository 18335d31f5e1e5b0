"""`make lcl-demo`: Link-Context Learning on creatures that training has never seen, with what takes the context away.

In: an output folder. Out: OUT/summary.json, a plot and a table. The stages are processes:
  1. data build   creatures -> shards; train and test classes share no combination of features
  2. train        tiny_lcl_0: captions of features, in place of a published tower and language model
  3. train        tiny_lcl_1: short episodes of classes that look different
  4. train        tiny_lcl: [mix] of episodes and captions
  5. train        with --released the last two again with the released splice: only the last image embedded
  6. eval         0, 1, 2, 4, 8 shots on unseen classes: as they are, demonstration images blanked, demonstration labels
                  shuffled, the released splice; all labels swapped, places of the right class; the same rows as ISEKAI
                  files
Decision: nothing is computed here: every number of the summary is read from files that the commands wrote, and a bound
that is missed is printed like one that is met.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from eventlens_ds.errors import UserError
from eventlens_ds.launch.demo import Stages, recipe_steps
from eventlens_ds.launch.world_small import Progress
from eventlens_ds.train.door import settle_accelerator

SHOTS = ("0", "1", "2", "4", "8")
CONDITIONS = {
    "accuracy": "none",
    "blanked": "blank_demos",
    "shuffled": "shuffle_labels",
    "released_splice": "released_splice",
}
"""Key of the summary -> condition of the evaluation."""
ANSWERS = 40


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make lcl-demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lcl-demo"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and of the training")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--classes", type=int, default=600, help="training classes; 100 others are held out")
    parser.add_argument("--steps", type=float, default=1.0, help="steps of every recipe times this number")
    parser.add_argument("--test-classes", type=int, default=100)
    parser.add_argument("--released", action="store_true", help="stage 4 as well: train with the released splice")
    args = parser.parse_args(argv)
    try:
        return run(**vars(args))
    except UserError as error:
        print(f"lcl-demo: error: {error}", file=sys.stderr)
        return error.code


def run(out: Path, seed: int, ranks: int, classes: int, steps: float, test_classes: int, released: bool) -> int:
    """The whole demo into `out`; goes on where an earlier call ended. Raises UserError or DataError with one line."""
    if classes < 12 or ranks < 1 or steps <= 0:
        raise UserError(f"--classes {classes} --ranks {ranks} --steps {steps}: at least 12, at least 1, above 0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    settle_accelerator()
    settings = {"seed": seed, "ranks": ranks, "classes": classes, "test_classes": test_classes, "steps": steps}
    progress, stages = Progress(out, settings), Stages(out, ranks)
    build = [
        "data", "build", "--source", "creatures", "--seed", str(seed), "--limit", str(classes), "--val-images",
        str(test_classes), "--image-size", "36", "--workers", str(len(os.sched_getaffinity(0))), "--out",
        str(out / "world"),
    ]  # fmt: skip
    progress.stage(stages, "Draw creatures and write shards", lambda title: stages.run(title, *build))
    _train(progress, stages, "captions", "tiny_lcl_0", seed, steps)
    _train(progress, stages, "easy", "tiny_lcl_1", seed, steps, "--init-from", str(out / "captions"))
    _train(progress, stages, "lcl", "tiny_lcl", seed, steps, "--init-from", str(out / "easy"))
    _evaluate(progress, stages, "lcl", ",".join(CONDITIONS.values()))
    _evaluate(progress, stages, "lcl", "correct_0,place_first,place_middle,place_last", name="ablations", shots="4")
    isekai = ["--split", "isekai", "--answers", str(ANSWERS)]
    _evaluate(progress, stages, "lcl", "none", *isekai, name="isekai", shots="4")
    if released:
        spliced = ("--data.control=released_splice", "--init-from")
        _train(progress, stages, "released_easy", "tiny_lcl_1", seed, steps, *spliced, str(out / "captions"))
        _train(progress, stages, "released", "tiny_lcl", seed, steps, *spliced, str(out / "released_easy"))
        _evaluate(progress, stages, "released", "none,released_splice", shots="0,4")
    summary = summarise(out, progress.state["seconds"], ranks, released)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    shutil.copyfile(out / "eval" / "lcl" / "metrics" / "lcl.png", out / "accuracy.png")
    print(
        "\n".join(["", *table(summary), "", f"look at      {out / 'accuracy.png'}, {out / 'eval'}/*/metrics/table.txt"])
    )
    return 0


def _train(progress: Progress, stages: Stages, name: str, recipe: str, seed: int, scale: float, *more: str) -> None:
    settings = [f"--train.steps={max(1, round(recipe_steps(recipe) * scale))}", f"--train.seed={seed}", *more]
    run_dir = stages.out / name
    progress.stage(stages, f"Train {name}", lambda title: stages.train(title, recipe, run_dir, *settings))


def _evaluate(
    progress: Progress,
    stages: Stages,
    run_name: str,
    conditions: str,
    *more: str,
    name: str = "",
    shots: str = ",".join(SHOTS),
) -> None:
    """Unseen classes, into OUT/eval/NAME."""
    name = name or run_name
    command = ["eval", str(stages.out / run_name), "--data", str(stages.out / "world"), "--tasks", "lcl"]
    command += ["--shots", shots, "--episodes", conditions, "--ranks", str(stages.ranks), *more]
    command += ["--out", str(stages.out / "eval" / name)]
    progress.stage(stages, f"Evaluate {name}", lambda title: stages.run(title, *command))


def metric(folder: Path, condition: str) -> dict[str, Any]:
    """Shots -> block of one condition of an evaluation."""
    stem = "lcl" if condition == "none" else f"lcl-{condition}"
    found: dict[str, Any] = json.loads((folder / "metrics" / f"{stem}.json").read_text())["lcl"]["shots"]
    return found


def summarise(out: Path, seconds: dict[str, float], ranks: int, released: bool) -> dict[str, Any]:
    """The summary from the files of the evaluations. intervals: 95 %, over pairs of classes."""
    found = {key: metric(out / "eval" / "lcl", condition) for key, condition in CONDITIONS.items()}
    summary: dict[str, Any] = {"n": found["accuracy"]["4"]["n"]}
    for key, shots in found.items():
        summary[key] = {count: block["accuracy"] for count, block in shots.items()}
    summary["intervals"] = {
        key: {count: block["interval"] for count, block in shots.items()} for key, shots in found.items()
    }
    ablated = ("correct_0", "place_first", "place_middle", "place_last")
    summary["ablations"] = {name: metric(out / "eval" / "ablations", name)["4"]["accuracy"] for name in ablated}
    isekai = metric(out / "eval" / "isekai", "none")["4"]
    rules = ("n", "accuracy", "answered", "released", "released_any_case")
    summary["isekai"] = {name: isekai[name] for name in rules if name in isekai}
    if released:
        trained = metric(out / "eval" / "released", "released_splice")
        summary["trained_with_released_splice"] = {count: block["accuracy"] for count, block in trained.items()}
    summary["bounds"] = bounds(summary)
    return summary | {"ranks": ranks, "seconds": round(sum(seconds.values()), 1)}


def bounds(summary: dict[str, Any]) -> dict[str, bool]:
    """What the demo promises, as met or missed. "At chance": one half lies within the interval."""

    def at_chance(key: str, shots: str) -> bool:
        low, high = summary["intervals"][key][shots]
        return low is not None and low <= 0.5 <= high

    return {
        "queries >= 1000": summary["n"] >= 1000,
        "4 shots >= 0.65": summary["accuracy"]["4"] >= 0.65,
        "blanked 0.50 within its interval": at_chance("blanked", "4"),
        "shuffled <= 0.55": summary["shuffled"]["4"] <= 0.55,
        "0 shots at chance": at_chance("accuracy", "0"),
    }


def table(summary: dict[str, Any]) -> list[str]:
    lines = [f"{'unseen creatures, two-way likelihood':<40}" + "".join(f"{f'{s} shots':>9}" for s in SHOTS)]
    names = {
        "accuracy": f"model (n = {summary['n']})",
        "blanked": "demonstration images blanked",
        "shuffled": "demonstration labels shuffled",
        "released_splice": "released splice: last image alone",
        "trained_with_released_splice": "trained and scored with released splice",
    }
    for key, name in names.items():
        if key in summary:
            lines.append(f"{name:<40}" + "".join(f"{summary[key].get(s, float('nan')):>9.3f}" for s in SHOTS))
    shown = ", ".join(f"{name} {value:.3f}" for name, value in summary["ablations"].items())
    lines.append(f"4 shots: {shown}")
    isekai = summary["isekai"]
    lines.append(
        f"the same queries as ISEKAI files, 4 shots: {isekai['accuracy']:.3f}; in words, released rule on "
        f"{isekai['answered']}: {isekai['released']:.3f}"
    )
    lines += [f"{'met' if met else 'MISSED':<7} {name}" for name, met in summary["bounds"].items()]
    lines.append(f"{summary['seconds']:.0f} s on {summary['ranks']} ranks. A diagnostic world, not ISEKAI or ImageNet.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
