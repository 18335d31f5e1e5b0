"""Tile sizes of the mixture's Triton kernels: plain functions of shapes, element size and compute capability.

In: the rank, the number of adapters or groups, bytes per element. Out: constexprs, warps and stages of one launch.
Decision: no tuning at run time, so two runs of a job compute the same sums in the same order; and `compile_cases` of
kernel.py can list every configuration that a launch can ask for, which is what the compile gate builds.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

GATE_WARPS = 8
"""Warps of the gate kernels: with four, some of them spill a register or two."""


class Config(NamedTuple):
    """Tile of a product [rows, columns, depth], warps per program and pipeline stages."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


def _power(value: int, low: int, high: int) -> int:
    return min(high, max(low, triton.next_power_of_2(value)))


def to_rank(rank: int, itemsize: int, capability: int) -> Config:
    """Products with `rank` columns and D as depth: the down projection and the gradient of its output."""
    columns = _power(rank, 16, 128 if itemsize == 2 else 64)
    if itemsize == 4:
        return Config(32, columns, 32, 4, 2)
    return Config(64, columns, 64, 8 if columns == 128 else 4, 3)


def from_rank(rank: int, itemsize: int, capability: int) -> Config:
    """Products with D columns and `rank` as depth: the up projection and the gradient of x."""
    if itemsize == 4:
        return Config(32, 64, _power(rank, 16, 32), 4, 2)
    return Config(64, 128, _power(rank, 16, 64), 8, 2)


def over_rows(rank: int, itemsize: int, capability: int) -> Config:
    """Products [rank, D] with rows as depth: the gradients of the weights."""
    if itemsize == 4:
        return Config(16, 32, 16, 4, 2)
    return Config(_power(rank, 16, 64), 128, 32, 4 if rank <= 32 else 8, 3)


def parts_of(rank: int, width: int, adapters: int, rows: int, config: Config) -> int:
    """Partial sums per weight gradient: enough programs for about four waves of 128 multiprocessors, 16 at most."""
    programs = adapters * triton.cdiv(rank, config.BM) * triton.cdiv(width, config.BN)
    wanted = triton.next_power_of_2(triton.cdiv(512, programs))
    useful = max(1, rows // (adapters * 4 * config.BK))
    return max(1, min(16, wanted, triton.next_power_of_2(useful)))


def gate_tile(columns: int) -> dict[str, int]:
    """Tokens, hidden units and adapters per step of the gate kernels; `columns` covers adapters and padding."""
    wide = _power(columns, 16, 128)
    return {"BM": 32 if wide < 128 else 16, "BR": 32, "E2": wide}


def route_tile(adapters: int) -> dict[str, int]:
    """Tokens and adapters per program of the router."""
    wide = _power(adapters, 2, 64)
    return {"BM": _power(1024 // wide, 16, 128), "E2": wide}


def sort_tile(groups: int) -> dict[str, int]:
    """Keys and groups per program of the counting sort: a tile of comparisons stays in registers."""
    wide = max(2, triton.next_power_of_2(groups))
    return {"B": _power(8192 // wide, 16, 256), "G2": wide}
