"""RoI-align on a GPU: what the interpreter cannot show. Run by `make gpu`; skipped where there is no GPU.

In: the kernels as compiled, against the loop and the reference on the CPU. Decision: half precision may err by twice
what rounding the exact result once does, with no constant to tune; the other tests compare bits.
"""

from __future__ import annotations

import os
from importlib import import_module

import numpy as np
import pytest
import torch

from eventlens_ds.ops import dispatch
from eventlens_ds.ops.roi_align import op, reference, roi_align
from tests.ops.roi_loop import errors, random_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="run with TRITON_INTERPRET=0"),
]

GRID, CALL = (24, 24), dict(output_size=7, spatial_scale=1 / 14, num_prefix_tokens=1)


@pytest.fixture(params=("triton", "csrc"))
def backend(request: pytest.FixtureRequest) -> str:
    obstacle = dispatch.available("roi_align", "cuda")[request.param]
    if obstacle:
        pytest.skip(obstacle)
    return request.param


def inputs(batch: int = 6, count: int = 80, channels: int = 1408, hot: bool = False):
    """Tokens, boxes and offsets on the GPU: ragged, an image without boxes, one with most of them when hot."""
    rng = np.random.default_rng(count)
    corner = rng.uniform(-40, 300, (count, 2))
    boxes = torch.from_numpy(np.concatenate([corner, corner + rng.uniform(-5, 250, (count, 2))], 1)).float()
    image = np.sort(rng.choice([0, 2, 3, 5], count)) if not hot else np.sort(rng.choice([1, 4], count, p=[0.05, 0.95]))
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(np.bincount(image, minlength=batch))]))
    tokens = torch.randn(batch, 577, channels, generator=torch.Generator().manual_seed(0))
    return tokens.cuda(), boxes.cuda(), offsets.cuda()


def both(tokens: torch.Tensor, boxes: torch.Tensor, offsets: torch.Tensor, backend: str, **changes):
    leaf = tokens.detach().requires_grad_()
    got = roi_align(leaf, boxes, offsets, GRID, backend=backend, **{**CALL, **changes})
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(got)
    return got.detach(), torch.autograd.grad(got, leaf, weight)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_loop(backend: str, dtype: torch.dtype) -> None:
    module = import_module(f"eventlens_ds.ops.roi_align.{'kernel' if backend == 'triton' else backend}")
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for seed in range(60):
        drawn = random_problem(seed)
        assert max(errors(module, drawn, dtype, seed % 2 == 0, layout=torch.Tensor.cuda)) <= limit, drawn


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("pool", [None, "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_agrees_with_the_reference(backend: str, dtype: torch.dtype, pool: str | None, hot: bool) -> None:
    """At most twice the error of rounding the exact result once (float32: 1e-5 of its largest element)."""
    tokens, boxes, offsets = inputs(count=300 if hot else 80, hot=hot)
    got = both(tokens.to(dtype), boxes, offsets, backend, pool=pool)
    for value, want in zip(got, exact(tokens.to(dtype), boxes, offsets, pool)):
        rounding = (want.to(dtype).double() - want).abs().max() if dtype != torch.float32 else 0.0
        assert (value.cpu().double() - want).abs().max() <= 2 * rounding + 1e-5 * want.abs().max()


def exact(tokens: torch.Tensor, boxes: torch.Tensor, offsets: torch.Tensor, pool: str | None):
    """What `both` must return: float64 sums of the same numbers with the same float32 weights, on the CPU."""
    leaf = tokens.detach().cpu().double().requires_grad_()
    tables = op.plan(boxes.cpu(), GRID, (7, 7), 1 / 14, 2, True, pool == "mean", "reference")
    got = op.pool([leaf], tables, offsets.cpu(), GRID, 1, "reference")
    got = got.flatten(0, 2) if pool == "mean" else got
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(tokens.dtype).double()
    return got.detach(), torch.autograd.grad(got, leaf, weight)[0]


@pytest.mark.parametrize("hot", [False, True])
def test_bits_repeat_a_hundred_times(backend: str, hot: bool) -> None:
    tokens, boxes, offsets = inputs(count=300, hot=hot)
    tokens = tokens.bfloat16()
    first = both(tokens, boxes, offsets, backend)
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, both(tokens, boxes, offsets, backend)))


def test_the_plan_is_that_of_the_cpu_to_the_bit(backend: str) -> None:
    """Adaptive sampling of 20,000 boxes at 1/14, a fifth of them on the grid of patches; NaN among them."""
    module = import_module(f"eventlens_ds.ops.roi_align.{'kernel' if backend == 'triton' else backend}")
    rng = np.random.default_rng(0)
    boxes = torch.from_numpy(rng.uniform(-40, 380, (20000, 4))).float()
    boxes[::5] = (boxes[::5] / 14).round() * 14
    boxes[::1000, 2] = float("nan")
    for sampling in (-1, 2):
        for aligned in (True, False):
            arguments = (GRID, (7, 7), 1 / 14, sampling, aligned, False)
            for got, want in zip(module.plan(boxes.cuda(), *arguments), reference.plan(boxes, *arguments)):
                assert torch.equal(got.cpu(), want)


def test_offsets_beyond_31_bits(backend: str) -> None:
    """4.6e9 bytes of bfloat16 features: the last image lies beyond element 2^31."""
    batch, channels = 2800, 1408
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    assert batch * 577 * channels > 2**31
    tokens = torch.zeros(batch, 577, channels, dtype=torch.bfloat16, device="cuda")
    tokens[-1] = torch.randn(577, channels)
    offsets = torch.zeros(batch + 1, dtype=torch.int64, device="cuda")
    offsets[-1] = 3
    boxes = torch.tensor([[10.0, 20, 200, 300], [-30, 5, 90, 400], [0, 0, 336, 336]], device="cuda")
    got, grad = both(tokens, boxes, offsets, backend)
    want, wanted = both(tokens[-1:].clone(), boxes, torch.tensor([0, 3], device="cuda"), backend)
    assert torch.equal(got, want) and torch.equal(grad[-1:], wanted) and not grad[:-1].any()


def test_compiles_and_captures(backend: str) -> None:
    """torch.compile as one graph gives the bits of eager, and a CUDA graph, which allows no sync, can be captured."""
    tokens, boxes, offsets = inputs()
    want = both(tokens, boxes, offsets, backend)
    compiled = torch.compile(lambda *given: roi_align(*given, GRID, backend=backend, **CALL), fullgraph=True)
    assert torch.equal(compiled(tokens, boxes, offsets), want[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = roi_align(tokens, boxes, offsets, GRID, backend=backend, **CALL)
    graph.replay()
    assert torch.equal(captured, want[0])


def test_wrong_offsets_on_the_device_stay_inside() -> None:
    """Unchecked on a GPU: the features are wrong, but Triton touches nothing outside the arguments."""
    tokens, boxes, offsets = inputs(count=300)
    for wrong in (offsets * 3, offsets - 50, offsets.flip(0).contiguous(), torch.zeros_like(offsets)):
        both(tokens, boxes, wrong, "triton")
    torch.cuda.synchronize()
