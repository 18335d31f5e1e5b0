"""`eventlens plan`, split from cli.py: its options, and the call.

In: the command line. Out: an exit code, as in cli.py. Decision: as there, what is called is imported inside.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from eventlens_ds.cli_data import add


def add_plan(commands: Any) -> None:
    plan = add(commands, "plan", _plan, "predict memory, traffic and scaling of a recipe", takes_rest=True)
    plan.epilog = "settings: --section.key=value change the recipe; --data.train=DIR takes rows from data"
    plan.add_argument("--config", metavar="RECIPE", help="YAML file, or name of a shipped recipe")
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="default 1")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default 8")
    plan.add_argument(
        "--gpu", default="h100", metavar="KIND", help="a100-40, a100, h100, h200, b200, cpu (default h100)"
    )
    plan.add_argument(
        "--images", type=int, default=0, metavar="N", help="images of a row (default: from data, or full)"
    )
    plan.add_argument("--calibrate", type=Path, metavar="RUN", help="measured run whose times are scaled")
    plan.add_argument("--check", type=Path, metavar="DATA", help="compare predictions with measured small runs, here")
    plan.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and traffic over nodes")
    plan.add_argument("--json", action="store_true")


def _plan(args: argparse.Namespace, rest: list[str]) -> int:
    from eventlens_ds.launch import plan
    from eventlens_ds.train import door

    door.refuse_near_options(rest, args.parser)
    return plan.main(args, rest)
