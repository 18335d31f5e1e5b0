"""Training with the kernels gives the losses of the reference: two ranks, ZeRO-3, the commands a user types.

In: the small world. Out: losses and gradient norms of each backend beside those of plain torch.
Decision: Triton runs in its interpreter, the program a GPU would compile; that takes minutes, so it is a slow test.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eventlens_ds.ops import dispatch
from tests.train.test_resume import LAUNCH, call, settings

STEPS = 3


def train(world: Path, run: Path, *more: str) -> list[dict[str, float]]:
    short = [
        f"--train.steps={STEPS}",
        "--data.row_tokens=256",
        "--train.rows_per_step=2",
        "--train.lr=0.01",
        "--train.timeout_minutes=20",
    ]
    done = call([*LAUNCH, *settings(world, run, *short, *more)], seconds=1200, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return train(world_folder, tmp_path_factory.mktemp("reference") / "run", "--model.kernels=reference")


@pytest.mark.P5
@pytest.mark.parametrize("kernels", ["csrc", pytest.param("triton", marks=pytest.mark.slow)])
def test_two_ranks_under_zero3_train_alike(
    kernels: str, reference: list[dict[str, float]], world_folder: Path, tmp_path: Path
) -> None:
    obstacle = dispatch.available("roi_align", "cpu")[kernels]
    if obstacle:
        pytest.skip(obstacle)
    found = train(world_folder, tmp_path / "run", f"--model.kernels={kernels}")
    capsule = json.loads((tmp_path / "run" / "capsule.json").read_text())
    assert {choice.split()[0] for choice in capsule["ops"].values()} == {kernels}
    assert len(found) == len(reference) == STEPS
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in reference], rel=1e-5)


def test_another_rule_for_the_bins_is_seen(
    reference: list[dict[str, float]], world_folder: Path, tmp_path: Path
) -> None:
    """Negative control: losses do depend on what RoI-align returns."""
    found = train(world_folder, tmp_path / "run", "--model.kernels=reference", "--model.roi.sampling_ratio=1")
    assert abs(found[-1]["loss"] / reference[-1]["loss"] - 1) > 1e-5
