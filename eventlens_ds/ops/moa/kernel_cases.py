"""The configurations in which the mixture's Triton kernels ship, for the compile gate (ops/aot.py).

In: nothing. Out: compile cases whose tiles come from kernel_config.py, the functions that a launch asks, for every rank
tile and element type and both capabilities. Decision: sizes that Triton specialises on (divisible by 16, equal to 1)
are given as at a launch, else the gate would measure kernels that nobody runs. gelu stands for all activations: it is
the longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from eventlens_ds.ops.aot import CompileCase
from eventlens_ds.ops.moa import kernel_config as config
from eventlens_ds.ops.moa import kernel_dense, kernel_sparse

RANKS = (16, 32, 64, 128, 256)
"""One rank per tile that the choosers can return; other ranks take the tile of the next."""
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
GROUPS = 64
POINTERS_32 = {"order_ptr": "*i32", "offsets_ptr": "*i32", "experts_ptr": "*i32"}
MODES = {"tasks": "*i64", "soft": "*fp32", "top_k": "*fp32", "top_k_leaky": "*fp32"}


def compile_cases() -> Iterator[CompileCase]:
    """Every kernel in every configuration that a launch on compute capability 8.x or 9.x can ask for, once."""
    seen = set()
    for case in _all_cases():
        key = (id(case.fn), *map(str, (case.signature, case.constexprs, case.num_warps, case.num_stages, case.archs)))
        if key not in seen:
            seen.add(key)
            yield case


def _all_cases() -> Iterator[CompileCase]:
    yield from _gate_cases()
    for power in range(1, 7):
        yield from _route_cases(2**power)
    for power in range(1, 11):
        yield from _sort_cases(2**power)
    for arch in (80, 90):
        for rank in RANKS:
            for element in TYPES:
                yield from _group_cases(rank, element, arch)
        # More groups only widen the search of a program for its tile.
        yield from _group_cases(64, "bf16", arch, groups=1024)


def _case(
    name: str,
    fn: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    unaligned: frozenset[str] = frozenset(),
    **how: Any,
) -> CompileCase:
    """Arguments without a type are int32; pointers and sizes are aligned except those named."""
    names = [name for name in fn.arg_names if name not in constants]
    signature = {name: types.get(name, "i32") for name in names}
    aligned = {
        n for n in names if signature[n].startswith("*") or n in ("D", "R", "W", "stride_e", "stride_d", "stride_r")
    }
    return CompileCase(name, fn, signature, constants, frozenset(aligned - unaligned), **how)


def _gate_cases() -> Iterator[CompileCase]:
    for element, mode, columns in product(("bf16", "fp32"), MODES, (16, 32, 64, 128)):
        types = {"routing_ptr": MODES[mode], "scale_ptr": "*fp32"}
        types |= dict.fromkeys(("hidden_ptr", "gated_ptr", "dgated_ptr", "dhidden_ptr"), f"*{element}")
        types |= dict.fromkeys(("drouting_ptr", "dbias_ptr", "dscale_ptr"), "*fp32")
        constants = {"MODE": mode, "ACT": "gelu", **config.gate_tile(columns)}
        name = f"{mode} {element} E2={columns}"
        yield _case(f"gate {name}", kernel_dense.gate_kernel, types, constants, num_warps=config.GATE_WARPS)
        yield _case(
            f"gate_backward {name}", kernel_dense.gate_backward_kernel, types, constants, num_warps=config.GATE_WARPS
        )


def _route_cases(adapters: int) -> Iterator[CompileCase]:
    types = dict.fromkeys(("logits_ptr", "weights_ptr", "grad_ptr", "dlogits_ptr"), "*fp32") | POINTERS_32
    for renormalise in (True, False):
        constants = {"RENORMALISE": renormalise, **config.route_tile(adapters)}
        name = f"E={adapters}{'' if renormalise else ' leaky'}"
        yield _case(f"route {name}", kernel_dense.route_kernel, types, constants)
        yield _case(f"route_backward {name}", kernel_dense.route_backward_kernel, types, constants)


def _sort_cases(groups: int) -> Iterator[CompileCase]:
    types = dict.fromkeys(("keys_ptr", "counts_ptr", "ends_ptr", "order_ptr"), "*i32")
    constants = config.sort_tile(groups)
    yield _case(f"count G={groups}", kernel_sparse.count_kernel, types, constants)
    yield _case(f"place G={groups}", kernel_sparse.place_kernel, types, constants)


def _group_cases(rank: int, element: str, arch: int, groups: int = GROUPS) -> Iterator[CompileCase]:
    size, kernels = TYPES[element], kernel_sparse
    features = (
        "x_ptr",
        "down_ptr",
        "up_ptr",
        "bias_ptr",
        "hidden_ptr",
        "grad_ptr",
        "dhidden_ptr",
        "base_ptr",
        "out_ptr",
    )
    floats = ("weights_ptr", "scale_ptr", "dgate_ptr", "dweight_ptr", "product_ptr", "dscale_ptr")
    types = POINTERS_32 | dict.fromkeys(features, f"*{element}") | dict.fromkeys(floats, "*fp32")
    name = f"{element} r={rank}" + (f" G={groups}" if groups != GROUPS else "")
    shared = {"PRECISION": "ieee" if element == "fp32" else "tf32"}

    def case(kind: str, fn: Any, tile: config.Config, **constants: Any) -> CompileCase:
        sizes = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
        how: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "archs": (arch,)}
        return _case(f"{kind} {name}", fn, kind_types[kind], {**sizes, **shared, **constants}, **how)

    sums = {"bias_ptr": "*fp32", "left_ptr": f"*{element}", "right_ptr": f"*{element}"}
    kind_types = dict.fromkeys(("down", "up", "up_dx", "hidden_backward"), types)
    kind_types |= dict.fromkeys(("sum_rows_down", "sum_rows_up"), types | sums)
    inward, outward = config.to_rank(rank, size, arch), config.from_rank(rank, size, arch)
    over = config.over_rows(rank, size, arch)
    yield case("down", kernels.down_kernel, inward, G2=groups)
    act = {"ACT": "gelu", "G2": groups}
    yield case("hidden_backward", kernels.hidden_backward_kernel, inward, stride_r=1, **act)
    yield case("up", kernels.up_kernel, outward, GATED=True, BASE=True, stride_r=1, **act)
    ungated = {"ACT": "identity", "G2": groups, "GATED": False}
    yield case("up_dx", kernels.up_kernel, outward, BASE=True, stride_d=1, **ungated)
    yield case("sum_rows_down", kernels.sum_rows_kernel, over, GATED=False, ACT="gelu")
    yield case("sum_rows_up", kernels.sum_rows_kernel, over, GATED=True, ACT="gelu")
