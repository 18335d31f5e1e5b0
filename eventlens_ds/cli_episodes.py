"""The options of `eventlens eval` that speak of episodes (--tasks lcl).

In: the command line. Out: keyword arguments of `eval.request.check`. Decision: they stand apart from cli.py, because
no other task reads them, and asking for them without lcl is refused.
"""

from __future__ import annotations

import argparse
from typing import Any

from eventlens_ds.cli_data import names
from eventlens_ds.errors import UserError


def add_episodes(parser: argparse.ArgumentParser) -> None:
    conditions = "none, blank_demos, shuffle_labels, released_splice, correct_50, place_first (default none)"
    parser.add_argument("--shots", default="", metavar="A,B", help="for lcl, per class (default 0,1,2,4,8)")
    parser.add_argument("--episodes", default="", metavar="A,B", help=f"for lcl: {conditions}")
    parser.add_argument("--answers", type=int, default=0, metavar="N", help="for lcl: queries answered in words too")


def episode_options(args: argparse.Namespace) -> dict[str, Any]:
    try:
        shots = [int(count) for count in names(args.shots)]
    except ValueError:
        raise UserError(f"--shots {args.shots}: wants numbers with commas") from None
    return {"shots": shots, "episodes": names(args.episodes), "answers": args.answers}
