"""Adapters on groups of tokens in plain torch: skips every adapter that a token does not use. The fast form on a CPU.

A row is a pair (token, slot) with flat index token * k + slot. A group is a run of `order` whose rows share one
adapter: a segment, or what a stable counting sort put together. Group g is order[offsets[g]:offsets[g + 1]], its
adapter experts[g]; -1 means none, and costs nothing. In: features, weights, rows. Out: residual + mixture.
Decision: the groups' sizes are read on the host, which is free on a CPU and waits for the device elsewhere; there the
kernels find their group themselves. `route`, `sort_rows` and `Rows` are what all backends share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from eventlens_ds.ops.moa.gates import AdapterStack
from eventlens_ds.ops.moa.reference import ACTIVATIONS, wide


class Rows(NamedTuple):
    """Which adapter runs on which token: the routing of one forward."""

    weights: torch.Tensor
    """float32[T, k], the gate of every row"""
    order: torch.Tensor
    """int32[T * k], flat indices of the rows group by group, slots never mixed within a group"""
    offsets: torch.Tensor
    """int32[G + 1], the groups, all groups of slot 0 first"""
    experts: torch.Tensor
    """int32[G], the adapter of each group, -1 for none"""


def route(logits: torch.Tensor, k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of logits [T, E] in descending order, the lowest index first among equals.

    Returns weights [T, k] (softmax over the selected, or over all without renormalise) and experts int32[T, k].
    """
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]
    if renormalise:
        return logits.gather(-1, order).softmax(-1), order.int()
    return logits.softmax(-1).gather(-1, order), order.int()


def route_backward(
    grad: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, renormalise: bool
) -> torch.Tensor:
    """Gradient for logits [T, E] from that of weights [T, k]; zero for unselected logits when renormalised."""
    index, inner = experts.long(), (grad * weights).sum(-1, keepdim=True)
    if renormalise:
        return torch.zeros_like(logits).scatter(-1, index, weights * (grad - inner))
    spread = torch.zeros_like(logits).scatter(-1, index, grad)
    return logits.softmax(-1) * (spread - inner)


def sort_rows(keys: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stable counting sort of keys int32[T, k] in [0, num_keys): order int32[T * k] and offsets int32[num_keys + 1]."""
    flat = keys.flatten()
    order = torch.sort(flat, stable=True).indices.int()
    counts = (flat[:, None] == torch.arange(num_keys, device=flat.device)).sum(0)
    return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


class Mover(Protocol):
    """Another way to move rows between the order of tokens and that of the groups, such as ops/moa/csrc.py."""

    def gather(self, x: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor: ...

    def combine(self, y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor: ...


def forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    adapters: AdapterStack,
    rows: Rows,
    activation: str,
    mover: Mover | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + mixture [T, D] and the pre-activations [T * k, r], in the order of the groups, for backward.

    Weights have the dtype of x except scale. Rows without an adapter leave their pre-activations unset.
    """
    out = residual.clone(memory_format=torch.contiguous_format)
    hidden = x.new_empty(rows.order.numel(), adapters.down.shape[1])
    take = _Taken(x, rows, mover)
    put = _Placed(out, rows, mover)
    for part, tokens, gate, e in _groups(rows):
        torch.addmm(adapters.down_bias[e], take(part, tokens), adapters.down[e].T, out=hidden[part])
        scaled = (gate * adapters.scale[e]).to(x.dtype)
        active = ACTIVATIONS[activation](hidden[part]) * scaled[:, None]
        put(part, tokens, active, adapters.up[e].T, scaled, adapters.up_bias[e])
    return put.total(), hidden


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    adapters: AdapterStack,
    rows: Rows,
    hidden: torch.Tensor,
    activation: str,
    mover: Mover | None = None,
) -> tuple[torch.Tensor, AdapterStack, torch.Tensor]:
    """Gradients for x, the adapters and the row weights [T, k], from grad [T, D] in the dtype of x."""
    # Sums over tokens are kept in at least float32 and rounded once.
    sums = AdapterStack(*(torch.zeros(w.shape, dtype=wide(w.dtype), device=w.device) for w in adapters))
    dweights = torch.zeros_like(rows.weights)
    take_x, take_grad = _Taken(x, rows, mover), _Taken(grad, rows, mover)
    put = _Placed(torch.zeros_like(x), rows, mover)
    for part, tokens, gate, e in _groups(rows):
        h, grads = hidden[part], take_grad(part, tokens)
        active = ACTIVATIONS[activation](h)
        scaled = (gate * adapters.scale[e]).to(x.dtype)
        dactive = torch.mm(grads, adapters.up[e])
        dgate = ((dactive * active).sum(-1) + torch.mv(grads, adapters.up_bias[e])).to(gate.dtype)
        dhidden = _activation_backward(dactive * scaled[:, None], h, activation)
        put(part, tokens, dhidden, adapters.down[e])
        sums.down[e] += torch.mm(dhidden.T, take_x(part, tokens))
        sums.down_bias[e] += dhidden.sum(0)
        sums.up[e] += torch.mm(grads.T, active * scaled[:, None])
        sums.up_bias[e] += torch.mv(grads.T, scaled)
        sums.scale[e] += (gate * dgate).sum()
        dweights.view(-1)[rows.order[part].long()] = dgate * adapters.scale[e].to(dgate.dtype)
    return put.total(), AdapterStack(*(total.to(w.dtype) for total, w in zip(sums, adapters))), dweights


class _Taken:
    """Rows of x [T, D] for one group after the other."""

    def __init__(self, x: torch.Tensor, rows: Rows, mover: Mover | None) -> None:
        self.x = x
        self.moved = None if mover is None else mover.gather(x, rows.order, rows.weights.shape[1])

    def __call__(self, part: slice, tokens: slice | torch.Tensor) -> torch.Tensor:
        return self.x[tokens] if self.moved is None else self.moved[part]


class _Placed:
    """Adds products of groups to the rows of a total [T, D]. A group holds a token once, so the sum has one order."""

    def __init__(self, out: torch.Tensor, rows: Rows, mover: Mover | None) -> None:
        self.out, self.rows, self.mover = out, rows, mover
        self.moved = None if mover is None else out.new_zeros(rows.order.numel(), out.shape[1])

    def __call__(
        self,
        part: slice,
        tokens: slice | torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor,
        scaled: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Add left @ right + scaled (x) bias."""
        if self.moved is None and isinstance(tokens, slice) and self.out.dtype == left.dtype:
            total = self.out[tokens].addmm_(left, right)
            if scaled is not None and bias is not None:
                total.addr_(scaled, bias)
            return
        product = torch.mm(left, right)
        if scaled is not None and bias is not None:
            product.addr_(scaled, bias)
        if self.moved is not None:
            self.moved[part] = product
        elif isinstance(tokens, slice):
            self.out[tokens] += product
        else:
            self.out.index_add_(0, tokens, product.to(self.out.dtype))

    def total(self) -> torch.Tensor:
        if self.moved is None or self.mover is None:
            return self.out
        # Gates are in the products already.
        return self.out + self.mover.combine(self.moved, self.rows.order, torch.ones_like(self.rows.weights))


def _groups(rows: Rows) -> Iterator[tuple[slice, slice | torch.Tensor, torch.Tensor, int]]:
    """(place in order, tokens, gates, adapter) of every group that has both rows and an adapter."""
    slots = rows.weights.shape[1]
    flat = rows.order.long()
    tokens, gates = flat // slots if slots > 1 else flat, rows.weights.flatten()[flat]
    bounds = rows.offsets.tolist()
    for first, end, e in zip(bounds, bounds[1:], rows.experts.tolist()):
        if first < end and e >= 0:
            part = slice(first, end)
            start, last = int(tokens[first]), int(tokens[end - 1])
            # Tokens ascend within a group, so these two tell whether they are a run, which needs no gather.
            run = last - start == end - first - 1
            yield part, slice(start, last + 1) if run else tokens[part], gates[part], e


def _activation_backward(grad: torch.Tensor, hidden: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, hidden, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, hidden)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, hidden)
    return grad
