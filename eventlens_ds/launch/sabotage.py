"""`python -m eventlens_ds.launch.sabotage ...`: a training run with a fault in it, or with a guard switched off.

In: the arguments of `eventlens train --ranks N`, and EVENTLENS_SABOTAGE, a JSON object. Out: what the run gives.
{"fault": HOW, "rank": R, "phase": P, "step": S}  HOW happens on rank R when it enters phase P of step S
{"without": "rng"}  rows do not seed their dropout, and a resume does not restore the generators
Decision: the same code runs as in any training; a fault is put in where the run marks what it does
(runtime/heartbeat.py), from outside that code, so that nothing of it is shipped in the training path.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

VARIABLE = "EVENTLENS_SABOTAGE"
MODULE = "eventlens_ds.launch.sabotage"


class Injected(RuntimeError):
    """The fault `exception`."""


def _exception() -> None:
    raise Injected("a fault was injected here")


def _hold_the_lock() -> None:
    """C code that never lets go of the interpreter lock: a match that would take longer than the universe."""
    import re

    re.match(r"(a*)*b", "a" * 64)


FAULTS: dict[str, Any] = {
    "exception": _exception,
    "exit": lambda: sys.exit(0),
    "abort": os.abort,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(10_000),
    "lock": _hold_the_lock,
}


def arm(asked: dict[str, Any]) -> None:
    """Put what EVENTLENS_SABOTAGE asks for into this process, a rank."""
    if asked.get("without") == "rng":
        _forget_generators()
    if "fault" in asked and int(asked["rank"]) == int(os.environ.get("RANK", "0")):
        _plant(asked)


def _plant(asked: dict[str, Any]) -> None:
    from eventlens_ds.runtime import heartbeat

    mark, phase, step = heartbeat.mark, asked["phase"], int(asked.get("step", 0))

    def marking(now: str, *args: Any, **kwargs: Any) -> None:
        mark(now, *args, **kwargs)
        if now == phase and heartbeat.here.step == step:
            sys.stderr.write(f"sabotage: {asked['fault']} in phase {phase} of step {step} at {time.time()!r}\n")
            sys.stderr.flush()
            FAULTS[asked["fault"]]()

    heartbeat.mark = marking  # type: ignore[assignment]


def _forget_generators() -> None:
    import torch

    from eventlens_ds.runtime import rng
    from eventlens_ds.train import step

    class WithoutSeeds:
        """torch, as train/step.py sees it, without the seed of a row."""

        def __getattr__(self, name: str) -> Any:
            return (lambda seed: None) if name == "manual_seed" else getattr(torch, name)

    step.torch = WithoutSeeds()  # type: ignore[assignment]
    rng.restore = lambda state: None


def main(argv: list[str]) -> int:
    """One rank when a launcher has set RANK; else the launcher of such ranks: `train --ranks N ...`."""
    from eventlens_ds.train import door

    if "RANK" in os.environ:
        arm(json.loads(os.environ.get(VARIABLE, "{}")))
        return door.main(argv)
    parser = door.Parser(prog=MODULE)
    parser.add_argument("--ranks", type=int, default=1)
    door.add_arguments(parser)
    joined = door.join_settings(argv)
    args, settings = parser.parse_known_args(joined)
    door.settle_accelerator()
    return door.guarded(lambda: door.launch(args.ranks, args, settings, joined, MODULE))


if __name__ == "__main__":
    from eventlens_ds.runtime.failures import leave

    leave(lambda: main(sys.argv[1:]))
