"""The way into training that all launchers share: parse, load the configuration, run, turn errors into exit codes.

In: the arguments of `eventlens train` or `python -m eventlens_ds.train`, from a shell, torchrun, deepspeed or srun.
Out: an exit code; the only text printed here is errors and notes, on stderr.
Decision: options of the launcher (--ranks) stay in cli.py; everything else means the same behind every door, and a
token that is neither an option nor a setting is refused with the nearest name of both.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from eventlens_ds.errors import UserError

if TYPE_CHECKING:
    from eventlens_ds.config.run_config import RunConfig


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose complaints are UserErrors, and which does not take an abbreviation for an option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a training run; settings (--section.key=value) are left over by parse_known_args."""
    parser.add_argument("--config", metavar="RECIPE", help="YAML file, or name of a shipped recipe")
    parser.add_argument("--init-from", metavar="X", help="run, checkpoint or converted folder to start from")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and exit")
    parser.add_argument("--print-config", action="store_true", help="print every setting with its value, and exit")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def join_settings(argv: Sequence[str]) -> list[str]:
    """`--a.b c` as `--a.b=c`, so that a parser cannot take the value for one of its own arguments."""
    joined: list[str] = []
    for token in argv:
        last = joined[-1] if joined else ""
        waiting = last.startswith("--") and "." in last and "=" not in last
        if waiting and not token.startswith("--"):
            joined[-1] = f"{last}={token}"
        else:
            joined.append(token)
    return joined


def refuse_unknown(rest: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """UserError for the first token that a command without settings did not take."""
    for token in rest:
        refuse_near_options([token], parser)
        raise UserError(f"{parser.prog}: unknown argument {token} (see {parser.prog} --help)")


def refuse_near_options(rest: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """UserError for a token that looks like a misspelt option of `parser`, rather than like a setting."""
    flags = [flag for action in parser._actions for flag in action.option_strings if action.help != argparse.SUPPRESS]
    for token in rest:
        name = token.partition("=")[0]
        if name.startswith("--") and "." not in name:
            near = difflib.get_close_matches(name, flags, n=1)
            if near:
                raise UserError(f"{parser.prog}: unknown option {name}; nearest: {near[0]}")


def configure(args: argparse.Namespace, settings: Sequence[str]) -> RunConfig:
    """The configuration that options and settings ask for; a run that is not dry needs data that exist."""
    from eventlens_ds.config import checks, load

    extra = [f"--io.init_from={args.init_from}"] if args.init_from else []
    config = load.load(args.config, [*settings, *extra])
    if not (args.dry_run or args.print_config):
        checks.require_data(config)
    return config


def run(args: argparse.Namespace, settings: Sequence[str], command: Sequence[str]) -> int:
    """Train with parsed arguments; `command` is the command line for notes. Returns the exit code."""
    config = configure(args, settings)
    if args.print_config:
        from eventlens_ds.config import load

        sys.stdout.write(load.dump(config))
        return 0
    from eventlens_ds.train import run as training

    if not args.dry_run:
        _point_out_idle_gpus(command)
    return training.main(config, dry_run=args.dry_run) or 0


def launch(
    ranks: int,
    args: argparse.Namespace,
    settings: Sequence[str],
    command: Sequence[str],
    module: str = "eventlens_ds.train",
) -> int:
    """`eventlens train --ranks N`: hold the run folder, open an attempt, start the ranks, see to it that outcome.json
    says how it ended.

    What can be refused without the ranks is refused here, once. module: what every rank runs.
    """
    from eventlens_ds.runtime import lease
    from eventlens_ds.runtime.local_ranks import run_ranks
    from eventlens_ds.train import outcome

    config = configure(args, settings)
    run_dir = Path(config.io.run)
    held = lease.acquire(run_dir, config.io.lease_seconds)
    try:
        attempt = outcome.begin(run_dir)
        told = {outcome.ATTEMPT: str(attempt), outcome.LAUNCHED: outcome.launched()}
        told[lease.VARIABLE] = str(held.generation)
        ended = run_ranks(ranks, without_ranks(command), module, env=told)
        if held.held():
            outcome.conclude(run_dir, attempt, ended)
    finally:
        held.release()
    return ended.code


def without_ranks(command: Sequence[str]) -> list[str]:
    """A command line without --ranks N."""
    kept: list[str] = []
    skip = False
    for token in command:
        if not (skip or token == "--ranks" or token.startswith("--ranks=")):
            kept.append(token)
        skip = token == "--ranks"
    return kept


def idle_gpus(visible: int, used: int, command: Sequence[str]) -> str | None:
    """A note with the command that would use all GPUs of this machine, or None when none is idle."""
    if visible <= used:
        return None
    line = shlex.join(["eventlens", "train", "--ranks", str(visible), *without_ranks(command)])
    was = "is" if visible - used == 1 else "are"
    return f"{visible - used} of {visible} GPUs {was} idle; to use all: {line}"


def _point_out_idle_gpus(command: Sequence[str]) -> None:
    import torch

    from eventlens_ds.runtime.distributed import rendezvous

    env = rendezvous(dict(os.environ))
    if env["LOCAL_RANK"] != "0":
        return
    forced_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    note = idle_gpus(torch.cuda.device_count(), 0 if forced_cpu else int(env["LOCAL_WORLD_SIZE"]), command)
    if note:
        sys.stderr.write(f"eventlens: note: {note}{' (and unset DS_ACCELERATOR)' if forced_cpu else ''}\n")


def settle_accelerator() -> None:
    """Tell DeepSpeed that this machine has no GPU, where it has no GPU device file; it warns at import otherwise."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def start_logging() -> None:
    """Our own loggers print to stdout, on rank 0 from INFO and on the others from WARNING."""
    rank = _rank()
    logger = logging.getLogger("eventlens_ds")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def _rank() -> int:
    """Rank of this process as its launcher says, before any process group exists."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def guarded(function: Callable[[], int]) -> int:
    """Runs `function`; a UserError becomes one line on stderr and its exit code, Ctrl-C becomes 130 and SIGTERM 143.

    A bug keeps its traceback. What other ranks report (runtime/failures.py) passes through as a silent exit.
    """
    from eventlens_ds.runtime import failures

    try:
        return function()
    except BrokenPipeError:
        # The reader of our output left (`eventlens ... | head`); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in failures.STORAGE:
            raise
        code, line = failures.exit_of(error)
        sys.stderr.write(f"eventlens: error: {line}\n")
        return code
    except (KeyboardInterrupt, failures.Terminated) as stopped:
        code, line = failures.exit_of(stopped)
        if _rank() == 0:
            sys.stderr.write(f"eventlens: {line}\n")
        return code


def main(argv: Sequence[str]) -> int:
    """`python -m eventlens_ds.train`: one rank; the launcher has set its variables."""

    def train() -> int:
        parser = Parser(prog="python -m eventlens_ds.train", description="Train as one rank of a run.")
        add_arguments(parser)
        args, settings = parser.parse_known_args(join_settings(argv))
        refuse_near_options(settings, parser)
        settle_accelerator()
        start_logging()
        return run(args, settings, argv)

    return guarded(train)
