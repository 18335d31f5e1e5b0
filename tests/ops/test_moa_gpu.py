"""The mixture's kernels on a GPU: bfloat16 against the float64 formula, 100 bitwise repeats, compile, no device sync.

Run with `pytest -m gpu`; skipped without a CUDA device. Decision: tolerances are relative to the largest value of each
tensor, float32 2e-5, bfloat16 2e-2 (eight bits of mantissa, one rounding per product and per slot), float16 4e-3. They
are set from the formats, not from a run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from eventlens_ds.ops.moa import AdapterStack, Gates, TaskOneHot, TopKRouter, moa
from tests.ops import moa_loop
from tests.ops.moa_loop import KINDS, draw, leaves_of, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = ((300, 4, 64, 512), (257, 16, 128, 264), (70, 3, 5, 37), (1, 1, 16, 64))
PATHS = ("dense", "sparse", "segments")


def cuda(gates: Gates, dtype: torch.dtype | None = None) -> Gates:
    moved = {n: t.cuda() for n, t in vars(gates).items() if torch.is_tensor(t)}
    floating = {n: t.to(dtype) for n, t in moved.items() if dtype is not None and t.is_floating_point()}
    return replace(gates, **{**moved, **floating})


def on_gpu(
    kind: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, calculate: torch.dtype, **how: Any
) -> list[torch.Tensor]:
    """Output and gradients with inputs of `dtype`, calculated in `calculate`."""
    tokens, adapters, rank, width = sizes
    segments = torch.tensor([0, tokens // 2, tokens // 2, tokens]).cuda() if how.get("path") == "segments" else None
    rows = tokens if segments is None else 3
    x, residual = (draw(tokens, width, seed=s).to(dtype).cuda().to(calculate) for s in (20, 21))
    # Weights of 1 / sqrt(fan-in), else sums over 4,096 hidden units drown the residual.
    down, down_bias, up, up_bias, scale = moa_loop.make_stack(adapters, rank, width)
    stack = AdapterStack(down / width**0.5, down_bias, up / rank**0.5, up_bias, scale)
    stack = AdapterStack(*(w.to(dtype).cuda().to(calculate) for w in stack))
    gates = cuda(moa_loop.make_gates(kind, rows, adapters, width, dtype), calculate)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(x, residual, stack, gates)]
    out = moa(x, residual, stack, gates, segments, activation="gelu", **how)
    weight = draw(tokens, width, seed=30).cuda()
    return [out.detach().double(), *(g.double() for g in torch.autograd.grad((out.double() * weight).sum(), leaves))]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_float64(kind: str, sizes: tuple[int, int, int, int], path: str) -> None:
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        # The float64 run is dense: plain torch, the specification.
        expected = on_gpu(
            kind, sizes, dtype, torch.float64, backend="reference", path="dense" if path != "segments" else path
        )
        assert worst(on_gpu(kind, sizes, dtype, dtype, backend="triton", path=path), expected) < tolerance


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["vectors", "one_hot", "top2"])
def test_a_hundred_bitwise_repeats(kind: str, path: str) -> None:
    sizes = (2048, 8, 64, 1024)
    first = on_gpu(kind, sizes, torch.bfloat16, torch.bfloat16, backend="triton", path=path)
    for _ in range(99):
        again = on_gpu(kind, sizes, torch.bfloat16, torch.bfloat16, backend="triton", path=path)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_compiles_with_inductor(path: str) -> None:
    x, stack = draw(64, 128).bfloat16().cuda(), moa_loop.make_stack(4, 16, 128, torch.bfloat16)
    stack = AdapterStack(*(w.cuda() for w in stack))
    logits = draw(64, 4, seed=1).cuda().float()

    def call(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return moa(x, x, stack, TopKRouter(logits, 2), backend="triton", path=path)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, fullgraph=True)(x, logits), call(x, logits))


@pytest.mark.parametrize("path", [None, *PATHS])
def test_never_waits_for_the_device(path: str | None) -> None:
    x, stack = draw(64, 128).bfloat16().cuda().requires_grad_(), moa_loop.make_stack(4, 16, 128, torch.bfloat16)
    stack = AdapterStack(*(w.cuda().requires_grad_() for w in stack))
    segments = torch.tensor([0, 20, 64]).cuda()
    gates = TaskOneHot(torch.tensor([1, -1]).cuda())
    moa(x, x, stack, gates, segments, path=path).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moa(x, x, stack, gates, segments, path=path).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_int32() -> None:
    """T * D > 2^31: the last tokens are computed as the first ones are."""
    width = 4096
    tokens = 2**31 // width + 64
    if torch.cuda.mem_get_info()[0] < 6 * tokens * width * 2:
        pytest.skip("needs 26 GB of free GPU memory")
    x = draw(1, width).bfloat16().cuda().expand(tokens, -1).contiguous()
    stack = AdapterStack(*(w.cuda() for w in moa_loop.make_stack(2, 16, width, torch.bfloat16)))
    ids = torch.arange(tokens, device="cuda") % 2
    for path in ("dense", "sparse"):
        out = moa(x, x, stack, TaskOneHot(ids), backend="triton", path=path)
        assert torch.equal(out[-64:], out[:64])
