"""Which parts of a RegionVLM learn in a stage, and the table that says so (P10).

In: a model, the parts named in StageConfig, the tasks of the data. Out: requires_grad set, and one line per part.
Decision: a part is a prefix of parameter names. Tensors that cannot receive a gradient by construction (the head
and the deepest layers of a tower read at an inner level, adapters of tasks without data) are frozen with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel

from eventlens_ds.errors import UserError
from eventlens_ds.model.adapters import level_of
from eventlens_ds.model.configuration import RegionVLMConfig

PARTS: dict[str, str] = {
    "vision": r"vision_tower\.",
    "projector": r"projector\.",
    "aggregator": r"aggregator(_mlp)?\.",
    "qformer": r"qformer(_projection)?\.",
    "soft_prompt": r"soft_prompt\.",
    "regions": r"regions\.",
    "router": r"adapters\.\d+\.gate_",
    "image_adapter": r"adapters\.\d+\.image_level_",
    "region_adapter": r"adapters\.\d+\.region_level_",
    "adapters": r"adapters\.",
    "language": r"language_model\.(?!.*\.lora_)",
    "lora": r".*\.lora_",
}
"""Part -> how the names of its parameters begin; the first that fits."""


MIXED = frozenset({"image_adapter", "region_adapter"})
"""Both together are "adapters" of a mixture; its gates are "router", as is the gate of a TokenRouter."""


class PartLine(NamedTuple):
    part: str
    trained: int
    frozen: int
    reasons: tuple[str, ...]


def part_of(name: str) -> str:
    """Part of a parameter by its name."""
    return next(part for part, start in PARTS.items() if re.match(start, name))


def numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also when ZeRO-3 has partitioned it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def unreachable(name: str, config: RegionVLMConfig, tasks: Sequence[str]) -> str:
    """Why a parameter can get no gradient, or ''."""
    if name.startswith("vision_tower.") and (
        ("post_layernorm" in name and not config.reads_qformer) or ".head." in name
    ):
        return "behind the hidden states that are read"
    layer = re.match(r"vision_tower\..*?layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= _deepest_state(config):
        return "deeper than the hidden states that are read"
    if re.match(PARTS["aggregator"], name):
        used = config.reads_aggregator if name.startswith("aggregator_mlp") else config.uses_aggregator
        return "" if used else "not an input of this stage"
    if re.match(PARTS["qformer"], name):
        last = f"qformer.layers.{config.qformer['layers'] - 1}.text_ffn."
        if name.startswith(last) or (not config.qformer["instruction_tokens"] and _reads_text(name)):
            return "no output depends on it"
        return "" if config.reads_qformer else "not an input of this stage"
    if name.startswith("adapters."):
        return unused_adapter(name, config, tasks)
    return ""


def unused_adapter(name: str, config: RegionVLMConfig, tasks: Sequence[str]) -> str:
    """Why an adapter or a gate can get no gradient from samples of `tasks`, or ''."""
    own = name.split(".")[2]
    if config.adapters["router"] == "task":
        return "" if any(own.startswith(f"{task}_") for task in tasks) else "adapter of a task without data"
    if config.adapters["router"] == "topk":
        return ""
    levels = {level_of(task) for task in tasks}
    if own.startswith("gate_") and own.removeprefix("gate_") not in levels:
        return "gate of a level without data"
    return ""


def _reads_text(name: str) -> bool:
    return ".text_ffn." in name or name.startswith(("qformer.word_embeddings.", "qformer.position_embeddings."))


def _deepest_state(config: RegionVLMConfig) -> int:
    """Index of the deepest hidden state of the tower that anything reads; state i is the output of block i - 1."""
    depth = config.vision_config.num_hidden_layers
    levels = [config.vision_level] if config.visual_input == "projector" else []
    if config.linking != "none" and config.roi["source"] == "tower":
        levels += config.roi["levels"]
    if config.reads_qformer:
        levels.append(-1)
    if config.uses_aggregator:
        levels += [layer + 1 for layer in config.aggregator["layers"]]
    return max(level if level >= 0 else depth + 1 + level for level in levels)


def apply_stage(model: PreTrainedModel, parts: Sequence[str], tasks: Sequence[str]) -> list[PartLine]:
    """Set requires_grad for a stage and describe it. Raises UserError for a part the model does not have."""
    config = cast(RegionVLMConfig, model.config)
    present = {part_of(name) for name, _ in model.named_parameters()}
    for part in parts:
        if part not in present and not (part == "adapters" and present & MIXED):
            raise UserError(
                f"stage.train: {part!r} is switched off in this model (it has {', '.join(sorted(present))})"
            )
    chosen = {*parts, *(MIXED if "adapters" in parts else ())}
    _refuse_without_adapter(config, tasks)
    lines: dict[str, list] = {part: [0, 0, set()] for part in PARTS if part in present}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        reason = unreachable(name, config, tasks)
        parameter.requires_grad_(part in chosen and not reason)
        count = lines[part]
        count[0 if parameter.requires_grad else 1] += numel(parameter)
        if part in chosen and reason:
            count[2].add(reason)
    return [PartLine(part, c[0], c[1], tuple(sorted(c[2]))) for part, c in lines.items()]


def _refuse_without_adapter(config: RegionVLMConfig, tasks: Sequence[str]) -> None:
    if not config.adapters["bottleneck"] or config.adapters["router"] != "task":
        return
    for task in tasks:
        if task not in config.tasks:
            raise UserError(
                f"model.adapters.tasks: {task} is in the data and has no adapter; add it, choose data.tasks without "
                "it, or switch adapters off (model.adapters.bottleneck 0)"
            )


def stage_table(lines: Sequence[PartLine]) -> str:
    """The stage as text: one line per part with trained and frozen parameters."""
    out = [f"{'part':<10} {'trained':>15} {'frozen':>15}  note"]
    for line in lines:
        out.append(f"{line.part:<10} {line.trained:>15,} {line.frozen:>15,}  {'; '.join(line.reasons)}")
    trained, frozen = sum(x.trained for x in lines), sum(x.frozen for x in lines)
    out.append(f"{'all':<10} {trained:>15,} {frozen:>15,}")
    return "\n".join(out)
