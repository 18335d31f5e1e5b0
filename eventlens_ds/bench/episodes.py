"""`eventlens bench episodes DATA`: packed rows of episodes against one padded episode per forward, as released.

In: a folder of `eventlens data build` that holds episodes, and settings. Out: one CSV line per arm in --out, and text.
  packed  rows of the plan, whole episodes up to data.row_tokens
  padded  batch size 1, every episode padded to the longest of the step (the released code's collator)
  alone   batch size 1, no padding
Decision: all arms run forward and backward over the same episodes in the same process, interleaved, and no time is
reported unless their losses agree to 1e-4.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError, UserError

ARMS = ("packed", "padded", "alone")
COLUMNS = (
    "arm", "strategy", "shots", "episodes", "images", "tokens", "padded_tokens", "ms_per_episode_p25",
    "ms_per_episode_p50", "ms_per_episode_p75", "repeats", "max_loss_difference", "preset", "attention", "device",
    "threads", "torch", "commit", "date",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="eventlens bench episodes", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of `eventlens data build` with episodes")
    parser.add_argument("--config", default="tiny_lcl")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps whose episodes are measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    args, settings = parser.parse_known_args(argv)
    if args.steps < 1 or args.repeats < 2:
        raise UserError(f"--steps {args.steps} --repeats {args.repeats}: at least 1 and 2")
    lines = measure(args.data, args.config, settings, args.steps, args.repeats, args.threads)
    if args.out:
        new = not args.out.exists()
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(lines)
    packed = float(lines[0]["ms_per_episode_p50"])
    for line in lines:
        ratio = float(line["ms_per_episode_p50"]) / packed
        print(
            f"{line['arm']:<7} {line['ms_per_episode_p50']:>9} ms an episode, {ratio:.2f} of packed; "
            f"{line['episodes']} episodes, {line['tokens']} tokens, {line['padded_tokens']} of padding"
        )
    return 0


def measure(
    folder: Path, recipe: str, settings: Sequence[str], steps: int, repeats: int, threads: int
) -> list[dict[str, Any]]:
    """One dict of COLUMNS per arm. Raises DataError when the arms give different losses."""
    import torch

    from eventlens_ds.config.load import load
    from eventlens_ds.model import initial, objective
    from eventlens_ds.runtime.build_model import describe, model_dtype
    from eventlens_ds.runtime.capsule import code
    from eventlens_ds.train.run import training_data

    if threads:
        torch.set_num_threads(threads)
    config = load(recipe, [f"--data.train=[{folder}]", "--data.tasks=[lcl]", "--data.episodes.share=0", *settings])
    architecture, tokenizer, spec = describe(config, dry=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = initial.new_model(architecture, dtype=model_dtype(config), seed=config.train.seed)
    model.to(device)
    data = training_data(config, tokenizer, spec)
    plan = data.plan(seed=config.train.seed, rows_per_step=config.train.rows_per_step)
    rows = [row for step in range(steps) for row in plan.step(step)]
    members = [member for row in rows for member in row.groups]
    batches = {arm: [batch.to(device) for batch in found] for arm, found in _batches(data, rows).items()}
    chunk = config.train.vision_chunk

    def run(arm: str) -> float:
        total = 0.0
        for batch in batches[arm]:
            token_logp = model(batch, max(1, -(-batch.pixel_values.shape[0] // chunk)))
            made = objective.row_sums(token_logp, batch, config.objective)
            loss = made.sums[0] + made.sums[1]
            loss.backward()
            total += float(loss.detach())
        model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return total / len(members)

    losses = {arm: run(arm) for arm in ARMS}
    difference = max(losses.values()) - min(losses.values())
    if not difference < 1e-4 * max(1.0, abs(losses["packed"])):
        raise DataError(f"the arms differ by {difference:.2g} in their loss; no time is reported")
    times = _timed(run, repeats, len(members))
    shared = {
        "strategy": config.data.episodes.strategy,
        "shots": config.data.episodes.shots,
        "episodes": len(members),
        "repeats": repeats,
        "max_loss_difference": f"{difference:.2e}",
        "preset": config.model.preset,
        "attention": architecture.text_config._attn_implementation,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": code().get("commit"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    return [{"arm": arm, **shared, **_facts(batches[arm], taken)} for arm, taken in times.items()]


def _timed(run: Callable[[str], float], repeats: int, episodes: int) -> dict[str, list[float]]:
    """Milliseconds an episode of every arm, the arms in turn."""
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(repeats):
        for arm, taken in times.items():
            started = time.perf_counter()
            run(arm)
            taken.append(1000 * (time.perf_counter() - started) / episodes)
    return times


def _facts(batches: Sequence[Any], taken: Sequence[float]) -> dict[str, Any]:
    """What an arm ran over, and quartiles of its milliseconds an episode."""
    names = ("ms_per_episode_p25", "ms_per_episode_p50", "ms_per_episode_p75")
    return {
        "images": sum(batch.pixel_values.shape[0] for batch in batches),
        "tokens": sum(batch.real_tokens for batch in batches),
        "padded_tokens": sum(batch.input_ids.shape[1] - batch.real_tokens for batch in batches),
        **dict(zip(names, (f"{q:.2f}" for q in statistics.quantiles(taken, n=4)))),
    }


def _batches(data: Any, rows: Sequence[Any]) -> dict[str, list[Any]]:
    """The same episodes as the rows of the plan, one by one, and one by one padded to the longest."""
    members = [member for row in rows for member in row.groups]
    alone = [data.batch([member], 0) for member in members]
    longest = max(batch.real_tokens for batch in alone)
    padded = [_padded(data, member, longest) for member in members]
    return {"packed": [data.batch(row.groups, 0) for row in rows], "padded": padded, "alone": alone}


def _padded(data: Any, member: tuple[int, int], tokens: int) -> Any:
    """One episode as a row of `tokens` tokens."""
    from eventlens_ds.data.collate import collate

    group = data.group(*member)
    encoded = data.encode(group, *member)
    vision = data.spec.vision
    return collate(
        [encoded],
        visual_tokens=vision.tokens,
        image_size=vision.image_size,
        seed=0,
        pad_to=tokens,
        pad_id=data.tokenizer.pad,
    )
