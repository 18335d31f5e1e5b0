"""RoI-align as torch operators: schemas, shapes for tracing, gradients.

In: checked tensors from the front door and the name of a backend. Out: `plan` and `pool`, which torch.compile sees as
single nodes, `pool` differentiable (twice) for its levels. The backends are the modules reference, kernel (Triton) and
csrc, with the same three functions plan, forward and backward; they are imported on first use.
Decision: Library.define and impl rather than triton_op, which can neither be traced nor checked under the interpreter.
Autocast has no rule here on purpose: features keep their dtype and boxes stay float32, since accumulation is float32
in every backend and coordinates in half precision are off by a good part of a cell.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from eventlens_ds.errors import ArgumentError
from eventlens_ds.ops import dispatch

MODULES = {"reference": "reference", "triton": "kernel", "csrc": "csrc"}

_library = torch.library.Library("eventlens", "FRAGMENT")

Plan = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def plan(
    boxes: torch.Tensor,
    grid_hw: tuple[int, int],
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    mean: bool,
    backend: str,
) -> Plan:
    """(wy [R, P, H], wx [R, Q, W], window int32[R, 4]) of boxes [R, 4], see reference.plan; no gradient."""
    return torch.ops.eventlens.roi_align_plan(
        boxes.detach(), grid_hw, output_size, spatial_scale, sampling_ratio, aligned, mean, backend
    )


def pool(
    levels: Sequence[torch.Tensor],
    tables: Plan,
    offsets: torch.Tensor,
    grid_hw: tuple[int, int],
    num_prefix_tokens: int,
    backend: str,
) -> torch.Tensor:
    """[R, P, Q, C]: the mean over levels [B, n + H * W, C] of the planned sums, see reference.forward."""
    return torch.ops.eventlens.roi_align(list(levels), *tables, offsets, grid_hw, num_prefix_tokens, backend)


def choose(backend: str | None, given: torch.Tensor) -> str:
    """The backend that runs for these tokens, see dispatch.choose_backend. Triton has no float64: the reference runs
    in its place. While a graph is captured nothing is decided (that would break it) and "" is passed on; the operator
    chooses when it runs."""
    if torch.compiler.is_compiling():
        return backend or ""
    name = dispatch.choose_backend("roi_align", given.device, backend or None)
    if name == "triton" and given.dtype == torch.float64:
        if backend:
            raise ArgumentError("roi_align: backend 'triton' has no float64, which tokens are; use float32")
        return "reference"
    return name


def _module(backend: str, given: torch.Tensor) -> Any:
    return importlib.import_module(f"eventlens_ds.ops.roi_align.{MODULES[backend or choose(None, given)]}")


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"eventlens::{name}", fake, lib=_library)


def _plan(boxes, grid_hw, output_size, spatial_scale, sampling_ratio, aligned, mean, backend):  # type: ignore[no-untyped-def]
    return tuple(
        _module(backend, boxes).plan(
            boxes, tuple(grid_hw), tuple(output_size), spatial_scale, sampling_ratio, aligned, mean
        )
    )


def _plan_fake(boxes, grid_hw, output_size, spatial_scale, sampling_ratio, aligned, mean, backend):  # type: ignore[no-untyped-def]
    count, (bins_y, bins_x) = boxes.shape[0], (1, 1) if mean else output_size
    return (
        boxes.new_empty(count, bins_y, grid_hw[0]),
        boxes.new_empty(count, bins_x, grid_hw[1]),
        boxes.new_empty(count, 4, dtype=torch.int32),
    )


def _forward(levels, wy, wx, window, offsets, grid_hw, prefix, backend):  # type: ignore[no-untyped-def]
    return _module(backend, levels[0]).forward(levels, wy, wx, window, offsets, tuple(grid_hw), prefix)


def _forward_fake(levels, wy, wx, *rest):  # type: ignore[no-untyped-def]
    return levels[0].new_empty(wy.shape[0], wy.shape[1], wx.shape[1], levels[0].shape[2])


def _backward(grad, wy, wx, window, offsets, grid_hw, prefix, batch, num_levels, backend):  # type: ignore[no-untyped-def]
    return _module(backend, grad).backward(grad, wy, wx, window, offsets, tuple(grid_hw), prefix, batch, num_levels)


def _backward_fake(grad, wy, wx, window, offsets, grid_hw, prefix, batch, num_levels, backend):  # type: ignore[no-untyped-def]
    return grad.new_empty(batch, prefix + grid_hw[0] * grid_hw[1], grad.shape[3])


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    levels, *tables, ctx.grid_hw, ctx.prefix, ctx.backend = inputs
    ctx.batch, ctx.num_levels = levels[0].shape[0], len(levels)
    ctx.save_for_backward(*tables)
    ctx.set_materialize_grads(False)


def _forward_gradient(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return [None] * ctx.num_levels, None, None, None, None, None, None, None
    # An expanded gradient (from a sum) has stride 0; the kernels read rows.
    spread = torch.ops.eventlens.roi_align_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.grid_hw, ctx.prefix, ctx.batch, ctx.num_levels, ctx.backend
    )
    return [spread] * ctx.num_levels, None, None, None, None, None, None, None


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *tables, ctx.grid_hw, ctx.prefix, _, ctx.num_levels, ctx.backend = inputs
    ctx.save_for_backward(*tables)
    ctx.set_materialize_grads(False)


def _backward_gradient(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
    """The gradient is linear in what it is given, and its own gradient is the forward pass."""
    if grad is None:
        return (None,) * 10
    pooled = torch.ops.eventlens.roi_align(
        [grad.contiguous()], *ctx.saved_tensors, ctx.grid_hw, ctx.prefix, ctx.backend
    )
    return pooled / ctx.num_levels, *(None,) * 9


_TABLES = "Tensor wy, Tensor wx, Tensor window, Tensor offsets, SymInt[2] grid_hw, SymInt prefix"

_define(
    "roi_align_plan",
    "(Tensor boxes, SymInt[2] grid_hw, SymInt[2] output_size, float spatial_scale, int sampling_ratio, bool aligned, "
    "bool mean, str backend) -> (Tensor, Tensor, Tensor)",
    _plan,
    _plan_fake,
)
_define("roi_align", f"(Tensor[] levels, {_TABLES}, str backend) -> Tensor", _forward, _forward_fake)
_define(
    "roi_align_backward",
    f"(Tensor grad, {_TABLES}, SymInt batch, int num_levels, str backend) -> Tensor",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("eventlens::roi_align", _forward_gradient, setup_context=_forward_context, lib=_library)
torch.library.register_autograd(
    "eventlens::roi_align_backward", _backward_gradient, setup_context=_backward_context, lib=_library
)
