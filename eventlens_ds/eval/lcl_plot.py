"""Accuracy of episodes by shots, one line per condition, with its interval.

In: metrics of eval/report.py. Out: metrics/lcl.png. Decision: the axis ends at 0 and 1 and chance is drawn, so that a
small effect looks small.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot(metrics: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Write the plot; False when no condition holds episodes."""
    lines = {stem: kinds["lcl"]["shots"] for stem, kinds in metrics.items() if "lcl" in kinds}
    if not lines:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=120)
    for stem, shots in lines.items():
        xs = [int(count) for count in shots]
        ys = [block["accuracy"] for block in shots.values()]
        ends = [block["interval"] for block in shots.values()]
        spread = [[y - (e[0] if e[0] is not None else y) for y, e in zip(ys, ends)]]
        spread.append([(e[1] if e[1] is not None else y) - y for y, e in zip(ys, ends)])
        axes.errorbar(xs, ys, spread, marker="o", capsize=3, label=stem)
    axes.axhline(0.5, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="shots per class", ylabel="two-way accuracy (likelihood)", ylim=(0, 1))
    axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return True
