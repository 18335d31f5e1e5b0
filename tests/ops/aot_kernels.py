"""Small Triton kernels for test_aot: one that may ship, one that spills, one over the shared memory of the chip.

In: nothing. Out: `compile_cases`, as a kernel module of ops/ has it. Decision: the offenders differ from the good one
only in tile sizes and warps, so that the gate is shown to read the compiled binary and not the source.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from eventlens_ds.ops.aot import CompileCase


@triton.jit
def product(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        left = tl.load(a + m[:, None] * K + (start + k)[None, :])
        right = tl.load(b + (start + k)[:, None] * BN + n[None, :])
        acc += tl.dot(left, right)
    tl.store(c + m[:, None] * BN + n[None, :], acc.to(tl.bfloat16))


def _case(
    name: str, tile: tuple[int, int, int], num_warps: int, num_stages: int, archs: tuple[int, ...]
) -> CompileCase:
    return CompileCase(
        name=name,
        fn=product,
        signature={"a": "*bf16", "b": "*bf16", "c": "*bf16", "K": "i32"},
        constexprs=dict(zip(("BM", "BN", "BK"), tile)),
        aligned=frozenset({"a", "b", "c", "K"}),
        num_warps=num_warps,
        num_stages=num_stages,
        archs=archs,
    )


def compile_cases() -> Iterator[CompileCase]:
    yield _case("good", (64, 64, 32), 4, 3, (80, 90))
    yield _case("spilling", (256, 128, 32), 4, 2, (90,))
    yield _case("oversized", (128, 128, 128), 8, 4, (80, 90))
