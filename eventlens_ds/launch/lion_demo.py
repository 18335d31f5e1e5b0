"""`make lion-demo`: LION's four stages on the embedded world, against one stage of as many steps and against no router.

In: an output folder. Out: OUT/summary.json and a table. The stages are processes:
  1. data build   world -> shards
  2. train        tiny_event, tiny_lion_0a, tiny_lion_0b: a tower and a language model in place of the published ones,
                  the start of every arm; from events of regions the tower learns what there is, from questions the
                  language model learns to find it, and then every task
  3. train        tiny_lion_1 .. tiny_lion_4, each from the one before
  4. train        tiny_lion_single from the same start, as many steps as the four together
  5. train        tiny_lion_3 and tiny_lion_4 from stage 2 with the gates left one-hot: no router
  6. eval         captions, questions (VQA), boxes (REC) and expressions (REG) at the start, after every stage and arm;
                  after stage 2 captions and questions through the Q-Former, which that stage leaves as stage 1 trained
                  it, and beside them through the aggregator, which no image-level task has trained by then
Decision: OUT/stages.json says what is done, as in world_small, and no number is computed here: an arm that loses to
another is printed like one that wins.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eventlens_ds.errors import UserError
from eventlens_ds.launch.demo import Stages, recipe_steps
from eventlens_ds.launch.world_small import Progress
from eventlens_ds.train.door import settle_accelerator

TASKS = ("caption", "vqa", "rec", "reg")
NUMBERS = ("caption_cider", "vqa_acc", "rec_acc50", "reg_cider")
STAGES = ("1", "2", "3", "4")
IMAGE_LEVEL = "stage2_image_level"
"""Evaluation of the image-level tasks after stage 2 through the branch that was trained for them."""
EVENTS = ("--model.word_spread=1", "--model.visual_positions=1.4", "--train.zero=zero1")
"""Of the event stage: the language model and the view of pictures that all recipes of LION here have."""
NO_ROUTER = "--stage.train=[qformer, aggregator, image_adapter, region_adapter{}]"


class Arm(NamedTuple):
    """One training run: the folder it writes, its recipe, the folder it starts from, settings over the recipe."""

    name: str
    recipe: str
    start: str
    settings: tuple[str, ...] = ()
    scored: bool = True


def arms(total: int) -> list[Arm]:
    """All runs in order; total = steps of the four stages together."""
    staged = [Arm(f"stage{n}", f"tiny_lion_{n}", f"stage{int(n) - 1}") for n in STAGES]
    return [
        Arm("events", "tiny_event", "", EVENTS, scored=False),
        Arm("stage0a", "tiny_lion_0a", "events", scored=False),
        Arm("stage0", "tiny_lion_0b", "stage0a"),
        *staged,
        Arm("single_stage", "tiny_lion_single", "stage0", (f"--train.steps={total}",)),
        Arm("no_router3", "tiny_lion_3", "stage2", (NO_ROUTER.format(""),), scored=False),
        Arm("no_router", "tiny_lion_4", "no_router3", (NO_ROUTER.format(", soft_prompt"),)),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make lion-demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lion-demo"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and of the training")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=1600, help="training pictures; one for 26 of them is held out")
    parser.add_argument("--steps", type=float, default=1.0, help="steps of every recipe times this number")
    args = parser.parse_args(argv)
    try:
        return run(**vars(args))
    except UserError as error:
        print(f"lion-demo: error: {error}", file=sys.stderr)
        return error.code


def run(out: Path, seed: int, ranks: int, images: int, steps: float) -> int:
    """The whole demo into `out`; goes on where an earlier call ended. Raises UserError or DataError with one line."""
    if images < 8 or ranks < 1 or steps <= 0:
        raise UserError(f"--images {images} --ranks {ranks} --steps {steps}: at least 8, at least 1, above 0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    settle_accelerator()
    progress = Progress(out, {"seed": seed, "ranks": ranks, "images": images, "steps": steps})
    stages = Stages(out, ranks)
    build = [
        "data", "build", "--source", "world", "--seed", str(seed), "--limit", str(images), "--val-images",
        str(max(1, images // 26)), "--workers", str(len(os.sched_getaffinity(0))), "--out", str(out / "world"),
    ]  # fmt: skip
    progress.stage(stages, "Draw the embedded world and write shards", lambda title: stages.run(title, *build))
    recipes = ("tiny_event", *(f"tiny_lion_{n}" for n in ("0a", "0b", *STAGES)))
    lengths = {name: max(1, round(recipe_steps(name) * steps)) for name in recipes}
    total = sum(lengths[f"tiny_lion_{n}"] for n in STAGES)
    for arm in arms(total):
        _train(progress, stages, arm, seed, lengths.get(arm.recipe, total))
        if arm.scored:
            _evaluate(progress, stages, arm.name, TASKS)
    _evaluate(progress, stages, "stage2", TASKS[:2], IMAGE_LEVEL, "--visual-input", "qformer")
    summary = summarise(out, progress.state["seconds"], total)
    summary["image_adapter_unchanged_in_stage2"] = unchanged(out / "stage1", out / "stage2", "image_level_")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\n".join(["", *table(summary), "", f"look at      {out / 'eval'}/*/metrics/table.txt"]))
    return 0


def _train(progress: Progress, stages: Stages, arm: Arm, seed: int, steps: int) -> None:
    settings = [f"--train.steps={steps}", f"--train.seed={seed}", *arm.settings]
    start = ["--init-from", str(stages.out / arm.start)] if arm.start else []
    run_dir = stages.out / arm.name
    progress.stage(stages, arm.name, lambda title: stages.train(title, arm.recipe, run_dir, *settings, *start))


def _evaluate(
    progress: Progress, stages: Stages, run_name: str, tasks: Sequence[str], name: str = "", *more: str
) -> None:
    """Held-out pictures, into OUT/eval/NAME."""
    name = name or run_name
    command = ["eval", str(stages.out / run_name), "--data", str(stages.out / "world"), "--tasks", ",".join(tasks)]
    command += ["--ranks", str(stages.ranks), "--out", str(stages.out / "eval" / name), *more]
    progress.stage(stages, f"eval {name}", lambda title: stages.run(title, *command))


def numbers(folder: Path, image_level: Path | None = None) -> dict[str, float]:
    """The four numbers of an evaluation; captions and questions of another one where that is given."""
    folders = (image_level or folder, image_level or folder, folder, folder)
    caption, vqa, rec, reg = (_metric(folder, task) for folder, task in zip(folders, TASKS, strict=True))
    return dict(zip(NUMBERS, (caption["cider"], vqa["accuracy"], rec["accuracy"], reg["cider"]), strict=True))


def _metric(folder: Path, task: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics" / f"{task}.json").read_text())[task]
    return found


def summarise(out: Path, seconds: dict[str, float], steps: int) -> dict[str, Any]:
    """The summary from the files of the evaluations. start: what every arm begins with. floor: the best constant box of
    the same rows; always the most frequent training caption. steps: of the four stages together, and of the single."""
    last, second = out / "eval" / "stage4", out / "eval" / "stage2"
    caption, rec = _metric(last, "caption"), _metric(last, "rec")
    scores = {n: numbers(out / "eval" / f"stage{n}") for n in STAGES}
    scores["2"] = numbers(second, out / "eval" / IMAGE_LEVEL)
    through = numbers(second)
    return {
        "start": numbers(out / "eval" / "stage0"),
        "stages": scores,
        "stage2_through_aggregator": {name: through[name] for name in NUMBERS[:2]},
        "single_stage": numbers(out / "eval" / "single_stage"),
        "no_router": numbers(out / "eval" / "no_router"),
        "floor": {"rec_constant_box": rec["floor"]["accuracy"], "caption_most_frequent": caption["floor"]["cider"]},
        "n": {task: _metric(last, task)["n"] for task in TASKS},
        "steps": steps,
        "seconds": round(sum(seconds.values()), 1),
    }


def unchanged(before: Path, after: Path, mark: str) -> bool:
    """Whether the tensors with `mark` in their names are the same bytes at the end of both runs."""
    import torch

    from eventlens_ds.runtime.checkpoint import resolve, weights

    ends = []
    for run_dir in (before, after):
        path = resolve(run_dir)
        if path is None:
            return False
        ends.append({name: tensor for name, tensor in weights(path) if mark in name})
    return (
        bool(ends[0])
        and ends[0].keys() == ends[1].keys()
        and all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())
    )


def table(summary: dict[str, Any]) -> list[str]:
    rows = {"start": summary["start"]} | {f"stage {n}": values for n, values in summary["stages"].items()}
    rows |= {"single stage, equal steps": summary["single_stage"], "stages 1-4, no router": summary["no_router"]}
    lines = [f"{'embedded world, held out':<28} {'caption CIDEr':>13} {'VQA':>7} {'REC@0.5':>8} {'REG CIDEr':>10}"]
    for name, values in rows.items():
        cells = [values[number] for number in NUMBERS]
        lines.append("{:<28} {:>13.3f} {:>7.3f} {:>8.3f} {:>10.3f}".format(name, *cells))
    through = summary["stage2_through_aggregator"]
    lines.append("{:<28} {:>13.3f} {:>7.3f}".format("stage 2, by the aggregator", *through.values()))
    floor = summary["floor"]
    lines.append(f"{'floor':<28} {floor['caption_most_frequent']:>13.3f} {'':>7} {floor['rec_constant_box']:>8.3f}")
    n = ", ".join(f"{task} {count}" for task, count in summary["n"].items())
    same = summary.get("image_adapter_unchanged_in_stage2")
    if same is not None:
        lines.append(f"the image-level adapter after stage 2 is that of stage 1, bit for bit: {same}")
    return [*lines, f"questions: {n};  {summary['steps']} steps an arm, {summary['seconds']:.0f} s in all"]


if __name__ == "__main__":
    sys.exit(main())
