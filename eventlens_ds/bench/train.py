"""`eventlens bench train DATA`: our training against Hugging Face Trainer with DeepSpeed, and against itself ablated.

In: a folder of `eventlens data build`, a recipe, settings. Out: one CSV line per arm in --out, and a table. The stages:
  1. gate     every arm's loss on the same samples (bench/gate.py)
  2. tune     a short run of the baseline per micro-batch size; the fastest is its size
  3. measure  one process group per arm and repeat, in rotated order, each with its warm-up (bench/arms.py)
  4. join     medians and spreads; arms that did not train on the same samples are refused
Decision: speed is supervised tokens per second, the one quantity all arms have in common; tokens of padding and of
repeated prefixes are work that an arm makes for itself. Nothing is printed before the gate has passed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventlens_ds.errors import DataError, UserError

if TYPE_CHECKING:
    from eventlens_ds.bench.arms import Job, Setting
    from eventlens_ds.runtime.distributed import World

SPEEDS = ("supervised", "samples", "tokens")
"""Counts whose rates per second are reported; tokens: all that are not padding."""

PARTS = ("vision", "roi", "language", "adapters")

COLUMNS = (
    "arm", "recipe", "preset", "ranks", "threads", "zero", "dtype", "attention", "kernels", "micro_batch",
    "steps", "micro_steps", "repeats", "samples", "supervised", "tokens", "padding_share",
    *(f"{name}_per_s_{quantile}" for name in SPEEDS for quantile in ("p20", "p50", "p80")),
    "ms_per_step_p50", "data_wait_share", "memory_mib_per_rank",
    "mfu", *(f"mfu_{part}" for part in PARTS), *(f"share_{part}" for part in PARTS), "share_other",
    "gate_difference", "device", "cores", "python", "torch", "deepspeed", "transformers", "commit", "changed", "date",
)  # fmt: skip

TUNED = (1, 2, 4)
"""Micro-batches tried for the baseline, in rows of data.row_tokens tokens."""

_MODULE = "eventlens_ds.bench.train"


def main(argv: Sequence[str]) -> int:
    """Measure and print; with the folder of a job as only argument, be one rank of it."""
    if len(argv) == 1 and (Path(argv[0]) / "job.json").is_file():
        return _rank(Path(argv[0]))
    from eventlens_ds.bench.arms import Job, Phases

    args, settings = _parse(argv)
    if args.out:
        _refuse_other_columns(args.out)
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // args.ranks)
    settings = [*settings, f"--train.threads={threads}"]
    job = Job(
        kind="gate",
        data=str(args.data.resolve()),
        recipe=args.config,
        settings=tuple(settings),
        arms=_arms(args.arms, args.config, settings),
        phases=Phases(args.warmup, args.steps, args.clocked),
        micro_batch=args.hf_batch,
    )
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if args.dry_run:
        print(_dry_text(job))
        return 0
    lines = measure(job, args.ranks, args.repeats)
    if args.out:
        _append(args.out, lines)
    print(table(lines))
    return 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    from eventlens_ds.train import door

    parser = door.Parser(prog="eventlens bench train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of `eventlens data build`")
    parser.add_argument("--config", default="tiny_vcr", metavar="RECIPE", help="recipe of the run (default tiny_vcr)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed optimizer steps (default 10)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="optimizer steps before them (default 2)")
    parser.add_argument("--clocked", type=int, default=2, metavar="N", help="steps for the time by part (default 2)")
    parser.add_argument("--repeats", type=int, default=3, metavar="K", help="processes per arm (default 3)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of a group (default 1)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads per rank (default: a share)")
    parser.add_argument("--hf-batch", type=int, default=0, metavar="N", help="samples per micro-batch (default: tuned)")
    parser.add_argument("--arms", default="", metavar="A,B", help="default: all that differ on this machine")
    parser.add_argument("--out", type=Path, metavar="CSV", help="file to append to")
    parser.add_argument("--dry-run", action="store_true", help="shapes and FLOPs of every arm, without weights")
    args, settings = parser.parse_known_args(door.join_settings(argv))
    door.refuse_near_options(settings, parser)
    for name, least in (("steps", 1), ("warmup", 1), ("repeats", 1), ("ranks", 1), ("clocked", 0), ("hf_batch", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if not args.data.is_dir():
        raise UserError(f"{args.data}: no such folder")
    return args, settings


def _arms(asked: str, recipe: str, settings: Sequence[str]) -> tuple[str, ...]:
    """The arms to measure. Without a wish those that are not by definition the same run as another."""
    from eventlens_ds.bench.arms import ARMS
    from eventlens_ds.config.load import load

    config = load(recipe, settings)
    if asked:
        unknown = [name for name in asked.split(",") if name not in ARMS]
        if unknown:
            raise UserError(f"--arms {asked}: no arm {unknown[0]!r}; there are: {', '.join(ARMS)}")
        return tuple(dict.fromkeys(asked.split(",")))
    same = [] if _has_kernels(config.model.kernels) else ["ours_reference"]
    if same:
        print("ours_reference is left out: on this machine the reference is what ours runs")
    return tuple(name for name in ARMS if name not in same)


def _has_kernels(wanted: str) -> bool:
    """Whether any op runs something else than the reference here."""
    import torch

    from eventlens_ds.ops.dispatch import PREFERENCE, choose_backend

    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = "cuda" if on_gpu else "cpu"
    return any(choose_backend(op, device, wanted or None) != "reference" for op in PREFERENCE)


def measure(job: Job, ranks: int, repeats: int) -> list[dict[str, Any]]:
    """One dict of COLUMNS per arm. Raises DataError when the gate fails or arms trained on other samples."""
    from eventlens_ds.bench import gate
    from eventlens_ds.bench.arms import BASELINE

    with tempfile.TemporaryDirectory() as folder:
        gated = _run(job, 1, Path(folder) / "gate")
        difference = gate.check(gated["seen"])
        job = replace(job, kind="time")
        if BASELINE in job.arms and not job.micro_batch:
            # Beyond the samples of a step it would take fewer steps than the other arms.
            most = -(-gated["seen"][0]["samples"] // (job.phases.timed * ranks))
            sizes = sorted({min(times * gated["micro_batch"], most) for times in TUNED})
            job = replace(job, micro_batch=_tuned(job, sizes, ranks, Path(folder)))
        results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in job.arms}
        for repeat in range(repeats):
            first = repeat % len(job.arms)
            for arm in (*job.arms[first:], *job.arms[:first]):
                # Times by part are taken once, in the first processes.
                phases = job.phases if repeat == 0 else job.phases._replace(clocked=0)
                own = replace(job, arms=(arm,), phases=phases)
                results[arm].append(_run(own, ranks, Path(folder) / f"{arm}-{repeat}"))
    return join(job, results, difference)


def _tuned(job: Job, sizes: Sequence[int], ranks: int, folder: Path) -> int:
    """The micro-batch of the baseline with the most supervised tokens per second in a run of a third of the steps."""
    from eventlens_ds.bench.arms import BASELINE

    phases = job.phases._replace(timed=max(1, job.phases.timed // 3), clocked=0)
    speeds: dict[int, float] = {}
    complaint = ""
    for size in sizes:
        own = replace(job, arms=(BASELINE,), phases=phases, micro_batch=size)
        try:
            result = _run(own, ranks, folder / f"tune-{size}")
        except DataError as error:
            # A size that does not fit the memory is no candidate.
            complaint = str(error)
            continue
        speeds[size] = result["supervised"] / result["seconds"]
    if not speeds:
        raise DataError(f"bench train: the baseline runs with no micro-batch of {sizes}: {complaint}")
    shown = ", ".join(f"{size}: {speed:.0f}" for size, speed in speeds.items())
    print(f"baseline, supervised tokens/s by samples per micro-batch: {shown}", flush=True)
    return max(speeds, key=lambda size: speeds[size])


def _run(job: Job, ranks: int, folder: Path) -> dict[str, Any]:
    """Run a job in `ranks` processes of its own and return what rank 0 wrote."""
    from eventlens_ds.runtime.local_ranks import spawn

    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    code = spawn(ranks, [str(folder)], module=_MODULE)
    if code != 0:
        log = (folder / "rank0.log").read_text(errors="replace").strip().splitlines()
        what = "the gate" if job.kind == "gate" else ", ".join(job.arms)
        raise DataError(f"bench train: {what} ended with exit code {code}: " + "\n".join(log[-12:]))
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def _rank(folder: Path) -> int:
    """One rank of a job: what it prints goes to a file beside the job."""
    number = int(os.environ.get("RANK", "0"))
    out = os.open(folder / f"rank{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    from eventlens_ds.bench import arms
    from eventlens_ds.runtime import distributed
    from eventlens_ds.train import door

    door.settle_accelerator()
    raw = json.loads((folder / "job.json").read_text())
    lists = {name: tuple(raw[name]) for name in ("settings", "arms")}
    job = arms.Job(**{**raw, **lists, "phases": arms.Phases(*raw["phases"])})
    given = arms.setting(job, job.arms[0])
    world = distributed.start(given.config.train.threads, given.config.train.timeout_minutes)
    result = _result(job, given, world)
    if world.rank == 0:
        (folder / "result.json").write_text(json.dumps({**result, "preset": given.config.model.preset}))
    distributed.stop()
    return 0


def _result(job: Job, given: Setting, world: World) -> dict[str, Any]:
    """What a rank was asked for. A collective."""
    from eventlens_ds.bench import arms

    if job.kind == "time" and job.arms[0] != arms.BASELINE:
        return arms.run(given, job.arms[0], world)
    # Imported by those that need it: the Trainer takes seconds.
    from eventlens_ds.bench import gate, hf_trainer

    if job.kind == "time":
        return hf_trainer.run(given, world, job.micro_batch)
    job = replace(job, micro_batch=job.micro_batch or hf_trainer.fitting_samples(given))
    return {"seen": gate.losses(job, world.device), "micro_batch": job.micro_batch}


def join(job: Job, results: dict[str, list[dict[str, Any]]], difference: float) -> list[dict[str, Any]]:
    """One dict of COLUMNS per arm from the results of its repeats.

    Raises DataError when a process trained on other samples or other supervised tokens than the first one, or when the
    kernels changed between two repeats of an arm.
    """
    runs = [(arm, result) for arm, found in results.items() for result in found]
    for arm, result in runs:
        for key in ("ids", "samples", "supervised"):
            if result[key] != runs[0][1][key]:
                raise DataError(
                    f"bench train: {arm} and {runs[0][0]} did not train on the same samples: {key} {result[key]} and "
                    f"{runs[0][1][key]}; nothing is reported"
                )
    for arm, found in results.items():
        if any(result["kernels"] != found[0]["kernels"] for result in found):
            raise DataError(
                f"bench train: {arm} ran other kernels in another repeat; was the extension built meanwhile?"
            )
    facts = _machine()
    return [
        {
            "arm": arm,
            "recipe": job.recipe,
            "repeats": len(found),
            **_columns(found),
            "gate_difference": f"{difference:.1e}",
            **facts,
            "device": found[0]["gpu"] or facts["device"],
        }
        for arm, found in results.items()
    ]


def _columns(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one arm. MFU takes the median repeat; a share of time is that of the clocked steps."""
    from eventlens_ds.train.metrics import mfu

    first = found[0]
    rates = {name: [run[name] / run["seconds"] for run in found] for name in SPEEDS}
    seconds = statistics.median(run["seconds"] for run in found)
    used: dict[str, float | None] = {
        part: mfu(first["flops"][part], seconds, first["ranks"], first["gpu"], first["dtype"])[0] for part in PARTS
    }
    known = [value for value in used.values() if value is not None]
    memory = [max(run["memory"][rank] for run in found) for rank in range(first["ranks"])]
    named = ("preset", "ranks", "threads", "zero", "dtype", "attention", "steps", "samples", "supervised", "tokens")
    shown = {f"share_{part}": f"{share:.3f}" for part, share in (first["shares"] or {}).items()}
    return {
        **{name: first[name] for name in named},
        "kernels": "; ".join(f"{op}: {choice.split(' ')[0]}" for op, choice in first["kernels"].items()),
        "micro_batch": first.get("micro_batch", ""),
        "micro_steps": first["micro"],
        "padding_share": f"{1 - first['tokens'] / first['computed']:.3f}",
        **{
            f"{name}_per_s_{label}": f"{value:.1f}"
            for name, speeds in rates.items()
            for label, value in zip(("p20", "p50", "p80"), spread(speeds))
        },
        "ms_per_step_p50": f"{1000 * seconds / first['steps']:.1f}",
        "data_wait_share": f"{statistics.median(run['waited'] / run['seconds'] for run in found):.3f}",
        "memory_mib_per_rank": " ".join(f"{peak / 2**20:.0f}" for peak in memory),
        "mfu": f"{sum(known):.4f}" if known else "",
        **{f"mfu_{part}": "" if value is None else f"{value:.4f}" for part, value in used.items()},
        **{f"share_{part}": shown.get(f"share_{part}", "") for part in (*PARTS, "other")},
    }


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles; of a single value three times itself."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def _machine() -> dict[str, Any]:
    """Device, versions, commit and date of a CSV line."""
    from eventlens_ds.runtime import capsule

    code, versions, hardware = capsule.code(), capsule.versions(), capsule.hardware()
    return {
        "device": hardware["processor"],
        "cores": hardware["cores"],
        **{name: versions[name] for name in ("python", "torch", "deepspeed", "transformers")},
        "commit": code["commit"],
        # Empty for a clean checkout: then the commit says everything.
        "changed": (code["diff_sha256"] or "")[:12],
        "date": datetime.now(UTC).date().isoformat(),
    }


def _refuse_other_columns(path: Path) -> None:
    """A file of another table would be found out only after the measurement."""
    if path.exists() and path.read_text(encoding="utf-8").partition("\n")[0].strip() != ",".join(COLUMNS):
        raise UserError(f"--out {path}: has other columns than this benchmark; name another file")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: no such folder")


def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(lines)


def _dry_text(job: Job) -> str:
    """Shapes of the first micro-step of every arm, for a terminal."""
    from eventlens_ds.bench import gate

    out = [f"{'arm':<16}{'samples':>9}{'supervised':>12}{'tokens':>9}{'padded to':>11}{'images':>8}  GFLOP by part"]
    for line in gate.shapes(replace(job, micro_batch=job.micro_batch or 1)):
        flops = ", ".join(f"{part} {line['flops'][part] / 1e9:.1f}" for part in PARTS)
        out.append(
            f"{line['arm']:<16}{line['samples']:>9}{line['supervised']:>12}{line['tokens']:>9}{line['computed']:>11}"
            f"{line['images']:>8}  {flops}"
        )
    return "\n".join([*out, "One micro-step, forward and backward on shapes alone; nothing was measured."])


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines for a terminal, with every arm's speed relative to the first."""
    base = float(lines[0]["supervised_per_s_p50"])
    out = [f"{'arm':<16}{'supervised tok/s (p20-p80)':>30}{'x':>7}{'samples/s':>11}{'padding':>9}{'wait':>7}{'MiB':>7}"]
    for line in lines:
        low, median, high = (float(line[f"supervised_per_s_{q}"]) for q in ("p20", "p50", "p80"))
        speed = f"{median:.0f} ({low:.0f}-{high:.0f})"
        out.append(
            f"{line['arm']:<16}{speed:>30}{median / base:>7.2f}{float(line['samples_per_s_p50']):>11.1f}"
            f"{line['padding_share']:>9}{line['data_wait_share']:>7}{line['memory_mib_per_rank'].split()[0]:>7}"
        )
    return "\n".join(
        [*out, f"x: relative to {lines[0]['arm']}. The same samples in every arm; losses differ by at most "
               f"{lines[0]['gate_difference']} (fp32)."]
    )  # fmt: skip


def _guarded_main() -> int:
    from eventlens_ds.train import door

    return door.guarded(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    from eventlens_ds.runtime.failures import leave

    leave(_guarded_main)
