"""RoI-align of csrc/, C++ and CUDA C++, against the literal loop, the reference, and themselves.

Every test runs the C++ library and the CUDA kernels on a CPU (tests/ops/csrc_engines.py). Mutants of the sources show
that the comparison with the loop sees half a cell, a clamp, a corner and a RoI that are missing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eventlens_ds.ops import build, extension
from eventlens_ds.ops.roi_align import reference
from tests.ops.csrc_engines import (
    ENGINES,
    PRECISIONS,
    CudaOnCpu,
    compile_cuda_on_cpu,
    engine,
    pooled,
    worst_errors,
)
from tests.ops.roi_loop import Problem, random_problem

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
PROBLEMS = {"csrc": 3000, "cuda_on_cpu": 1000}
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=ENGINES)
def using(request: pytest.FixtureRequest):
    return engine(request.param)


def large_problem(seed: int = 0, count: int = 24, channels: int = 150) -> tuple[torch.Tensor, ...]:
    """Tokens, boxes and offsets of a 19 x 21 grid: several column tiles, channel blocks and tiles of bins."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 260 - 20
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 200], 1)
    tokens = torch.randn(3, 2 + 19 * 21, channels, generator=generator)
    return tokens, boxes, torch.tensor([0, count // 4, count // 4, count])


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ENGINES)
def test_equals_the_loop(name: str, dtype: torch.dtype) -> None:
    forward, backward = worst_errors(engine(name), range(PROBLEMS[name]), dtype)
    assert forward <= TOLERANCE[dtype] and backward <= TOLERANCE[dtype], (forward, backward)


@pytest.mark.parametrize("channels", [1, 64, 150, 151])
@pytest.mark.parametrize("bins", [(7, 7), (1, 3), (2, 14)])
@pytest.mark.parametrize("mean", [False, True])
def test_equals_the_reference_on_a_larger_grid(using, channels: int, bins: tuple[int, int], mean: bool) -> None:
    tokens, boxes, offsets = large_problem(channels=channels)
    plan = using.plan(boxes, (19, 21), bins, 1 / 14, 2, True, mean)
    got = using.forward([tokens], *plan, offsets, (19, 21), 2)
    expected = reference.plan(boxes, (19, 21), bins, 1 / 14, 2, True, mean)
    assert torch.equal(plan[2], expected.window)
    assert (got - reference.forward([tokens], *expected, offsets, (19, 21), 2)).abs().max() < 1e-5
    grad = torch.randn_like(got)
    wanted = reference.backward(grad, *expected, offsets, (19, 21), 2, 3, 1)
    back = using.backward(grad, *plan, offsets, (19, 21), 2, 3, 1)
    assert (back - wanted).abs().max() < 1e-4
    assert torch.equal(back[:, :2], torch.zeros_like(back[:, :2])), "prefix rows"
    assert torch.equal(back[1], torch.zeros_like(back[1])), "an image without boxes"


def test_both_engines_make_the_same_plan_bit_for_bit() -> None:
    """The CUDA plan is the CPU plan: same source, and nothing in it may be contracted."""
    left, right = engine("csrc"), engine("cuda_on_cpu")
    for seed in range(400):
        problem = random_problem(seed)
        for mean in (False, True):
            plans = [pooled(side, problem, [problem.tokens.float()], mean)[0] for side in (left, right)]
            assert all(torch.equal(a, b) for a, b in zip(*plans)), seed


def test_plan_is_that_of_the_reference(using) -> None:
    """Table by table, up to the order of a sum: adaptive sampling must pick the same number of samples."""
    for seed in range(400):
        problem = random_problem(seed)
        boxes = torch.from_numpy(problem.boxes)
        settings = (problem.grid, problem.bins, problem.scale, problem.sampling, problem.aligned)
        want = reference.plan(boxes, *settings, False)
        wy, wx, window = using.plan(boxes, *settings, False)
        assert (wy - want.wy).abs().max() < 5e-7 and (wx - want.wx).abs().max() < 5e-7, seed
        assert torch.equal(window, want.window), seed
        for table, (begin, end) in ((wy, window[:, :2].T), (wx, window[:, 2:].T)):
            cells = torch.arange(table.shape[2])
            inside = (cells >= begin[:, None]) & (cells < end[:, None])
            weighted = (table != 0).any(1)
            assert not (weighted & ~inside).any(), "a weight outside the window"
            assert (inside.sum(1) == (end - begin)).all() and (weighted.any(1) == (end > begin)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(using, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and isinstance(using, CudaOnCpu):
        pytest.skip("the CUDA kernels are compiled for bfloat16 here; float16 is the same template")
    tokens, boxes, offsets = large_problem()
    # Subnormal, infinite and NaN features go through the conversions too.
    tokens[:, 2 + 9 * 21 :, :5] = torch.tensor([1e-7, -3e-6, float("inf"), float("nan"), 65000.0])
    tokens = tokens.to(dtype)
    plan = using.plan(boxes, (19, 21), (7, 7), 1 / 14, 2, True, False)
    got = using.forward([tokens], *plan, offsets, (19, 21), 2)
    want = using.forward([tokens.float()], *plan, offsets, (19, 21), 2).to(dtype)
    assert got.dtype == dtype and torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert got.isnan().any() and torch.equal(got.isnan(), want.isnan())
    back = using.backward(got, *plan, offsets, (19, 21), 2, 3, 1)
    wanted = using.backward(got.float(), *plan, offsets, (19, 21), 2, 3, 1).to(dtype)
    assert torch.equal(back.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("mean", [False, True])
def test_levels_are_averaged_and_their_gradient_divided(using, mean: bool) -> None:
    tokens, boxes, offsets = large_problem()
    levels = [tokens, tokens.flip(0) * 2, tokens + 1]
    plan = using.plan(boxes, (19, 21), (3, 5), 1 / 14, 2, True, mean)
    got = using.forward(levels, *plan, offsets, (19, 21), 2)
    want = torch.stack([using.forward([level], *plan, offsets, (19, 21), 2) for level in levels]).mean(0)
    assert (got - want).abs().max() < 1e-6
    one = using.backward(got, *plan, offsets, (19, 21), 2, 3, 1)
    assert (using.backward(got, *plan, offsets, (19, 21), 2, 3, 3) - one / 3).abs().max() < 1e-5


@pytest.mark.parametrize("mean", [False, True])
def test_cells_outside_a_window_are_never_read(using, mean: bool) -> None:
    """NaN and Inf there reach neither the features of the box nor, backward, the gradient of other cells."""
    tokens, boxes, offsets = large_problem()
    plan = using.plan(boxes, (19, 21), (3, 5), 1 / 14, 2, True, mean)
    clean = using.forward([tokens], *plan, offsets, (19, 21), 2)
    for r in (0, 7, 15, 23):
        top, bottom, left, right = plan[2][r].tolist()
        grid = torch.full((3, 2 + 19 * 21, 150), float("nan"))
        grid[:, ::2] = float("inf")
        cells = grid[:, 2:].view(3, 19, 21, 150)
        cells[:, top:bottom, left:right] = tokens[:, 2:].view(3, 19, 21, 150)[:, top:bottom, left:right]
        assert torch.equal(using.forward([grid], *plan, offsets, (19, 21), 2)[r], clean[r])
        grad = torch.zeros_like(clean)
        grad[r] = float("nan")
        back = using.backward(grad, *plan, offsets, (19, 21), 2, 3, 1)[:, 2:].view(3, 19, 21, 150)
        image = int((offsets <= r).sum()) - 1
        back[image, top:bottom, left:right] = 0
        assert torch.equal(back, torch.zeros_like(back))


def test_no_boxes(using) -> None:
    tokens, boxes, _ = large_problem()
    offsets = torch.zeros(4, dtype=torch.int64)
    plan = using.plan(boxes[:0], (19, 21), (3, 5), 1 / 14, 2, True, False)
    assert using.forward([tokens], *plan, offsets, (19, 21), 2).shape == (0, 3, 5, 150)
    back = using.backward(tokens.new_empty(0, 3, 5, 150), *plan, offsets, (19, 21), 2, 3, 1)
    assert torch.equal(back, torch.zeros_like(tokens))


def test_strided_tokens(using) -> None:
    """Batch and token strides are free: a view of a wider buffer, every second image, a transposed grid."""
    tokens, boxes, offsets = large_problem()
    plan = using.plan(boxes, (19, 21), (3, 5), 1 / 14, 2, True, False)
    want = using.forward([tokens], *plan, offsets, (19, 21), 2)
    wide = torch.full((6, 405, 161), float("nan"))
    for view in (wide[::2, 4:, 3:153], wide[:3, :401, :150], wide.transpose(0, 1)[4:, ::2, 3:153].transpose(0, 1)):
        view.copy_(tokens)
        assert not view.is_contiguous() and torch.equal(using.forward([view], *plan, offsets, (19, 21), 2), want)
    grad = torch.randn(1, 1, 1, 150).expand(24, 3, 5, 150)
    left = using.backward(grad, *plan, offsets, (19, 21), 2, 3, 1)
    assert torch.equal(left, using.backward(grad.contiguous(), *plan, offsets, (19, 21), 2, 3, 1))


def test_channels_that_are_not_dense_are_copied() -> None:
    using = engine("csrc")
    tokens, boxes, offsets = large_problem()
    plan = using.plan(boxes, (19, 21), (3, 5), 1 / 14, 2, True, False)
    across = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    assert across.stride(2) != 1
    want = using.forward([tokens], *plan, offsets, (19, 21), 2)
    assert torch.equal(using.forward([across], *plan, offsets, (19, 21), 2), want)


def test_same_bits_each_time_and_for_every_number_of_threads() -> None:
    using = engine("csrc")
    tokens, boxes, offsets = large_problem(count=60, channels=256)
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 3, 3, 5):
            torch.set_num_threads(threads)
            plan = using.plan(boxes, (19, 21), (7, 7), 1 / 14, 2, True, False)
            got = using.forward([tokens], *plan, offsets, (19, 21), 2)
            seen.append((*plan, got, using.backward(got, *plan, offsets, (19, 21), 2, 3, 1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


def test_wrong_arguments_are_refused_before_memory_is_touched() -> None:
    using = engine("csrc")
    tokens, boxes, offsets = large_problem()
    wy, wx, window = using.plan(boxes, (19, 21), (3, 5), 1 / 14, 2, True, False)
    grid = ((19, 21), 2)
    cases = {
        "offsets run from 0 to 25 but there are 24": ([tokens], wy, wx, window, torch.tensor([0, 6, 6, 25]), *grid),
        "offsets fall from 9 to 6": ([tokens], wy, wx, window, torch.tensor([0, 9, 6, 24]), *grid),
        "levels has 401 in dimension 1, expected 402": ([tokens], wy, wx, window, offsets, (19, 21), 3),
        "wy has 19 in dimension 2, expected 21": ([tokens], wy, wx, window, offsets, (21, 19), 2),
        "window 0 leaves the grid of 19 x 21": ([tokens], wy, wx, window + 21, offsets, *grid),
        "levels has 3 in dimension 0, expected 2": ([tokens], wy, wx, window, torch.tensor([0, 3, 24]), *grid),
    }
    for message, arguments in cases.items():
        with pytest.raises(RuntimeError, match=message):
            using.forward(*arguments)
    with pytest.raises(RuntimeError, match="grad has 3 in dimension 1, expected 5"):
        using.backward(torch.zeros(24, 3, 5, 4), wx, wx, window, offsets, *grid, 3, 1)


def test_opcheck() -> None:
    """Schema and fake kernels, on small arguments of every operator."""
    engine("csrc")
    tokens, boxes, offsets = large_problem(count=4, channels=3)
    ops = torch.ops.eventlens_csrc
    checks = ("test_schema", "test_faketensor")
    plan = ops.roi_align_plan(boxes, 19, 21, 3, 2, 0.07, 2, True, False)
    pool = ops.roi_align_forward([tokens], *plan, offsets, 19, 21, 2)
    experts = torch.tensor([[0, 2], [1, 2]], dtype=torch.int32)
    order, _ = ops.moa_sort_by_expert(experts, 3)
    calls = {
        ops.roi_align_plan: (boxes, 19, 21, 3, 2, 0.07, 2, True, True),
        ops.roi_align_forward: ([tokens, tokens], *plan, offsets, 19, 21, 2),
        ops.roi_align_backward: (pool, *plan, offsets, 19, 21, 2, 3, 1),
        ops.moa_route: (torch.randn(5, 3), 2, True),
        ops.moa_sort_by_expert: (experts, 3),
        ops.moa_gather: (torch.randn(2, 3), order, 2),
        ops.moa_combine: (torch.randn(4, 3), order, torch.rand(2, 2)),
    }
    assert {call.default.name().split("::")[1] for call in calls} == set(extension.SCHEMAS)
    for call, arguments in calls.items():
        torch.library.opcheck(call.default, arguments, test_utils=checks)


MUTANTS = {
    "half a cell": ("roi_align_plan.h", "? T(-0.5) : T(0)", "? T(0) : T(0)"),
    "clamp dropped": ("roi_align_plan.h", "(sample > last ? last : sample)", "sample"),
    "corner skipped": ("roi_align_plan.h", "cell < low + 2", "cell < low + 1"),
    "last RoI ignored, C++": ("roi_align_cpu.cpp", "r < plan.first[image + 1]", "r + 1 < plan.first[image + 1]"),
    "column dropped, C++": ("roi_align_cpu.cpp", "j < window[3]; ++j", "j + 1 < window[3]; ++j"),
    "last RoI ignored, CUDA": (
        "roi_align_kernels.cuh", "r < plan.offsets[image + 1]; ++r", "r + 1 < plan.offsets[image + 1]; ++r",
    ),
    "barrier removed, CUDA": ("roi_align_kernels.cuh", "    __syncthreads();\n    if (channel", "    if (channel"),
}  # fmt: skip


def mutate(name: str, folder: Path) -> Path:
    """A copy of csrc/ with one mutation."""
    file, old, new = MUTANTS[name]
    for source in extension.SOURCES.iterdir():
        if source.is_file():
            (folder / source.name).write_text(source.read_text())
    text = (folder / file).read_text()
    assert old in text, f"{file} no longer has {old!r}"
    (folder / file).write_text(text.replace(old, new))
    return folder


FAST = ("half a cell", "last RoI ignored, CUDA")
KERNEL_MUTANTS = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS if "C++" not in name
]


@pytest.mark.parametrize("name", KERNEL_MUTANTS)
def test_mutants_of_the_kernels_fail(name: str, tmp_path: Path) -> None:
    engine("cuda_on_cpu")
    mutant = CudaOnCpu(compile_cuda_on_cpu(mutate(name, tmp_path), tmp_path))
    assert max(worst_errors(mutant, range(60), torch.float64)) > 1e-3


PROGRAM = """
import sys
from pathlib import Path
import torch
from eventlens_ds.ops import extension
extension.FOLDER, extension.SOURCES = Path(sys.argv[1]), Path(sys.argv[2])
from tests.ops.csrc_engines import engine, worst_errors
print(*worst_errors(engine("csrc"), range(60), torch.float64))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MUTANTS if "CUDA" not in name])
def test_mutants_of_the_library_fail(name: str, tmp_path: Path) -> None:
    engine("csrc")
    sources = tmp_path / "csrc"
    sources.mkdir()
    build.build(tmp_path / build.LIBRARY, mutate(name, sources), cuda="0")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(sources)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert max(map(float, done.stdout.split())) > 1e-3


def test_problems_reach_every_branch() -> None:
    """The random problems hold hot images, images without boxes, boxes outside the grid, and prefix tokens."""
    problems: list[Problem] = [random_problem(seed, hot_image=seed % 7 == 0) for seed in range(300)]
    assert any((problem.offsets.diff() == 0).any() for problem in problems)
    assert {problem.sampling for problem in problems} == {-1, 0, 1, 2, 3}
    assert {problem.prefix for problem in problems} == {0, 1, 2}
    assert any(problem.forward().abs().amax((1, 2, 3)).eq(0).any() for problem in problems)
