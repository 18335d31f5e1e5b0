"""`eventlens prove|preflight|compare`: what a user runs to trust a machine, a recipe, or two runs.

In: the command line. Out: an exit code, as in cli.py; tables on stdout.
Decision: as there, every command imports what it calls inside its function.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from eventlens_ds.cli_data import add, existing, names
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.train import door


def add_proofs(commands: Any) -> None:
    prove = commands.add_parser("prove", help="break your own run on purpose and compare", description="Proofs.")
    kinds = prove.add_subparsers(title="commands", metavar="COMMAND", required=True)
    resume = add(kinds, "resume", _prove_resume, "kill at random times, resume, compare bit for bit", takes_rest=True)
    resume.add_argument("--kills", type=int, default=10, metavar="N", help="kills in all (default 10)")
    resume.add_argument("--without", default="", choices=("", "rng"), help="switch a guard off: the proof must fail")
    elastic = add(kinds, "elastic", _prove_elastic, "go on with other numbers of ranks, compare steps", True)
    elastic.add_argument("--order", default="2,1,4,2", metavar="A,B", help="numbers of ranks (default 2,1,4,2)")
    elastic.add_argument("--without", default="", choices=("", "rng"), help="switch a guard off: the proof must fail")
    faults = add(kinds, "faults", _prove_faults, "a fault in every phase: detected, in time, blamed right?", True)
    faults.add_argument("--faults", default="", metavar="A,B", help="exception, exit, abort, kill, stop, hang, lock")
    faults.add_argument("--phases", default="", metavar="A,B", help="start, step, eval, save (default all)")
    faults.add_argument("--seconds", type=float, default=6.0, metavar="T", help="train.watchdog_seconds (default 6)")
    preflight = add(commands, "preflight", _preflight, "one step of a recipe, saved and loaded, before a job", True)
    for parser in (resume, elastic, faults, preflight):
        parser.epilog = "settings: --section.key=value, as for `eventlens train`"
        parser.add_argument("--config", metavar="RECIPE", default="prove", help="default: prove, a 40-step tiny model")
        parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes on this machine (default 2)")
        parser.add_argument("--out", type=Path, default=Path("runs/prove"), metavar="DIR")
    resume.add_argument("--seed", type=int, default=0, metavar="S", help="of times and targets (default 0)")
    compare = add(commands, "compare", _compare, "what differs between two runs, and nothing else")
    compare.add_argument("a", type=Path, metavar="RUN_A")
    compare.add_argument("b", type=Path, metavar="RUN_B")


def _say(line: str) -> None:
    print(line, flush=True)


def _proof(args: argparse.Namespace, rest: list[str]) -> Any:
    from eventlens_ds.launch.prove import Proof

    door.refuse_near_options(rest, args.parser)
    if args.ranks < 1:
        raise UserError(f"--ranks {args.ranks}: must be at least 1")
    return Proof(args.config, tuple(rest), args.out, args.ranks, getattr(args, "without", ""))


def _prove_resume(args: argparse.Namespace, rest: list[str]) -> int:
    from eventlens_ds.launch import prove

    result = prove.resume(_proof(args, rest), args.kills, args.seed, _say)
    sys.stdout.write(prove.table(result) + "\n")
    if not result["identical"]:
        raise DataError(f"{args.out}: a killed run is not the same as one that nobody disturbed")
    return 0


def _prove_elastic(args: argparse.Namespace, rest: list[str]) -> int:
    from eventlens_ds.launch import elastic

    order = names(args.order)
    if not all(name.isdigit() for name in order):
        raise UserError(f"--order {args.order}: numbers of ranks with commas between them")
    result = elastic.elastic(_proof(args, rest), [int(name) for name in order], _say)
    sys.stdout.write(elastic.table(result) + "\n")
    if not result["same_samples"] or result["largest"] > elastic.TOLERANCE:
        raise DataError(
            f"{args.out}: another number of ranks changed samples, or a loss by more than {elastic.TOLERANCE}"
        )
    return 0


def _prove_faults(args: argparse.Namespace, rest: list[str]) -> int:
    from eventlens_ds.launch import faults

    asked = names(args.faults) or faults.FAULTS, names(args.phases) or faults.PHASES
    cells = faults.matrix(_proof(args, rest), *asked, args.seconds, _say)
    wrong = [cell for cell in cells if not cell.ok(args.seconds + faults.GRACE)]
    if wrong:
        told = ", ".join(f"{cell.fault} in {cell.phase}" for cell in wrong)
        raise DataError(f"{args.out}: {len(wrong)} of {len(cells)} faults were not detected as they should be: {told}")
    return 0


def _preflight(args: argparse.Namespace, rest: list[str]) -> int:
    from eventlens_ds.launch import preflight

    proof = _proof(args, rest)
    print(preflight.text(preflight.main(proof.recipe, proof.settings, proof.ranks, args.out)))
    return 0


def _compare(args: argparse.Namespace, _rest: list[str]) -> int:
    from eventlens_ds.launch import compare

    print(compare.text(existing(args.a), existing(args.b)))
    return 0
