"""RoI-align in Triton: launchers of the kernels, their configurations, and the list of them for the compile gate.

In: what reference.py takes, boxes and tables in float32, features in float32, bfloat16 or float16, on a GPU (or on the
CPU under TRITON_INTERPRET=1, for tests). Out: the same, without a device sync and without atomics.
Decision: one configuration per kernel and compute capability, from a plain function and not from autotuning, so that
what runs is what was compiled and inspected, and the first step of a run is not spent on measuring.
The interpreter computes nonsense in bfloat16, so bfloat16 is widened there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from triton.runtime.jit import JITFunction

from eventlens_ds.errors import ArgumentError
from eventlens_ds.ops.aot import CompileCase
from eventlens_ds.ops.roi_align.kernel_backward import add_parts_kernel, backward_kernel, schedule_kernel
from eventlens_ds.ops.roi_align.kernel_forward import forward_kernel, mean_kernel, plan_kernel

INTERPRETED = not isinstance(plan_kernel, JITFunction)
MOST_LEVELS = 4
"""Levels that one launch reads; more are added in float32, a launch each."""
MOST_JOBS = 8
"""Jobs that the RoIs of one hot image are cut into; more would not fill a chip better."""
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

Plan = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Config:
    """Constants of one launch: tiles (the kernel's upper-case arguments), warps per program, stages of its loops."""

    tiles: dict[str, int]
    num_warps: int
    num_stages: int


def config(capability: int, kernel: str, *, half: bool = False, dense: bool = True) -> Config:
    """The configuration of a kernel ("plan", "forward", "mean", "schedule", "backward", "backward_mean", "add_parts").

    capability is 80 (A100) or 90 (H100, H200); later ones run as 90. half: features of two bytes. dense: channels and
    strides are multiples of 16; others take an address per element. BQ = BJ = 16 is the smallest tile of a tensor core;
    channels per program are whole cache lines, as many as leave no register spilled (see the compile gate).
    """
    stages = 3 if half and capability >= 90 else 2
    wide = 128 if dense else 64
    table = {
        "plan": Config({"BP": 8, "BI": 32}, 1, 1),
        "forward": Config({"BQ": 16, "BJ": 16, "BC": wide if half else 32}, 4, stages),
        "mean": Config({"BJ": 16, "BC": wide if half else 64}, 4, stages),
        "schedule": Config({"BLOCK": 128}, 4, 1),
        "backward": Config({"BQ": 16, "BJ": 32, "BC": wide}, 4, stages),
        "backward_mean": Config({"BQ": 16, "BJ": 32, "BC": wide}, 4, stages),
        "add_parts": Config({"BI": 16, "BC": wide}, 4, stages),
    }
    return table[kernel]


def plan(
    boxes: torch.Tensor,
    grid_hw: tuple[int, int],
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    mean: bool,
) -> Plan:
    """(wy [R, P, H], wx [R, Q, W], window int32[R, 4]) of float32 boxes [R, 4], see reference.plan; one launch."""
    if boxes.dtype != torch.float32:
        raise ArgumentError(f"roi_align: Triton plans boxes of float32, got {boxes.dtype}")
    count, boxes = boxes.shape[0], boxes.contiguous()
    wy = boxes.new_empty(count, 1 if mean else output_size[0], grid_hw[0])
    wx = boxes.new_empty(count, 1 if mean else output_size[1], grid_hw[1])
    window = boxes.new_empty(count, 4, dtype=torch.int32)
    if count:
        chosen = config(_capability(boxes), "plan")
        with torch.cuda.device_of(boxes):
            plan_kernel[(2 * count,)](
                *(boxes, wy, wx, window, *grid_hw, *output_size, spatial_scale, max(sampling_ratio, 0)),
                ALIGNED=aligned,
                ADAPTIVE=sampling_ratio <= 0,
                MEAN=mean,
                **chosen.tiles,
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
                enable_fp_fusion=False,
            )
    return wy, wx, window


def forward(
    levels: Sequence[torch.Tensor],
    wy: torch.Tensor,
    wx: torch.Tensor,
    window: torch.Tensor,
    offsets: torch.Tensor,
    grid_hw: tuple[int, int],
    num_prefix_tokens: int,
) -> torch.Tensor:
    """[R, P, Q, C] in the dtype of levels: the mean over levels [B, n + H * W, C] of the planned sums.

    Four levels are read by one launch, or one when they are not `dense` (see config). Levels whose strides differ are
    copied.
    """
    dtype = levels[0].dtype
    _check_dtype(dtype)
    if INTERPRETED and dtype == torch.bfloat16:
        levels = [level.float() for level in levels]
    if any(level.stride() != levels[0].stride() for level in levels):
        levels = [level.contiguous() for level in levels]
    offsets = offsets.to(wy.device, non_blocking=True)
    most = MOST_LEVELS if _dense(*levels) else 1
    groups = [levels[first : first + most] for first in range(0, len(levels), most)]
    shape = (wy.shape[0], wy.shape[1], wx.shape[1], levels[0].shape[2])
    parts = [levels[0].new_empty(shape, dtype=torch.float32 if len(groups) > 1 else None) for _ in groups]
    for group, out in zip(groups, parts):
        if out.numel():
            _launch_forward(group, wy, wx, window, offsets, grid_hw, num_prefix_tokens, 1.0 / len(levels), out)
    for part in parts[1:]:
        parts[0] += part
    return parts[0].to(dtype)


def _launch_forward(
    levels: Sequence[torch.Tensor],
    wy: torch.Tensor,
    wx: torch.Tensor,
    window: torch.Tensor,
    offsets: torch.Tensor,
    grid_hw: tuple[int, int],
    num_prefix_tokens: int,
    share: float,
    out: torch.Tensor,
) -> None:
    first, (count, bins_y, bins_x, channels) = levels[0], out.shape
    mean = (bins_y, bins_x) == (1, 1)
    half = first.dtype != torch.float32
    chosen = config(_capability(first), "mean" if mean else "forward", half=half, dense=_dense(*levels))
    tensors = [*levels, *[first] * (MOST_LEVELS - len(levels)), wy, wx, window, offsets, out]
    sizes = [first.shape[0], channels, *grid_hw, *([] if mean else [bins_y, bins_x]), num_prefix_tokens]
    extra = {} if mean else {"EXACT": not half}
    with torch.cuda.device_of(first):
        (mean_kernel if mean else forward_kernel)[(count * triton.cdiv(channels, chosen.tiles["BC"]),)](
            *tensors,
            *sizes,
            first.stride(0),
            first.stride(1),
            share,
            LEVELS=len(levels),
            **extra,
            **chosen.tiles,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )


def backward(
    grad: torch.Tensor,
    wy: torch.Tensor,
    wx: torch.Tensor,
    window: torch.Tensor,
    offsets: torch.Tensor,
    grid_hw: tuple[int, int],
    num_prefix_tokens: int,
    batch: int,
    num_levels: int,
) -> torch.Tensor:
    """[B, n + H * W, C], the gradient of each level for grad [R, P, Q, C], in its dtype; prefix rows are zero.

    Offsets on the CPU tell whether an image is hot; on a GPU it is assumed that one may be, which costs up to
    2 * (MOST_JOBS - 1) float32 images of memory when there are more than 64 RoIs.
    """
    dtype = grad.dtype
    _check_dtype(dtype)
    if INTERPRETED and dtype == torch.bfloat16:
        grad = grad.float()
    grad = grad.contiguous()
    count, bins_y, bins_x, channels = grad.shape
    out = grad.new_empty(batch, num_prefix_tokens + grid_hw[0] * grid_hw[1], channels)
    if not out.numel():
        return out.to(dtype)
    chunk, extra = chunks(count, offsets)
    offsets = offsets.to(wy.device, non_blocking=True)
    mean = (bins_y, bins_x) == (1, 1)
    half, dense = grad.dtype != torch.float32, _dense(grad)
    chosen = config(_capability(grad), "backward_mean" if mean else "backward", half=half, dense=dense)
    jobs, sums, parts = offsets, offsets, wy
    share = 1.0 / num_levels
    with torch.cuda.device_of(grad):
        if extra:
            jobs, sums = _schedule(offsets, batch, count, chunk, extra)
            parts = wy.new_empty(2 * extra, grid_hw[0] * grid_hw[1], channels)
        columns, blocks = triton.cdiv(grid_hw[1], chosen.tiles["BJ"]), triton.cdiv(channels, chosen.tiles["BC"])
        backward_kernel[((batch + extra) * grid_hw[0] * columns * blocks,)](
            *(grad, wy, wx, window, offsets, jobs, parts, out),
            *(count, channels, *grid_hw, bins_y, bins_x, num_prefix_tokens, share),
            SPLIT=extra > 0,
            MEAN=mean,
            EXACT=not half,
            **chosen.tiles,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
        if extra:
            adding = config(_capability(grad), "add_parts", half=half, dense=dense)
            _add_parts(sums, parts, out, num_prefix_tokens, share, adding)
    return out.to(dtype)


def _schedule(offsets: torch.Tensor, batch: int, count: int, chunk: int, extra: int) -> tuple[torch.Tensor, ...]:
    """(jobs int64[batch + extra, 4], parts int64[batch, 2]), see schedule_kernel."""
    jobs, parts = offsets.new_empty(batch + extra, 4), offsets.new_empty(batch, 2)
    chosen = config(_capability(offsets), "schedule")
    schedule_kernel[(1,)](
        *(offsets, jobs, parts, batch, count, chunk, extra), **chosen.tiles, num_warps=chosen.num_warps
    )
    return jobs, parts


def _add_parts(
    sums: torch.Tensor, parts: torch.Tensor, out: torch.Tensor, num_prefix_tokens: int, share: float, chosen: Config
) -> None:
    _, cells, channels = parts.shape
    pieces, blocks = triton.cdiv(cells, chosen.tiles["BI"]), triton.cdiv(channels, chosen.tiles["BC"])
    add_parts_kernel[(out.shape[0] * pieces * blocks,)](
        *(sums, parts, out, channels, cells, num_prefix_tokens, share),
        **chosen.tiles,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def chunks(count: int, offsets: torch.Tensor) -> tuple[int, int]:
    """(RoIs of a job, jobs beyond one per image at most) for `count` RoIs; no device sync."""
    chunk = max(64, triton.cdiv(count, MOST_JOBS))
    if offsets.device.type == "cpu":
        return chunk, sum((rois - 1) // chunk for rois in offsets.diff().tolist() if rois)
    return chunk, max(count - 1, 0) // chunk


def _dense(*tensors: torch.Tensor) -> bool:
    """Whether rows of channels can be read 16 bytes at a time."""
    return all(
        tensor.data_ptr() % 16 == 0 and not any(size % 16 for size in (tensor.shape[-1], *tensor.stride()[:-1]))
        for tensor in tensors
    )


def _capability(tensor: torch.Tensor) -> int:
    if tensor.device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(tensor.device)
    return 90 if major >= 9 else 80


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in TYPES:
        raise ArgumentError(f"roi_align: Triton takes {', '.join(map(str, TYPES))}, got {dtype}")


def compile_cases() -> Iterator[CompileCase]:
    """Every kernel in every configuration that the launchers above can choose, for the compile gate."""
    for capability in (80, 90):
        yield from _plan_cases(capability)
        for dtype in TYPES:
            for mean in (False, True):
                for levels in range(1, MOST_LEVELS + 1):
                    yield _forward_case(capability, dtype, levels, mean=mean)
                yield _forward_case(capability, dtype, 1, mean=mean, dense=False)
                for split in (False, True):
                    for dense in (True, False):
                        yield _backward_case(capability, dtype, mean=mean, split=split, dense=dense)
            yield _add_parts_case(capability, dtype, dense=True)
            yield _add_parts_case(capability, dtype, dense=False)


def _case(
    name: str,
    kernel: JITFunction,
    capability: int,
    chosen: Config,
    types: dict[str, str],
    flags: dict[str, bool | int],
    aligned: Sequence[str] = (),
) -> CompileCase:
    """A case whose pointers are all divisible by 16, as those of new tensors are, and `aligned` besides."""
    pointers = [argument for argument, kind in types.items() if kind.startswith("*")]
    return CompileCase(
        name=f"roi_align {name}",
        fn=kernel,
        signature=types,
        constexprs={**flags, **chosen.tiles},
        aligned=frozenset([*pointers, *aligned]),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        archs=(capability,),
    )


def _types(pointers: dict[str, str], integers: str, floats: str = "") -> dict[str, str]:
    """Argument -> type of a kernel with these pointers, 32-bit integers and floats."""
    typed = {f"{name}_ptr": kind for name, kind in pointers.items()}
    return {**typed, **dict.fromkeys(integers.split(), "i32"), **dict.fromkeys(floats.split(), "fp32")}


_TABLES = {"wy": "*fp32", "wx": "*fp32", "window": "*i32"}


def _plan_cases(capability: int) -> Iterator[CompileCase]:
    types = _types({"boxes": "*fp32", **_TABLES}, "H W P Q sampling", "scale")
    for number in range(8):
        flags: dict[str, bool | int] = {name: bool(number >> i & 1) for i, name in enumerate(_PLAN_FLAGS)}
        name = " ".join(["plan", *(flag.lower() for flag, on in flags.items() if on)])
        yield _case(name, plan_kernel, capability, config(capability, "plan"), types, flags)
    schedule = _types({"offsets": "*i64", "jobs": "*i64", "parts": "*i64"}, "B R chunk extra")
    yield _case("schedule", schedule_kernel, capability, config(capability, "schedule"), schedule, {})


_PLAN_FLAGS = ("ALIGNED", "ADAPTIVE", "MEAN")


def _forward_case(capability: int, dtype: torch.dtype, levels: int, *, mean: bool, dense: bool = True) -> CompileCase:
    kind, half = TYPES[dtype], dtype != torch.float32
    pointers = {f"x{i}": kind for i in range(MOST_LEVELS)} | _TABLES | {"offsets": "*i64", "out": kind}
    types = _types(pointers, f"B C H W {'' if mean else 'P Q'} prefix stride_b stride_t", "share")
    flags: dict[str, bool | int] = {"LEVELS": levels} if mean else {"LEVELS": levels, "EXACT": not half}
    name = f"{'mean' if mean else 'forward'} {kind[1:]} levels={levels}{'' if dense else ' ragged'}"
    chosen = config(capability, "mean" if mean else "forward", half=half, dense=dense)
    aligned = ("C", "stride_b", "stride_t") if dense else ()
    return _case(name, mean_kernel if mean else forward_kernel, capability, chosen, types, flags, aligned)


def _backward_case(capability: int, dtype: torch.dtype, *, mean: bool, split: bool, dense: bool) -> CompileCase:
    kind, half = TYPES[dtype], dtype != torch.float32
    pointers = {"grad": kind, **_TABLES, "offsets": "*i64", "jobs": "*i64", "parts": "*fp32", "out": kind}
    flags: dict[str, bool | int] = {"SPLIT": split, "MEAN": mean, "EXACT": not half}
    name = f"backward {'mean ' * mean}{kind[1:]}{' split' * split}{'' if dense else ' ragged'}"
    chosen = config(capability, "backward_mean" if mean else "backward", half=half, dense=dense)
    types = _types(pointers, "R C H W P Q prefix", "share")
    return _case(name, backward_kernel, capability, chosen, types, flags, ("C",) if dense else ())


def _add_parts_case(capability: int, dtype: torch.dtype, *, dense: bool) -> CompileCase:
    kind = TYPES[dtype]
    types = _types({"sums": "*i64", "parts": "*fp32", "out": kind}, "C cells prefix", "share")
    chosen = config(capability, "add_parts", half=dtype != torch.float32, dense=dense)
    name = f"add_parts {kind[1:]}{'' if dense else ' ragged'}"
    return _case(name, add_parts_kernel, capability, chosen, types, {}, ("C",) if dense else ())
