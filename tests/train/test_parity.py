"""One planned step under ZeRO 0-3, tree and flat rows, one and two ranks equals plain torch in one process (P8).

In: the small world; rows of the step hold LM and choice groups unevenly, and the last rank lacks a row. Out: the
table of launch/parity.py, checked cell by cell and printed (pytest -s shows it).
Decision: the file is the job of its ranks too, so that the negative control can average rows inside them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.launch import parity
from eventlens_ds.runtime.failures import leave
from tests.small_world import SmallRun

ROOT = Path(__file__).parents[2]


def run(small: SmallRun, matrix: parity.Matrix, guard: str = "on") -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        patch.setenv("PARITY_GUARD", guard)
        return parity.table(matrix, small.architecture, module="tests.train.test_parity")


def check(cells: list[dict[str, Any]], matrix: parity.Matrix, path: Path) -> None:
    path.write_text(parity.text(cells) + "\n")
    print(f"\n{path}\n{path.read_text()}")
    sizes = [len(matrix.stages), len(matrix.layouts), len(matrix.rows), len(matrix.ranks)]
    assert len(cells) == sizes[0] * sizes[1] * sizes[2] * sizes[3]
    for cell in cells:
        assert cell["loss_rel"] <= 1e-5 and cell["norm_rel"] <= 1e-5, cell
        if cell["stage"] == 3:
            assert cell["partitioned"] == cell["parameters"], cell
            assert cell["gathers"] > 50 or cell["ranks"] == 1, cell


def test_the_step_mixes_objectives_unevenly(small: SmallRun) -> None:
    """Otherwise means of rows would agree by chance and the matrix would prove nothing."""
    from eventlens_ds.model import objective

    plan = small.data.plan(seed=0, rows_per_step=3)
    counts = [objective.counts(small.batch(row.groups)).tolist() for row in plan.step(0)]
    assert len({tuple(c) for c in counts}) == 3
    assert any(lm and not questions for lm, questions, _ in counts) and any(questions for _, questions, _ in counts)


@pytest.mark.P8
@pytest.mark.P4
def test_three_rows_on_one_and_two_ranks(small: SmallRun, world_folder: Path, tmp_path: Path) -> None:
    """Accumulation 3 and 2; with two ranks the second one has no row in the last micro-step."""
    matrix = parity.Matrix(str(world_folder), rows=(3,))
    check(run(small, matrix), matrix, tmp_path / "parity.md")


@pytest.mark.P8
def test_means_of_rows_would_differ(small: SmallRun, world_folder: Path) -> None:
    """Negative control: with a mean per row the loss depends on how rows are cut and spread."""
    matrix = parity.Matrix(str(world_folder), rows=(3,), stages=(3,), ranks=(2,), layouts=("tree",))
    (cell,) = run(small, matrix, guard="off")
    assert cell["loss_rel"] > 1e-3 and cell["norm_rel"] > 1e-3, cell


@pytest.mark.P8
@pytest.mark.slow
def test_the_whole_matrix(small: SmallRun, world_folder: Path, tmp_path: Path) -> None:
    """Accumulation 1, 2, 3 and 5, with and without a missing row."""
    matrix = parity.Matrix(str(world_folder), rows=(2, 3, 5))
    check(run(small, matrix), matrix, tmp_path / "parity.md")


def average_rows() -> None:
    """Switch the guard off: every row is divided by its own counts, and rows are averaged."""
    import torch

    from eventlens_ds.model import objective

    counts, row_sums = objective.counts, objective.row_sums

    def mean(token_logp: Any, batch: Any, *rest: Any) -> Any:
        made = row_sums(token_logp, batch, *rest)
        made.sums = made.sums / counts(batch).clamp(min=1).to(made.sums)
        return made

    objective.row_sums = mean
    objective.counts = lambda batch, **_: torch.ones(3, dtype=torch.float64)


if __name__ == "__main__":
    if os.environ["PARITY_GUARD"] == "off":
        average_rows()
    leave(lambda: parity.rank_job(Path(sys.argv[1])))
