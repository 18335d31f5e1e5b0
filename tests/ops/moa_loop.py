"""Inputs of the mixture's tests, and the mixture as a literal double loop over tokens and adapters.

In: sizes and the name of a gate kind. Out: float64 tensors drawn from fixed seeds, and `loop`, the formula written out
token by token with Python's own sort for the routing. Decision: the loop shares no code with the package, so an error
of the reference cannot hide in it; autograd of the loop gives the gradients that every path is compared with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from eventlens_ds.ops.moa import AdapterStack, Gates, SoftMixture, TaskOneHot, TaskVectors, TopKRouter, moa

KINDS = ("vectors", "one_hot", "top1", "top2", "top2_leaky", "top_all", "soft")
ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "identity": lambda hidden: hidden,
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_stack(adapters: int, rank: int, width: int, dtype: torch.dtype = torch.float64) -> AdapterStack:
    shapes = ((adapters, rank, width), (adapters, rank), (adapters, width, rank), (adapters, width), (adapters,))
    return AdapterStack(*(draw(*shape, seed=i + 1, dtype=dtype) for i, shape in enumerate(shapes)))


def make_gates(kind: str, rows: int, adapters: int, width: int, dtype: torch.dtype = torch.float64) -> Gates:
    """Gates for `rows` tokens or segments; tasks 0, 2, 4, ... have work, the last row is padding (task -1)."""
    tasks = (torch.arange(rows) * 5) % 3 * 2 % adapters
    if rows > 1:
        tasks[-1] = -1
    # Halves: about every second row has a tie.
    logits = (draw(rows, adapters, seed=11) * 2).round().div(2).to(dtype)
    if kind == "vectors":
        return TaskVectors(draw(3, adapters, width, seed=12, dtype=dtype), tasks.clamp(max=2))
    if kind == "one_hot":
        return TaskOneHot(tasks)
    if kind == "soft":
        return SoftMixture(logits)
    k = {"top1": 1, "top2": 2, "top2_leaky": 2, "top_all": adapters}[kind]
    return TopKRouter(logits, min(k, adapters), renormalise=kind != "top2_leaky")


def loop_gate(gates: Gates, row: int, adapter: int) -> torch.Tensor | float:
    if isinstance(gates, TaskVectors):
        return gates.vectors[gates.task_ids[row], adapter] if gates.task_ids[row] >= 0 else 0.0
    if isinstance(gates, TaskOneHot):
        return float(gates.task_ids[row] == adapter)
    logits = gates.logits[row].double()
    values = logits.tolist()
    chosen = list(range(len(values)))
    if isinstance(gates, TopKRouter):
        chosen = sorted(chosen, key=lambda e: (-values[e], e))[: gates.k]
    if adapter not in chosen:
        return 0.0
    pool = range(len(values)) if isinstance(gates, TopKRouter) and not gates.renormalise else chosen
    powers = (logits - logits.max()).exp()
    return powers[adapter] / powers[list(pool)].sum()


def loop(
    x: torch.Tensor,
    residual: torch.Tensor,
    stack: AdapterStack,
    gates: Gates,
    row_of: list[int] | None = None,
    activation: str = "relu",
) -> torch.Tensor:
    """The formula of `moa`; row_of[t] is the gate row of token t (default: its own)."""
    act, out = ACTIVATIONS[activation], []
    for t in range(len(x)):
        total = residual[t]
        for e in range(len(stack.scale)):
            gate = loop_gate(gates, t if row_of is None else row_of[t], e)
            hidden = act(stack.down[e] @ x[t] + stack.down_bias[e])
            total = total + stack.scale[e] * gate * (stack.up[e] @ hidden + stack.up_bias[e])
        out.append(total)
    return torch.stack(out) if out else residual.clone()


def leaves_of(x: torch.Tensor, residual: torch.Tensor, stack: AdapterStack, gates: Gates) -> list[torch.Tensor]:
    """Everything that gets a gradient, in one order."""
    routed = {"vectors": getattr(gates, "vectors", None), "logits": getattr(gates, "logits", None)}
    return [x, residual, *stack, *(t for t in routed.values() if t is not None)]


def run(
    kind: str,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float64,
    segments: torch.Tensor | None = None,
    activation: str = "gelu",
    spelled_out: bool = False,
    **how: Any,
) -> list[torch.Tensor]:
    """Output and all gradients of one call on (T, E, r, D), as float64; spelled_out: of the loop instead."""
    tokens, adapters, rank, width = sizes
    rows = tokens if segments is None else len(segments) - 1
    x, residual = draw(tokens, width, seed=20, dtype=dtype), draw(tokens, width, seed=21, dtype=dtype)
    stack, gates = make_stack(adapters, rank, width, dtype), make_gates(kind, rows, adapters, width, dtype)
    if spelled_out:
        x, residual, stack = x.double(), residual.double(), AdapterStack(*(w.double() for w in stack))
        floating = {name: t.double() for name, t in vars(gates).items() if torch.is_tensor(t) and t.is_floating_point()}
        gates = replace(gates, **floating)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(x, residual, stack, gates)]
    if spelled_out:
        row_of = None if segments is None else torch.arange(rows).repeat_interleave(segments.diff()).tolist()
        out = loop(x, residual, stack, gates, row_of, activation)
    else:
        out = moa(x, residual, stack, gates, segments, activation=activation, **how)
    weight = draw(tokens, width, seed=30)
    gradients = torch.autograd.grad((out.double() * weight).sum(), leaves, allow_unused=spelled_out)
    return [out.detach().double(), *(torch.zeros(()) if g is None else g.double() for g in gradients)]


def worst(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference, relative to the largest value of each tensor (at least 1)."""
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(got, expected, strict=True) if a.numel()
    ]
    return float("inf") if any(e != e for e in errors) else max(errors, default=0.0)
