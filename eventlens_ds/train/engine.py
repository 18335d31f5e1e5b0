"""Build what trains: model, weights, stage, optimizer, DeepSpeed engine.

In: RunConfig and the World of this rank. Out: a `Trainable`. The stages:
  1. model with initial weights and LoRA, partitioned from the start under ZeRO-3
  2. weights from folders, then from --init-from
  3. stage: requires_grad, optimizer groups by part and by decay
  4. deepspeed.initialize with torch's fused AdamW (no op is compiled)
Decision: groups are made from names, not shapes, since under ZeRO-3 every shard is one-dimensional.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from eventlens_ds.config.deepspeed import deepspeed_dict
from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.model import folders
from eventlens_ds.model.configuration import RegionVLMConfig
from eventlens_ds.model.stages import PartLine, apply_stage, part_of
from eventlens_ds.runtime.build_model import describe, new_model, weights_of_run
from eventlens_ds.runtime.distributed import World

__all__ = ["Trainable", "build", "describe", "new_model", "parameter_groups", "set_lr"]

log = logging.getLogger(__name__)

_NO_DECAY = ("norm", "layrnorm", "bias", "scale", "embedding", "embed_tokens", "language_model.shared.")


@dataclass
class Trainable:
    """An engine and what was decided while building it.

    base: sha256 of every published weight file. own: names of parameters that differ from those files.
    """

    engine: Any
    model: nn.Module
    stage: list[PartLine]
    base: dict[str, str] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    identity: dict[str, Any] = field(default_factory=dict)
    """What a checkpoint of this run is only to be continued with (train/identity.py)."""

    @property
    def frozen_own(self) -> list[str]:
        """Frozen parameters that no published file holds: a checkpoint needs them once per run."""
        return [n for n, p in self.engine.module.named_parameters() if not p.requires_grad and n in self.own]


def build(config: RunConfig, architecture: RegionVLMConfig, world: World, tasks: Sequence[str]) -> Trainable:
    """Model and engine of this rank. A collective."""
    import deepspeed

    settings = deepspeed_dict(config, world.size)
    made = new_model(config, architecture, settings)
    own = {name for name, _ in made.named_parameters()}
    base, loaded = folders.load_folders(made, config.model)
    own -= loaded
    if config.io.init_from:
        report = weights_of_run(made, config.io.init_from)
        log.info("%s", report.text())
        own |= report.loaded
    if config.train.activation_checkpointing:
        made.gradient_checkpointing_enable()
    stage = apply_stage(made, config.stage.train, tasks)
    optimizer = torch.optim.AdamW(
        parameter_groups(made, config), lr=config.train.lr, betas=config.train.betas, fused=True
    )
    engine, *_ = deepspeed.initialize(model=made, optimizer=optimizer, config=settings, dist_init_required=False)
    return Trainable(engine, made, stage, base, own)


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Optimizer groups: one per (part, decay), each with its `lr_scale`."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = not any(word in name for word in _NO_DECAY)
            groups.setdefault((part_of(name), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.train.weight_decay if decays else 0.0,
            "lr_scale": config.stage.lr_scale.get(part, 1.0),
        }
        for (part, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
