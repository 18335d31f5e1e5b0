"""The mixture of adapters as torch operators: schemas, shapes for tracing, gradients.

In: checked tensors from the front door and the name of a backend. Out: `dense`, `route`, `sort_rows` and `grouped`,
differentiable functions that torch.compile sees as single nodes.
Decision: Library.define and impl rather than triton_op: that one can neither be traced nor checked under the
interpreter, and its dispatch costs more than these kernels save at small T. Saved for backward: inputs and the
pre-activations; activations are computed again. Kernels are imported on first use, so this module needs no triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eventlens_ds.ops.moa import grouped as torch_form
from eventlens_ds.ops.moa.gates import AdapterStack
from eventlens_ds.ops.moa.grouped import Rows

STACK = "Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor scale"
ROWS = "Tensor weights, Tensor order, Tensor offsets, Tensor experts"
STACK_GRADS = "Tensor, Tensor, Tensor, Tensor, Tensor"

_library = torch.library.Library("eventlens", "FRAGMENT")


def dense(x: Tensor, residual: Tensor, adapters: AdapterStack, routing: Tensor, mode: str, k: int, act: str) -> Tensor:
    """residual + mixture [T, D] with all adapters as one pair of matrix products; Triton only.

    mode: "tasks" (routing is task ids [T]), "soft", "top_k" or "top_k_leaky" (routing is float32 logits [T, E]).
    """
    return torch.ops.eventlens.moa_dense(x, residual, *adapters, routing, mode, k, act)[0]


def route(logits: Tensor, k: int, renormalise: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Weights [T, k] and experts int32[T, k] of the k largest of logits [T, E], see grouped.route."""
    return torch.ops.eventlens.moa_route(logits, k, renormalise, backend)


def sort_rows(keys: Tensor, num_keys: int, backend: str) -> tuple[Tensor, Tensor]:
    """Stable counting sort of keys int32[T, k] in [0, num_keys), see grouped.sort_rows."""
    return torch.ops.eventlens.moa_sort(keys, num_keys, backend)


def grouped(x: Tensor, residual: Tensor, adapters: AdapterStack, rows: Rows, act: str, backend: str) -> Tensor:
    """residual + mixture [T, D] where each row runs its own adapter alone, see grouped.forward."""
    return torch.ops.eventlens.moa_grouped(x, residual, *adapters, *rows, act, backend)[0]


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"eventlens::{name}", fake, lib=_library)


def _kernels() -> Any:
    from eventlens_ds.ops.moa import kernel

    return kernel


def _mover(backend: str) -> Any:
    """The compiled primitives for csrc, None for plain torch."""
    if backend == "reference":
        return None
    from eventlens_ds.ops.moa import csrc

    return csrc


def _dense(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *stack, routing, mode, k, activation = rest
    return _kernels().dense_forward(x, residual, AdapterStack(*stack), routing, mode, k, activation)


def _dense_fake(x: Tensor, residual: Tensor, down: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), x.new_empty(x.shape[0], down.shape[0] * down.shape[1])


def _dense_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *stack, routing, hidden, mode, k, activation = rest
    dx, gradients, drouting = _kernels().dense_backward(
        grad, x, AdapterStack(*stack), routing, hidden, mode, k, activation
    )
    return dx, *gradients, drouting


def _dense_backward_fake(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *stack, routing, _, mode, _, _ = rest
    drouting = routing.new_empty(0 if mode == "tasks" else routing.shape, dtype=torch.float32)
    return x.new_empty(x.shape), *_stack_like(stack), drouting


def _stack_like(stack: list[Tensor]) -> list[Tensor]:
    return [weight.new_empty(weight.shape) for weight in stack]


def _dense_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, *stack, routing, ctx.mode, ctx.k, ctx.activation = inputs
    ctx.residual_dtype = inputs[1].dtype
    ctx.save_for_backward(x, *stack, routing, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _dense_gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 11
    x, *stack, routing, hidden = ctx.saved_tensors
    dx, *rest, drouting = torch.ops.eventlens.moa_dense_backward(
        grad.to(x.dtype).contiguous(), x, *stack, routing, hidden, ctx.mode, ctx.k, ctx.activation
    )
    return dx, grad, *rest, None if ctx.mode == "tasks" else drouting, None, None, None


def _route(logits: Tensor, k: int, renormalise: bool, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return torch_form.route(logits, k, renormalise)
    return (_kernels() if backend == "triton" else _mover(backend)).route(logits, k, renormalise)


def _route_fake(logits: Tensor, k: int, renormalise: bool, backend: str) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], k), logits.new_empty(logits.shape[0], k, dtype=torch.int32)


def _route_backward(
    grad: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, renormalise: bool, backend: str
) -> Tensor:
    form = _kernels() if backend == "triton" else torch_form
    return form.route_backward(grad, logits, weights, experts, renormalise)


def _route_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.renormalise, ctx.backend = inputs
    ctx.save_for_backward(logits, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _route_gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None
    dlogits = torch.ops.eventlens.moa_route_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.renormalise, ctx.backend
    )
    return dlogits, None, None, None


def _sort(keys: Tensor, num_keys: int, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "csrc":
        return _mover(backend).sort_by_expert(keys, num_keys)
    return (_kernels() if backend == "triton" else torch_form).sort_rows(keys, num_keys)


def _sort_fake(keys: Tensor, num_keys: int, backend: str) -> tuple[Tensor, Tensor]:
    return keys.new_empty(keys.numel()), keys.new_empty(num_keys + 1)


def _grouped(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    stack, rows, (activation, backend) = AdapterStack(*rest[:5]), Rows(*rest[5:9]), rest[9:]
    if backend == "triton":
        return _kernels().grouped_forward(x, residual, stack, rows, activation)
    return torch_form.forward(x, residual, stack, rows, activation, _mover(backend))


def _grouped_fake(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    stack, rows = AdapterStack(*rest[:5]), Rows(*rest[5:9])
    return residual.new_empty(residual.shape), x.new_empty(rows.order.shape[0], stack.down.shape[1])


def _grouped_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stack, rows, (hidden, activation, backend) = AdapterStack(*rest[:5]), Rows(*rest[5:9]), rest[9:]
    if backend == "triton":
        dx, gradients, dweights = _kernels().grouped_backward(grad, x, stack, rows, hidden, activation)
    else:
        dx, gradients, dweights = torch_form.backward(grad, x, stack, rows, hidden, activation, _mover(backend))
    return dx, *gradients, dweights


def _grouped_backward_fake(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights = rest[5]
    return x.new_empty(x.shape), *_stack_like([*rest[:5]]), weights.new_empty(weights.shape)


def _grouped_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, *tensors, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(x, *tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grouped_gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 13
    x, *rest = ctx.saved_tensors
    # An expanded gradient (from a sum) has stride 0; the kernels read rows.
    dx, *stack, dweights = torch.ops.eventlens.moa_grouped_backward(
        grad.to(x.dtype).contiguous(), x, *rest, ctx.activation, ctx.backend
    )
    return dx, grad, *stack, dweights, None, None, None, None, None


_define(
    "moa_dense",
    f"(Tensor x, Tensor residual, {STACK}, Tensor routing, str mode, int k, str activation) -> (Tensor, Tensor)",
    _dense,
    _dense_fake,
)
_define(
    "moa_dense_backward",
    f"(Tensor grad, Tensor x, {STACK}, Tensor routing, Tensor hidden, str mode, int k, str activation) "
    f"-> (Tensor, {STACK_GRADS}, Tensor)",
    _dense_backward,
    _dense_backward_fake,
)
_define(
    "moa_route",
    "(Tensor logits, int k, bool renormalise, str backend) -> (Tensor, Tensor)",
    _route,
    _route_fake,
)
_define(
    "moa_route_backward",
    "(Tensor grad, Tensor logits, Tensor weights, Tensor experts, bool renormalise, str backend) -> Tensor",
    _route_backward,
    lambda grad, logits, *rest: logits.new_empty(logits.shape),
)
_define("moa_sort", "(Tensor keys, int num_keys, str backend) -> (Tensor, Tensor)", _sort, _sort_fake)
_define(
    "moa_grouped",
    f"(Tensor x, Tensor residual, {STACK}, {ROWS}, str activation, str backend) -> (Tensor, Tensor)",
    _grouped,
    _grouped_fake,
)
_define(
    "moa_grouped_backward",
    f"(Tensor grad, Tensor x, {STACK}, {ROWS}, Tensor hidden, str activation, str backend) "
    f"-> (Tensor, {STACK_GRADS}, Tensor)",
    _grouped_backward,
    _grouped_backward_fake,
)

for _name, _gradient, _context in (
    ("moa_dense", _dense_gradient, _dense_context),
    ("moa_route", _route_gradient, _route_context),
    ("moa_grouped", _grouped_gradient, _grouped_context),
):
    torch.library.register_autograd(f"eventlens::{_name}", _gradient, setup_context=_context, lib=_library)
