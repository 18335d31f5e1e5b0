"""RoI-align as a torch operator: opcheck, torch.compile without graph breaks, recomputation, autocast, fixed bits.

In: every backend that runs on this machine's CPU (reference, Triton under the interpreter, csrc when it is built).
Decision: the front door itself is compiled, not only the operators, since its checks are what would break a graph.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from eventlens_ds.errors import ArgumentError
from eventlens_ds.ops import dispatch
from eventlens_ds.ops.roi_align import roi_align, roi_align_nchw

GRID, SCALE = (4, 5), 0.25
BACKENDS = ("reference", "triton", "csrc")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    obstacle = dispatch.available("roi_align", "cpu")[request.param]
    if obstacle:
        pytest.skip(obstacle)
    return request.param


def inputs(count: int = 5, levels: int = 2) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator) * 12
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 12 - 2], 1)
    tokens = [torch.randn(3, 21, 4, generator=generator).requires_grad_() for _ in range(levels)]
    return tokens, boxes, torch.tensor([0, count // 2, count // 2, count])


def call(levels, boxes, offsets, backend, **changes):  # type: ignore[no-untyped-def]
    keywords = dict(output_size=(2, 3), spatial_scale=SCALE, num_prefix_tokens=1, backend=backend)
    return roi_align(levels, boxes, offsets, GRID, **{**keywords, **changes})


@pytest.mark.parametrize("mean", [False, True])
def test_opcheck(backend: str, mean: bool) -> None:
    levels, boxes, offsets = inputs()
    ops = torch.ops.eventlens
    arguments = (boxes, GRID, (2, 3), SCALE, 2, True, mean, backend)
    tables = ops.roi_align_plan(*arguments)
    grad = torch.randn(5, *((1, 1) if mean else (2, 3)), 4, requires_grad=True)
    checked = (
        (ops.roi_align_plan.default, arguments),
        (ops.roi_align.default, (levels, *tables, offsets, GRID, 1, backend)),
        (ops.roi_align_backward.default, (grad, *tables, offsets, GRID, 1, 3, 2, backend)),
    )
    for op, given in checked:
        assert set(torch.library.opcheck(op, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("pool", [None, "mean"])
def test_compiles_without_graph_breaks(backend: str, pool: str | None) -> None:
    """One graph forward and backward, equal to eager to the bit; another number of boxes runs too."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: call(*given, backend, pool=pool) * 2, fullgraph=True, backend="aot_eager")
    for count in (5, 7, 8):
        levels, boxes, offsets = inputs(count)
        runs = []
        for function in (compiled, lambda *given: call(*given, backend, pool=pool) * 2):
            got = function(levels, boxes, offsets)
            runs.append([got.detach(), *torch.autograd.grad(got.sum(), levels)])
        assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_the_torchvision_call_compiles() -> None:
    torch._dynamo.reset()
    image, rois = torch.randn(2, 3, 6, 8), torch.tensor([[1.0, 2, 3, 20, 18], [0.0, 1, 1, 9, 9]])
    compiled = torch.compile(lambda *given: roi_align_nchw(*given, 2, 0.25), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image, rois), roi_align_nchw(image, rois, 2, 0.25))


def test_a_captured_graph_chooses_the_backend_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    levels, boxes, offsets = inputs()
    compiled = torch.compile(lambda *given: call(*given, None), fullgraph=True, backend="aot_eager")
    want = call(levels, boxes, offsets, None)
    monkeypatch.setattr(dispatch, "_decisions", {})
    assert torch.equal(compiled(levels, boxes, offsets), want)
    assert list(dispatch.decisions()) == ["roi_align on cpu"]


def test_a_captured_graph_does_not_read_values_but_checks_shapes() -> None:
    torch._dynamo.reset()
    levels, boxes, offsets = inputs()
    compiled = torch.compile(lambda *given: call(*given, "reference"), fullgraph=True, backend="eager")
    with pytest.raises(ArgumentError, match=r"offsets are torch.int64\[3\]"):
        call(levels, boxes, offsets[:3], "reference")
    with pytest.raises(Exception, match="offsets are torch.int64"):
        compiled(levels, boxes, offsets[:3])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend: str, reentrant: bool) -> None:
    levels, boxes, offsets = inputs()
    runs = []
    for recompute in (False, True):
        given = lambda *tokens: call(list(tokens), boxes, offsets, backend)  # noqa: E731
        got = checkpoint(given, *levels, use_reentrant=reentrant) if recompute else given(*levels)
        for level in levels:
            level.grad = None
        got.pow(2).sum().backward()
        runs.append([got.detach(), *(level.grad for level in levels)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_autocast_keeps_dtypes(backend: str) -> None:
    """Features keep their dtype and boxes stay float32: a product in bfloat16 would be off by 1e-2."""
    levels, boxes, offsets = inputs()
    want = call(levels, boxes, offsets, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(levels, boxes, offsets, backend)
        gradients = torch.autograd.grad(got.sum(), levels)
    assert got.dtype == torch.float32 and (got - want).abs().max() <= 1e-5
    assert all(grad.dtype == torch.float32 for grad in gradients)


def test_bits_repeat_for_expanded_gradients(backend: str) -> None:
    """Gradients of a sum have stride 0; twenty runs, forward and backward, give the same bits."""
    levels, boxes, offsets = inputs(12)
    runs = []
    for _ in range(20 if backend != "triton" else 3):
        got = call(levels, boxes, offsets, backend)
        runs.append([got.detach(), *torch.autograd.grad(got.sum(), levels)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


def test_only_some_levels_need_a_gradient(backend: str) -> None:
    levels, boxes, offsets = inputs()
    frozen = [levels[0].detach(), levels[1]]
    (grad,) = torch.autograd.grad(call(frozen, boxes, offsets, backend).sum(), levels[1])
    (want,) = torch.autograd.grad(call(levels, boxes, offsets, "reference").sum(), levels[1])
    assert (grad - want).abs().max() <= 1e-5
    assert not call([level.detach() for level in levels], boxes, offsets, backend).requires_grad


def test_importing_the_op_imports_neither_triton_nor_the_compiler() -> None:
    code = "import sys, eventlens_ds.ops.roi_align; sys.exit(bool({'triton', 'torch._dynamo'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
