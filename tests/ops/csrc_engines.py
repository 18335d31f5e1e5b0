"""The two implementations in csrc/ behind one interface: the loaded C++ library, and the CUDA kernels run on a CPU.

In: nothing, or a folder of sources to compile cuda_on_cpu.cpp with. Out: engines with plan, forward, backward and the
routing primitives, and `worst_errors`, which compares an engine with the literal loop.
Decision: the CUDA kernels are compiled by g++ and run thread by thread, so their indexing, barriers and order of sums
are tested on machines without a GPU; outputs are poisoned with NaN first, so an element that is not written shows.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eventlens_ds.ops import build, extension
from eventlens_ds.ops.moa import csrc as moa_csrc
from eventlens_ds.ops.roi_align import csrc as roi_csrc
from tests.ops.roi_loop import Problem, random_problem

HERE = Path(__file__).parent
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def compile_cuda_on_cpu(csrc: Path, folder: Path) -> Path:
    """The kernels of `csrc` as a library that needs nothing but libc."""
    target = folder / "cuda_on_cpu.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-w"]
    include = ["-isystem", str(build.find_torch().root / "include"), f"-I{csrc}"]
    command = [build.find_cxx(), *flags, *include, str(HERE / "cuda_on_cpu.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def sizes_of(*numbers: int) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Filled with NaN, or with the largest integer."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max, dtype=dtype)


class CudaOnCpu:
    """roi_align/csrc.py and moa/csrc.py by the CUDA kernels."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def plan(self, boxes, grid_hw, output_size, spatial_scale, sampling_ratio, aligned, mean):
        rows = (1, 1) if mean else output_size
        wy = poisoned(len(boxes), rows[0], grid_hw[0], dtype=boxes.dtype)
        wx = poisoned(len(boxes), rows[1], grid_hw[1], dtype=boxes.dtype)
        window = poisoned(len(boxes), 4, dtype=torch.int32)
        sizes = sizes_of(len(boxes), 0, *output_size, *grid_hw)
        scale, ratio = ctypes.c_double(spatial_scale), ctypes.c_int64(sampling_ratio)
        flags = (ctypes.c_bool(aligned), ctypes.c_bool(mean))
        boxes = boxes.contiguous()
        self.library.roi_align_plan(
            TYPES[boxes.dtype], pointer(boxes), sizes, scale, ratio, *flags, pointer(wy), pointer(wx), pointer(window)
        )
        return wy, wx, window

    def forward(self, levels, wy, wx, window, offsets, grid_hw, num_prefix_tokens):
        first = levels[0]
        out = poisoned(wy.shape[0], wy.shape[1], wx.shape[1], first.shape[2], dtype=first.dtype)
        strides = {level.stride() for level in levels}
        assert len(strides) == 1 and first.stride(2) == 1
        sizes = sizes_of(
            wy.shape[0], first.shape[0], wy.shape[1], wx.shape[1], *grid_hw, num_prefix_tokens, first.shape[2],
            len(levels), first.stride(0), first.stride(1),
        )  # fmt: skip
        self._apply(True, levels, wy, wx, window, offsets, sizes, out)
        return out

    def backward(self, grad, wy, wx, window, offsets, grid_hw, num_prefix_tokens, batch, num_levels):
        out = poisoned(batch, num_prefix_tokens + grid_hw[0] * grid_hw[1], grad.shape[3], dtype=grad.dtype)
        sizes = sizes_of(
            wy.shape[0], batch, wy.shape[1], wx.shape[1], *grid_hw, num_prefix_tokens, grad.shape[3], num_levels, 2, 2
        )
        self._apply(False, [grad.contiguous()], wy, wx, window, offsets, sizes, out)
        return out

    def _apply(self, forward, tensors, wy, wx, window, offsets, sizes, out):
        wide = torch.promote_types(out.dtype, torch.float32)
        wy, wx = wy.to(wide), wx.to(wide)
        array = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        self.library.roi_align_apply(
            TYPES[out.dtype], ctypes.c_bool(forward), array, pointer(wy), pointer(wx), pointer(window),
            pointer(offsets), sizes, pointer(out),
        )  # fmt: skip

    def route(self, logits, k, renormalise):
        weights = poisoned(len(logits), k, dtype=torch.float32)
        experts = poisoned(len(logits), k, dtype=torch.int32)
        numbers = map(ctypes.c_int64, (*logits.shape, k))
        self.library.moa_route(
            pointer(logits), *numbers, ctypes.c_bool(renormalise), pointer(weights), pointer(experts)
        )
        return weights, experts

    def sort_by_expert(self, experts, num_experts):
        order = poisoned(experts.numel(), dtype=torch.int32)
        offsets = poisoned(num_experts + 1, dtype=torch.int32)
        slots = ctypes.c_int64(experts.numel())
        self.library.moa_sort_by_expert(pointer(experts), slots, num_experts, pointer(order), pointer(offsets))
        return order, offsets

    def gather(self, x, order, k):
        out = poisoned(len(order), x.shape[1], dtype=x.dtype)
        numbers = map(ctypes.c_int64, (len(order), k, x.shape[1]))
        self.library.moa_gather(pointer(x), pointer(order), *numbers, pointer(out))
        return out

    def combine(self, y, order, weights):
        out = poisoned(len(weights), y.shape[1], dtype=y.dtype)
        numbers = map(ctypes.c_int64, (*weights.shape, y.shape[1]))
        self.library.moa_combine(pointer(y), pointer(order), pointer(weights), *numbers, pointer(out))
        return out


class Library:
    """roi_align/csrc.py and moa/csrc.py as they are, by the compiled extension on the CPU."""

    plan = staticmethod(roi_csrc.plan)
    forward = staticmethod(roi_csrc.forward)
    backward = staticmethod(roi_csrc.backward)
    route = staticmethod(moa_csrc.route)
    sort_by_expert = staticmethod(moa_csrc.sort_by_expert)
    gather = staticmethod(moa_csrc.gather)
    combine = staticmethod(moa_csrc.combine)


@functools.cache
def engine(name: str) -> Any:
    """The engine "csrc" or "cuda_on_cpu"; skips the test with the reason where it cannot run."""
    if name == "csrc":
        why = extension.obstacle("cpu")
        if why:
            pytest.skip(why)
        return Library()
    try:
        build.find_cxx()
    except build.BuildError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as folder:
        return CudaOnCpu(compile_cuda_on_cpu(extension.SOURCES, Path(folder)))


ENGINES = ("csrc", "cuda_on_cpu")
PRECISIONS = {torch.float64: np.float64, torch.float32: np.float32}


def pooled(using: Any, problem: Problem, tokens: Sequence[torch.Tensor], mean: bool) -> tuple[Any, torch.Tensor]:
    """The plan of a problem, in the precision of its tokens, and the pooled features."""
    wide = torch.promote_types(tokens[0].dtype, torch.float32)
    boxes = torch.from_numpy(problem.boxes).to(wide)
    plan = using.plan(boxes, problem.grid, problem.bins, problem.scale, problem.sampling, problem.aligned, mean)
    return plan, using.forward(list(tokens), *plan, problem.offsets, problem.grid, problem.prefix)


def worst_errors(using: Any, seeds: Iterable[int], dtype: torch.dtype) -> tuple[float, float]:
    """Largest absolute errors, forward and backward, over random problems; NaN counts as infinite."""
    worst = [0.0, 0.0]
    for seed in seeds:
        problem = random_problem(seed, hot_image=seed % 7 == 0)
        mean = seed % 3 == 0
        tokens = problem.tokens.to(dtype)
        plan, got = pooled(using, problem, [tokens], mean)
        want = problem.forward(tokens, PRECISIONS[dtype])
        want = want.mean((1, 2), keepdim=True) if mean else want
        grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        back = using.backward(grad, *plan, problem.offsets, problem.grid, problem.prefix, problem.batch, 1)
        spread = (grad / np.prod(problem.bins)).expand(-1, *problem.bins, -1) if mean else grad
        wanted = problem.backward(spread, PRECISIONS[dtype])
        for k, (left, right) in enumerate(((got, want), (back, wanted))):
            error = (left.double() - right).abs().max().item() if left.numel() else 0.0
            worst[k] = max(worst[k], float("inf") if error != error else error)
    return worst[0], worst[1]
