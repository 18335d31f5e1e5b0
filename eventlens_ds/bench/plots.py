"""The plots of the kernel benchmarks, as PNG files.

In: rows of one op. Out: (description, file) of each plot that the rows can fill; none for rows that are not there.
Decision: bars share one scale and start at zero; a speed-up is drawn against the fastest baseline with a line at one,
so a loss looks like a loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.bench.kernels.command import best_baseline

Row = dict[str, str]

DISPATCHED = "ours as dispatched"

_CROSSOVER = re.compile(r"T(\d+)-D(\d+)-E(\d+)-r(\d+)-k2")


def draw(op: str, found: Sequence[Row], folder: Path) -> list[tuple[str, Path]]:
    """Write the plots of one op, per device. Returns nothing where there are no timed rows."""
    import matplotlib

    matplotlib.use("Agg")
    made: list[tuple[str, Path]] = []
    for machine in dict.fromkeys((row["device"], row["threads"]) for row in found):
        mine = [
            r for r in found if (r["device"], r["threads"]) == machine and r["status"] == "ok" and r["cache"] != "warm"
        ]
        compared = _compared(mine)
        if not compared:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", f"{op} {machine[0]}".lower()).strip("-")
        where = f"{op} on {machine[0]}"
        made.append((f"{where}: share of copy bandwidth", _copy_share(compared, where, folder / f"{slug}-copy.png")))
        made.append(
            (f"{where}: speed-up over the best baseline", _speedup(compared, where, folder / f"{slug}-speed.png"))
        )
        crossing = _crossover(mine, where, folder / f"{slug}-crossover.png") if op == "moa" else None
        if crossing:
            made.append((f"{where}: dense against sparse", crossing))
    return made


def _compared(found: Sequence[Row]) -> dict[tuple[str, str], tuple[Row, Row]]:
    """(case and dtype, mode) -> (ours as dispatched, the fastest baseline)."""
    pairs: dict[tuple[str, str], tuple[Row, Row]] = {}
    for row in found:
        if row["provider"] != DISPATCHED:
            continue
        same = [r for r in found if all(r[key] == row[key] for key in ("case", "dtype", "mode"))]
        best = best_baseline(same, "call")
        if best is not None:
            pairs[f"{row['case']} {row['dtype']}", row["mode"]] = row, dict(best)
    return pairs


def _axes(cases: int, columns: int) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1,
        columns,
        figsize=(4.2 * columns, 1.4 + 0.42 * cases),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    return figure, axes[0]


def _save(figure: Any, title: str, path: Path) -> Path:
    from matplotlib import pyplot

    figure.suptitle(title, fontsize=10)
    # Without its version in the file, the same rows give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _copy_share(compared: dict[tuple[str, str], tuple[Row, Row]], where: str, path: Path) -> Path:
    cases, modes = list(dict.fromkeys(c for c, _ in compared)), list(dict.fromkeys(m for _, m in compared))
    figure, axes = _axes(len(cases), len(modes))
    for axis, mode in zip(axes, modes):
        for side, (name, colour) in enumerate((("ours", "tab:blue"), ("best baseline", "tab:gray"))):
            there = {i: compared[case, mode][side] for i, case in enumerate(cases) if (case, mode) in compared}
            at = [i + 0.4 * side - 0.2 for i in there]
            axis.barh(
                at, [100 * float(row["copy_share"]) for row in there.values()], height=0.38, color=colour, label=name
            )
        axis.set(title=mode, xlabel="% of the speed of a copy")
    shares = [100 * float(row["copy_share"]) for pair in compared.values() for row in pair]
    axes[0].set_xlim(0, 1.05 * max(shares))
    axes[0].set_yticks(range(len(cases)), cases, fontsize=7)
    axes[0].invert_yaxis()
    axes[-1].legend(fontsize=7)
    return _save(figure, where, path)


def _speedup(compared: dict[tuple[str, str], tuple[Row, Row]], where: str, path: Path) -> Path:
    cases, modes = list(dict.fromkeys(c for c, _ in compared)), list(dict.fromkeys(m for _, m in compared))
    figure, axes = _axes(len(cases), len(modes))
    for axis, mode in zip(axes, modes):
        for at, case in enumerate(cases):
            if (case, mode) not in compared:
                continue
            ours, best = compared[case, mode]
            ratio = float(best["us_p50"]) / float(ours["us_p50"])
            axis.barh(at, ratio, height=0.6, color="tab:green" if ratio >= 1 else "tab:red")
            axis.text(ratio, at, f" {ratio:.2f} {best['provider']}", va="center", fontsize=6)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=mode, xlabel="time of the best baseline / ours")
    ratios = [float(best["us_p50"]) / float(ours["us_p50"]) for ours, best in compared.values()]
    # Room for the names to the right of the longest bar.
    axes[0].set_xlim(0, 1.6 * max(1.0, *ratios))
    axes[0].set_yticks(range(len(cases)), cases, fontsize=7)
    axes[0].invert_yaxis()
    return _save(figure, where, path)


def _crossover(found: Sequence[Row], where: str, path: Path) -> Path | None:
    """Times of our paths over E * r, for the (T, D) with the most points at k = 2; None when there are fewer than 3."""
    times: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in found:
        match, name = _CROSSOVER.fullmatch(row["case"]), row["provider"].split()
        if not match or row["mode"] != "fwd+bwd" or row["ours"] == "no" or name[1] not in ("dense", "sparse"):
            continue
        tokens, width, adapters, rank = match.groups()
        line = times.setdefault((tokens, width), {}).setdefault(name[1], {})
        columns = int(adapters) * int(rank)
        line[columns] = min(line.get(columns, float("inf")), float(row["us_p50"]))
    sizes = max(times, key=lambda size: sum(map(len, times[size].values())), default=None)
    if sizes is None or max(map(len, times[sizes].values())) < 3:
        return None
    figure, (axis,) = _axes(6, 1)
    for path_name, measured in sorted(times[sizes].items()):
        at = sorted(measured)
        axis.plot(at, [measured[columns] for columns in at], marker="o", label=path_name)
    axis.set(xscale="log", yscale="log", xlabel="hidden columns E * r", ylabel="us, fwd+bwd, fastest backend")
    axis.legend(fontsize=8)
    return _save(figure, f"{where}: T={sizes[0]}, D={sizes[1]}, k=2", path)
