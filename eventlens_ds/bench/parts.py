"""Time and FLOPs of a training step by part: vision, RoI, language model, adapters.

In: a RegionVLM, wherever it is wrapped. Out: seconds of forward and backward per part (`PartClock`) and model FLOPs per
part (`flops_by_part`). Decision: one clock that is always in exactly one part. Forward hooks switch it when a module
begins and ends; in the backward pass the gradient that arrives at a module's output switches it, because autograd runs
the modules in reverse. Nothing is synchronised on the way (CUDA events are read at the end), but hooks and events cost
time of their own, so a clock runs in a pass of its own and never while speed is measured.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from eventlens_ds.errors import UserError
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.model.stages import numel, part_of
from eventlens_ds.train.metrics import part_flops

PARTS = ("vision", "roi", "language", "adapters")
"""vision: tower and projector. roi: RoI-align and the layers around it. language: decoder, embeddings, head."""

OTHER = "other"
"""Loss, splice, gradient reduction, gathering outside of a module, optimizer."""

WAIT = "wait"
"""Waiting for data; no part of the shares."""

_CLOCKED = (
    (r"vision_tower$|vision_tower\..*layers\.\d+$|projector$", "vision"),
    (r"regions$", "roi"),
    (r"adapters\.\d+$", "adapters"),
    # Children of a decoder layer and not the layer, whose output is the adapter's.
    (r"language_model\.model\.(layers\.\d+\.\w+|embed_tokens|norm)$|language_model\.lm_head$", "language"),
    (r"language_model\.model$", "language"),
)
"""Patterns of module names and the part that they belong to."""


class PartClock:
    """Seconds per part between `start` and `stop`."""

    def __init__(self, model: RegionVLM, device: str) -> None:
        self._model, self._cuda = model, device.startswith("cuda")
        self._marks: list[tuple[str, Any]] = []
        self._part = OTHER
        self._outer: list[str] = []
        self._handles: list[Any] = []

    def start(self) -> None:
        for name, module in self._model.named_modules():
            part = next((part for pattern, part in _CLOCKED if re.match(pattern, name)), None)
            if part is not None:
                # The whole decoder only sets the part between its children in the forward pass.
                backward = not name.endswith("language_model.model")
                self._handles.append(module.register_forward_pre_hook(self._enters(part)))
                self._handles.append(module.register_forward_hook(self._leaves(part, backward)))
        self.switch(OTHER)

    def stop(self) -> dict[str, float]:
        """Remove the hooks; seconds of every part that occurred."""
        self.switch(OTHER)
        for handle in self._handles:
            handle.remove()
        if self._cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys((*PARTS, OTHER, WAIT), 0.0)
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:]):
            seconds[part] += begin.elapsed_time(end) / 1000 if self._cuda else end - begin
        return seconds

    def switch(self, part: str) -> str:
        """From now on the time is that of `part`; returns the part before."""
        before, self._part = self._part, part
        if self._cuda:
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((part, mark))
        return before

    def _enters(self, part: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            self._outer.append(self.switch(part))

        return hook

    def _leaves(self, part: str, backward: bool) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.switch(self._outer.pop())
            if backward:
                for tensor in _with_gradient(output):
                    tensor.register_hook(lambda _gradient: self._reached(part))

        return hook

    def _reached(self, part: str) -> None:
        """The backward pass has come to a module of `part`; the time after the last one is nobody's."""
        self.switch(part)
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_over)

    def _backward_over(self) -> None:
        self.switch(OTHER)


def _with_gradient(output: Any) -> list[torch.Tensor]:
    """Tensors of a module's output that take part in the backward pass."""
    if isinstance(output, torch.Tensor):
        return [output] if output.requires_grad else []
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for value in values for tensor in _with_gradient(value)]


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Share of every part in the time that was not spent waiting for data."""
    total = sum(taken for part, taken in seconds.items() if part != WAIT)
    return {part: seconds[part] / total if total else 0.0 for part in (*PARTS, OTHER)}


def flops_by_part(model: RegionVLM, seen: Mapping[str, int]) -> dict[str, float]:
    """Model FLOPs of each part for what it saw: `seen` has images, regions, tokens (no padding) and supervised.

    Products of weights only, as in train/flops.py: attention scores are left out, so an MFU made of it is a lower
    bound. The head counts supervised tokens, an adapter layer one adapter per token, RoI-align its linear layers.
    """
    config = model.config
    if config.visual_input != "projector" or config.adapters["router"] != "task":
        raise UserError("bench train: counts models with a projector and one adapter per task, not LION's parts")
    if config.encoder_decoder:
        raise UserError("bench train: counts decoder-only language models, not T5")
    tower = config.grid[0] * config.grid[1] + config.num_prefix_tokens
    total = dict.fromkeys(PARTS, 0.0)
    trains_vision, trains_adapters = (
        any(p.requires_grad for p in part.parameters()) for part in (model.vision_tower, model.adapters)
    )
    for name, parameter in model.named_parameters():
        part = part_of(name)
        # Vectors are added or scale; positions are looked up. ZeRO-3 keeps a shape under another name.
        if len(getattr(parameter, "ds_shape", parameter.shape)) < 2 or "position_embedding" in name:
            continue
        size, tokens, into = numel(parameter), seen["tokens"], "language"
        backward, trained = True, float(parameter.requires_grad)
        if part == "vision":
            tokens, backward, into = seen["images"] * tower, trains_vision, "vision"
        elif part == "projector":
            tokens, into = seen["images"] * config.visual_tokens, "vision"
        elif part == "regions":
            tokens, into = seen["regions"], "roi"
        elif part == "adapters":
            if not name.split(".")[2].startswith(f"{config.tasks[0]}_"):
                continue
            trained, into = float(trains_adapters), "adapters"
        elif "embed_tokens" in name or "lm_head" in name:
            if "embed_tokens" in name and not config.tie_word_embeddings:
                continue
            tokens = seen["supervised"]
        total[into] += part_flops(tokens, size, trained=trained, backward=backward)
    return total
