"""What one micro-step of a model holds in memory, found by running it on tensors without storage.

In: a RunConfig, its architecture, the contents of a packed row (`RowShape`). Out: `Shapes`: parameters, and the peak
of activations over forward and backward of one row. The stages: a model on the meta device; a row of that content;
forward and backward under `LiveBytes`, which adds up what is alive.
Decision: the model's own forward is run instead of a formula per layer, so a new part is counted on the day it is
written; attention is replaced by what a fused kernel keeps (queries, keys, values, output, one number a row), because
on the meta device torch would choose the unfused one, which no GPU runs here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.data.records import TASKS, Batch
from eventlens_ds.model import lora
from eventlens_ds.model.configuration import RegionVLMConfig
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.model.stages import apply_stage, part_of
from eventlens_ds.runtime.build_model import model_dtype


@dataclass(frozen=True)
class RowShape:
    """What a packed row holds: tokens, images, regions, supervised tokens, groups (trees) and leaves of each group."""

    tokens: int
    images: int
    regions: int
    supervised: int
    groups: int = 1
    leaves: int = 1


@dataclass(frozen=True)
class Parameter:
    name: str
    part: str
    numel: int
    trained: bool


@dataclass(frozen=True)
class Shapes:
    """parameters: all of the model. activations: bytes at the peak of a micro-step, without parameters and without
    gradients that are already handed over; activations_zero3: the same where DeepSpeed's linear layer runs, which
    keeps its input even if its weight is frozen."""

    parameters: tuple[Parameter, ...]
    activations: int
    activations_zero3: int
    dtype_bytes: int
    row: RowShape

    @property
    def total(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def trained(self) -> int:
        return sum(p.numel for p in self.parameters if p.trained)

    def parts(self) -> dict[str, tuple[int, int]]:
        """part -> (parameters, trained ones)."""
        made: dict[str, tuple[int, int]] = {}
        for p in self.parameters:
            total, trained = made.get(p.part, (0, 0))
            made[p.part] = (total + p.numel, trained + p.numel * p.trained)
        return made


class LiveBytes(TorchDispatchMode):
    """Bytes of storages that operations have made and that are still alive; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def ignore(self, tensors: Iterator[torch.Tensor]) -> None:
        """Do not count what exists already (parameters, the row)."""
        for tensor in tensors:
            self._hold(tensor, count=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, count=True)
        return out

    def _hold(self, tensor: torch.Tensor, *, count: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if count else 0
        if key in self._known:
            return

        def gone(_: Any, key: int = key, size: int = size) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


class _Fused(torch.autograd.Function):
    """Scaled dot-product attention as a fused kernel keeps it: no [queries, keys] matrix."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, torch's attention is `_Fused`; by name, because a mode of torch does not reach recomputation."""
    before = F.scaled_dot_product_attention

    def replaced(query: Any, key: Any, value: Any, *_: Any, **options: Any) -> Any:
        if options.get("enable_gqa") and key.shape[-3] != query.shape[-3]:
            repeat = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(repeat, -3) for t in (key, value))
        return _Fused.apply(query, key, value)

    F.scaled_dot_product_attention = replaced
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


@contextmanager
def zero3_linear() -> Iterator[None]:
    """Inside, F.linear is DeepSpeed's, as zero.Init puts it there (memory_efficient_linear)."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    before = F.linear
    F.linear = zero3_linear_wrap
    try:
        yield
    finally:
        F.linear = before


def empty_row(config: RunConfig, architecture: RegionVLMConfig, shape: RowShape) -> Batch:
    """A row with that content and no values: `groups` trees of a prefix and `leaves` leaves, equally long."""
    vision, visual = architecture.vision_config, architecture.visual_tokens
    meta: dict[str, Any] = {"device": "meta"}

    def ints(*size: int) -> torch.Tensor:
        return torch.zeros(*size, dtype=torch.int64, **meta)

    bounds, parents = _tree(shape)
    leaves = shape.groups * shape.leaves
    offsets = torch.linspace(0, shape.regions, shape.images + 1).round().long()
    slots = ints(shape.tokens)
    assert visual * shape.images <= shape.tokens
    instruction = architecture.qformer["instruction_tokens"] if architecture.reads_qformer else 0
    return Batch(
        input_ids=ints(1, shape.tokens),
        position_ids=ints(1, shape.tokens),
        parents=torch.tensor(parents, dtype=torch.int32),
        bounds=torch.tensor(bounds, dtype=torch.int32),
        task_ids=slots,
        pixel_values=torch.empty(shape.images, 3, vision.image_size, vision.image_size, **meta),
        boxes=torch.empty(shape.regions, 4, **meta),
        box_offsets=offsets,
        image_slots=ints(shape.tokens),
        region_slots=ints(shape.tokens),
        soft_slots=torch.zeros(shape.tokens, dtype=torch.bool, **meta),
        start_slots=torch.zeros(shape.tokens, dtype=torch.bool),
        instruction_ids=ints(shape.images, instruction),
        instruction_mask=torch.zeros(shape.images, instruction, dtype=torch.bool, **meta),
        target_from=ints(shape.supervised),
        target_ids=ints(shape.supervised),
        target_leaf=ints(shape.supervised),
        leaf_weight=torch.empty(leaves, **meta),
        leaf_task=ints(leaves),
        leaf_sample=ints(leaves),
        choice_leaves=ints(0, 4),
        choice_labels=ints(0),
        choice_weight=torch.empty(0, **meta),
        choice_task=ints(0),
        choice_sample=ints(0),
        seed=0,
        sample_ids=[],
        image_keys=[],
        sample_image=[],
        real_tokens=shape.tokens,
    )


def _tree(shape: RowShape) -> tuple[list[list[int]], list[int]]:
    """(bounds, parents) of the segments; a prefix takes half of its group."""
    bounds: list[list[int]] = []
    parents: list[int] = []
    edges = [round(i * shape.tokens / shape.groups) for i in range(shape.groups + 1)]
    for start, end in zip(edges, edges[1:]):
        root, middle = len(bounds), (start + end) // 2
        bounds.append([start, middle])
        parents.append(-1)
        cuts = [middle + round(i * (end - middle) / shape.leaves) for i in range(shape.leaves + 1)]
        for first, last in zip(cuts, cuts[1:]):
            bounds.append([first, last])
            parents.append(root)
    return bounds, parents


def meta_model(config: RunConfig, architecture: RegionVLMConfig, tasks: Sequence[str]) -> RegionVLM:
    """The model of a run with its stage set, without storage."""
    with torch.device("meta"):
        model = RegionVLM._from_config(architecture, dtype=model_dtype(config))
        model.tie_weights()
        if config.model.lora.rank:
            lora.inject(model.language_model, config.model.lora, config.train.seed)
    model.to(model_dtype(config))
    model.choose_kernels("reference")
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable()
    apply_stage(model, config.stage.train, tasks)
    return model.train()


def measure(
    config: RunConfig,
    architecture: RegionVLMConfig,
    row: RowShape,
    tasks: Sequence[str] = (),
    like: Shapes | None = None,
) -> Shapes:
    """Parameters and peak of activations of one micro-step over `row`. tasks: of the data (default: with adapters).
    like: shapes of another row, whose share of ZeRO-3's linear layers is taken over (half the time)."""
    architecture = RegionVLMConfig.from_dict(architecture.to_dict())
    architecture.text_config._attn_implementation = "eventlens_blocks" if row.groups * row.leaves else "sdpa"
    chosen = list(tasks or config.data.tasks or architecture.tasks)
    model = meta_model(config, architecture, chosen)
    parameters = tuple(Parameter(n, part_of(n), p.numel(), p.requires_grad) for n, p in model.named_parameters())
    plain = peak_of_row(model, config, architecture, row)
    if like is not None:
        zero3 = round(plain * like.activations_zero3 / like.activations)
    else:
        with zero3_linear():
            zero3 = peak_of_row(model, config, architecture, row)
    return Shapes(parameters, plain, zero3, model_dtype(config).itemsize, row)


def peak_of_row(model: nn.Module, config: RunConfig, architecture: RegionVLMConfig, row: RowShape) -> int:
    """Peak bytes of forward and backward of a meta model, each gradient gone as soon as it is complete."""
    batch = empty_row(config, architecture, row)
    batch = replace(batch, task_ids=torch.full_like(batch.task_ids, TASKS.index(architecture.tasks[0])))
    # A ZeRO stage hands a gradient over, or keeps it and counts it itself.
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    with fused_attention(), LiveBytes() as memory:
        memory.ignore(iter([*model.parameters(), *model.buffers()]))
        memory.ignore(v for v in vars(batch).values() if isinstance(v, torch.Tensor) and v.is_meta)
        calls = max(1, -(-row.images // config.train.vision_chunk))
        out = model(batch=batch, vision_calls=calls)
        logp = out[0] if isinstance(out, tuple) else out
        loss = logp.sum()
        del out, logp
        loss.backward()
    for hook in hooks:
        hook.remove()
    inputs = sum(v.nbytes for v in vars(batch).values() if isinstance(v, torch.Tensor) and v.is_meta)
    return memory.peak + inputs
