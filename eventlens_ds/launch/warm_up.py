"""Compiled kernels of a recipe, made once per node and before the first collective.

In: a RunConfig, on a node with a GPU. Out: filled node-local caches (TRITON_CACHE_DIR and its like, see slurm/rank.sh)
and a line that says what was run; on a CPU nothing is compiled, and that is what the line says.
  1. the recipe's model on the meta device, no weight of it exists
  2. of its modules that launch kernels of ours (adapters, region encoder) one of each kind and size, on the GPU
  3. forward and backward of each, on a full row of zeros in the dtype of training
Decision: one task of the node check compiles while nobody waits for it. Otherwise the first ranks to get there would,
all of a node at once, with the others in an all-reduce whose timeout runs. Nothing else of a run is compiled: neither
torch.compile nor an op of DeepSpeed is used, except by zero3_offload, whose optimizer is built at its first step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from eventlens_ds.config.run_config import RunConfig

REGIONS = 16


def warm_up(config: RunConfig, on_gpu: bool) -> str:
    """Compile what the first step of `config` on this node would. The line that says so; RuntimeError of a kernel."""
    if not on_gpu:
        return "no kernel is compiled on a CPU, nothing to warm up"
    begun = time.monotonic()
    names = [name for name, _ in run_kernels(config, "cuda")]
    return f"warmed up {', '.join(names) or 'nothing'} in {time.monotonic() - begun:.1f} s"


def run_kernels(config: RunConfig, device: str) -> Iterator[tuple[str, nn.Module]]:
    """Forward and backward of each kind of module that has kernels of ours; its name, once it has been run."""
    import torch

    from eventlens_ds.launch.plan_shapes import meta_model
    from eventlens_ds.model.adapters import Adapters
    from eventlens_ds.model.regions import RegionEncoder
    from eventlens_ds.runtime.build_model import describe

    architecture, *_ = describe(config, dry=True)
    model = meta_model(config, architecture, architecture.tasks)
    model.choose_kernels(config.model.kernels)
    seen: set[str] = set()
    for module in model.modules():
        size = f"{type(module).__name__} {[tuple(p.shape) for p in module.parameters()]}"
        if not isinstance(module, Adapters | RegionEncoder) or size in seen:
            continue
        seen.add(size)
        module.to_empty(device=device)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        if isinstance(module, Adapters):
            out = _adapt(module, config.data.row_tokens, device)
        else:
            roi = architecture.roi
            out = _encode(module, 1 if roi["source"] == "aggregator" else len(roi["levels"]), device)
        out.float().sum().backward()
        if device != "cpu":
            torch.cuda.synchronize()
        yield type(module).__name__, module


def _adapt(module: Any, tokens: int, device: str) -> torch.Tensor:
    import torch

    like = next(module.parameters())
    x = torch.zeros(1, tokens, _width(module), device=device, dtype=like.dtype, requires_grad=True)
    out = module(x, x, torch.zeros(tokens, dtype=torch.int64, device=device))
    return out  # type: ignore[no-any-return]


def _width(module: Any) -> int:
    """Width of the features that adapters read and write."""
    return int(getattr(module, f"{module.names[0]}_up_bias").shape[0])


def _encode(module: Any, levels: int, device: str) -> torch.Tensor:
    import torch

    like = module.linear_1.weight
    width = like.shape[1] // (module.output_size**2 if module.pool == "flatten" else 1)
    patches = module.grid[0] * module.grid[1] + module.num_prefix_tokens
    made = [torch.zeros(1, patches, width, device=device, dtype=like.dtype, requires_grad=True) for _ in range(levels)]
    box = torch.tensor([0.0, 0.0, module.image_size / 2, module.image_size / 2], device=device)
    out = module(made, box.repeat(REGIONS, 1), torch.tensor([0, REGIONS], device=device))
    return out  # type: ignore[no-any-return]
