"""Attention over a row that is a tree of segments, in each backend's form (P4).

In: parents int32[S] (-1: a root) and bounds int32[S, 2]; segments tile [0, T) in order, a parent comes before its
children, and a token sees the earlier tokens of its own segment and all tokens of the ancestors. Out: position ids,
a 4-D mask (sdpa, eager), one masked block per root (blocks) or a plan that gathers the ancestors' keys per segment
(varlen, flash).
Decision: the tree is the only source. Nothing is read from position ids, as transformers does when no mask is
given: on such a row that cuts every branch but the first off its prefix, in silence.
Importing this module registers "eventlens_varlen" and "eventlens_blocks" with transformers. No mask function goes
with them: for a name that has none, transformers builds no mask.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from eventlens_ds.errors import UserError

logger = logging.getLogger(__name__)

VARLEN = "eventlens_varlen"
"""The attn_implementation that takes a VarlenPlan."""

BLOCKS = "eventlens_blocks"
"""The attn_implementation that takes a tuple of TreeBlock."""


@dataclass(frozen=True)
class VarlenPlan:
    """A tree as query sequences with gathered keys; empty segments are left out.

    kv_index   int64[K]: the token behind each key; a segment's keys are its ancestors' tokens, then its own
    cu_q, cu_k int32[N + 1]: where the queries and keys of each of the N segments start
    max_q, max_k: the longest segment and the longest path; num_tokens: tokens before padding
    """

    kv_index: torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    num_tokens: int

    def to(self, device: torch.device | str) -> VarlenPlan:
        kv_index, cu_q, cu_k = (t.to(device, non_blocking=True) for t in (self.kv_index, self.cu_q, self.cu_k))
        return VarlenPlan(kv_index, cu_q, cu_k, self.max_q, self.max_k, self.num_tokens)


@dataclass(frozen=True)
class TreeBlock:
    """The tokens [start, end) below one root and their mask bool[1, 1, n, n]; padding is a block of its own."""

    start: int
    end: int
    mask: torch.Tensor


def ancestor_matrix(parents: torch.Tensor) -> torch.Tensor:
    """bool[S, S]: [s, a] is True when a is s or an ancestor of s.

    The closure of the parent relation by repeated squaring: log2(S) small products, no loop over segments and no
    device sync.
    """
    count = parents.shape[0]
    index = torch.arange(count, device=parents.device)
    reach = (index[:, None] == index) | (parents[:, None] == index)
    for _ in range(max(count - 1, 0).bit_length()):
        reach = (reach.float() @ reach.float()) > 0.5
    return reach


def tree_positions(parents: torch.Tensor, bounds: torch.Tensor, total_tokens: int | None = None) -> torch.Tensor:
    """Position ids int64[T]: a segment continues where its parent ends, so siblings restart at the same place.

    total_tokens: length of the row; padding tokens beyond the last bound get position 0.
    """
    _check_tree(parents, bounds)
    total = _row_length(bounds, total_tokens)
    length = (bounds[:, 1] - bounds[:, 0]).long()
    path = (ancestor_matrix(parents) * length).sum(1)
    shift = torch.cat([path - bounds[:, 1], path.new_zeros(1)])
    token = torch.arange(total, device=bounds.device)
    segment = _segment_of(token, bounds)
    return torch.where(segment < parents.shape[0], token + shift[segment], 0)


def tree_mask(parents: torch.Tensor, bounds: torch.Tensor, total_tokens: int) -> torch.Tensor:
    """bool[1, 1, T, T], True where query (row) sees key (column); padding tokens see only themselves.

    The form for scaled_dot_product_attention. Memory grows with T squared.
    """
    _check_tree(parents, bounds)
    segment = _segment_of(torch.arange(total_tokens, device=bounds.device), bounds)
    # One more row and column stand for padding, which is related to nothing.
    related = F.pad(ancestor_matrix(parents), (0, 1, 0, 1), value=False)
    # Ancestors lie before their descendants in the row, so the lower triangle only cuts inside a segment.
    visible = related[:, segment].index_select(0, segment).tril()
    visible.diagonal().fill_(True)
    return visible[None, None]


def varlen_plan(parents: torch.Tensor, bounds: torch.Tensor) -> VarlenPlan:
    """The tree as one query sequence per segment, for causal attention aligned at the bottom right.

    Its sizes are read on the host: build it from CPU tensors and move it, or accept a sync.
    """
    _check_tree(parents, bounds)
    num_tokens = _row_length(bounds, None)
    segment = _segment_of(torch.arange(num_tokens, device=bounds.device), bounds)
    length = bounds[:, 1] - bounds[:, 0]
    # Token order inside a row of this matrix is ancestors first, because parents precede children.
    keys = ancestor_matrix(parents)[length > 0][:, segment]
    lengths_q, lengths_k = length[length > 0], keys.sum(1)
    return VarlenPlan(
        kv_index=keys.nonzero()[:, 1],
        cu_q=F.pad(lengths_q.cumsum(0), (1, 0)).to(torch.int32),
        cu_k=F.pad(lengths_k.cumsum(0), (1, 0)).to(torch.int32),
        max_q=int(lengths_q.max()) if len(lengths_q) else 0,
        max_k=int(lengths_k.max()) if len(lengths_k) else 0,
        num_tokens=num_tokens,
    )


def tree_blocks(parents: torch.Tensor, bounds: torch.Tensor, total_tokens: int) -> tuple[TreeBlock, ...]:
    """The tree as masked blocks, one per root: trees of a row never see each other, so the cost is the sum of their
    squares and not the square of the row. Its sizes are read on the host: build it from CPU tensors.
    """
    _check_tree(parents, bounds)
    # A root opens a block when nothing from it on refers to a segment before it; trees may also be interleaved.
    index = torch.arange(len(parents), device=parents.device)
    earliest = torch.where(parents < 0, index, parents).flip(0).cummin(0).values.flip(0)
    roots = ((parents < 0) & (earliest >= index)).nonzero()[:, 0].tolist()
    blocks = []
    for first, last in zip(roots, [*roots[1:], len(parents)]):
        start, end = int(bounds[first, 0]), int(bounds[last - 1, 1])
        if end > start:
            below = torch.where(parents[first:last] < 0, -1, parents[first:last] - first)
            blocks.append(TreeBlock(start, end, tree_mask(below, bounds[first:last] - start, end - start)))
    padded = _row_length(bounds, None)
    if padded < total_tokens:
        alone = torch.eye(total_tokens - padded, dtype=torch.bool, device=bounds.device)[None, None]
        blocks.append(TreeBlock(padded, total_tokens, alone))
    return tuple(blocks)


def choose_form(choice: str, device: torch.device | str, dtype: torch.dtype, *, encoder_decoder: bool = False) -> str:
    """The attn_implementation for a `model.attention` setting: auto, sdpa, blocks or varlen.

    auto takes varlen where a fused kernel for it exists (CUDA, half precision), else blocks. An encoder-decoder (T5)
    has sdpa and blocks. Raises UserError for a form that does not exist or that the model cannot follow.
    """
    forms = {"sdpa": "sdpa", "blocks": BLOCKS, "varlen": VARLEN}
    if encoder_decoder:
        if choice == "varlen":
            raise UserError("model.attention varlen: T5 adds a bias of distances, for which no varlen kernel exists")
        choice = "blocks" if choice == "auto" else choice
    if choice == "auto":
        choice = "varlen" if _fused_kernel_runs(torch.device(device).type, dtype) else "blocks"
    if choice not in forms:
        raise UserError(f"model.attention is auto, sdpa, blocks or varlen, not {choice!r}")
    return forms[choice]


def attention_kwargs(
    implementation: str,
    parents: torch.Tensor,
    bounds: torch.Tensor,
    total_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Keyword arguments that make a transformers decoder attend along the tree.

    implementation: the model's attn_implementation (sdpa, eager or eventlens_varlen); dtype and device: those of its
    hidden states (None: where the tree is). The tree is best left on the CPU: a plan is built there and moved, a mask
    is built where it is used. Pass use_cache=False with them. Raises UserError for an implementation that cannot
    follow a tree.
    """
    device = bounds.device if device is None else device
    if implementation == VARLEN:
        return {"attention_mask": None, "varlen_plan": varlen_plan(parents, bounds).to(device)}
    if implementation == BLOCKS:
        blocks = tree_blocks(parents, bounds, total_tokens)
        return {
            "attention_mask": None,
            "tree_blocks": tuple(TreeBlock(b.start, b.end, b.mask.to(device, non_blocking=True)) for b in blocks),
        }
    if implementation not in ("sdpa", "eager"):
        known = f"sdpa, eager, {BLOCKS} or {VARLEN}"
        raise UserError(f"attention {implementation!r} cannot follow a segment tree; use {known}")
    _check_tree(parents, bounds)
    mask = tree_mask(parents.to(device), bounds.to(device), total_tokens)
    if implementation == "eager":
        # Eager attention adds the mask to the scores; a bool mask would add 0 or 1.
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {"attention_mask": mask}


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    varlen_plan: VarlenPlan | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for a VarlenPlan: query [1, H, T, D], key and value [1, H_kv, T, D].

    Returns ([1, T, H, D], None). A padding token attends to itself, as in tree_mask. Raises UserError without a
    plan (plain causal attention would leak between branches), with a mask, dropout or a window that would cut.
    """
    if varlen_plan is None:
        raise UserError(f"{VARLEN} needs varlen_plan=... in the call of the language model")
    if attention_mask is not None:
        raise UserError(f"{VARLEN} follows its plan and takes no attention_mask")
    if dropout:
        raise UserError(f"{VARLEN} has no attention dropout, got {dropout}; set attention_dropout to 0")
    if sliding_window is not None and sliding_window < varlen_plan.max_k:
        raise UserError(f"{VARLEN} has no sliding window: {sliding_window} is less than a path of {varlen_plan.max_k}")
    assert query.shape[0] == 1, "a packed row is a batch of one"
    plan = varlen_plan
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    real_q, keys, values = q[: plan.num_tokens], k[plan.kv_index], v[plan.kv_index]
    if plan.num_tokens == 0:
        output = real_q
    elif _fused_kernel_runs(query.device.type, query.dtype) and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0:
        output = _fused(real_q, keys, values, plan, scaling)
    else:
        output = _per_segment(real_q, keys, values, plan, scaling)
    padding = v[plan.num_tokens :].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.cat([output, padding])[None], None


def block_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_blocks: tuple[TreeBlock, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for tree blocks: query [1, H, T, D], key and value [1, H_kv, T, D].

    Returns ([1, T, H, D], None). Raises UserError without blocks, with a mask, or with a window that would cut.
    """
    if tree_blocks is None:
        raise UserError(f"{BLOCKS} needs tree_blocks=... in the call of the language model")
    if attention_mask is not None:
        raise UserError(f"{BLOCKS} follows its blocks and takes no attention_mask")
    longest = max((b.end - b.start for b in tree_blocks), default=0)
    if sliding_window is not None and sliding_window < longest:
        raise UserError(f"{BLOCKS} has no sliding window: {sliding_window} is less than a tree of {longest}")
    outputs = []
    for block in tree_blocks:
        q, k, v = (t[:, :, block.start : block.end] for t in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=block.mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _per_segment(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: VarlenPlan, scale: float | None
) -> torch.Tensor:
    """The plan with one scaled_dot_product_attention per segment: every device and dtype, slow on long rows."""
    starts_q, starts_k = plan.cu_q.tolist(), plan.cu_k.tolist()
    outputs = []
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:]):
        out = F.scaled_dot_product_attention(
            q[q0:q1].transpose(0, 1)[None],
            k[k0:k1].transpose(0, 1)[None],
            v[k0:k1].transpose(0, 1)[None],
            attn_mask=causal_lower_right(q1 - q0, k1 - k0),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: VarlenPlan, scale: float | None) -> torch.Tensor:
    """The plan in one kernel: flash-attn when installed, else torch's own varlen attention."""
    if _flash_attn_func() is not None:
        return _flash_attn_func()(
            q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, softmax_scale=scale, causal=True
        )
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters
    # torch 2.10 spells the causal flag otherwise and has no scale and no grouped queries.
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    if "scale" in accepted:
        options["scale"] = scale
    elif scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    output: Any = varlen_attn(q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, **options)
    return output


@cache
def _flash_attn_func() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _fused_kernel_runs(device: str, dtype: torch.dtype) -> bool:
    return device == "cuda" and dtype in (torch.float16, torch.bfloat16)


def _check_tree(parents: torch.Tensor, bounds: torch.Tensor) -> None:
    """A tree that breaks the contract would give a plausible wrong mask; checked where it needs no device sync."""
    if bounds.is_cuda or len(bounds) == 0:
        return
    index = torch.arange(len(parents))
    assert bool(((parents >= -1) & (parents < index)).all()), f"a parent must come before its children: {parents}"
    starts = F.pad(bounds[:-1, 1], (1, 0))
    tiles = bool((bounds[:, 0] == starts).all()) and bool((bounds[:, 1] >= bounds[:, 0]).all())
    assert tiles, f"segments must tile the row in order: {bounds.tolist()}"


def _row_length(bounds: torch.Tensor, total_tokens: int | None) -> int:
    if total_tokens is not None:
        return total_tokens
    return int(bounds[-1, 1]) if len(bounds) else 0


def _segment_of(token: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """The segment of each token; the number of segments for padding beyond the last bound."""
    return torch.searchsorted(bounds[:, 1].long().contiguous(), token, right=True)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionInterface.register(BLOCKS, block_attention)
