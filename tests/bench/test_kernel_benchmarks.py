"""The kernel benchmarks: every provider computes the op, shapes are what they say, commands write what they promise.

In: the quick shapes of both benchmarks. Out: nothing. Decision: all providers run through the real gate, forward and
backward against float64; those that are slow to compile or to interpret have a slow test. The gate is shown to bite.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from eventlens_ds.bench import moa, roi_align
from eventlens_ds.bench.kernels.command import chosen, dtypes, selected, without_compiling
from eventlens_ds.bench.kernels.harness import Ready, gate
from eventlens_ds.bench.providers import roi_align as roi_providers
from eventlens_ds.bench.providers import torchvision
from eventlens_ds.errors import UserError

CPU = torch.device("cpu")
MODULES = pytest.mark.parametrize("module", [roi_align, moa], ids=["roi_align", "moa"])


def slow(name: str) -> bool:
    """Providers that take seconds here: compiled, or Triton in the interpreter, which tests/ops has for its own."""
    return name.endswith("compiled") or "triton" in name


def results(
    module: ModuleType, shape, dtype: torch.dtype = torch.float32, only_slow: bool = False
) -> dict[str, object]:
    """What the gate says of every provider that applies."""
    problem = module.problem(shape, dtype, CPU)
    entries = [p for p in module.providers(CPU) if p.applies(problem) and slow(p.name) == only_slow]
    return {entry.name: gate(problem, entry) for entry in entries}


def not_ready(found: dict[str, object]) -> dict[str, object]:
    return {name: r for name, r in found.items() if not isinstance(r, Ready) and not str(r).startswith("absent")}


@MODULES
def test_every_provider_agrees_with_float64(module: ModuleType):
    for shape in module.QUICK:
        found = results(module, shape)
        assert not not_ready(found), shape.name
        assert sum(isinstance(r, Ready) for r in found.values()) >= 7


@MODULES
@pytest.mark.slow
def test_compiled_and_interpreted_providers_agree_with_float64(module: ModuleType):
    for shape in module.QUICK:
        torch.compiler.reset()
        found = results(module, shape, only_slow=True)
        assert found and not not_ready(found), shape.name


@pytest.mark.parametrize(
    "change",
    [
        {"aligned": False},
        {"levels": 3},
        {"spread": "one"},
        {"spread": "zipf", "mix": "spilling", "grid": (7, 11)},
        {"sampling": 3, "bins": 1},
        {"mix": "whole", "pool": "mean"},
        {"sampling": -1},
    ],
)
def test_every_option_of_roi_align(change: dict[str, object]):
    shape = replace(roi_align.QUICK[0], **change)
    found = results(roi_align, shape)
    assert not not_ready(found)
    written_for_it = 0 if shape.sampling < 1 else 7
    assert sum(isinstance(r, Ready) and not r.provider.ours for r in found.values()) == written_for_it


def test_half_precision_inputs_are_compared_after_rounding():
    found = results(roi_align, roi_align.QUICK[0], torch.bfloat16)
    low, high = found["bmm"], found["bmm high+low"]
    assert isinstance(low, Ready) and isinstance(high, Ready)
    assert high.errors["fwd"][1] < low.errors["fwd"][1] < 1.5e-2


def test_a_baseline_without_the_border_rule_is_called_wrong(monkeypatch: pytest.MonkeyPatch):
    """Negative control of the gate on the real op: the hat without its clamp, as zero padding would have it."""
    right = roi_providers.sample_positions

    def unclamped(given, axis):
        corner = given.boxes * given.scale - 0.5
        size = (corner[:, 3 - axis] - corner[:, 1 - axis]) / (given.output[axis] * given.sampling)
        index = torch.arange(given.output[axis] * given.sampling) + 0.5
        return corner[:, 1 - axis, None] + index * size[:, None], right(given, axis)[1]

    monkeypatch.setattr(roi_providers, "sample_positions", unclamped)
    found = results(roi_align, replace(roi_align.QUICK[0], mix="spilling"))
    assert str(found["einsum eager"]).startswith("wrong: forward")
    assert isinstance(found["ours reference"], Ready)


@MODULES
def test_names_are_unique_and_choosable(module: ModuleType):
    for shapes in (module.CUDA, module.CPU, module.QUICK):
        names = [shape.name for shape in shapes]
        assert len(set(names)) == len(names)
    providers = [p.name for p in module.providers(CPU)]
    assert len(set(providers)) == len(providers)
    assert "ours as dispatched" in providers


def test_headline_shapes_of_the_issue_are_there():
    assert {"B8-24x24-C1024-R12-P7", "B8-24x24-C1024-R12-P7-mean"} <= {shape.name for shape in roi_align.CPU}
    assert roi_align.CUDA[0].name == "B64-24x24-C1408-R12-P7" and moa.CUDA[0].name == "T16384-D4096-E4-r64-k2"
    assert {f"T2048-D{d}-{rest}" for d in (512, 1024) for rest in ("E4-r64-k2", "E16-r128-k2", "E4-r64-k1-tasks")} <= {
        shape.name for shape in moa.CPU
    }


def test_boxes_per_image():
    zipf = roi_align.boxes_per_image(roi_align.Shape(8, (24, 24), 1408, 16, spread="zipf"))
    assert sum(zipf) == 128 and zipf == sorted(zipf, reverse=True) and zipf[-1] == 0
    assert roi_align.boxes_per_image(roi_align.Shape(3, (4, 4), 8, 2, spread="one")) == [6, 0, 0]


def test_needed_bytes_count_touched_cells_once():
    whole = roi_align.Shape(2, (6, 6), 8, 3, mix="whole")
    problem = roi_align.problem(whole, torch.float32, CPU)
    given = roi_providers.inputs_of(problem)
    output, boxes = 6 * 7 * 7 * 8 * 4, 6 * 4 * 4
    assert problem.min_bytes["fwd"] == 2 * 36 * 8 * 4 + output + boxes
    assert problem.min_bytes["bwd"] == given.levels[0].nbytes + output + boxes
    few = roi_align.problem(replace(whole, spread="one"), torch.float32, CPU)
    assert few.min_bytes["fwd"] == 36 * 8 * 4 + output + boxes


def test_needed_flops_are_those_of_selected_adapters():
    problem = moa.problem(moa.QUICK[0], torch.float32, CPU)
    assert problem.flops["fwd"] == 2 * 2 * 96 * 2 * 16 * 64 and problem.flops["fwd+bwd"] == 3 * problem.flops["fwd"]


def test_dtypes_by_default_and_on_demand():
    first, later = roi_align.CUDA[0], roi_align.CUDA[3]
    assert dtypes(first, "cpu", None) == [torch.float32] and dtypes(later, "cuda", None) == [torch.bfloat16]
    assert dtypes(first, "cuda", None) == [torch.bfloat16, torch.float16, torch.float32]
    assert dtypes(later, "cuda", "fp16") == [torch.float16]
    with pytest.raises(UserError, match="fp8"):
        dtypes(later, "cuda", "fp8")


def test_unknown_shapes_and_providers_are_named():
    matrix = roi_align.Matrix("roi_align", {"cpu": roi_align.CPU, "quick": roi_align.QUICK}, None, None)  # type: ignore[arg-type]
    assert [s.name for s in chosen(matrix, True, "cpu", "B2-12x12-C64-R4-P7")] == ["B2-12x12-C64-R4-P7"]
    with pytest.raises(UserError, match="B9 does not exist"):
        chosen(matrix, False, "cpu", "B9")
    with pytest.raises(UserError, match="nonsense"):
        selected(roi_align.providers(CPU), "nonsense")


def test_compiled_baselines_are_left_out_by_name():
    entries = [without_compiling(p) for p in roi_align.providers(CPU)]
    problem = roi_align.problem(roi_align.QUICK[0], torch.float32, CPU)
    out = {p.name for p in entries if p.obstacle(problem) == "left out by --compiled headline"}
    assert out == {"einsum compiled", "scenic compiled"}


def test_torchvision_is_tried_in_another_process():
    import sys

    before = "torchvision" in sys.modules
    assert isinstance(torchvision.obstacle(), str)
    assert ("torchvision" in sys.modules) == before


@MODULES
def test_the_command_writes_rows_and_names_what_it_left_out(module: ModuleType, tmp_path: Path, capsys):
    out = tmp_path / "rows.csv"
    arguments = ["--device", "cpu", "--quick", "--providers", "ours as,bmm", "--repeats", "3", "--bitwise", "1"]
    assert module.main([*arguments, "--out", str(out), "--minutes", "0.0001"]) == 0
    said = capsys.readouterr()
    with out.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert {row["case"] for row in found} == {module.QUICK[0].name}
    assert {row["mode"] for row in found if row["status"] == "ok"} == {"fwd", "bwd", "fwd+bwd"}
    assert "not measured" in said.err and all(shape.name in said.err for shape in module.QUICK[1:])
    assert "copy of the same bytes" in said.out and "ours as dispatched" in said.out


@pytest.mark.gpu
@MODULES
def test_every_provider_agrees_on_a_gpu(module: ModuleType, tmp_path: Path):
    out = tmp_path / "rows.csv"
    arguments = ["--device", "cuda", "--quick", "--repeats", "3", "--bitwise", "2", "--dtypes", "bf16,fp32"]
    assert module.main([*arguments, "--out", str(out)]) == 0
    with out.open(newline="") as file:
        found = list(csv.DictReader(file))
    ours = [row for row in found if row["ours"] == "yes"]
    assert not [row["status"] for row in ours if row["status"] != "ok" and not row["status"].startswith("absent")]
    timed = [row for row in ours if row["status"] == "ok"]
    assert {row["cache"] for row in timed} == {"cold", "warm"}
    assert all(int(row["launches"]) > 0 and float(row["kernel_us"]) > 0 for row in timed)
    assert all(row["bitwise"] == "yes" for row in timed)
