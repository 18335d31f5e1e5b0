"""RoI-align in plain torch against a literal loop over samples (tests/ops/roi_loop.py), and the front door of the op.

Boxes cover the inside, the border, the outside, integer corners, zero areas, inverted corners, huge boxes, NaN and
infinity. Negative controls: mutants of the reference, made by replacing its source text, fail the same comparison.
"""

from __future__ import annotations

import itertools
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from eventlens_ds.errors import ArgumentError, UserError
from eventlens_ds.ops.roi_align import reference, roi_align, roi_align_nchw
from tests.ops.roi_loop import INF, NAN, Problem, errors, random_problem

SPECIAL_BOXES = [
    [0.0, 0.0, 32.0, 24.0],
    [4.0, 4.0, 12.0, 20.0],
    [3.3, 1.7, 9.9, 15.2],
    [-9.0, -7.0, 12.0, 11.0],
    [20.0, 15.0, 45.0, 40.0],
    [-80.0, -80.0, -60.0, -60.0],
    [33.0, 25.0, 36.0, 28.0],
    [7.0, 7.0, 7.0, 7.0],
    [5.0, 3.0, 5.0, 19.0],
    [18.0, 16.0, 6.0, 4.0],
    [-3000.0, -2000.0, 3000.0, 2500.0],
    [NAN, 2.0, 9.0, 9.0],
    [1.0, 2.0, 9.0, NAN],
    [-4.0, -4.0, 36.0, 28.0],
    [35.9, 27.9, 36.1, 28.1],
]


def special(bins: tuple[int, int] = (2, 3), sampling: int = 2, aligned: bool = True, prefix: int = 1) -> Problem:
    """The boxes above on three images of 6 x 8 cells, all of them on the first and the last."""
    return Problem(
        grid=(6, 8),
        bins=bins,
        scale=0.25,
        sampling=sampling,
        aligned=aligned,
        batch=3,
        channels=4,
        prefix=prefix,
        boxes=np.array(SPECIAL_BOXES, np.float32),
        image_of_box=np.array([0] * 8 + [2] * 7),
        seed=0,
    )


def settings(problem: Problem, mean: bool = False) -> dict:
    return {
        "output_size": problem.bins,
        "spatial_scale": problem.scale,
        "sampling_ratio": problem.sampling,
        "aligned": problem.aligned,
        "num_prefix_tokens": problem.prefix,
        "pool": "mean" if mean else None,
        "backend": "reference",
    }


def tensors(problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
    return problem.tokens.to(dtype), torch.from_numpy(problem.boxes).to(dtype), problem.offsets, problem.grid


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("block", range(8))
def test_equals_the_loop_on_random_problems(block: int, dtype: torch.dtype, limit: float) -> None:
    """3,200 problems of up to four boxes: other grids, bins, scales, sampling ratios, both conventions."""
    for seed in range(block * 400, (block + 1) * 400):
        problem = random_problem(seed)
        forward, backward = errors(reference, problem, dtype, mean=seed % 4 == 0)
        assert forward <= limit and backward <= limit, (forward, backward, problem)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling", [1, 2, 3, -1, 0])
def test_equals_the_loop_on_special_boxes(sampling: int, aligned: bool) -> None:
    for bins, mean in itertools.product([(1, 1), (2, 3), (3, 3)], (False, True)):
        problem = special(bins, sampling, aligned)
        assert max(errors(reference, problem, torch.float64, mean)) <= 1e-12


def test_the_front_door_is_the_reference() -> None:
    """Values and gradient through autograd equal the loop, with levels, prefix tokens and an image without boxes."""
    problem = special()
    tokens, boxes, offsets, grid = tensors(problem, torch.float64)
    levels = [tokens.requires_grad_(), torch.randn_like(tokens).requires_grad_()]
    got = roi_align(levels, boxes, offsets, grid, **settings(problem))
    want = (problem.forward(levels[0].detach()) + problem.forward(levels[1].detach())) / 2
    assert (got - want).abs().max() <= 1e-12
    for grad in torch.autograd.grad(got.sum(), levels):
        assert (grad - problem.backward(torch.ones_like(want) / 2)).abs().max() <= 1e-12
        assert torch.equal(grad[:, 0], torch.zeros_like(grad[:, 0])) and not grad[1].any() and grad[0].any()


MUTANTS = {
    "half a cell off": ("0.5 if aligned else 0.0", "0.0 if aligned else 0.5"),
    "samples off the middle": ("samples = first + (index + 0.5)", "samples = first + (index + 0.0)"),
    "clamp dropped": ("samples.clamp(0.0, cells - 1.0)", "samples"),
    "edge excluded": ("samples <= float(cells)", "samples < float(cells)"),
    "one corner skipped": ("hat = (1.0 - (samples", "hat = (samples[..., None] > centre) * (1.0 - (samples"),
    "no least size": ("width.clamp(min=1.0), height.clamp(min=1.0)", "width, height"),
    "last box of an image ignored": ("searchsorted(offsets[1:].to", "searchsorted((offsets[1:] - 1).clamp(min=0).to"),
    "prefix forgotten": ("image * tokens + num_prefix_tokens", "image * tokens"),
    "adaptive samples rounded down": ("torch.ceil(bin_size)", "torch.floor(bin_size)"),
    "boxes in bfloat16": ("corners = boxes", "corners = boxes.bfloat16()"),
    "gradient of a level not shared": ("weights / num_levels", "weights"),
}


def mutant(old: str, new: str) -> types.ModuleType:
    """The reference with one piece of its text replaced."""
    source = Path(reference.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} is in the source {source.count(old)} times"
    module = types.ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant.py", "exec"), module.__dict__)  # noqa: S102
    return module


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_reference_fail(name: str) -> None:
    """Each is far from the loop on the special boxes; the unchanged source, loaded the same way, is not."""
    module = mutant(*MUTANTS[name])
    same = mutant("samples = first", "samples = first ")
    worst = {"mutant": 0.0, "same": 0.0}
    for sampling, aligned in itertools.product((1, 2, -1), (True, False)):
        problem = special(sampling=sampling, aligned=aligned)
        worst["same"] = max(worst["same"], *errors(same, problem, torch.float32))
        if name == "gradient of a level not shared":
            grad, tables = torch.ones(15, 2, 3, 4), module.plan(*plan_arguments(problem))
            halves = [m.backward(grad, *tables, problem.offsets, (6, 8), 1, 3, 2) for m in (module, reference)]
            worst["mutant"] = max(worst["mutant"], (halves[0] - halves[1]).abs().max().item())
        else:
            worst["mutant"] = max(worst["mutant"], *errors(module, problem, torch.float32))
    assert worst["same"] <= 1e-5 and worst["mutant"] > 1e-3, worst


def plan_arguments(problem: Problem, mean: bool = False) -> tuple:
    boxes = torch.from_numpy(problem.boxes)
    return boxes, problem.grid, problem.bins, problem.scale, problem.sampling, problem.aligned, mean


def test_float32_boxes_and_patch_14() -> None:
    """Boxes in float32 on a 24 x 24 grid of 14-pixel patches: float32 rounding, nothing more."""
    generator = np.random.default_rng(3)
    corner = generator.random((20, 2)) * 250
    boxes = np.concatenate([corner, corner + generator.random((20, 2)) * 80], 1).astype(np.float32)
    image = np.zeros(20, np.int64)
    problem = Problem((24, 24), (3, 3), 1 / 14, 2, True, 1, 3, 1, boxes, image, seed=0)
    got = roi_align(*tensors(problem, torch.float32), **settings(problem))
    want = problem.forward()
    assert got.dtype == torch.float32 and (got - want).abs().max() < 1e-5


def test_infinite_and_huge_boxes() -> None:
    """Infinity samples nothing; a box of a billion pixels has 1e8 samples a bin, of which those near the grid count."""
    tokens = torch.randn(1, 48, 4)
    infinite = torch.tensor([[1.0, 2.0, INF, 9.0], [-INF, 2.0, 8.0, 9.0], [-INF, 0.0, INF, 9.0]])
    huge = torch.tensor([[-1e9, -1e9, 1e9, 1e9], [0.0, 0.0, 1e30, 1e30], [-3e38, -3e38, 3e38, 3e38]])
    for sampling, aligned in itertools.product((2, -1), (True, False)):
        call = dict(output_size=2, spatial_scale=0.25, sampling_ratio=sampling, aligned=aligned)
        got = roi_align(tokens, infinite, torch.tensor([0, 3]), (6, 8), **call)
        assert torch.equal(got, torch.zeros_like(got))
        assert roi_align(tokens, huge, torch.tensor([0, 3]), (6, 8), **call).isfinite().all()


def test_cells_outside_the_window_are_not_read() -> None:
    """NaN and Inf in the prefix row and in cells without weight reach no sum, also not as 0 * NaN."""
    problem = special()
    tokens, boxes, offsets, grid = tensors(problem, torch.float32)
    boxes = boxes[[1, 2, 9]]
    offsets = torch.tensor([0, 2, 2, 3])
    clean = roi_align(tokens, boxes, offsets, grid, **settings(problem))
    _, _, window = reference.plan(boxes, *plan_arguments(problem)[1:])
    poisoned = torch.full_like(tokens, NAN)
    poisoned[:, ::2] = INF
    for r, image in enumerate((0, 0, 2)):
        i0, i1, j0, j1 = window[r].tolist()
        keep = poisoned[image, 1:].view(6, 8, -1)
        keep[i0:i1, j0:j1] = tokens[image, 1:].view(6, 8, -1)[i0:i1, j0:j1]
    assert poisoned.isnan().any() and torch.equal(roi_align(poisoned, boxes, offsets, grid, **settings(problem)), clean)
    poisoned[0, 1:].view(6, 8, -1)[int(window[0, 0]), int(window[0, 2])] = NAN
    assert roi_align(poisoned, boxes, offsets, grid, **settings(problem)).isnan().any()


def test_gradcheck() -> None:
    """First and second derivatives in float64: one level, two averaged levels, the mean over bins."""
    problem = Problem(
        (3, 4), (2, 2), 0.1, 2, True, 3, 2, 1, np.array([SPECIAL_BOXES[i] for i in (1, 3, 9, 11)], np.float32),
        np.array([0, 0, 0, 2]), seed=1,
    )  # fmt: skip
    tokens, boxes, offsets, grid = tensors(problem, torch.float64)
    other = torch.randn_like(tokens).requires_grad_()
    tokens.requires_grad_()

    def pool(*levels: torch.Tensor, mean: bool = False) -> torch.Tensor:
        return roi_align(levels, boxes, offsets, grid, **settings(problem, mean))

    assert torch.autograd.gradcheck(pool, (tokens, other)) and torch.autograd.gradgradcheck(pool, (tokens, other))
    assert torch.autograd.gradcheck(lambda level: pool(level, mean=True), (tokens,))


def test_boxes_get_no_gradient() -> None:
    problem = special()
    tokens, boxes, offsets, grid = tensors(problem, torch.float64)
    got = roi_align(tokens.requires_grad_(), boxes.requires_grad_(), offsets, grid, **settings(problem))
    assert torch.autograd.grad(got.sum(), boxes, allow_unused=True)[0] is None


def test_no_boxes_keeps_the_graph() -> None:
    """R = 0 gives an empty result that is still a function of the tokens, so every rank has the same backward."""
    tokens = torch.randn(2, 13, 3, requires_grad=True)
    call = dict(output_size=2, spatial_scale=1.0)
    for pool, shape in ((None, (0, 2, 2, 3)), ("mean", (0, 3))):
        nothing = torch.zeros(3, dtype=torch.int64)
        got = roi_align(tokens, torch.zeros(0, 4), nothing, (3, 4), pool=pool, num_prefix_tokens=1, **call)
        assert got.shape == shape
        (grad,) = torch.autograd.grad(got.sum(), tokens)
        assert torch.equal(grad, torch.zeros_like(grad))
    empty = roi_align(torch.zeros(0, 12, 3), torch.zeros(0, 4), torch.zeros(1, dtype=torch.int64), (3, 4), **call)
    assert empty.shape == (0, 2, 2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """Half-precision features give the rounded result of exact arithmetic; autocast changes neither value nor dtype."""
    problem = special()
    half = problem.tokens.to(dtype)
    boxes = torch.from_numpy(problem.boxes)
    want = problem.forward(half, np.float32).to(dtype)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            got = roi_align(half, boxes, problem.offsets, problem.grid, **settings(problem))
        assert got.dtype == dtype
        # A result that lies between two numbers of `dtype` may round to either after float32 arithmetic.
        assert (got != want).double().mean() < 0.01 and torch.allclose(got, want, rtol=2**-7, atol=1e-6)


def test_strided_tokens_and_repeated_bits() -> None:
    """Slices of a larger tensor give the bits of a copy, and so does every repetition, forward and backward."""
    problem = special()
    _, boxes, offsets, grid = tensors(problem, torch.float32)
    larger = torch.randn(3, 2, 60, 9)
    tokens = larger[:, 1, 5:54, 2:6]
    assert not tokens.is_contiguous()
    runs = []
    for given in (tokens, tokens.contiguous(), tokens):
        leaf = given.detach().requires_grad_()
        got = roi_align(leaf, boxes, offsets, grid, **settings(problem))
        runs.append([got.detach(), *torch.autograd.grad(got.pow(2).sum(), leaf)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_nchw_matches_the_loop(as_list: bool, channels_last: bool) -> None:
    problem = special(sampling=-1, aligned=False, prefix=0)
    image = problem.tokens.view(3, 6, 8, 4).permute(0, 3, 1, 2)
    image = image if channels_last else image.contiguous()
    rois = torch.cat([torch.from_numpy(problem.image_of_box)[:, None], torch.from_numpy(problem.boxes)], 1).double()
    want = problem.forward().permute(0, 3, 1, 2)
    given = [rois[rois[:, 0] == i, 1:] for i in range(3)] if as_list else rois
    got = roi_align_nchw(image, given, problem.bins, 0.25)
    assert got.shape == want.shape and (got - want).abs().max() < 1e-12
    if not as_list:
        mixed = torch.arange(15).flip(0)
        assert torch.equal(roi_align_nchw(image, rois[mixed], problem.bins, 0.25), got[mixed])


def test_weights_of_an_inside_box_sum_to_one() -> None:
    boxes = torch.tensor([[0.0, 0.0, 32.0, 24.0], [3.0, 5.0, 9.0, 7.0]])
    for ratio in (1, 2, 5, -1):
        wy, wx, window = reference.plan(boxes, (6, 8), (3, 4), 0.25, ratio, True, False)
        assert torch.allclose(wy.sum(-1), torch.ones(2, 3)) and torch.allclose(wx.sum(-1), torch.ones(2, 4))
        for table, (begin, end) in ((wy, window[0, :2]), (wx, window[0, 2:])):
            used = (table[0] != 0).any(0).nonzero()
            assert (begin, end) == (used.min(), used.max() + 1)


def test_clear_errors() -> None:
    """Each message names what was given and what was expected; every error is a UserError and a ValueError."""
    tokens, boxes, offsets = torch.zeros(2, 13, 3), torch.zeros(4, 4), torch.tensor([0, 1, 4])
    call = dict(output_size=2, spatial_scale=1.0)
    prefixed = dict(num_prefix_tokens=1, **call)
    nested = torch.tensor([0, 5, 4])
    refused = [
        (r"\[2, 13, 3\], expected \[B, 12, C\]", (tokens, boxes, offsets, (3, 4)), call),
        ("run from 0 to 3, expected 0 to 4 boxes", (tokens, boxes, torch.tensor([0, 1, 3]), (3, 4)), prefixed),
        ("run from 1 to 4", (tokens, boxes, torch.tensor([1, 1, 4]), (3, 4)), prefixed),
        ("fall from 5 to 4", (tokens, boxes, nested, (3, 4)), prefixed),
        (r"int64\[4\], expected torch.int64\[3\]", (tokens, boxes, torch.tensor([0, 1, 2, 4]), (3, 4)), prefixed),
        (r"int32\[3\], expected torch.int64\[3\]", (tokens, boxes, offsets.int(), (3, 4)), prefixed),
        (r"float32, got torch.bfloat16", (tokens, boxes.bfloat16(), offsets, (3, 4)), prefixed),
        (r"boxes must be \[R, 4\], got \[4, 5\]", (tokens, torch.zeros(4, 5), offsets, (3, 4)), prefixed),
        (r"differ: \[2, 13, 3\] and \[2, 13, 2\]", ([tokens, tokens[..., :2]], boxes, offsets, (3, 4)), prefixed),
        ("float32 on cpu and torch.float64", ([tokens, tokens.double()], boxes, offsets, (3, 4)), prefixed),
        ("tokens are torch.int64, expected one of", (tokens.long(), boxes, offsets, (3, 4)), prefixed),
        ("stride 1, got 13", (torch.zeros(2, 3, 13).mT, boxes, offsets, (3, 4)), prefixed),
        ("boxes are on meta, tokens on cpu", (tokens, boxes.to("meta"), offsets, (3, 4)), prefixed),
        ("offsets are on meta, tokens on cpu", (tokens, boxes, offsets.to("meta"), (3, 4)), prefixed),
        ("at least one level", ([], boxes, offsets, (3, 4)), call),
        (r"bins \(0, 2\) on a grid of \(3, 4\)", (tokens, boxes, offsets, (3, 4)), {**prefixed, "output_size": (0, 2)}),
        ("None or 'mean', not 'max'", (tokens, boxes, offsets, (3, 4)), {**prefixed, "pool": "max"}),
        ("backends: ", (tokens, boxes, offsets, (3, 4)), {**prefixed, "backend": "cuda"}),
        ("has no float64", (tokens.double(), boxes, offsets, (3, 4)), {**prefixed, "backend": "triton"}),
    ]  # fmt: skip
    for message, arguments, keywords in refused:
        with pytest.raises(ArgumentError, match=message) as caught:
            roi_align(*arguments, **keywords)
        assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)
    assert roi_align(tokens, boxes, offsets, (3, 4), **prefixed).shape == (4, 2, 2, 3)
    with pytest.raises(ArgumentError, match=r"images 2 to 2 outside \[0, 2\)"):
        roi_align_nchw(torch.zeros(2, 3, 4, 4), torch.tensor([[2.0, 0, 0, 1, 1]]), 2)
    with pytest.raises(ArgumentError, match=r"\[K, 5\] or a list of \[L, 4\], got \[1, 4\]"):
        roi_align_nchw(torch.zeros(2, 3, 4, 4), torch.zeros(1, 4), 2)
