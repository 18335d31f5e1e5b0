"""`eventlens COMMAND`: parse, call one function, print what it returns.

In: the command line. Out: an exit code (0 done, 2 usage or configuration, 3 data or checkpoint check failed, 130
interrupted; a run's own codes pass through). Errors a user can cause are one line on stderr.
Decision: every command imports what it calls inside its function, so that --help needs neither torch nor a GPU, and
only commands that exist are listed.
"""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eventlens_ds import __version__
from eventlens_ds.cli_data import Command, add, add_data, existing, names
from eventlens_ds.cli_episodes import add_episodes, episode_options
from eventlens_ds.cli_plan import add_plan
from eventlens_ds.cli_proof import add_proofs
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.train import door

BENCHMARKS = {
    "roi_align": "RoI-align on token grids, every backend against the strongest baselines",
    "moa": "the mixture of adapters, every path and backend against the strongest baselines",
    "adapters": "a training step with a mixture, with task adapters and without adapters",
    "episodes": "packed episodes of many images against one padded episode per forward",
    "score": "candidates scored with a shared prefix against one row per candidate",
    "loader": "our loader against a plain Pillow loop over the same images",
    "train": "our training against Hugging Face Trainer with DeepSpeed, and against itself ablated",
    "report": "writes the tables and plots of BENCHMARKS.md from the CSV files",
}
"""Modules of eventlens_ds.bench that are commands."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line without its own end of the process; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return door.guarded(lambda: _dispatch(given))


def _dispatch(argv: Sequence[str]) -> int:
    joined = door.join_settings(argv)
    args, rest = _parser().parse_known_args(joined)
    if not args.takes_rest:
        door.refuse_unknown(rest, args.parser)
    door.settle_accelerator()
    door.start_logging()
    args.argv = joined[1:]
    command: Command = args.function
    return command(args, rest)


class _Parser(door.Parser):
    """Names the nearest command for a misspelt one."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = ", ".join(map(str, action.choices))
        near = difflib.get_close_matches(str(value), list(map(str, action.choices)), n=1, cutoff=0.0)
        raise UserError(f"{self.prog} {value}: no such command; nearest: {near[0]}; there are: {known}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="eventlens", description="Trains region-grounded multimodal language models with DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"eventlens {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_data(commands)
    _add_train(commands)
    _add_use(commands)
    add_plan(commands)
    _add_upkeep(commands)
    add_proofs(commands)
    return parser


def _add_train(commands: Any) -> None:
    train = add(commands, "train", _train, "train a model", takes_rest=True)
    train.epilog = "settings: --section.key=value; `eventlens train --print-config` lists them all"
    train.add_argument("--ranks", type=int, default=1, metavar="N", help="processes on this machine (default 1)")
    door.add_arguments(train)


def _add_use(commands: Any) -> None:
    evaluate = add(commands, "eval", _eval, "score a run on a data set")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder or checkpoint")
    evaluate.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder of `eventlens data build`")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="default: below RUN")
    evaluate.add_argument("--split", default="val")
    evaluate.add_argument("--limit", type=int, default=0, metavar="N", help="images (default all)")
    evaluate.add_argument("--controls", metavar="A,B", help="none, blank, permute_regions (default none); or empty")
    evaluate.add_argument("--events", type=int, default=0, metavar="N", help="events to complete (default 0)")
    tasks = "caption, rec, reg, vqa, vsr, pope: answered in words; lcl: episodes; without --controls no VCR"
    evaluate.add_argument("--tasks", default="", metavar="A,B", help=tasks)
    evaluate.add_argument("--beams", type=int, default=1, metavar="N", help="for --tasks (default 1: greedy)")
    evaluate.add_argument("--max-new-tokens", type=int, default=0, metavar="N", help="for --tasks (default: per task)")
    evaluate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="for --beams (default 1)")
    add_episodes(evaluate)
    view = "projector, aggregator, qformer or all, of a run that has several (default: as trained)"
    evaluate.add_argument("--visual-input", default="", metavar="VIEW", help=view)
    evaluate.add_argument("--checkpoint", default="latest", metavar="X", help="latest, best or a path")
    evaluate.add_argument("--leaderboard", type=Path, metavar="FILE", help="VCR leaderboard csv of a blind split")
    evaluate.add_argument("--ranks", type=int, default=1, metavar="N", help="processes on this machine (default 1)")
    evaluate.add_argument("--zero3", action="store_true", help="partition the model; default: a replica per rank")
    export = add(commands, "export", _export, "write a Hugging Face folder from a run")
    export.add_argument("run", type=Path, metavar="RUN", help="run folder or checkpoint")
    export.add_argument("out", type=Path, metavar="OUT")
    export.add_argument("--peft", action="store_true", help="LoRA as a PEFT folder, other parts beside it, no base")
    convert = add(commands, "convert", _convert, "published LION or InstructBLIP weights", takes_rest=True)
    convert.epilog = "settings: --section.key=value change --config"
    convert.add_argument("source", type=Path, metavar="SOURCE", help=".pth, .bin or .safetensors file, or folder")
    convert.add_argument("--from", dest="kind", required=True, choices=("lion", "instructblip", "eva"))
    convert.add_argument("--out", type=Path, metavar="DIR", help="for --init-from DIR; default: only print the map")
    convert.add_argument("--leave-out", default="", metavar="A,B", help="beginnings of names not wanted")
    convert.add_argument("--heads", type=int, default=16, metavar="N", help="of a tower without config.json (16)")
    convert.add_argument("--config", metavar="RECIPE", help="recipe whose model every tensor must fit")
    predict = add(commands, "predict", _predict, "ask an exported model about one image")
    predict.add_argument("model", type=Path, metavar="OUT", help="folder of `eventlens export`")
    predict.add_argument("image", type=Path, metavar="IMAGE")
    predict.add_argument("--boxes", nargs="+", default=[], metavar="NAME:X1,Y1,X2,Y2", help="in pixels of the image")
    predict.add_argument("--question", metavar="TEXT", help="mention boxes as [1], [2], ...")
    predict.add_argument("--choices", nargs="+", default=[], metavar="TEXT", help="candidate answers to rank")
    predict.add_argument("--tags", metavar="A,B,C", help="what a tagger saw, for a model with a soft prompt")
    predict.add_argument("--events", action="store_true", help="what happens before, why, and after")
    predict.add_argument("--png", type=Path, metavar="FILE", help="draw boxes and answer")


def _add_upkeep(commands: Any) -> None:
    verify = add(commands, "verify", _verify, "check the bytes of checkpoints")
    verify.add_argument("path", type=Path, metavar="RUN|CHECKPOINT")
    doctor = add(commands, "doctor", _doctor, "what this machine has and lacks")
    doctor.add_argument("--json", action="store_true")
    bench = add(commands, "bench", _bench, "measure, and write what was measured")
    bench.add_argument("name", metavar="NAME", help="; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items()))
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments; NAME -h lists them")


def _train(args: argparse.Namespace, rest: list[str]) -> int:
    door.refuse_near_options(rest, args.parser)
    if args.ranks < 1:
        raise UserError(f"--ranks {args.ranks}: must be at least 1")
    if args.ranks == 1 or args.dry_run or args.print_config:
        return door.run(args, rest, args.argv)
    return door.launch(args.ranks, args, rest, args.argv)


def _eval(args: argparse.Namespace, _rest: list[str]) -> int:
    if args.ranks < 1:
        raise UserError(f"--ranks {args.ranks}: must be at least 1")
    from eventlens_ds.eval import harness

    asked: dict[str, Any] = {
        "split": args.split,
        "limit": args.limit,
        "controls": None if args.controls is None else names(args.controls),
        "generate": args.events,
        "tasks": names(args.tasks),
        "beams": args.beams,
        "max_new_tokens": args.max_new_tokens,
        "repetition_penalty": args.repetition_penalty,
        "checkpoint": args.checkpoint,
        "zero3": args.zero3,
        "leaderboard": args.leaderboard,
        "visual_input": args.visual_input,
        **episode_options(args),
    }
    run, data = existing(args.run), existing(args.data)
    if args.ranks > 1:
        from eventlens_ds.runtime.local_ranks import spawn

        # Refused here, before any rank starts.
        harness.check(run, data, **asked)
        return spawn(args.ranks, ["eval", *door.without_ranks(args.argv)], module="eventlens_ds")
    return harness.main(run, data, out=args.out, **asked)


def _export(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.export import folder, peft_folder

    main = peft_folder.main if args.peft else folder.main
    return main(existing(args.run), args.out) or 0


def _convert(args: argparse.Namespace, rest: list[str]) -> int:
    if rest and not args.config:
        door.refuse_unknown(rest, args.parser)
    from eventlens_ds.config import load
    from eventlens_ds.export import convert

    if args.heads < 1:
        raise UserError(f"--heads {args.heads}: must be at least 1")
    config = load.load(args.config, rest) if args.config else None
    leave_out = names(args.leave_out)
    return convert.main(args.kind, args.source, args.out, leave_out=leave_out, heads=args.heads, config=config)


def _predict(args: argparse.Namespace, _rest: list[str]) -> int:
    if bool(args.question) == args.events:
        raise UserError("eventlens predict: give either --question TEXT or --events")
    boxes = [parse_box(text) for text in args.boxes]
    from eventlens_ds.export import predict

    asked = {"question": args.question, "choices": args.choices, "events": args.events}
    asked["tags"] = None if args.tags is None else names(args.tags)
    print(predict.main(args.model, args.image, boxes=boxes, png=args.png, **asked))
    return 0


def parse_box(text: str) -> tuple[str, tuple[float, float, float, float]]:
    """(name, corners in pixels) of "person:10,20,50,80"; the name may be left out."""
    name, colon, numbers = text.rpartition(":")
    try:
        x1, y1, x2, y2 = map(float, numbers.split(","))
    except ValueError:
        raise UserError(f"--boxes {text}: write NAME:X1,Y1,X2,Y2, such as person:10,20,50,80") from None
    if not (math.isfinite(x1 + y1 + x2 + y2) and x1 < x2 and y1 < y2):
        raise UserError(f"--boxes {text}: x1 < x2 and y1 < y2 are needed")
    return (name if colon else "object"), (x1, y1, x2, y2)


def _verify(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.runtime import commit

    single = (args.path / commit.MANIFEST).exists()
    folders = [args.path] if single else commit.committed(args.path)
    if not folders:
        raise UserError(f"{args.path}: no checkpoint, and no run folder with one")
    broken = 0
    for folder in folders:
        problems = commit.verify(folder)
        broken += bool(problems)
        told = "; ".join(problems) if problems else _size(commit.read_manifest(folder))
        print(f"{'DAMAGED' if problems else 'ok':8} {folder}: {told}")
    if broken:
        raise DataError(f"{broken} of {len(folders)} checkpoints are damaged")
    return 0


def _size(manifest: dict[str, Any]) -> str:
    """What a checkpoint holds and, of its slowest rank, how long writing took."""
    files, took = manifest["files"].values(), manifest.get("seconds")
    told = f"{len(files)} files, {sum(entry['size'] for entry in files) / 2**20:.1f} MiB"
    return f"{told}, written in {took['writing']:g} s, {took['hashing']:g} s of it hashing" if took else told


def _doctor(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.launch import doctor

    report, code = doctor.main(as_json=args.json)
    print(report)
    return code


def _bench(args: argparse.Namespace, _rest: list[str]) -> int:
    import importlib

    if args.name not in BENCHMARKS:
        raise UserError(f"eventlens bench {args.name}: no such benchmark; there are: {', '.join(BENCHMARKS)}")
    return importlib.import_module(f"eventlens_ds.bench.{args.name}").main(args.arguments) or 0
