"""The command line that both kernel benchmarks share: choose shapes, measure, print, append rows.

In: a Matrix (shapes, problems, providers of one op) and arguments. Out: an exit code, rows in --out, tables on stdout.
Decision: with --minutes no new case is started once the time is spent, and those left out are named: a partial table
is said to be one. Without --out nothing is written.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from eventlens_ds.bench.kernels import rows
from eventlens_ds.bench.kernels.clock import Clock
from eventlens_ds.bench.kernels.harness import MODES, Problem, Provider, matmul_rate, measure, release
from eventlens_ds.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Shape(Protocol):
    """A case: its name, and whether it is a headline, which is measured in every dtype by default."""

    @property
    def name(self) -> str: ...

    @property
    def every_dtype(self) -> bool: ...


@dataclass(frozen=True)
class Matrix:
    """What one op is measured on. shapes: "cuda", "cpu" and "quick" -> cases, the most important first."""

    op: str
    shapes: Mapping[str, Sequence[Any]]
    problem: Callable[[Any, torch.dtype, torch.device], Problem]
    providers: Callable[[torch.device], list[Provider]]


def run(matrix: Matrix, argv: Sequence[str]) -> int:
    args = _parse(matrix.op, argv)
    device = torch.device(args.device)
    shapes = chosen(matrix, args.quick, device.type, args.shapes)
    if args.list:
        print("\n".join(shape.name for shape in shapes))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    providers = selected(matrix.providers(device), args.providers)
    modes = _known("--modes", args.modes, MODES)
    # Providers of all backends take turns, which dispatch would log as a change of mind at every call.
    logging.getLogger("eventlens_ds.ops").setLevel(logging.WARNING)
    clock, where = Clock(device), rows.environment(device)
    cases = [(shape, dtype) for shape in shapes for dtype in dtypes(shape, device.type, args.dtypes)]
    left_out = []
    flop_rates = {dtype: matmul_rate(dtype, clock) for dtype in dict.fromkeys(dtype for _, dtype in cases)}
    started = time.perf_counter()
    for number, (shape, dtype) in enumerate(cases):
        label = f"{shape.name} {str(dtype).removeprefix('torch.')}"
        if args.minutes and number and time.perf_counter() - started > 60 * args.minutes:
            left_out.append(label)
            continue
        torch.compiler.reset()
        problem = matrix.problem(shape, dtype, device)
        measured = measure(
            problem,
            providers if args.compiled == "all" or shape.every_dtype else [without_compiling(p) for p in providers],
            clock,
            modes=modes,
            repeats=args.repeats or (5 if args.quick else 100),
            budget=args.case_seconds,
            bitwise=args.bitwise,
            flop_rate=flop_rates[dtype],
        )
        if args.out:
            rows.append(args.out, [{**row, **where} for row in measured])
        print(f"\n{matrix.op} {label} on {where['device']}, {where['threads']} threads")
        print(render(measured), flush=True)
        del problem
        release(device)
    if left_out:
        print(f"\n--minutes {args.minutes}: not measured: {', '.join(left_out)}", file=sys.stderr)
    return 0


def _parse(op: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"eventlens bench {op}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", metavar="A,B", help="cases by name (see --list); default: all of the device")
    parser.add_argument("--quick", action="store_true", help="three tiny cases: does everything run")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--providers", metavar="A,B", help="those whose name contains one of these words")
    parser.add_argument("--dtypes", metavar="A,B", help="bf16, fp16, fp32 (CPU: fp32; GPU: bf16, first cases all)")
    parser.add_argument(
        "--compiled",
        choices=("all", "headline"),
        default="all",
        help="torch.compile baselines on all cases, or on the first ones only: they take seconds to compile per case",
    )
    parser.add_argument("--modes", metavar="A,B", default=",".join(MODES), help="fwd, bwd, fwd+bwd")
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help="runs of each (default 100; --quick 5)")
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="for all providers together, per mode and cache state; slow ones are run less often",
    )
    parser.add_argument("--bitwise", type=int, default=20, metavar="N", help="repetitions that must give equal bits")
    parser.add_argument("--minutes", type=float, default=0.0, metavar="M", help="start no further case after this")
    parser.add_argument("--out", type=Path, metavar="CSV", help="append rows to this file")
    return parser.parse_args(argv)


def without_compiling(provider: Provider) -> Provider:
    """The provider, or one that says why it is left out when it would have to be compiled."""
    if not provider.name.endswith("compiled"):
        return provider
    return replace(provider, obstacle=lambda _: "left out by --compiled headline")


def chosen(matrix: Matrix, quick: bool, device: str, names: str | None) -> list[Any]:
    """The cases asked for; raises UserError for a name that does not exist."""
    known = {shape.name: shape for shape in matrix.shapes["quick" if quick else device]}
    if not names:
        return list(known.values())
    return [known[name] for name in _known("--shapes", names, list(known))]


def _known(option: str, given: str, known: Sequence[str]) -> list[str]:
    asked = [name for name in given.split(",") if name]
    for name in asked:
        if name not in known:
            raise UserError(f"{option}: {name} does not exist; there are: {', '.join(known)}")
    return asked


def selected(providers: list[Provider], words: str | None) -> list[Provider]:
    """Providers whose name contains one of the words; raises UserError for a word that none contains."""
    asked = [word for word in (words or "").split(",") if word]
    for word in asked:
        if not any(word in provider.name for provider in providers):
            raise UserError(f"--providers: {word}: no such provider; there are: {', '.join(p.name for p in providers)}")
    return [p for p in providers if not asked or any(word in p.name for word in asked)]


def dtypes(shape: Shape, device: str, given: str | None) -> list[torch.dtype]:
    """The dtypes a case is measured in."""
    if given:
        return [DTYPES[name] for name in _known("--dtypes", given, list(DTYPES))]
    if device == "cpu":
        return [torch.float32]
    return list(DTYPES.values()) if shape.every_dtype else [torch.bfloat16]


def render(measured: Sequence[dict[str, Any]]) -> str:
    """One block per mode and cache state, the fastest first, against the best baseline of the same scope."""
    lines = [f"  {row['provider']}: {row['status']}" for row in measured if row["status"] != "ok"]
    timed = [row for row in measured if row["status"] == "ok"]
    for mode, cache in dict.fromkeys((row["mode"], row["cache"]) for row in timed):
        block = sorted((r for r in timed if (r["mode"], r["cache"]) == (mode, cache)), key=lambda r: float(r["us_p50"]))
        lines.append(f"{mode}, cache {cache}; copy of the same bytes {block[0]['copy_us']} us")
        for row in block:
            best = best_baseline(block, row["scope"])
            versus = f"{float(best['us_p50']) / float(row['us_p50']):5.2f}x of {best['provider']}" if best else ""
            lines.append(
                f"  {row['provider']:26} {float(row['us_p50']):10.1f} us ({row['us_p20']} - {row['us_p80']})  "
                f"copy {100 * float(row['copy_share']):5.1f} %  rms {row['rms_error']}  "
                f"peak {row['peak_bytes'] / 2**20:8.1f} MiB  bitwise {row['bitwise']:3}  {versus}"
            )
    return "\n".join(lines)


def best_baseline(block: Sequence[Mapping[str, Any]], scope: str) -> Mapping[str, Any] | None:
    """The fastest provider of a scope that is not ours; None without one."""
    others = [row for row in block if row["ours"] == "no" and row["scope"] == scope and row["status"] == "ok"]
    return min(others, key=lambda row: float(row["us_p50"])) if others else None
