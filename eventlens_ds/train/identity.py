"""What a checkpoint may be continued with: the same data, tokenizer, prompts, settings; else a refusal with a diff.

In: the run as it is now, the identity in a manifest, `io.accept`. Out: nothing, or a DataError that lists every
difference as "key: was -> now". Decision: settings that change neither numbers nor their order (where to write, how
often to save, how many loader workers) may differ freely; everything else is refused unless named, because a run that
continues with another learning rate or tokenizer gives results that nobody can explain later.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

FREE = (
    "io.", "eval.", "data.train", "data.eval", "data.workers", "data.prefetch", "data.error_budget",
    "model.kernels", "model.attention", "model.init_from", "train.steps", "train.zero", "train.save_every",
    "train.keep", "train.eval_every", "train.log_every", "train.ledger", "train.threads", "train.timeout_minutes",
    "train.watchdog_seconds", "train.stop_signals", "train.skip_limit",
)  # fmt: skip
"""Beginnings of keys that may differ. data.train is compared by content, train.zero by the stage of the checkpoint."""

SHORT = 12


def identity(config: RunConfig, data: Sequence[str], plan: str, tokenizer: str, prompts: Any) -> dict[str, Any]:
    """JSON-able: fingerprints of the shards in the order of data.train, of the plan and of the tokenizer; settings."""
    settings = {key: value for key, value in _flat(asdict(config)) if not key.startswith(FREE)}
    return {"data": list(data), "plan": plan, "tokenizer": tokenizer, "prompts": prompts, "settings": settings}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and name != "lr_scale":
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def defaults() -> dict[str, Any]:
    """Every setting as a run has it that names none."""
    return dict(_flat(asdict(RunConfig())))


def changes(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Key -> "was -> now" of everything that differs."""
    found = {}
    old, new = saved["data"], now["data"]
    for number in range(max(len(old), len(new))):
        was, is_now = (part[number][:SHORT] if number < len(part) else "none" for part in (old, new))
        if old[number : number + 1] != new[number : number + 1]:
            found[f"data: folder {number + 1} of data.train"] = f"{was} -> {is_now}"
    for key in ("tokenizer", "prompts"):
        if saved[key] != now[key]:
            found[key] = f"{str(saved[key])[:SHORT]} -> {str(now[key])[:SHORT]}"
    # A setting that a run is older than had no effect then, and its default has none.
    old_settings = defaults() | saved["settings"]
    for key in sorted({*saved["settings"], *now["settings"]}):
        was, is_now = old_settings.get(key), now["settings"].get(key)
        if was != is_now:
            found[key] = f"{was} -> {is_now}"
    if saved["plan"] != now["plan"] and not found:
        found["data: the plan"] = f"{saved['plan'][:SHORT]} -> {now['plan'][:SHORT]}"
    return found


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], accept: Sequence[str], source: str) -> None:
    """DataError unless every change was accepted: by its key, or data, tokenizer for what they begin with."""
    found = changes(saved, now)
    for name in accept:
        if name != "base" and name not in ("data", "tokenizer") and name not in {*saved["settings"], *now["settings"]}:
            raise UserError(f"io.accept: {name}: not among what a checkpoint is compared by")
    refused = {key: change for key, change in found.items() if key.partition(":")[0] not in accept}
    if refused:
        told = "; ".join(f"{key}: {change}" for key, change in refused.items())
        names = ",".join(dict.fromkeys(key.partition(":")[0] for key in refused))
        raise DataError(f"{source}: made with other data or settings: {told} (to go on: --io.accept={names})")
    for key, change in found.items():
        log.warning("accepted: %s: %s", key, change)
