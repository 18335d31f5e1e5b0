"""The Triton kernels of RoI-align under the interpreter, against the literal loop and the reference.

New tensors are filled with NaN, so that an element which no program writes is seen; bfloat16, speed and the compiler
are the matter of test_roi_align_gpu.py and of the compile gate. Negative controls: mutants of every kernel, made by
replacing its source text, fail the same comparison.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from eventlens_ds.errors import ArgumentError
from eventlens_ds.ops.roi_align import kernel, kernel_backward, kernel_forward, reference, roi_align
from tests.ops.roi_loop import INF, NAN, Problem, errors, random_problem

if not kernel.INTERPRETED:
    pytest.skip("kernels are compiled in this process: TRITON_INTERPRET is not set", allow_module_level=True)

# Half precision: sums are float32, results below 8 are off by half a unit in the last place at most.
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN, or a number that is no index."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fresh = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *size, **keywords) -> torch.Tensor:
        made = fresh(self, *size, **keywords)
        return made.fill_(NAN if made.is_floating_point() else -(2**30))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def problem(**changes) -> Problem:
    """Two images of 4 x 5 cells with five boxes: outside, inside, spilling; with a NaN, inverted."""
    boxes = [[50, 2, 60, 9], [3, 2, 17, 13], [-9, -5, 12, 11], [2, 3, NAN, 12], [15, 12, 4, 3]]
    values = dict(
        grid=(4, 5), bins=(2, 3), scale=0.25, sampling=2, aligned=True, batch=2, channels=3, prefix=1, seed=0,
        boxes=np.array(boxes, np.float32), image_of_box=np.array([0, 0, 0, 1, 1]),
    )  # fmt: skip
    return Problem(**{**values, **changes})


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("mean", [False, True], ids=["bins", "mean"])
@pytest.mark.parametrize("block", range(2))
def test_equals_the_loop_on_random_problems(block: int, mean: bool, dtype: torch.dtype) -> None:
    for seed in range(5000 + block * 4 + 10 * mean, 5004 + block * 4 + 10 * mean):
        drawn = random_problem(seed)
        assert max(errors(kernel, drawn, dtype, mean)) <= LIMITS[dtype], drawn


def test_the_plan_is_the_reference_to_the_bit() -> None:
    """Larger grids, knife edges included; the mean over bins is added in another order."""
    for seed in range(8):
        drawn, mean = random_problem(seed, most_boxes=9, most_cells=40, most_bins=9), seed % 4 == 0
        boxes = torch.from_numpy(drawn.boxes)
        arguments = (boxes, drawn.grid, drawn.bins, drawn.scale, drawn.sampling, drawn.aligned, mean)
        for got, want in zip(kernel.plan(*arguments), reference.plan(*arguments)):
            assert torch.equal(got, want) or (mean and (got - want).abs().max() <= 1e-6), drawn


SHAPES = {
    "two blocks of channels": dict(channels=130),
    "channels of whole vectors": dict(channels=32, prefix=0),
    "more bins than a tile": dict(bins=(2, 18)),
    "more rows of bins than a chunk": dict(bins=(34, 2), sampling=1),
    "columns beyond a tile": dict(grid=(2, 37), scale=1.0, boxes=np.array([[1, -1, 36, 3]] * 5, np.float32)),
    "rows beyond a chunk": dict(grid=(35, 2), scale=1.0, boxes=np.array([[-1, 1, 3, 34]] * 5, np.float32)),
    "one cell": dict(grid=(1, 1)),
    "images without boxes": dict(batch=131, grid=(1, 2), image_of_box=np.array([3, 3, 128, 128, 130])),
    "many prefix tokens": dict(prefix=5),
    "no boxes": dict(boxes=np.zeros((0, 4), np.float32), image_of_box=np.zeros(0, np.int64)),
}


@pytest.mark.parametrize("mean", [False, True], ids=["bins", "mean"])
@pytest.mark.parametrize("name", SHAPES)
def test_odd_shapes(name: str, mean: bool) -> None:
    assert max(errors(kernel, problem(**SHAPES[name]), torch.float32, mean)) <= 1e-5


@pytest.mark.parametrize("mean", [False, True], ids=["bins", "mean"])
@pytest.mark.parametrize("bound", [False, True], ids=["exact", "upper bound"])
def test_one_hot_image_is_cut_into_jobs(bound: bool, mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of three RoIs, as many as there are or (offsets on a GPU) as there may be; both halves of the work run."""
    rng = np.random.default_rng(0)
    boxes = rng.uniform(-4, 24, (11, 4)).astype(np.float32)
    hot = problem(batch=4, boxes=boxes, image_of_box=np.array([0, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3]), bins=(2, 2))
    monkeypatch.setattr(kernel, "chunks", lambda count, offsets: (3, (count - 1) // 3 if bound else 2))
    assert max(errors(kernel, hot, torch.float32, mean)) <= 1e-5


def test_jobs_cover_the_rois_once() -> None:
    """The schedule of ragged counts, in two blocks of images; offsets that do not tile stay within the tables."""
    counts = torch.tensor([0, 7, 3, 0, 4] * 30)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    batch, total, chunk = len(counts), int(offsets[-1]), 3
    extra = (total - 1) // chunk
    for given in (offsets, torch.tensor([0, total] * 76)[:151], offsets * 5 - 9):
        jobs, parts = offsets.new_empty(batch + extra + 1, 4), offsets.new_empty(batch, 2)
        kernel_backward.schedule_kernel[(1,)](given, jobs, parts, batch, total, chunk, extra, BLOCK=128)
        assert jobs[-1].tolist() == [-(2**30)] * 4
        live = jobs[:-1][jobs[:-1, 0] >= 0]
        assert live[:, 1].min() >= 0 and live[:, 2].max() <= total and parts.sum(1).max() <= 2 * extra
        if given is offsets:
            rois = [(int(i), r) for i, a, b, _ in live.tolist() for r in range(a, b)]
            assert sorted(rois) == [(b, r) for b in range(batch) for r in range(offsets[b], offsets[b + 1])]
            used = sorted(part for *_, part in live.tolist() if part >= 0)
            assert used == list(range(int(parts[:, 1].sum())))


def test_the_size_of_jobs() -> None:
    offsets = torch.tensor([0, 5, 70, 70])
    assert kernel.chunks(70, offsets) == (64, 1) and kernel.chunks(5, torch.tensor([0, 5])) == (64, 0)
    chunk, extra = kernel.chunks(4096, torch.tensor([0, 4096], device="meta"))
    assert (chunk, extra) == (512, 7)


@pytest.mark.parametrize("mean", [False, True], ids=["bins", "mean"])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("channels", [16, 3])
def test_levels_are_averaged(channels: int, count: int, mean: bool) -> None:
    """Up to four levels in one launch when they are dense, one at a time when they are not; rounded once."""
    given = problem(channels=channels, boxes=np.array([[3, 2, 17, 13]] * 5, np.float32), bins=(2, 2))
    boxes = torch.from_numpy(given.boxes)
    tables = kernel.plan(boxes, given.grid, given.bins, given.scale, given.sampling, given.aligned, mean)
    levels = [torch.randn(given.tokens.shape).half() for _ in range(count)]
    levels[1] = torch.randn(2, 3, *given.tokens.shape[1:]).half()[:, 1]
    got = kernel.forward(levels, *tables, given.offsets, given.grid, given.prefix)
    want = sum(given.forward(level, np.float32) for level in levels) / count
    want = want.mean((1, 2), keepdim=True) if mean else want
    assert got.dtype == torch.float16 and (got.double() - want).abs().max() <= 2e-3
    grad = torch.randn(got.shape)
    got = kernel.backward(grad, *tables, given.offsets, given.grid, given.prefix, 2, count)
    want = reference.backward(grad, *tables, given.offsets, given.grid, given.prefix, 2, count)
    assert (got - want).abs().max() <= 1e-5


def test_strided_tokens() -> None:
    """A slice of a larger tensor, with other image and token strides, is read where it lies."""

    def slice_of_larger(tokens: torch.Tensor) -> torch.Tensor:
        batch, rows, channels = tokens.shape
        larger = torch.full((batch, 2, rows + 4, channels + 3), INF, dtype=tokens.dtype)
        larger[:, 1, 2:-2, 1:-2] = tokens
        return larger[:, 1, 2:-2, 1:-2]

    for mean in (False, True):
        assert max(errors(kernel, problem(), torch.float32, mean, layout=slice_of_larger)) <= 1e-5


@pytest.mark.parametrize("mean", [False, True], ids=["bins", "mean"])
def test_cells_outside_the_window_are_not_read(mean: bool) -> None:
    """Inf and NaN in the prefix row and beyond the window do not reach a RoI; inside the window they do."""
    given = problem(boxes=np.array([[6, 6, 13, 9]], np.float32), image_of_box=np.array([0]))
    tables = kernel.plan(torch.from_numpy(given.boxes), (4, 5), (2, 3), 0.25, 2, True, mean)
    i0, i1, j0, j1 = tables[2][0].tolist()
    assert (i1 - i0) * (j1 - j0) < 20
    tokens = torch.full(given.tokens.shape, INF)
    tokens[1] = NAN
    inside = tokens[0, 1:].view(4, 5, -1)[i0:i1, j0:j1]
    inside.copy_(torch.randn(inside.shape))
    clean = torch.where(tokens.isfinite(), tokens, 0.0)
    got, want = (kernel.forward([given_], *tables, given.offsets, (4, 5), 1) for given_ in (tokens, clean))
    assert torch.equal(got, want)
    inside[0, 0] = NAN
    assert kernel.forward([tokens], *tables, given.offsets, (4, 5), 1).isnan().any()


def test_the_front_door_runs_the_kernels() -> None:
    """Through autograd, bits repeat; bfloat16 is widened under the interpreter; float64 boxes are rounded."""
    given = problem()
    boxes, call = torch.from_numpy(given.boxes), dict(output_size=(2, 3), spatial_scale=0.25, num_prefix_tokens=1)
    for dtype in (torch.float32, torch.bfloat16):
        runs = []
        for backend, box in (("triton", boxes), ("triton", boxes.double()), ("reference", boxes)):
            leaf = given.tokens.to(dtype).requires_grad_()
            got = roi_align(leaf, box, given.offsets, given.grid, backend=backend, **call)
            runs.append([got.detach(), *torch.autograd.grad(got.float().pow(2).sum(), leaf)])
        assert all(torch.equal(a, b) for a, b in zip(*runs[:2]))
        assert all((a.float() - b.float()).abs().max() <= (0.04 if dtype == torch.bfloat16 else 1e-5)
                   for a, b in zip(runs[0], runs[2]))  # fmt: skip


def test_what_triton_does_not_take() -> None:
    given = problem()
    tables = kernel.plan(torch.from_numpy(given.boxes), (4, 5), (2, 3), 0.25, 2, True, False)
    with pytest.raises(ArgumentError, match="torch.float16, got torch.float64"):
        kernel.forward([given.tokens], *tables, given.offsets, (4, 5), 1)
    with pytest.raises(ArgumentError, match="float32, got torch.float64"):
        kernel.plan(torch.from_numpy(given.boxes).double(), (4, 5), (2, 3), 0.25, 2, True, False)


FORWARD, BACKWARD = kernel_forward, kernel_backward
MUTANTS = {
    "plan: half a cell off": (FORWARD, "plan_kernel", "0.5 if ALIGNED else 0.0", "0.0 if ALIGNED else 0.5"),
    "plan: clamp dropped": (FORWARD, "plan_kernel", "tl.minimum(tl.maximum(sample, 0.0), cells - 1.0)", "sample"),
    "plan: one corner skipped": (
        FORWARD, "plan_kernel", "hat = tl.maximum(1.0 -", "hat = (at[:, None] >= cell[None, :]) * tl.maximum(1.0 -",
    ),
    "plan: no least size": (FORWARD, "plan_kernel", "tl.where(length < 1.0, 1.0, length)", "length"),
    "plan: window without its last cell": (
        FORWARD, "plan_kernel", "tl.max(tl.where(used, cell + 1, 0))", "tl.max(tl.where(used, cell, 0))",
    ),
    "forward: last RoI of an image ignored": (FORWARD, "forward_kernel", "ends <= roi)", "ends <= roi + 1)"),
    "forward: last row skipped": (
        FORWARD, "forward_kernel", "for i in range(low, high):", "for i in range(low, high - 1):",
    ),
    "forward: half a cell off": (
        FORWARD, "forward_kernel", "tl.load(rows_ptr + i) * strip", "tl.load(rows_ptr + i + (i + 1 < H)) * strip",
    ),
    "mean: last row skipped": (FORWARD, "mean_kernel", "for i in range(i0, i1):", "for i in range(i0, i1 - 1):"),
    "mean: last RoI of an image ignored": (FORWARD, "mean_kernel", "ends <= roi)", "ends <= roi + 1)"),
    "mean: columns not weighted": (
        FORWARD, "mean_kernel", "(tl.load(wy_ptr + roi * H + i) * columns)", "tl.load(wy_ptr + roi * H + i)",
    ),
    "backward: last RoI of an image ignored": (
        BACKWARD, "backward_kernel", "for roi in range(begin, end):", "for roi in range(begin, end - 1):",
    ),
    "backward: last row of bins skipped": (
        BACKWARD, "backward_kernel", "for p in range(low, high):", "for p in range(low, high - 1):",
    ),
    "backward: first row of the window skipped": (BACKWARD, "backward_kernel", "(row >= i0)", "(row > i0)"),
    "backward: prefix rows not written": (
        BACKWARD, "backward_kernel", "range(0, tl.where(job == image, prefix, 0))", "range(0, 0)",
    ),
    "backward: last column skipped": (
        BACKWARD, "backward_kernel", "(q < Q)[None, :] & (j < W)[:, None]", "(q < Q)[None, :] & (j < W - 1)[:, None]",
    ),
    "schedule: last RoI of a job ignored": (
        BACKWARD, "schedule_kernel", "begin + (k + 1) * chunk, end)", "begin + (k + 1) * chunk, end) - 1",
    ),
    "add_parts: last part skipped": (
        BACKWARD, "add_parts_kernel", "range(first, first + count)", "range(first, first + count - 1)",
    ),
}  # fmt: skip


def load(path: Path) -> types.ModuleType:
    """The module in a file; the interpreter reads the source of kernels from there."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_every_kernel_fail(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel with one piece of its text replaced is far from the loop; the same file unchanged is not."""
    module, changed, old, new = MUTANTS[name]
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} is in the source {source.count(old)} times"
    if changed in ("schedule_kernel", "add_parts_kernel"):
        monkeypatch.setattr(kernel, "chunks", lambda count, offsets: (2, 2))
    case, mean = problem(aligned="least size" not in name), changed == "mean_kernel"
    worst = []
    for text in (source.replace(old, new), source):
        path = tmp_path / f"mutant_{len(worst)}.py"
        path.write_text(text)
        monkeypatch.setattr(kernel, changed, getattr(load(path), changed))
        worst.append(max(errors(kernel, case, torch.float32, mean)))
    assert worst[0] > 1e-3 and worst[1] <= 1e-5, worst


def test_the_plan_is_compiled_without_fused_multiply_add() -> None:
    """The compiled plan has no fma, whose single rounding could cross a knife edge; with Triton's default it has."""
    script = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from eventlens_ds.ops.roi_align import kernel
for case in kernel.compile_cases():
    if not case.name.startswith("roi_align plan aligned") or case.archs != (80,):
        continue
    names = case.fn.arg_names
    source = ASTSource(
        fn=case.fn, signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
    )
    counts = []
    for fusion in (False, True):
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": fusion}
        ptx = triton.compile(source, target=GPUTarget("cuda", case.archs[0], 32), options=options).asm["ptx"]
        counts.append(sum(line.strip().startswith("fma.") for line in ptx.splitlines()))
        assert "div.full" not in ptx and "div.approx" not in ptx
    assert counts[0] == 0 < counts[1], (case.name, counts)
print("compared")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "compared", done.stderr[-2000:]
