"""Which implementation of an op runs, and why.

In: the name of an op, the device of its tensors and an optional override. Out: the name of a backend.
Decision: a choice is never silent. The reason is logged the first time each one is made and `decisions` lists them
for the run's capsule; a backend that does not exist, or cannot run on that device, is an error and not a fallback.
Backends: reference (plain torch, the specification), triton (CUDA, or the interpreter), csrc (C++ and CUDA C++).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

from eventlens_ds.errors import ArgumentError

logger = logging.getLogger(__name__)

PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "roi_align": {"cuda": ("triton", "csrc", "reference"), "cpu": ("csrc", "reference", "triton")},
    "moa": {"cuda": ("triton", "reference", "csrc"), "cpu": ("reference", "csrc", "triton")},
}
"""Backends of each op per device type, the one to take first. Any other device type runs the reference."""

_decisions: dict[tuple[str, str], str] = {}


def choose_backend(op: str, device: torch.device | str, override: str | None = None) -> str:
    """The backend of `op` for tensors on `device`.

    `override` names one explicitly; None takes the first of PREFERENCE that runs there. Raises ArgumentError for an op
    or a backend that does not exist or cannot run on the device, naming those that can.
    """
    kind = torch.device(device).type
    obstacles = available(op, kind)
    usable = [name for name, obstacle in obstacles.items() if not obstacle]
    if override is not None:
        if obstacles.get(override, "no such backend"):
            why = obstacles.get(override, "no such backend")
            raise ArgumentError(f"{op} cannot run backend {override!r} on {kind}: {why}; backends: {', '.join(usable)}")
        name, reason = override, "asked for by name"
    else:
        # The interpreter is for tests: it runs when asked for by name, never by itself.
        name = next(candidate for candidate in usable if candidate != "triton" or kind != "cpu")
        skipped = [f"{other}: {why}" for other, why in obstacles.items() if why and _rank(op, kind, other, name)]
        reason = "; ".join(skipped) or f"first choice on {kind}"
    _record(op, kind, f"{name} ({reason})")
    return name


def available(op: str, device_type: str) -> dict[str, str]:
    """Every backend of `op` in order of preference, with what keeps it from running on a device type ("" if nothing).

    Raises ArgumentError for an unknown op.
    """
    if op not in PREFERENCE:
        raise ArgumentError(f"no op named {op!r}; ops: {', '.join(sorted(PREFERENCE))}")
    order = PREFERENCE[op].get(device_type, ("reference",))
    probes = {"reference": lambda kind: "", "triton": _triton_obstacle, "csrc": _csrc_obstacle}
    return {name: probes[name](device_type) for name in order}


def decisions() -> dict[str, str]:
    """Every choice made so far in this process: {"op on device type": "backend (reason)"}."""
    return {f"{op} on {device}": choice for (op, device), choice in sorted(_decisions.items())}


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_obstacle(device_type: str) -> str:
    if not _has_triton():
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a GPU (or TRITON_INTERPRET=1, for tests)"
    return ""


def _csrc_obstacle(device_type: str) -> str:
    from eventlens_ds.ops import extension

    return extension.obstacle(device_type)


def _rank(op: str, kind: str, other: str, chosen: str) -> bool:
    """Whether `other` is preferred to `chosen`."""
    order = PREFERENCE[op].get(kind, ("reference",))
    return order.index(other) < order.index(chosen)


def _record(op: str, device: str, choice: str) -> None:
    if _decisions.get((op, device)) != choice:
        _decisions[(op, device)] = choice
        logger.info("%s on %s runs %s", op, device, choice)
