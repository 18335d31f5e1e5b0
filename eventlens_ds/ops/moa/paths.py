"""Which of three ways a mixture of adapters is computed, and why.

dense     every adapter on every token: two matrix products and one pointwise kernel
sparse    rows (token, slot) sorted by adapter; each adapter runs on its own tokens only
segments  as sparse, but the caller's segments are the groups, so nothing is sorted
In: sizes, never values. Out: a backend and a path. Decision: on a GPU up to DENSE_COLUMNS = 512 hidden columns are
bound by memory traffic, so skipping adapters would save nothing there; a CPU is bound by arithmetic from the start. A
choice is made and logged once per process and set of sizes.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, NamedTuple, get_args

from eventlens_ds.errors import ArgumentError
from eventlens_ds.ops.dispatch import choose_backend
from eventlens_ds.ops.moa.reference import DENSE_COLUMNS

logger = logging.getLogger(__name__)

Path = Literal["dense", "sparse", "segments"]

CPU_SKIPPED_COLUMNS = 128
"""Hidden columns a CPU has to save per token before groups beat one pair of products over all adapters."""

KERNEL_DTYPES = ("float32", "float16", "bfloat16")

KERNEL_COLUMNS = 4096
"""Hidden columns up to which the dense kernels run: [T, E * r] of them are stored."""

KERNEL_ADAPTERS = 64
"""Adapters of the kernels' router: a row of logits is one tile in registers."""

KERNEL_GROUPS = 1024
"""Groups that a kernel searches for its own; more segments than that are sorted instead."""


class Sizes(NamedTuple):
    """What a choice depends on; plain numbers, so a traced call makes it once."""

    device: str
    dtype: str
    adapters: int
    """E; tasks when channel gates are folded"""
    rank: int
    used: int
    """adapters per token: k, or 1 for tasks"""
    segments: int | None
    """None without segments"""


def choose(sizes: Sizes, backend: str | None, path: str | None) -> tuple[str, str]:
    """(backend, path) for a call, logged with its reason the first time.

    `backend` and `path` name one explicitly. Raises ArgumentError when the named one cannot take these sizes.
    """
    return _choose_once(backend, path, *sizes)


def _choose_once(backend: str | None, path: str | None, *sizes: Any) -> tuple[str, str]:
    # While tracing, the arguments of such a function have to be plain values.
    return _choose(Sizes(*sizes), backend, path)


# What torch.compiler.assume_constant_result does, which would import the compiler (2 s) wherever this op is imported:
# a trace calls the function once and keeps its answer.
_choose_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=512)
def _choose(sizes: Sizes, backend: str | None, path: str | None) -> tuple[str, str]:
    if path is not None and path not in get_args(Path):
        raise ArgumentError(f"moa: no path {path!r}; paths: {', '.join(get_args(Path))}")
    if path == "segments" and sizes.segments is None:
        raise ArgumentError("moa: path 'segments' needs segments, got None")
    name = choose_backend("moa", sizes.device, backend)
    if name == "triton" and (limit := _kernel_limit(sizes, path)):
        if backend is not None or path is not None:
            raise ArgumentError(f"moa: triton cannot run this: {limit}")
        name = choose_backend("moa", sizes.device, "reference")
        logger.info("moa runs reference on %s: %s", sizes.device, limit)
    if name == "csrc" and path == "dense":
        raise ArgumentError("moa: csrc has no path dense, it only routes; use backend reference or triton")
    chosen, reason = (path, "asked for by name") if path is not None else _prefer(sizes, name)
    logger.info("moa takes path %s on %s with %s: %s", chosen, sizes.device, name, reason)
    return name, chosen


def _prefer(sizes: Sizes, backend: str) -> tuple[str, str]:
    """The path that suits the sizes, and why."""
    columns = sizes.adapters * sizes.rank
    skipped = columns - sizes.used * sizes.rank
    few = sizes.segments is not None and sizes.used * sizes.segments <= KERNEL_GROUPS
    groups = "segments" if few else "sparse"
    if backend == "csrc":
        return groups, "csrc only routes"
    if sizes.device == "cpu":
        if skipped <= CPU_SKIPPED_COLUMNS:
            return "dense", f"(E - k) * r = {skipped} <= {CPU_SKIPPED_COLUMNS} columns to skip"
        return groups, f"(E - k) * r = {skipped} > {CPU_SKIPPED_COLUMNS} columns to skip"
    if backend == "reference":
        return "dense", f"plain torch would wait for the {sizes.device} device to learn the groups"
    if skipped == 0 and columns <= KERNEL_COLUMNS:
        return "dense", f"every token uses all {sizes.adapters} adapters"
    if few and sizes.used == 1:
        return "segments", f"{sizes.segments} segments with one adapter each"
    if columns <= DENSE_COLUMNS:
        return "dense", f"E * r = {columns} <= {DENSE_COLUMNS}"
    return groups, f"E * r = {columns} > {DENSE_COLUMNS}"


def _kernel_limit(sizes: Sizes, path: str | None) -> str:
    """What is too large for the Triton kernels, "" when nothing is."""
    if sizes.dtype not in KERNEL_DTYPES:
        return f"features are {sizes.dtype}, kernels take {', '.join(KERNEL_DTYPES)}"
    if sizes.adapters > KERNEL_ADAPTERS:
        return f"{sizes.adapters} adapters, kernels take up to {KERNEL_ADAPTERS}"
    if path == "dense" and sizes.adapters * sizes.rank > KERNEL_COLUMNS:
        return f"E * r = {sizes.adapters * sizes.rank} on path dense, which takes up to {KERNEL_COLUMNS}"
    groups = sizes.used * (sizes.segments if path == "segments" and sizes.segments is not None else sizes.adapters)
    if path != "dense" and groups > KERNEL_GROUPS:
        return f"{groups} groups of rows, path {path or 'sparse'} takes up to {KERNEL_GROUPS}"
    return ""
