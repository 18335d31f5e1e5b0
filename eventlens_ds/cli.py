"""`eventlens COMMAND`: parse, call one function, print what it returns.

In: the command line. Out: an exit code (0 done, 2 usage or configuration, 3 data or checkpoint check failed, 130
interrupted; a run's own codes pass through). Errors a user can cause are one line on stderr.
Decision: every command imports what it calls inside its function, so that --help needs neither torch nor a GPU, and
only commands that exist are listed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eventlens_ds import __version__
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.train import door

SOURCES = "any of vcr, visualcomet, captions, rec, refcoco, vg, vqa, vsr, pope, tags"
"""data/sources/combined.py has the same names; it would import torch here."""

Command = Callable[[argparse.Namespace, list[str]], int]
"""(options, what is left over: settings, or the arguments of a benchmark) -> exit code."""

PLANNED = ("plan", "preflight", "prove", "compare", "neighbours")
"""Named in the design, not written yet: asking for one says so."""

BENCHMARKS = {
    "roi_align": "RoI-align on token grids, every backend against the strongest baselines",
    "moa": "the mixture of adapters, every path and backend against the strongest baselines",
    "adapters": "a training step with a mixture, with task adapters and without adapters",
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
    """Names the nearest command for a misspelt one, and says of a planned one that it does not exist yet."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = ", ".join(map(str, action.choices))
        if value in PLANNED:
            raise UserError(f"{self.prog} {value}: planned, not written yet; there are: {known}")
        near = difflib.get_close_matches(str(value), list(map(str, action.choices)), n=1, cutoff=0.0)
        raise UserError(f"{self.prog} {value}: no such command; nearest: {near[0]}; there are: {known}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="eventlens", description="Trains region-grounded multimodal language models with DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"eventlens {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_data(commands)
    _add_train(commands)
    _add_use(commands)
    _add_upkeep(commands)
    return parser


def _add(commands: Any, name: str, function: Command, text: str, takes_rest: bool = False) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    made.set_defaults(function=function, takes_rest=takes_rest, parser=made)
    return made


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="make, check and look at data sets", description="Data sets.")
    verbs = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build = _add(verbs, "build", _data_build, "write a folder of shards; run again to continue")
    build.add_argument("--source", required=True, metavar="A,B", help=f"world, or {SOURCES}")
    build.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    build.add_argument("--root", type=Path, metavar="DIR", help="where the source lies (world: where to draw; OUT-raw)")
    build.add_argument("--splits", metavar="A,B", help="default: all")
    build.add_argument("--limit", type=int, default=0, metavar="N", help="images per split (world: of train; 1000)")
    build.add_argument("--workers", type=int, default=1, metavar="W", help="processes (default 1)")
    build.add_argument("--shard-images", type=int, default=1000, metavar="N", help="images per shard (default 1000)")
    build.add_argument("--part", metavar="K/N", help="write only shards k, k+n, ...: one of n jobs; see --finish")
    build.add_argument("--tagger", default="", metavar="MODULE:FUNCTION", help="gives every image its tags")
    build.add_argument("--finish", action="store_true", help="join the shards after all parts are written")
    build.add_argument("--seed", type=int, default=0, metavar="S", help="world: seed (default 0)")
    build.add_argument("--image-size", type=int, default=96, metavar="PX", help="world: pixels per side (default 96)")
    build.add_argument("--val-images", type=int, metavar="N", help="world: images of val (default: a fifth of train)")
    index = _add(verbs, "index", _data_index, "rebuild the index from the shards alone")
    index.add_argument("folder", type=Path, metavar="DIR")
    lint = _add(verbs, "lint", _data_lint, "check annotations before anything is built")
    lint.add_argument("--source", required=True, metavar="A,B", help="as in build, without world and refcoco")
    lint.add_argument("--root", required=True, type=Path, metavar="DIR")
    lint.add_argument("--no-images", action="store_true", help="do not decode the pictures")
    lint.add_argument("--json", action="store_true", help="one JSON object per finding")
    info = _add(verbs, "info", _data_info, "what a folder of shards holds")
    info.add_argument("folder", type=Path, metavar="DIR")
    info.add_argument("--json", action="store_true")
    preview = _add(verbs, "preview", _data_preview, "one HTML page of what the model sees", takes_rest=True)
    preview.add_argument("folder", type=Path, metavar="DIR")
    preview.add_argument("--out", type=Path, default=Path("preview.html"), metavar="FILE")
    preview.add_argument("--split", default="train")
    preview.add_argument("--number", type=int, default=12, metavar="N", help="images (default 12)")
    preview.add_argument("--config", metavar="RECIPE", help="recipe whose model and layout are shown")


def _add_train(commands: Any) -> None:
    train = _add(commands, "train", _train, "train a model", takes_rest=True)
    train.epilog = "settings: --section.key=value; `eventlens train --print-config` lists them all"
    train.add_argument("--ranks", type=int, default=1, metavar="N", help="processes on this machine (default 1)")
    door.add_arguments(train)


def _add_use(commands: Any) -> None:
    evaluate = _add(commands, "eval", _eval, "score a run on a data set")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder or checkpoint")
    evaluate.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder of `eventlens data build`")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="default: below RUN")
    evaluate.add_argument("--split", default="val")
    evaluate.add_argument("--limit", type=int, default=0, metavar="N", help="images (default all)")
    evaluate.add_argument("--controls", metavar="A,B", help="none, blank, permute_regions (default none); or empty")
    evaluate.add_argument("--events", type=int, default=0, metavar="N", help="events to complete (default 0)")
    tasks = "caption, rec, reg, vqa, vsr, pope: answered in words; without --controls no VCR"
    evaluate.add_argument("--tasks", default="", metavar="A,B", help=tasks)
    evaluate.add_argument("--beams", type=int, default=1, metavar="N", help="for --tasks (default 1: greedy)")
    evaluate.add_argument("--max-new-tokens", type=int, default=0, metavar="N", help="for --tasks (default: per task)")
    evaluate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="for --beams (default 1)")
    evaluate.add_argument("--checkpoint", default="latest", metavar="X", help="latest, best or a path")
    evaluate.add_argument("--leaderboard", type=Path, metavar="FILE", help="VCR leaderboard csv of a blind split")
    evaluate.add_argument("--ranks", type=int, default=1, metavar="N", help="processes on this machine (default 1)")
    evaluate.add_argument("--zero3", action="store_true", help="partition the model; default: a replica per rank")
    export = _add(commands, "export", _export, "write a Hugging Face folder from a run")
    export.add_argument("run", type=Path, metavar="RUN", help="run folder or checkpoint")
    export.add_argument("out", type=Path, metavar="OUT")
    export.add_argument("--peft", action="store_true", help="LoRA as a PEFT folder, other parts beside it, no base")
    convert = _add(commands, "convert", _convert, "published LION or InstructBLIP weights", takes_rest=True)
    convert.epilog = "settings: --section.key=value change --config"
    convert.add_argument("source", type=Path, metavar="SOURCE", help=".pth, .bin or .safetensors file, or folder")
    convert.add_argument("--from", dest="kind", required=True, choices=("lion", "instructblip", "eva"))
    convert.add_argument("--out", type=Path, metavar="DIR", help="for --init-from DIR; default: only print the map")
    convert.add_argument("--leave-out", default="", metavar="A,B", help="beginnings of names not wanted")
    convert.add_argument("--heads", type=int, default=16, metavar="N", help="of a tower without config.json (16)")
    convert.add_argument("--config", metavar="RECIPE", help="recipe whose model every tensor must fit")
    predict = _add(commands, "predict", _predict, "ask an exported model about one image")
    predict.add_argument("model", type=Path, metavar="OUT", help="folder of `eventlens export`")
    predict.add_argument("image", type=Path, metavar="IMAGE")
    predict.add_argument("--boxes", nargs="+", default=[], metavar="NAME:X1,Y1,X2,Y2", help="in pixels of the image")
    predict.add_argument("--question", metavar="TEXT", help="mention boxes as [1], [2], ...")
    predict.add_argument("--choices", nargs="+", default=[], metavar="TEXT", help="candidate answers to rank")
    predict.add_argument("--tags", metavar="A,B,C", help="what a tagger saw, for a model with a soft prompt")
    predict.add_argument("--events", action="store_true", help="what happens before, why, and after")
    predict.add_argument("--png", type=Path, metavar="FILE", help="draw boxes and answer")


def _add_upkeep(commands: Any) -> None:
    verify = _add(commands, "verify", _verify, "check the bytes of checkpoints")
    verify.add_argument("path", type=Path, metavar="RUN|CHECKPOINT")
    doctor = _add(commands, "doctor", _doctor, "what this machine has and lacks")
    doctor.add_argument("--json", action="store_true")
    bench = _add(commands, "bench", _bench, "measure, and write what was measured")
    bench.add_argument("name", metavar="NAME", help="; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items()))
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments; NAME -h lists them")


def _data_build(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.data import build
    from eventlens_ds.data.sources import combined
    from eventlens_ds.launch.build_display import BuildDisplay

    if args.finish:
        _print_json(build.finish(args.out))
        return 0
    arguments: dict[str, Any]
    if args.source == "world":
        if args.part:
            raise UserError("--part: a world is built by one job; use --workers")
        root = args.root or args.out.with_name(args.out.name + "-raw")
        count = args.limit or 1000
        source: Any = combined.draw_world(
            root,
            seed=args.seed,
            num_images=count,
            image_size=args.image_size,
            val_images=args.val_images,
            workers=args.workers,
        )
        arguments = {"seed": args.seed, "num_images": count, "image_size": args.image_size}
    else:
        if args.root is None:
            raise UserError(f"--root is missing: the folder where {args.source} lies")
        if args.tagger and "tags" in _names(args.source):
            raise UserError(f"--tagger {args.tagger}: --source {args.source} reads tags from a file; choose one")
        source = combined.open_source(args.source, args.root)
        arguments = {"root": str(args.root.resolve())}
    with BuildDisplay() as show:
        made = build.build(
            source,
            args.out,
            splits=args.splits.split(",") if args.splits else None,
            limit=0 if args.source == "world" else args.limit,
            workers=args.workers,
            shard_images=args.shard_images,
            arguments=arguments,
            tagger=args.tagger,
            part=parse_part(args.part) if args.part else None,
            progress=show,
        )
    if made:
        _print_json(made)
    else:
        print(f"part {args.part} is written; when all are: eventlens data build ... --finish --out {args.out}")
    return 0


def parse_part(text: str) -> tuple[int, int]:
    """(k, n) of "k/n" with 0 <= k < n."""
    k, slash, n = text.partition("/")
    if not slash or not k.isdigit() or not n.isdigit() or int(k) >= int(n):
        raise UserError(f"--part {text}: write K/N with 0 <= K < N, such as 0/4")
    return int(k), int(n)


def _existing(folder: Path) -> Path:
    if not folder.exists():
        raise UserError(f"{folder}: no such folder")
    return folder


def _data_index(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.data import manifest

    _print_json(manifest.index(_existing(args.folder)))
    return 0


def _data_lint(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.data import lint
    from eventlens_ds.data.sources import combined

    counts: dict[str, int] = {"error": 0, "warning": 0, "info": 0}
    for source in combined.open_sources(args.source, args.root):
        for split in source.splits():
            for finding in lint.lint(source, split, decode=not args.no_images):
                counts[finding.severity] += 1
                if args.json:
                    print(json.dumps(finding._asdict()))
                else:
                    print(f"{finding.severity:8}{finding.code:18}{finding.where}: {finding.message}")
    print(", ".join(f"{number} {severity}" for severity, number in counts.items()), file=sys.stderr)
    if counts["error"]:
        raise DataError(f"{args.root}: {counts['error']} errors")
    return 0


def _data_info(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.data import info

    found = info.info(_existing(args.folder))
    if args.json:
        _print_json(found)
    else:
        print(info.render(found))
    return 0


def _data_preview(args: argparse.Namespace, rest: list[str]) -> int:
    from eventlens_ds.config import load
    from eventlens_ds.data import preview
    from eventlens_ds.data.loader import RunData
    from eventlens_ds.runtime.build_model import describe, tokenizer_path

    if args.number < 1:
        raise UserError(f"--number {args.number}: must be at least 1")
    config = load.load(args.config, rest)
    _, tokenizer, spec = describe(config, dry=True)
    data = RunData(
        [str(_existing(args.folder))],
        args.split,
        config=config.data,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path(config),
        spec=spec,
        tasks=config.data.tasks,
        with_blind=True,
    )
    print(preview.preview(data, args.out, number=args.number))
    return 0


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
        "controls": None if args.controls is None else _names(args.controls),
        "generate": args.events,
        "tasks": _names(args.tasks),
        "beams": args.beams,
        "max_new_tokens": args.max_new_tokens,
        "repetition_penalty": args.repetition_penalty,
        "checkpoint": args.checkpoint,
        "zero3": args.zero3,
        "leaderboard": args.leaderboard,
    }
    run, data = _existing(args.run), _existing(args.data)
    if args.ranks > 1:
        from eventlens_ds.runtime.local_ranks import spawn

        # Refused here, before any rank starts.
        harness.check(run, data, **asked)
        return spawn(args.ranks, ["eval", *door.without_ranks(args.argv)], module="eventlens_ds")
    return harness.main(run, data, out=args.out, **asked)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _export(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.export import folder, peft_folder

    main = peft_folder.main if args.peft else folder.main
    return main(_existing(args.run), args.out) or 0


def _convert(args: argparse.Namespace, rest: list[str]) -> int:
    if rest and not args.config:
        door.refuse_unknown(rest, args.parser)
    from eventlens_ds.config import load
    from eventlens_ds.export import convert

    if args.heads < 1:
        raise UserError(f"--heads {args.heads}: must be at least 1")
    config = load.load(args.config, rest) if args.config else None
    leave_out = _names(args.leave_out)
    return convert.main(args.kind, args.source, args.out, leave_out=leave_out, heads=args.heads, config=config)


def _predict(args: argparse.Namespace, _rest: list[str]) -> int:
    if bool(args.question) == args.events:
        raise UserError("eventlens predict: give either --question TEXT or --events")
    boxes = [parse_box(text) for text in args.boxes]
    from eventlens_ds.export import predict

    asked = {"question": args.question, "choices": args.choices, "events": args.events}
    asked["tags"] = None if args.tags is None else _names(args.tags)
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
        print(f"{'DAMAGED' if problems else 'ok':8} {folder}{': ' if problems else ''}{'; '.join(problems)}")
    if broken:
        raise DataError(f"{broken} of {len(folders)} checkpoints are damaged")
    return 0


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


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))
