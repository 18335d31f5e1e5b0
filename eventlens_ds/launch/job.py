"""What the job scripts ask of Python: is there work, and what does the end of an attempt mean?

In: `python -m eventlens_ds.launch.job begin|conclude|lead|history`, from slurm/job.sh. Out: a few lines that it reads.
RUN/slurm/attempts.jsonl has one line per attempt: job, nodes, state, code, checkpoint, decision, seconds.
  begin     check the configuration, make RUN/slurm; "train" or "finished", the run folder, attempts so far
  conclude  read outcome.json; "exit", "requeue" or "again", an exit code, one line that says why
  lead      seconds before the time limit at which the job should be told, from the stops measured so far
  history   the attempts of a run as a table
Decision: outcome.json is believed only when this attempt wrote it, and a failure is repeated only as long as new
checkpoints appear; so neither a rank that dies while importing nor a bug at one step can go round for ever.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from eventlens_ds.errors import UserError
from eventlens_ds.runtime import commit, lease
from eventlens_ds.train import door, outcome

FINAL = (2, 3, 6)
"""Exit codes that another attempt cannot change: configuration, data or checkpoint, node check."""
LEASED, TERMINATED, PLANNED = 4, 143, 75
FOLDER, JOURNAL = "slurm", "attempts.jsonl"

SHORTEST, USUAL, LONGEST = 120, 300, 3600
"""Bounds of `lead`, and what the scripts ask for as long as nothing has been measured, in seconds."""


class Decision(NamedTuple):
    """exit: end the job with `code`. requeue: run it again. again: try once more in this job, a little later."""

    action: Literal["exit", "requeue", "again"]
    code: int
    reason: str


class End(NamedTuple):
    """How an attempt ended, as the job script saw it.

    state: of outcome.json, "" when this attempt did not write it. code: of outcome.json, else of the first rank that
    failed, else of srun. signal: what the script was sent, USR1 (stop soon), TERM (being cancelled) or "".
    step: newest committed checkpoint. restarted: Slurm has run this job before. job: number and restart of the job.
    """

    state: str
    code: int
    reason: str
    signal: str
    step: int
    restarted: bool
    job: str = ""


def decide(end: End, earlier: Sequence[dict[str, Any]], *, max_crashes: int, lease_tries: int) -> Decision:
    """What follows an attempt; `earlier` are the lines of the journal before it."""
    if end.state == outcome.FINISHED:
        return Decision("exit", 0, "finished")
    if end.signal == "TERM":
        return Decision("exit", TERMINATED, f"cancelled, {_saved(end.step)}")
    if end.state == outcome.PREEMPTED:
        return Decision("requeue", PLANNED, f"stopped on request, {_saved(end.step)}")
    if end.code == TERMINATED or (end.signal == "USR1" and end.code == 0):
        return Decision("requeue", PLANNED, f"stopped on request before its first step, {_saved(end.step)}")
    if end.code in FINAL:
        return Decision("exit", end.code, f"failed with code {end.code}, which no other attempt changes: {end.reason}")
    if end.code == LEASED:
        # Only a restarted job can be kept out by its own attempt before, cut off from Slurm while its rank lives on.
        tries = 1 + sum(row["code"] == LEASED and row["job"] == end.job for row in earlier)
        what = f"the run folder is in use, try {tries} of {lease_tries if end.restarted else 1}: {end.reason}"
        return Decision("again" if end.restarted and tries < lease_tries else "exit", LEASED, what)
    code = end.code or 1
    # Having waited for the run folder is neither a crash nor progress.
    runs = [row for row in earlier if row["code"] != LEASED]
    fruitless = 1 + _trailing(
        runs, lambda row: row["step"] == end.step and row["decision"] == "requeue" and row["code"]
    )
    if fruitless >= max_crashes:
        what = f"{fruitless} attempts in a row without a new checkpoint"
        return Decision(
            "exit", code, f"failed with code {code}: {end.reason}; given up after {what}, {_saved(end.step)}"
        )
    return Decision("requeue", code, f"failed with code {code}: {end.reason}; {_saved(end.step)}")


def _saved(step: int) -> str:
    return f"saved at step {step}" if step else "nothing saved yet"


def _trailing(rows: Sequence[dict[str, Any]], fits: Any) -> int:
    """How many of the last rows fit, without a gap."""
    count = 0
    for row in reversed(rows):
        if not fits(row):
            break
        count += 1
    return count


def journal(run: Path) -> list[dict[str, Any]]:
    """The attempts of a run so far; a line torn by a kill is left out."""
    rows = []
    try:
        lines = (run / FOLDER / JOURNAL).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def newest_step(run: Path) -> int:
    """Step of the newest committed checkpoint, 0 without one; its bytes are not checked here."""
    return max((int(path.name.split("-")[1]) for path in commit.committed(run)), default=0)


def begin(settings: Sequence[str]) -> str:
    """Lines for the script: "train" or "finished", the run folder, the number of the attempt before.

    UserError for a configuration that cannot run and for a run folder that cannot be written.
    """
    config = _configure(settings)
    run = Path(config.io.run).absolute()
    before = outcome.read(run)
    done = before.get("state") == outcome.FINISHED and int(before.get("step") or 0) >= config.train.steps
    try:
        (run / FOLDER).mkdir(parents=True, exist_ok=True)
        probe = run / FOLDER / f".probe-{time.time_ns()}"
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        raise UserError(f"io.run {run}: cannot be written: {error.strerror}") from None
    return f"{'finished' if done else 'train'}\n{run}\n{int(before.get('attempt', 0))}"


def _configure(settings: Sequence[str]) -> Any:
    parser = door.Parser(prog="slurm job", add_help=False)
    door.add_arguments(parser)
    args, rest = parser.parse_known_args(door.join_settings(settings))
    door.refuse_near_options(rest, parser)
    return door.configure(args, rest)


def conclude(args: argparse.Namespace) -> str:
    """Note the attempt in the journal; lines for the script: action, exit code, reason."""
    end = read_end(args)
    earlier = journal(args.run)
    decision = decide(end, earlier, max_crashes=args.max_crashes, lease_tries=args.lease_tries)
    row = {
        "job": args.job,
        "nodes": args.nodes,
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "state": end.state,
        "code": end.code,
        "signal": end.signal,
        "step": end.step,
        "decision": decision.action,
        "seconds": args.seconds,
        "stop_seconds": args.stop_seconds,
        "reason": decision.reason,
    }
    with (args.run / FOLDER / JOURNAL).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    args.exits.unlink(missing_ok=True)
    return f"{decision.action}\n{decision.code}\n{decision.reason}"


def read_end(args: argparse.Namespace) -> End:
    """The end of an attempt from outcome.json, the exit codes of ranks and srun's."""
    said = outcome.read(args.run)
    ours = int(said.get("attempt", 0)) > args.before
    state = str(said.get("state", "")) if ours else ""
    first = args.exits.read_text().splitlines()[:1] if args.exits.exists() else []
    code, reason = args.srun, f"srun ended with {args.srun}" if args.srun else "the ranks ended without a word"
    if first:
        number, rank, node = first[0].split()
        code, reason = int(number), f"rank {rank} on {node} ended with {number}"
    if code == LEASED and not ours:
        reason = f"held by {lease.holder(args.run)}"
    # srun sends TERM to the others when one rank fails: then theirs is not the reason.
    if ours and state == outcome.FAILED and not (first and said["code"] == TERMINATED):
        code, reason = int(said["code"]), str(said["reason"])
    if state == outcome.PREEMPTED and code not in (0, PLANNED, TERMINATED):
        state = outcome.FAILED  # the others stopped because srun told them to, when this rank had failed
    restarted = args.job.rpartition(".")[2] not in ("", "0")
    return End(state, code, reason, args.stop, newest_step(args.run), restarted, args.job)


def lead(settings: Sequence[str]) -> str:
    """Seconds between the signal and the end of the job: twice the slowest stop of this run and a minute."""
    slowest = max((row["stop_seconds"] for row in journal(Path(_configure(settings).io.run))), default=0)
    return str(min(max(SHORTEST, 2 * slowest + 60), LONGEST) if slowest else USUAL)


def history(run: Path) -> str:
    """The attempts of a run as a table. Steps are those of checkpoints."""
    rows = journal(run)
    if not rows:
        raise UserError(f"{run}: no attempts of a Slurm job ({FOLDER}/{JOURNAL})")
    columns = ("job", "nodes", "state", "code", "signal", "step", "decision", "seconds", "stop_seconds", "ended")
    table = [columns, *(tuple(str(row[name]) for name in columns) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    return "\n".join(" ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)


def _parser() -> argparse.ArgumentParser:
    parser = door.Parser(prog="python -m eventlens_ds.launch.job", description="Begin and end of a Slurm job.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=door.Parser)
    verbs.add_parser("begin", help="arguments of `eventlens train`", add_help=False)
    verbs.add_parser("lead", help="arguments of `eventlens train`", add_help=False)
    verbs.add_parser("history").add_argument("run", type=Path)
    made = verbs.add_parser("conclude")
    for name in ("run", "exits"):
        made.add_argument(f"--{name}", type=Path, required=True)
    for name in ("before", "srun", "seconds", "stop-seconds", "max-crashes", "lease-tries"):
        made.add_argument(f"--{name}", type=int, required=True)
    for name in ("stop", "job", "nodes"):
        made.add_argument(f"--{name}", default="")
    return parser


def main(argv: Sequence[str]) -> int:
    args, rest = _parser().parse_known_args(argv)
    if args.verb in ("begin", "lead"):
        print({"begin": begin, "lead": lead}[args.verb](argv[1:]))
    elif rest:
        raise UserError(f"unknown argument {rest[0]}")
    else:
        print(history(args.run) if args.verb == "history" else conclude(args))
    return 0


if __name__ == "__main__":
    sys.exit(door.guarded(lambda: main(sys.argv[1:])))
