"""`eventlens data VERB`, and what the commands of cli.py share: adding a command, lists with commas, JSON.

In: the command line. Out: an exit code, as in cli.py.
Decision: as there, every command imports what it calls inside its function.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError, UserError

SOURCES = "any of vcr, visualcomet, captions, rec, refcoco, vg, vqa, vsr, pope, tags, lcl"
"""data/sources/combined.py has the same names; it would import torch here."""

Command = Callable[[argparse.Namespace, list[str]], int]
"""(options, what is left over: settings, or the arguments of a benchmark) -> exit code."""


def add(commands: Any, name: str, function: Command, text: str, takes_rest: bool = False) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    made.set_defaults(function=function, takes_rest=takes_rest, parser=made)
    return made


def add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="make, check and look at data sets", description="Data sets.")
    verbs = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build = add(verbs, "build", _data_build, "write a folder of shards; run again to continue")
    build.add_argument("--source", required=True, metavar="A,B", help=f"world, creatures, or {SOURCES}")
    build.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    build.add_argument("--root", type=Path, metavar="DIR", help="where the source lies (world: where to draw; OUT-raw)")
    build.add_argument("--splits", metavar="A,B", help="default: all")
    build.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="images per split (world: of train; 1000; creatures: classes, 600)",
    )
    build.add_argument("--workers", type=int, default=1, metavar="W", help="processes (default 1)")
    build.add_argument("--shard-images", type=int, default=1000, metavar="N", help="images per shard (default 1000)")
    build.add_argument("--part", metavar="K/N", help="write only shards k, k+n, ...: one of n jobs; see --finish")
    build.add_argument("--tagger", default="", metavar="MODULE:FUNCTION", help="gives every image its tags")
    build.add_argument("--finish", action="store_true", help="join the shards after all parts are written")
    build.add_argument("--seed", type=int, default=0, metavar="S", help="world: seed (default 0)")
    build.add_argument("--image-size", type=int, default=96, metavar="PX", help="world: pixels per side (default 96)")
    build.add_argument(
        "--val-images",
        type=int,
        metavar="N",
        help="world: images of val (default: a fifth of train; creatures: classes)",
    )
    index = add(verbs, "index", _data_index, "rebuild the index from the shards alone")
    index.add_argument("folder", type=Path, metavar="DIR")
    lint = add(verbs, "lint", _data_lint, "check annotations before anything is built")
    lint.add_argument(
        "--source", required=True, metavar="A,B", help="as in build, without world, creatures, refcoco, lcl"
    )
    lint.add_argument("--root", required=True, type=Path, metavar="DIR")
    lint.add_argument("--no-images", action="store_true", help="do not decode the pictures")
    lint.add_argument("--json", action="store_true", help="one JSON object per finding")
    info = add(verbs, "info", _data_info, "what a folder of shards holds")
    info.add_argument("folder", type=Path, metavar="DIR")
    info.add_argument("--json", action="store_true")
    preview = add(verbs, "preview", _data_preview, "one HTML page of what the model sees", takes_rest=True)
    preview.add_argument("folder", type=Path, metavar="DIR")
    preview.add_argument("--out", type=Path, default=Path("preview.html"), metavar="FILE")
    preview.add_argument("--split", default="train")
    preview.add_argument("--number", type=int, default=12, metavar="N", help="images (default 12)")
    preview.add_argument("--config", metavar="RECIPE", help="recipe whose model and layout are shown")
    _add_neighbours(verbs)


def _add_neighbours(verbs: Any) -> None:
    near = add(
        verbs, "neighbours", _data_neighbours, "mine look-alike classes, written as Link-Context Learning's pairs"
    )
    near.add_argument(
        "classes", type=Path, metavar="FILE", help="JSON lines [class_id, name, [images]], or a pairs file"
    )
    near.add_argument("--images", required=True, type=Path, metavar="DIR", help="where the images lie")
    near.add_argument("--out", required=True, type=Path, metavar="FILE", help="pairs file to write")
    near.add_argument("--clip", default="", metavar="DIR", help="CLIP folder that measures similarity")
    near.add_argument("--run", default="", metavar="RUN", help="in its place the vision tower of a run (images alone)")
    near.add_argument("--number", type=int, default=36, metavar="N", help="neighbours of a class (default 36)")
    near.add_argument("--rule", default="nearest", metavar="R", help="nearest, or bins as the released code")
    near.add_argument("--images-per-class", type=int, default=100, metavar="N", help="measured (default 100)")
    near.add_argument("--samples", type=int, default=0, metavar="N", help="images listed per class (default all)")
    near.add_argument("--test-classes", type=int, default=0, metavar="N", help="held out as pairs, in OUT_test.jsonl")
    near.add_argument("--context", type=int, default=32, metavar="N", help="images shown of a test class (default 32)")
    near.add_argument("--seed", type=int, default=0, metavar="S")


def _data_neighbours(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.eval import neighbours

    asked = {"clip": args.clip, "run": args.run, "count": args.number, "rule": args.rule, "seed": args.seed}
    asked |= {"per_class": args.images_per_class, "samples": args.samples, "context": args.context}
    done = neighbours.main(
        existing(args.classes), existing(args.images), args.out, test_classes=args.test_classes, **asked
    )
    print_json(done)
    return 0


def _data_build(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.data import build
    from eventlens_ds.data.sources import combined
    from eventlens_ds.launch.build_display import BuildDisplay

    if args.finish:
        print_json(build.finish(args.out))
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
    elif args.source == "creatures":
        source, arguments = _creatures(args)
    else:
        if args.root is None:
            raise UserError(f"--root is missing: the folder where {args.source} lies")
        if args.tagger and "tags" in names(args.source):
            raise UserError(f"--tagger {args.tagger}: --source {args.source} reads tags from a file; choose one")
        source = combined.open_source(args.source, args.root)
        arguments = {"root": str(args.root.resolve())}
    with BuildDisplay() as show:
        made = build.build(
            source,
            args.out,
            splits=args.splits.split(",") if args.splits else None,
            limit=0 if args.source in ("world", "creatures") else args.limit,
            workers=args.workers,
            shard_images=args.shard_images,
            arguments=arguments,
            tagger=args.tagger,
            part=parse_part(args.part) if args.part else None,
            progress=show,
        )
    if made:
        print_json(made)
    else:
        print(f"part {args.part} is written; when all are: eventlens data build ... --finish --out {args.out}")
    return 0


def _creatures(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The source of drawn creatures, and what identifies it."""
    from eventlens_ds.data.sources import combined

    if args.part:
        raise UserError("--part: creatures are built by one job; use --workers")
    train = args.limit or 600
    test = args.val_images or max(2, train // 12 * 2)
    arguments = {"seed": args.seed, "train": train, "test": test, "image_size": args.image_size}
    root = args.root or args.out.with_name(args.out.name + "-raw")
    return combined.draw_creatures(root, **arguments, workers=args.workers), arguments


def parse_part(text: str) -> tuple[int, int]:
    """(k, n) of "k/n" with 0 <= k < n."""
    k, slash, n = text.partition("/")
    if not slash or not k.isdigit() or not n.isdigit() or int(k) >= int(n):
        raise UserError(f"--part {text}: write K/N with 0 <= K < N, such as 0/4")
    return int(k), int(n)


def existing(folder: Path) -> Path:
    if not folder.exists():
        raise UserError(f"{folder}: no such folder")
    return folder


def _data_index(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.data import manifest

    print_json(manifest.index(existing(args.folder)))
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

    found = info.info(existing(args.folder))
    if args.json:
        print_json(found)
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
        [str(existing(args.folder))],
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


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))
