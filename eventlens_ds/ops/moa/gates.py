"""What a mixture of adapters is made of: the stacked weights, four kinds of gate, and how gates change form.

In: tensors with one gate row per token, or one per segment of tokens. Out: checked gates, gates spread over tokens,
and channel gates folded into the weights.
Decision: two of the four kinds are special cases. A soft mixture is top-k routing with k = E. A channel gate commutes
with the up projection, so the adapters of one task fold into a single adapter of rank E * r; kernels then only know
scalar gates. Gates: task vectors as in LION (Chen et al., 2023), top-k routing (Shazeer et al., 2017).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch

from eventlens_ds.errors import ArgumentError


class AdapterStack(NamedTuple):
    """Weights of E adapters of width r: y_e = scale_e * (up_e act(down_e x + down_bias_e) + up_bias_e)."""

    down: torch.Tensor
    """[E, r, D]"""
    down_bias: torch.Tensor
    """[E, r]"""
    up: torch.Tensor
    """[E, D, r]"""
    up_bias: torch.Tensor
    """[E, D]"""
    scale: torch.Tensor
    """[E]"""


@dataclass(frozen=True)
class TaskVectors:
    """One gate per channel: adapter e of a token of task t is multiplied by vectors[t, e], [tasks, E, D].

    A negative task (padding) has no adapter.
    """

    vectors: torch.Tensor
    task_ids: torch.Tensor
    """int64[T]"""


@dataclass(frozen=True)
class TaskOneHot:
    """Adapter e serves task e alone; a negative task (padding) has no adapter."""

    task_ids: torch.Tensor
    """int64[T]"""


@dataclass(frozen=True)
class TopKRouter:
    """The k largest logits [T, E] of a token are used, the lowest index first among equals.

    renormalise=True: softmax over the selected, others get no gradient. False: softmax over all, then selection.
    """

    logits: torch.Tensor
    k: int
    renormalise: bool = True


@dataclass(frozen=True)
class SoftMixture:
    """Every adapter, weighted by the softmax of its logit [T, E]."""

    logits: torch.Tensor


Gates = TaskVectors | TaskOneHot | TopKRouter | SoftMixture
ScalarGates = TaskOneHot | TopKRouter | SoftMixture
AnyGates = TypeVar("AnyGates", bound=Gates)


def gate_rows(gates: Gates) -> torch.Tensor:
    """The tensor of a gate that has one row per token or per segment: task ids [N] or logits [N, E]."""
    return gates.logits if isinstance(gates, TopKRouter | SoftMixture) else gates.task_ids


def spread(gates: AnyGates, segments: torch.Tensor, num_tokens: int) -> AnyGates:
    """Repeat each row of a per-segment gate over the tokens of its segment."""
    rows = gate_rows(gates)
    repeated = torch.repeat_interleave(rows, segments.diff().to(rows.device), dim=0, output_size=num_tokens)
    if isinstance(gates, TopKRouter | SoftMixture):
        return replace(gates, logits=repeated)
    return replace(gates, task_ids=repeated)


def fold_vectors(adapters: AdapterStack, gates: TaskVectors) -> tuple[AdapterStack, TaskOneHot]:
    """The same mixture as one adapter of rank E * r per task, its channel gates and scales inside the up projection.

    Exact: v (.) (up h + c) = (v (.) up) h + v (.) c. Costs tasks * E * r * D multiplications, not T * E * D. The down
    projection is a view shared by all tasks; autograd sums its gradient over them.
    """
    tasks, count, width = gates.vectors.shape
    rank = adapters.down.shape[1]
    gate = gates.vectors * adapters.scale[:, None]
    up = (gate[..., None] * adapters.up).transpose(1, 2).reshape(tasks, width, count * rank)
    folded = AdapterStack(
        adapters.down.flatten(0, 1).expand(tasks, -1, -1),
        adapters.down_bias.flatten().expand(tasks, -1),
        up,
        (gate * adapters.up_bias).sum(1),
        torch.ones(tasks, dtype=adapters.scale.dtype, device=adapters.scale.device),
    )
    return folded, TaskOneHot(gates.task_ids)


def check_adapters(adapters: AdapterStack, x: torch.Tensor) -> None:
    """Raise ArgumentError unless the stacked weights fit one another and x [..., D]."""
    if adapters.down.ndim != 3:
        raise ArgumentError(f"moa: down must be [E, r, D], got {list(adapters.down.shape)}")
    (count, rank, _), width = adapters.down.shape, x.shape[-1]
    expected = ((count, rank, width), (count, rank), (count, width, rank), (count, width), (count,))
    for name, weight, shape in zip(AdapterStack._fields, adapters, expected):
        if tuple(weight.shape) != shape:
            raise ArgumentError(f"moa: {name} is {list(weight.shape)}, expected {list(shape)}")
        if weight.device != x.device:
            raise ArgumentError(f"moa: {name} is on {weight.device} but x is on {x.device}")
        if not weight.dtype.is_floating_point:
            raise ArgumentError(f"moa: {name} is {weight.dtype}, expected a floating point type")


def check_gates(gates: Gates, segments: torch.Tensor | None, tokens: torch.Tensor, count: int, width: int) -> None:
    """Raise ArgumentError unless gates (and segments) fit tokens [T, D] and E adapters of width D.

    Values on an accelerator are not looked at, that would wait for the device: there a task without an adapter adds
    nothing to its tokens, and segments must tile the tokens.
    """
    num_tokens = tokens.shape[0]
    rows = num_tokens if segments is None else segments.shape[0] - 1
    if gate_rows(gates).device != tokens.device:
        raise ArgumentError(f"moa: the gate is on {gate_rows(gates).device} but x is on {tokens.device}")
    of = "tokens" if segments is None else "segments"
    if isinstance(gates, TopKRouter | SoftMixture):
        if tuple(gates.logits.shape) != (rows, count):
            raise ArgumentError(f"moa: logits are {list(gates.logits.shape)}, expected {[rows, count]} ({of}, E)")
        if isinstance(gates, TopKRouter) and not 1 <= gates.k <= count:
            raise ArgumentError(f"moa: top-k routing needs 1 <= k <= {count} adapters, got k={gates.k}")
    elif tuple(gates.task_ids.shape) != (rows,):
        raise ArgumentError(f"moa: {list(gates.task_ids.shape)} task ids for {rows} {of}")
    if isinstance(gates, TaskVectors) and tuple(gates.vectors.shape[1:]) != (count, width):
        raise ArgumentError(f"moa: vectors are {list(gates.vectors.shape)}, expected [tasks, {count}, {width}]")
    if not torch.compiler.is_compiling():
        _check_values(gates, segments, num_tokens, count)


def _check_values(gates: Gates, segments: torch.Tensor | None, num_tokens: int, count: int) -> None:
    if segments is not None and segments.device.type == "cpu":
        first, last = int(segments[0]), int(segments[-1])
        if first != 0 or last != num_tokens or bool((segments.diff() < 0).any()):
            raise ArgumentError(f"moa: segments from {first} to {last} do not tile {num_tokens} tokens in order")
    if isinstance(gates, TaskVectors | TaskOneHot) and gates.task_ids.device.type == "cpu" and gates.task_ids.numel():
        tasks = gates.vectors.shape[0] if isinstance(gates, TaskVectors) else count
        if (largest := int(gates.task_ids.max())) >= tasks:
            what = "vector" if isinstance(gates, TaskVectors) else "adapter"
            raise ArgumentError(f"moa: task {largest} has no {what}, there are {tasks}")
