"""torchvision.ops.roi_align as a provider, where torchvision can be imported.

In: the same Problem as the others. Out: Runs in the layout of the public op (`call`: with the permutation and the
casts that a token model needs around it) or in torchvision's own (`kernel`: NCHW and dtype made beforehand).
Decision: whether it imports is tried in another process, because a torchvision that does not fit the installed torch
fails half way and breaks later imports of transformers. For the mean it is asked for one bin of P * S samples, which
is the same number and its fastest way.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import lru_cache

import torch

from eventlens_ds.bench.kernels.harness import Problem, Provider, Run
from eventlens_ds.bench.providers.roi_align import RoIInputs, inputs_of


@lru_cache
def obstacle() -> str:
    """Why torchvision cannot be used here; "" when it can."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    done = subprocess.run([sys.executable, "-c", "import torchvision.ops"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"torchvision does not import: {done.stderr.strip().splitlines()[-1][:100]}"


def _pool(given: RoIInputs, features: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    from torchvision.ops import roi_align

    size, samples = (given.output, given.sampling)
    if given.pool == "mean":
        size, samples = (1, 1), given.sampling * given.output[0]
    return roi_align(features, boxes, size, given.scale, samples, given.aligned)


def _boxes(given: RoIInputs, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat((given.image[:, None].to(dtype), given.boxes.to(dtype)), 1)


def _call(given: RoIInputs, dtype: torch.dtype) -> torch.Tensor:
    features = given.features(dtype).transpose(1, 2).unflatten(2, given.grid).contiguous()
    pooled = _pool(given, features, _boxes(given, dtype)).movedim(1, -1).contiguous()
    return given.finish(pooled.flatten(1) if given.pool == "mean" else pooled)


def _prepare_call(dtype: torch.dtype, deterministic: bool = False):
    def prepare(problem: Problem) -> Run:
        given = inputs_of(problem)

        def forward() -> torch.Tensor:
            if not deterministic:
                return _call(given, dtype)
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(True)
            try:
                return _call(given, dtype)
            finally:
                torch.use_deterministic_algorithms(before)

        return Run(forward, given.levels, problem.grad_output)

    return prepare


def _prepare_kernel(problem: Problem) -> Run:
    given = inputs_of(problem)
    with torch.no_grad():
        features = given.features(torch.float32).transpose(1, 2).unflatten(2, given.grid).contiguous()
        boxes = _boxes(given, torch.float32)
        grad = problem.grad_output.float()
        grad = (grad[:, :, None, None] if given.pool == "mean" else grad.movedim(-1, 1)).contiguous()
    features.requires_grad_()

    def restore(output: torch.Tensor, grads):
        tokens = grads[0].flatten(2).transpose(1, 2) / len(given.levels)
        padded = torch.nn.functional.pad(tokens, (0, 0, given.prefix, 0))
        pooled = output.flatten(1) if given.pool == "mean" else output.movedim(1, -1)
        return pooled, [padded] * len(given.levels)

    return Run(lambda: _pool(given, features, boxes), [features], grad, restore)


def providers() -> list[Provider]:
    """torchvision inside a model in float32, its kernel alone, in half precision, and its deterministic path."""

    def fits(problem: Problem) -> str:
        given = inputs_of(problem)
        if given.pool == "mean" and (given.sampling < 1 or given.output[0] != given.output[1]):
            return "its mean is not one bin for this shape"
        return obstacle()

    def half(problem: Problem) -> bool:
        return problem.dtype == torch.float16

    def on_gpu(problem: Problem) -> bool:
        return problem.device.type == "cuda"

    return [
        Provider("torchvision fp32", _prepare_call(torch.float32), fits),
        Provider("torchvision fp32 kernel", _prepare_kernel, fits, scope="kernel"),
        Provider("torchvision fp16", _prepare_call(torch.float16), fits, applies=half),
        Provider("torchvision deterministic", _prepare_call(torch.float32, deterministic=True), fits, applies=on_gpu),
    ]
