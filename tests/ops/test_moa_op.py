"""The mixture as torch operators: opcheck, torch.compile without breaks, autocast, checkpointing, repeatability.

In: every gate kind, the plain torch backend and the Triton kernels under the interpreter. Decision: the operators are
checked one by one (schema, fake kernels, autograd registration) and the front door as users call it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from eventlens_ds.ops.moa import AdapterStack, Gates, TaskOneHot, grouped, moa
from tests.ops import moa_loop
from tests.ops.moa_loop import draw, run, worst

KINDS = ("vectors", "one_hot", "top2", "top2_leaky", "soft")
TOKENS, ADAPTERS, RANK, WIDTH = 7, 2, 4, 6


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, AdapterStack]:
    x, residual = draw(TOKENS, WIDTH, seed=20, dtype=dtype), draw(TOKENS, WIDTH, seed=21, dtype=dtype)
    return x, residual, moa_loop.make_stack(ADAPTERS, RANK, WIDTH, dtype)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck_of_path_sparse(backend: str) -> None:
    ops = torch.ops.eventlens
    logits = draw(TOKENS, ADAPTERS, dtype=torch.float32).requires_grad_()
    for renormalise in (True, False):
        opcheck(ops.moa_route.default, (logits, 2, renormalise, backend))
        weights, experts = grouped.route(logits.detach(), 2, renormalise)
        opcheck(
            ops.moa_route_backward.default,
            (torch.ones(TOKENS, 2), logits.detach(), weights, experts, renormalise, backend),
        )
    keys = experts + torch.tensor([0, ADAPTERS], dtype=torch.int32)
    opcheck(ops.moa_sort.default, (keys, 2 * ADAPTERS, backend))
    rows = (weights, *grouped.sort_rows(keys, 2 * ADAPTERS), torch.arange(ADAPTERS, dtype=torch.int32).repeat(2))
    x, residual, stack = inputs()
    arguments = (x, residual, *stack, *rows)
    for tensor in arguments:
        tensor.requires_grad_(tensor.is_floating_point())
    opcheck(ops.moa_grouped.default, (*arguments, "gelu", backend))
    plain = [t.detach() for t in arguments]
    hidden = ops.moa_grouped(*plain, "gelu", backend)[1]
    opcheck(ops.moa_grouped_backward.default, (plain[1], plain[0], *plain[2:], hidden, "gelu", backend))


@pytest.mark.parametrize("mode", ["tasks", "soft", "top_k", "top_k_leaky"])
def test_opcheck_of_path_dense(mode: str) -> None:
    x, residual, stack = inputs()
    routing = torch.arange(TOKENS) % ADAPTERS if mode == "tasks" else draw(TOKENS, ADAPTERS, dtype=torch.float32)
    arguments = [x, residual, *stack, routing]
    for tensor in arguments:
        tensor.requires_grad_(tensor.is_floating_point())
    opcheck(torch.ops.eventlens.moa_dense.default, (*arguments, mode, 2, "silu"))
    plain = [t.detach() for t in arguments]
    hidden = torch.ops.eventlens.moa_dense(*plain, mode, 2, "silu")[1]
    opcheck(torch.ops.eventlens.moa_dense_backward.default, (plain[1], plain[0], *plain[2:], hidden, mode, 2, "silu"))


def rebuild(gates: Gates, tensors: list[torch.Tensor]) -> Gates:
    """The same gate around other tensors: what a traced function does with its inputs."""
    names = [field.name for field in fields(gates) if torch.is_tensor(getattr(gates, field.name))]
    return replace(gates, **dict(zip(names, tensors, strict=True)))


@pytest.mark.parametrize(
    ("kind", "backend", "path"),
    [
        *((kind, None, None) for kind in KINDS),
        *((kind, "reference", "sparse") for kind in ("vectors", "one_hot", "top2")),
        ("vectors", "triton", "dense"),
        ("top2", "triton", "sparse"),
        ("one_hot", "triton", "segments"),
    ],
)
def test_compiles_without_a_break(kind: str, backend: str | None, path: str | None) -> None:
    x, residual, stack = inputs()
    segments = torch.tensor([0, 2, 2, TOKENS]) if path == "segments" else None
    gates = moa_loop.make_gates(kind, TOKENS if segments is None else 3, ADAPTERS, WIDTH, torch.float32)
    routed = [t for t in vars(gates).values() if torch.is_tensor(t)]
    leaves = [t for t in (x, residual, *stack, *routed) if t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()

    def call(x: torch.Tensor, residual: torch.Tensor, stack: list[torch.Tensor], *routed: torch.Tensor) -> torch.Tensor:
        return moa(x, residual, AdapterStack(*stack), rebuild(gates, [*routed]), segments, backend=backend, path=path)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for form in (call, compiled):
        out = form(x, residual, [*stack], *routed)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert worst(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, path: str) -> None:
    """Features in bfloat16, master weights, residual and gradients in float32."""
    x, residual, stack = inputs()
    gates = moa_loop.make_gates(kind, TOKENS, ADAPTERS, WIDTH, torch.float32)
    exact = moa(x, residual, stack, gates, path=path)
    leaves = [w.requires_grad_() for w in stack]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = moa(x, residual, AdapterStack(*leaves), gates, path=path)
    assert got.dtype == torch.float32 and 0 < (got - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(got.sum(), leaves))


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_autocast_of_the_kernels(path: str) -> None:
    x, residual, stack = inputs()
    gates = moa_loop.make_gates("top2", TOKENS, ADAPTERS, WIDTH, torch.float32)
    exact = moa(x, residual, stack, gates)
    with torch.autocast("cpu", dtype=torch.float16):
        got = moa(x, residual, stack, gates, backend="triton", path=path)
    assert got.dtype == torch.float32 and 0 < (got - exact).abs().max() < 0.01 * exact.abs().max()


FORMS = [("reference", "dense"), ("reference", "sparse"), ("triton", "dense"), ("triton", "sparse")]


@pytest.mark.P7
@pytest.mark.parametrize(("backend", "path"), FORMS)
def test_two_open_forwards_then_one_backward(backend: str, path: str) -> None:
    """Two checkpointed forwards with other tasks, one backward: each recomputes with the gates of its own forward."""
    x, residual, stack = inputs()
    leaves = [w.requires_grad_() for w in stack]
    tasks = [torch.arange(TOKENS) % ADAPTERS, (torch.arange(TOKENS) + 1) % ADAPTERS]

    def call(x: torch.Tensor, ids: torch.Tensor, *stack: torch.Tensor) -> torch.Tensor:
        return moa(x, residual, AdapterStack(*stack), TaskOneHot(ids), backend=backend, path=path)

    def total(run_one: Any) -> tuple[torch.Tensor, ...]:
        outs = [run_one(ids) for ids in tasks]
        return torch.autograd.grad(outs[0].square().sum() + outs[1].pow(3).sum(), leaves)

    plain = total(lambda ids: call(x, ids, *leaves))
    again = total(lambda ids: checkpoint(call, x, ids, *leaves, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    swapped = total(lambda ids: call(x, tasks[0], *leaves))
    assert not torch.equal(plain[0], swapped[0]), "control: the tasks matter"


def test_reentrant_checkpointing() -> None:
    x, residual, stack = inputs()
    leaves, ids = [w.requires_grad_() for w in stack], torch.arange(TOKENS) % ADAPTERS

    def call(x: torch.Tensor, *stack: torch.Tensor) -> torch.Tensor:
        return moa(x, residual, AdapterStack(*stack), TaskOneHot(ids), path="sparse").square().sum()

    plain = torch.autograd.grad(call(x, *leaves), leaves)
    checkpoint(call, x, *leaves, use_reentrant=True).backward()
    assert all(torch.equal(a, leaf.grad) for a, leaf in zip(plain, leaves, strict=True))


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_bitwise_repeatable(path: str) -> None:
    first, *others = (run("top2", (64, 4, 5, 16), torch.float32, path=path) for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_saved_for_backward_is_inputs_and_pre_activations() -> None:
    """No activation, no gathered copy: the only [T * k, ...] tensor kept besides the inputs is the pre-activation."""
    x, residual, stack = inputs()
    leaves = [w.requires_grad_() for w in stack]
    saved: list[torch.Size] = []
    gates = moa_loop.make_gates("top2", TOKENS, ADAPTERS, WIDTH, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        moa(x, residual, AdapterStack(*leaves), gates, path="sparse")
    large = [tuple(shape) for shape in saved if len(shape) == 2 and shape[0] >= TOKENS and shape[1] > 2]
    assert sorted(large) == sorted([(TOKENS, WIDTH), (2 * TOKENS, RANK)])
