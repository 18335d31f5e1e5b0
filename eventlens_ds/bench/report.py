"""`eventlens bench report`: writes the tables of BENCHMARKS.md and the plots from the CSV files, and nothing else.

In: results/*.csv. Out: the text between the markers of BENCHMARKS.md, PNG files in docs/plots. Text outside the markers
stays. Decision: no figure is typed; a ratio is always against the fastest baseline that passed the gate, ours is what
dispatch runs by default, and whatever the matrix names but no row holds is listed as not measured.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.bench import moa, plots, roi_align
from eventlens_ds.bench.kernels import rows
from eventlens_ds.bench.kernels.command import best_baseline, dtypes
from eventlens_ds.bench.kernels.harness import MODES
from eventlens_ds.errors import UserError

Row = dict[str, str]

MATRIX = {"roi_align": roi_align, "moa": moa}

ROOT = Path(__file__).resolve().parents[2]

DISPATCHED = "ours as dispatched"

NEVER = {
    "roi_align": "mmcv, F.interpolate on crops, torch.compile with max-autotune, CUDA graphs (kernel_us bounds them)",
    "moa": "grouped_gemm, ScatterMoE, MegaBlocks, Liger, vLLM and sglang kernels, PEFT X-LoRA and Arrow layers, "
    "torch.compile with max-autotune, CUDA graphs (kernel_us bounds them)",
}
"""Baselines that this repository has no provider for, so that nobody takes their absence for a result."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="eventlens bench report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=rows.RESULTS, metavar="DIR", help="folder of the CSV files")
    parser.add_argument("--file", type=Path, default=ROOT / "BENCHMARKS.md", metavar="MD")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "plots", metavar="DIR")
    parser.add_argument("--contract", type=Path, default=ROOT / "docs" / "KERNELS.md", metavar="MD")
    args = parser.parse_args(argv)
    for path in (args.file, args.contract):
        if not path.exists():
            raise UserError(f"{path}: no such file; the report fills in the marked parts of an existing one")
    losses = {}
    sections = {name: table(args.results / f"{name}.csv") for name, table in RUNS.items()}
    for op in MATRIX:
        found = rows.read(args.results / f"{op}.csv")
        pictures = plots.draw(op, found, args.plots)
        links = [f"![{alt}]({os.path.relpath(path, args.file.parent)})" for alt, path in pictures]
        sections[op] = kernels(op, found, links)
        losses[f"{op} slower"] = slower(found)
    for path, written in ((args.file, sections), (args.contract, losses)):
        text = path.read_text()
        for name, body in written.items():
            text = replace(text, name, body)
        path.write_text(text)
        print(f"{path}: {', '.join(written)}")
    return 0


def replace(text: str, name: str, body: str) -> str:
    """`text` with `body` between the markers of a section; a section without markers is added at the end."""
    start, end = f"<!-- eventlens bench report: {name} -->", f"<!-- end of {name} -->"
    block = f"{start}\n\n{body}\n\n{end}"
    before, found, rest = text.partition(start)
    if not found:
        return f"{text.rstrip()}\n\n{block}\n"
    _, closed, after = rest.partition(end)
    if not closed:
        raise UserError(f"the marker {end} is missing after {start}")
    return before + block + after


def _newest(path: Path, *key: str) -> list[Row]:
    """The newest row of each key, in the order of the file; none without the file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list({tuple(row[name] for name in key): row for row in csv.DictReader(file)}.values())


def score(path: Path) -> str:
    """The table of `eventlens bench score`, the newest measurement of each layout and machine."""
    found = _newest(path, "device", "preset", "layout")
    if not found:
        return "Not measured: `eventlens bench score DIR --out eventlens_ds/bench/results/score.csv`."
    lines = ["| layout | questions | tokens | median ms (quartiles) | measured on |", "|---|---|---|---|---|"]
    for row in found:
        lines.append(
            f"| {row['layout']} | {row['questions']} | {int(row['tokens']):,} "
            f"| {row['ms_p50']} ({row['ms_p25']} - {row['ms_p75']}) | {_provenance(row)} |"
        )
    return "\n".join(lines)


def loader(path: Path) -> str:
    """The table of `eventlens bench loader`: its rate over that of a plain Pillow loop, per data set and workers."""
    found = _newest(path, "machine", "data", "side", "workers")
    if not found:
        return "Not measured: `eventlens bench loader DIR --out eventlens_ds/bench/results/loader.csv`."
    lines = [
        "| data | megapixels -> side | workers | ours img/s | plain img/s | ours / plain (quartiles) | measured on |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['data']} | {row['megapixels']} -> {row['side']} px | {row['workers']} | {row['ours_img_s']} "
            f"| {row['plain_img_s']} | {row['ratio_p50']} ({row['ratio_p25']} - {row['ratio_p75']}) "
            f"| {row['machine']}, {row['cores']} cores, Pillow {row['pillow']}, torch {row['torch']}, "
            f"commit {row['commit'][:7]}, {row['date']} |"
        )
    return "\n".join(lines)


def train(path: Path) -> str:
    """The table of `eventlens bench train`: one line per arm, its rate over that of the baseline in the same run."""
    found = _newest(path, "device", "preset", "dtype", "ranks", "arm")
    if not found:
        return "Not measured: `eventlens bench train DIR --out eventlens_ds/bench/results/train.csv`."
    lines = [
        "| arm | supervised tokens/s (p20 - p80) | of HF Trainer | samples/s | padding | data wait | MiB a rank | MFU "
        "| time in vision, RoI, LM, adapters, other | measured on |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        base = next((r for r in found if r["arm"].startswith("hf") and _same_run(r, row)), None)
        low, rate, high = (float(row[f"supervised_per_s_{q}"]) for q in ("p20", "p50", "p80"))
        ratio = f"{rate / float(base['supervised_per_s_p50']):.2f}" if base else ""
        shares = ", ".join(_percent(row[f"share_{part}"]) if row[f"share_{part}"] else "n/a" for part in PARTS_OF_STEP)
        where = f"{row['preset']}, {row['dtype']}, {row['ranks']} ranks, {row['device']}, torch {row['torch']}"
        cells = (
            row["arm"],
            f"{rate:.0f} ({low:.0f} - {high:.0f})",
            ratio,
            f"{float(row['samples_per_s_p50']):.1f}",
            f"{_percent(row['padding_share'])} %",
            f"{_percent(row['data_wait_share'])} %",
            row["memory_mib_per_rank"],
            row["mfu"] or "n/a",
            f"{shares} %",
            f"{where}, commit {row['commit'][:7]}, {row['date']}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def adapters(path: Path) -> str:
    """The table of `eventlens bench adapters`: a step of each arm over that of the arm it is compared with."""
    found = _newest(path, "device", "preset", "layers", "dtype", "trained", "arm")
    if not found:
        return "Not measured: `eventlens bench adapters DIR --out eventlens_ds/bench/results/adapters.csv`."
    lines = [
        "| arm | median ms (quartiles) | ratio (quartiles) | forwards a row | shape | measured on |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        ratio = f"{row['ratio_p50']} ({row['ratio_p25']} - {row['ratio_p75']}) of {row['against']}"
        shape = (
            f"{row['preset']}, width {row['width']}, {row['layers']} layers, tower of {row['vision_layers']} at "
            f"{row['image_size']} px, bottleneck {row['bottleneck']}, {row['tokens']} tokens, {row['dtype']}, "
            f"trained: {row['trained']}"
        )
        lines.append(
            f"| {row['arm']} | {row['ms_p50']} ({row['ms_p25']} - {row['ms_p75']}) "
            f"| {ratio if row['against'] else ''} | {row['forwards_per_row']} | {shape} "
            f"| {_provenance({**row, 'modified': 'yes' if row['changed'] else 'no'})} |"
        )
    return "\n".join(lines)


def episodes(path: Path) -> str:
    """The table of `eventlens bench episodes`: time per episode of each arm over that of packed rows."""
    found = _newest(path, "device", "preset", "strategy", "shots", "arm")
    if not found:
        return "Not measured: `eventlens bench episodes DIR --out eventlens_ds/bench/results/episodes.csv`."
    lines = [
        "| shots | arm | ms an episode (quartiles) | of packed | episodes | tokens | padding | measured on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    packed = {(row["device"], row["strategy"], row["shots"]): row for row in found if row["arm"] == "packed"}
    for row in found:
        base = packed[row["device"], row["strategy"], row["shots"]]
        lines.append(
            f"| {row['strategy']}, {row['shots']} | {row['arm']} | {row['ms_per_episode_p50']} "
            f"({row['ms_per_episode_p25']} - {row['ms_per_episode_p75']}) "
            f"| {float(row['ms_per_episode_p50']) / float(base['ms_per_episode_p50']):.2f} | {row['episodes']} "
            f"| {int(row['tokens']):,} | {int(row['padded_tokens']):,} | {row['preset']}, {_provenance(row)} |"
        )
    return "\n".join(lines)


PARTS_OF_STEP = ("vision", "roi", "language", "adapters", "other")


def _same_run(a: Row, b: Row) -> bool:
    return all(a[name] == b[name] for name in ("device", "preset", "dtype", "ranks", "commit", "date"))


RUNS = {"score": score, "loader": loader, "train": train, "adapters": adapters, "episodes": episodes}
"""Benchmarks that are not of one op: name of the CSV and of the section -> its table."""


def _provenance(row: Row) -> str:
    threads = "" if row.get("device_type") == "cuda" else f", {row['threads']} threads"
    changed = " with changes" if row.get("modified") == "yes" else ""
    return f"{row['device']}{threads}, torch {row['torch']}, commit {row['commit'][:7]}{changed}, {row['date']}"


LEGEND = """\
Every provider makes its weights or routing inside the timed call (scope kernel: before it) and passed the gate: output
and all gradients agree with float64. Times are medians with the 20th and 80th percentile of interleaved rounds;
on a GPU with a cold L2 cache (warm ones are in the CSV). % of copy: against a copy_ that reads and writes the bytes
that any implementation must move, in the same rounds; % of roofline: against the slower of that and the needed FLOPs
at the speed of a large matrix product. rms error: in units of the rms of the float64 result, forward or the worst
gradient. memory / io: inputs and peak of the call over inputs and outputs."""


def kernels(op: str, found: Sequence[Row], pictures: Sequence[str]) -> str:
    """The whole section of one op: per machine a summary and the first case in full, then what is not measured."""
    parts = []
    for machine in dict.fromkeys((row["device"], row["threads"]) for row in found):
        mine = [row for row in found if (row["device"], row["threads"]) == machine]
        parts += [f"### {op}: {_provenance(mine[0])}", summary(mine), *full(mine), refused(mine)]
    parts += [*pictures, missing(op, found)]
    return "\n\n".join(part for part in ([LEGEND] if found else []) + parts if part)


def _blocks(found: Sequence[Row]) -> Iterator[list[Row]]:
    """The timed rows of one case, dtype, mode and cache state; on a GPU the cold cache only."""
    timed = [row for row in found if row["status"] == "ok" and row["cache"] != "warm"]
    for key in dict.fromkeys((row["case"], row["dtype"], row["mode"]) for row in timed):
        yield [row for row in timed if (row["case"], row["dtype"], row["mode"]) == key]


def summary(found: Sequence[Row]) -> str:
    """One line per case, dtype and mode: ours as dispatched against the fastest baseline."""
    lines = [
        "| case | dtype | mode | ours us (p20 - p80) | % of copy | % of roofline | fastest of ours "
        "| best baseline us | speed-up | rms error | memory / io |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for block in _blocks(found):
        ours = next((row for row in block if row["provider"] == DISPATCHED), None)
        best = best_baseline(block, "call")
        if ours is None:
            continue
        fastest = min((r for r in block if r["ours"] == "yes" and r["scope"] == "call"), key=_time)
        # Dispatch is wrong only where another path wins by more than the spread of the measurement.
        other = "as dispatched" if _time(fastest) > 0.9 * _time(ours) else f"{fastest['provider']} {fastest['us_p50']}"
        against = f"{best['provider']} {best['us_p50']}" if best else "none"
        ratio = f"{_time(best) / _time(ours):.2f}" if best else ""
        lines.append(
            f"| {ours['case']} | {ours['dtype']} | {ours['mode']} "
            f"| {ours['us_p50']} ({ours['us_p20']} - {ours['us_p80']}) | {_percent(ours['copy_share'])} "
            f"| {_percent(ours['roofline_share'])} | {other} | {against} | {ratio} | {ours['rms_error']} "
            f"| {memory(ours)} |"
        )
    return "\n".join(lines)


def slower(found: Sequence[Row]) -> str:
    """Where ours as dispatched loses to a baseline, per machine; and the kinds of device without a measurement."""
    lines = []
    for machine in dict.fromkeys((row["device"], row["threads"]) for row in found):
        mine = [row for row in found if (row["device"], row["threads"]) == machine]
        lost, compared = [], 0
        for block in _blocks(mine):
            ours = next((row for row in block if row["provider"] == DISPATCHED), None)
            best = best_baseline(block, "call")
            if ours is None or best is None:
                continue
            compared += 1
            if _time(best) < _time(ours):
                where = f"{ours['case']} {ours['dtype']} {ours['mode']}"
                lost.append(f"{where} ({_time(best) / _time(ours):.2f} of the speed of {best['provider']})")
        lines.append(f"- {_provenance(mine[0])}: in {len(lost)} of {compared} comparisons. {'; '.join(lost)}".rstrip())
    lines += [f"- {kind}: not measured" for kind in ("cuda", "cpu") if kind not in {r["device_type"] for r in found}]
    return "\n".join(lines)


def _time(row: Mapping[str, Any]) -> float:
    return float(row["us_p50"])


def _percent(share: str) -> str:
    return f"{100 * float(share):.0f}"


def memory(row: Row) -> str:
    """Inputs and peak over inputs and outputs; for backward alone it would depend on what forward saved."""
    if row["mode"] == "bwd":
        return ""
    return f"{(float(row['held_bytes']) + float(row['peak_bytes'])) / float(row['io_bytes']):.2f}"


def full(found: Sequence[Row]) -> list[str]:
    """Every provider of the first case, one table per mode."""
    tables = []
    first = found[0]["case"], next((row["dtype"] for row in found if row["status"] == "ok"), "")
    for block in _blocks(found):
        if (block[0]["case"], block[0]["dtype"]) != first:
            continue
        lines = [
            f"{first[0]}, {first[1]}, {block[0]['mode']}; a copy of the same bytes takes {block[0]['copy_us']} us:",
            "",
            "| provider | scope | us (p20 - p80) | % of copy | GB/s | rms error | peak MiB | launches | bitwise |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted(block, key=_time):
            lines.append(
                f"| {row['provider']} | {row['scope']} | {row['us_p50']} ({row['us_p20']} - {row['us_p80']}) "
                f"| {_percent(row['copy_share'])} | {row['gb_per_s']} | {row['rms_error']} "
                f"| {float(row['peak_bytes']) / 2**20:.1f} | {row['launches'] or 'n/a'} | {row['bitwise']} |"
            )
        tables.append("\n".join(lines))
    return tables


def refused(found: Sequence[Row]) -> str:
    """Providers without a time and why, with the cases it holds for."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in found:
        if row["status"] != "ok":
            reasons.setdefault((row["provider"], row["status"]), []).append(f"{row['case']} {row['dtype']}")
    total = len({(row["case"], row["dtype"]) for row in found})
    lines = [
        f"- {provider}: {status} ({'every case' if len(where) == total else ', '.join(where)})"
        for (provider, status), where in reasons.items()
    ]
    return "\n".join(["Without a time:", "", *lines]) if lines else ""


def missing(op: str, found: Sequence[Row]) -> str:
    """What the matrix names and no row holds, and the baselines without a provider."""
    lines = [f"Not measured ({op}):", ""]
    shapes = {"cuda": MATRIX[op].CUDA, "cpu": MATRIX[op].CPU}
    for kind, cases in shapes.items():
        there = {(r["case"], r["dtype"], r["mode"]) for r in found if r["device_type"] == kind}
        wanted = [(c.name, str(d).removeprefix("torch.")) for c in cases for d in dtypes(c, kind, None)]
        absent = [
            f"{name} {dtype}" for name, dtype in wanted if not all((name, dtype, mode) in there for mode in MODES)
        ]
        if len(absent) == len(wanted):
            lines.append(f"- {kind}: all {len(wanted)} cases (`eventlens bench {op} --device {kind} --list`)")
        elif absent:
            lines.append(f"- {kind}: {', '.join(absent)}")
    return "\n".join([*lines, f"- baselines that have no provider here: {NEVER[op]}"])
