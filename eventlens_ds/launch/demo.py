"""`make demo`: the whole main job on the embedded world, by the same commands a user types.

In: an output folder. Out: OUT/summary.json, logs, pictures, and a table on the terminal. The stages are processes:
  1. data build       world -> VCR and VisualCOMET files -> shards and index
  2. train            event pretraining, 2 ranks, ZeRO-3
  3. train            VCR fine-tuning from stage 2, saving once before the end
  4. train            the same run continued from that checkpoint in another folder: must end in the same bits
  5. eval             held-out questions; again without pixels and regions; again with regions permuted
  6. export, predict  a Hugging Face folder, one picture
Decision: nothing here computes a result. Every number of the summary is read from files that the commands wrote, so
running the commands by hand gives the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError, UserError
from eventlens_ds.runtime.local_ranks import before_exec
from eventlens_ds.train.door import settle_accelerator

CHANCE = 0.25
RESUMED_STEPS = 10
"""Steps that the resumed copy of the VCR run repeats, at most half of the run."""


class Stages:
    """Runs `eventlens` commands one after the other and remembers what they took."""

    def __init__(self, out: Path, ranks: int) -> None:
        self.out, self.ranks = out, ranks
        self.seconds: dict[str, float] = {}
        self.log = out / "commands.log"

    def run(self, title: str, *command: str, show: bool = False) -> None:
        """Run `eventlens COMMAND`, its output in commands.log (and on the terminal with `show`)."""
        line = [sys.executable, "-m", "eventlens_ds", *command]
        print(f"\n== {title}\n$ eventlens {shlex.join(command)}", flush=True)
        started = time.monotonic()
        tail: list[str] = []
        try:
            # A stage does not outlive us: it would write into the folder of whoever starts us again.
            arm = before_exec(os.getpid(), signal.SIGTERM)
            with (
                self.log.open("a") as log,
                subprocess.Popen(
                    line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=arm
                ) as child,
            ):
                log.write(f"$ eventlens {shlex.join(command)}\n")
                assert child.stdout is not None
                for text in child.stdout:
                    log.write(text)
                    tail = [*tail[-14:], text.rstrip()]
                    if show and not text.startswith("["):
                        print(f"   {text.rstrip()}", flush=True)
        finally:
            self.seconds[title] = time.monotonic() - started
        if child.returncode:
            print("\n".join(tail), file=sys.stderr)
            raise DataError(f"`eventlens {command[0]}` ended with exit code {child.returncode}; see {self.log}")
        print(f"   {self.seconds[title]:.0f} s", flush=True)

    def train(self, title: str, recipe: str, run: Path, *settings: str) -> None:
        where = [f"--data.train={self.out / 'world'}", f"--io.run={run}"]
        self.run(title, "train", "--config", recipe, "--ranks", str(self.ranks), *where, *settings, show=True)

    def evaluate(self, title: str, run: Path) -> None:
        """Held-out questions, with both controls, into OUT/eval."""
        data, out = str(self.out / "world"), str(self.out / "eval")
        self.run(
            title, "eval", str(run), "--data", data, "--split", "val", "--controls", "none,blank,permute_regions",
            "--out", out, "--ranks", str(self.ranks), show=True,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the world")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=2000, help="training pictures; a sixth as many are held out")
    parser.add_argument("--event-steps", type=int, default=0, help="0: as in the recipe")
    parser.add_argument("--vcr-steps", type=int, default=0, help="0: as in the recipe")
    args = parser.parse_args(argv)
    try:
        return _demo(args)
    except UserError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return error.code


def _demo(args: argparse.Namespace) -> int:
    out = args.out
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    settle_accelerator()
    started = time.monotonic()
    demo = Stages(out, args.ranks)
    world, event, vcr, again = out / "world", out / "event", out / "vcr", out / "vcr-resumed"
    workers = str(len(os.sched_getaffinity(0)))
    demo.run(
        "Draw the embedded world and write shards", "data", "build", "--source", "world", "--seed", str(args.seed),
        "--limit", str(args.images), "--val-images", str(args.images // 6), "--workers", workers, "--out", str(world),
    )  # fmt: skip
    steps = [f"--train.steps={args.event_steps}"] if args.event_steps else []
    demo.train("Event pretraining", "tiny_event", event, *steps)
    total = args.vcr_steps or recipe_steps("tiny_vcr")
    # In the second half, so that only one more checkpoint follows and retention keeps this one.
    stop = max(1, total - RESUMED_STEPS, (total + 1) // 2)
    vcr_settings = [
        f"--train.steps={total}",
        f"--train.save_every={stop}",
        "--train.log_every=5",
        "--init-from",
        str(event),
    ]
    demo.train("VCR fine-tuning", "tiny_vcr", vcr, *vcr_settings)
    _copy_for_resume(vcr, again, stop)
    demo.train("Resume from the last checkpoint but one, in a copy", "tiny_vcr", again, *vcr_settings)
    demo.evaluate("Evaluate on held-out questions, with controls", vcr)
    demo.run("Export", "export", str(vcr), str(out / "export"))
    _predict(demo, world)
    summary = summarise(out, args.ranks, seconds=time.monotonic() - started)
    summary["resume_bit_identical"] = _same_end(vcr, again)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(_table(summary, demo.seconds, out))
    return 0


def recipe_steps(recipe: str) -> int:
    from eventlens_ds.config.load import load

    return load(recipe).train.steps


def _copy_for_resume(run: Path, copy: Path, step: int) -> None:
    """A run folder as it stood after `step`: that checkpoint, its log, its pointer."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("step-*", "tensorboard", "outcome.json"))
    name = f"step-{step}"
    shutil.copytree(run / "checkpoints" / name, copy / "checkpoints" / name)
    (copy / "checkpoints" / "LATEST").write_text(name + "\n")


def _same_end(run: Path, again: Path) -> bool:
    """Both runs logged the same losses and gradient norms bit for bit and hold the same final tensors."""
    import torch

    from eventlens_ds.runtime.checkpoint import resolve, weights

    logs = [[(r["step"], r["loss"], r["grad_norm"], r["sample_hash"]) for r in read_log(x)] for x in (run, again)]
    ends = []
    for folder in (run, again):
        path = resolve(folder)
        if path is None:
            return False
        ends.append(dict(weights(path)))
    same = ends[0].keys() == ends[1].keys() and all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())
    resumed_from = max(int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("step-*")) - RESUMED_STEPS
    repeated = [row for row in logs[1] if row[0] > resumed_from]
    return same and bool(repeated) and repeated == [row for row in logs[0] if row[0] > resumed_from]


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def summarise(out: Path, ranks: int, *, seconds: float) -> dict[str, Any]:
    """The summary, from the files of the runs OUT/event and OUT/vcr and of OUT/eval."""
    scores = {name: json.loads((out / "eval" / "metrics" / f"{name}.json").read_text())["vcr"] for name in _CONDITIONS}
    losses = [row["loss"] for row in read_log(out / "event")]
    plain = scores["vcr"]
    manifest = json.loads((out / "vcr" / "checkpoints" / _latest(out / "vcr") / "manifest.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "ranks": ranks,
        "zero_stage": manifest["zero_stage"],
        "event_loss": [losses[0], losses[-1]],
        "vcr": {name: plain[name] for name in ("q2a", "qa2r", "q2ar", "n")},
        "blind": {name: max(CHANCE, scores["vcr-blank"][name]) for name in ("q2a", "qa2r")},
        "roi_permuted": {"q2a_which_person": scores["vcr-permute_regions"]["which_person"]["q2a"]},
        "vcr_which_person": {"q2a": plain["which_person"]["q2a"]},
    }


_CONDITIONS = ("vcr", "vcr-blank", "vcr-permute_regions")


def _latest(run: Path) -> str:
    return (run / "checkpoints" / "LATEST").read_text().strip()


def _predict(demo: Stages, world: Path) -> None:
    """Ask the exported model the first held-out question and draw the answer."""
    from eventlens_ds.data.shards import ShardSet

    shards = ShardSet.open(world, "val")
    image = shards.image(0)
    record = next(r for r in map(shards.record, shards.records_of(0)) if r["kind"] == "vcr")
    picture = demo.out / "picture.png"
    picture.write_bytes(shards.image_bytes(0))
    boxes = [f"{r.name}:" + ",".join(f"{v:g}" for v in r.box) for r in image.regions]
    question, *choices = (_plain(tokens) for tokens in (record["question"], *record["answer_choices"]))
    out = str(demo.out / "prediction.png")
    asked = ["--boxes", *boxes, "--question", question, "--choices", *choices]
    demo.run("Predict", "predict", str(demo.out / "export"), str(picture), *asked, "--png", out, show=True)


def _plain(tokens: list[Any]) -> str:
    """Token list of VCR as a question for the command line: mentions as [n], counted from 1."""
    words = [" and ".join(f"[{i + 1}]" for i in t) if isinstance(t, list) else t for t in tokens]
    return " ".join(words).replace(" ?", "?").replace(" .", ".")


def scores_table(summary: dict[str, Any]) -> list[str]:
    """Lines of the three numbers and their controls."""
    vcr, blind = summary["vcr"], summary["blind"]
    model = f"model (n = {vcr['n']})"
    return [
        f"{'embedded world, held-out questions':<44} {'Q->A':>7} {'QA->R':>7} {'Q->AR':>7}",
        f"{model:<44} {vcr['q2a']:>7.3f} {vcr['qa2r']:>7.3f} {vcr['q2ar']:>7.3f}",
        f"{'blind (larger of blanked model and chance)':<44} {blind['q2a']:>7.3f} {blind['qa2r']:>7.3f}",
        f"{'which-person questions':<44} {summary['vcr_which_person']['q2a']:>7.3f}",
        f"{'which-person, regions permuted':<44} {summary['roi_permuted']['q2a_which_person']:>7.3f}",
    ]


def _table(summary: dict[str, Any], seconds: dict[str, float], out: Path) -> str:
    lines = [
        "",
        *scores_table(summary),
        f"event loss {summary['event_loss'][0]:.3f} -> {summary['event_loss'][1]:.3f};  "
        f"resume bit-identical: {summary['resume_bit_identical']};  {summary['seconds']:.0f} s "
        f"on {summary['ranks']} ranks, ZeRO stage {summary['zero_stage']}",
        "These are numbers of a diagnostic world that the package draws, not of VCR.",
        "",
        *(f"{took:7.0f} s  {title}" for title, took in seconds.items()),
        "",
        f"look at      {out / 'prediction.png'}, {out / 'eval' / 'metrics' / 'table.txt'}",
        f"TensorBoard  tensorboard --logdir {out}",
        "one node     deepspeed --num_gpus 8 --module eventlens_ds.train --config event_pretrain --data.train=DIR",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
