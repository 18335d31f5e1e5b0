"""`eventlens export RUN OUT --peft`: LoRA and adapters as PEFT writes them, and beside them what a RegionVLM needs.

In: a model with LoRA, adapters or both in place, made from a committed checkpoint. Out: OUT/adapter_config.json and
adapter_model.safetensors with LoRA, which `PeftModel.from_pretrained(base, OUT)` loads without us; OUT/moa with the
adapters, which it loads after `import eventlens_ds.model`; and OUT/region_vlm with every other tensor that no published
file holds (projector, region encoder), loaded with the base, LoRA and adapters by AutoModel (model/peft_folder.py).
Decision: tensors come from the checkpoint, which is whole whatever the ZeRO stage and ranks were; asking a partitioned
model for its state_dict is how LoRA files of empty tensors are made. A run that trained the base model too is refused,
because LoRA on the published base would be another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import nn

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.export import folder
from eventlens_ds.model import folders, lora
from eventlens_ds.model.peft_folder import (
    ADAPTER,
    BASES,
    MOA,
    PARTS,
    RegionVLMPeftConfig,
    adapter_settings,
    moa_name,
)
from eventlens_ds.model.weights import gathered
from eventlens_ds.runtime import checkpoint, commit

_ADAPTERS = "adapters."


def main(run: Path, out: Path, *, part_size: str = folder.PART_SIZE) -> int:
    """Export LoRA and the parts that go with it, and return 0.

    Raises UserError when the run is not one of LoRA on a published model, and what `folder.export` raises.
    """
    return folder.export(run, out, partial(_write, part_size=part_size), refuse)


def base_path(config: RunConfig) -> str:
    """Folder of the model that LoRA belongs to: a causal language model, or a whole LLaVA."""
    return config.model.language_path or config.model.init_from


def refuse(config: RunConfig, path: Path) -> None:
    """UserError unless the run has LoRA or adapters on a published language model that it did not change."""
    if not config.model.lora.rank and not config.model.adapters.bottleneck:
        raise UserError(
            "--peft: this run has no LoRA (model.lora.rank is 0) and no adapters (model.adapters.bottleneck is 0); "
            "export it without --peft"
        )
    if not base_path(config):
        raise UserError(
            "--peft: the language model of this run has no published folder that they could be loaded onto "
            "(model.language_path, model.init_from); export it without --peft"
        )
    changed = {n for n in _held(path) if n.startswith(folders.LANGUAGE) and lora.MARK not in n}
    if changed:
        raise UserError(
            f"--peft: this run trained the language model itself ({min(changed)}, {len(changed)} tensors), "
            f"so LoRA or adapters on {base_path(config)} would be another model; export it without --peft"
        )


def _write(staging: Path, source: folder.Source, part_size: str) -> dict[str, Any]:
    """Write the folders, read them back and compare; returns what the record says of them."""
    path, config, model, processor = source
    if model.config.encoder_decoder:
        raise UserError("--peft: LoRA and adapters of T5 have no PEFT folder; export this run without --peft")
    language = _write_lora(staging, config, model) if config.model.lora.rank else {}
    adapters = _write_adapters(staging / MOA, config, model) if config.model.adapters.bottleneck else {}
    parts = other_parts(model, config, path)
    (staging / PARTS).mkdir()
    save_torch_state_dict(parts, staging / PARTS, max_shard_size=part_size, metadata={"format": "pt"})
    sha256 = commit.read_manifest(path)["base"]
    RegionVLMPeftConfig(
        region_vlm=model.config.to_dict(),
        lora=asdict(config.model.lora),
        base_sha256=sha256,
        dtype=str(model.dtype).removeprefix("torch."),
        **{field: getattr(config.model, field) for field in BASES},
    ).save_pretrained(staging / PARTS)
    processor.save_pretrained(staging / PARTS)
    folder.compare_tensors(sorted((staging / PARTS).glob("*.safetensors")), parts)
    held = {"lora": language, "adapters": adapters, "other": parts}
    told = {
        "base": {field: getattr(config.model, field) for field in BASES if getattr(config.model, field)},
        "base_sha256": sha256,
        "tensors": {name: len(tensors) for name, tensors in held.items()},
        "parameters": {name: _elements(tensors) for name, tensors in held.items()},
    }
    return {"lora_merged": 0, "peft": told}


def _write_lora(out: Path, config: RunConfig, model: Any) -> dict[str, torch.Tensor]:
    in_llava = bool(config.model.init_from)
    tensors = lora.peft_state(model.language_model, in_llava=in_llava)
    check_whole(tensors, config.model.lora.rank)
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})
    lora.peft_config(config.model.lora, base_path(config), in_llava=in_llava).save_pretrained(str(out))
    folder.compare_tensors([out / ADAPTER], tensors)
    return tensors


def _write_adapters(out: Path, config: RunConfig, model: Any) -> dict[str, torch.Tensor]:
    from eventlens_ds.model import peft_moa

    in_llava = bool(config.model.init_from)
    tensors = adapter_state(model, in_llava=in_llava)
    out.mkdir()
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})
    peft_moa.MoAConfig(
        **adapter_settings(model.config),
        target_modules=r"model\.language_model\.layers\.\d+" if in_llava else peft_moa.TARGETS,
        base_model_name_or_path=base_path(config),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(out))
    folder.compare_tensors([out / ADAPTER], tensors)
    return tensors


def adapter_state(model: nn.Module, *, in_llava: bool = False) -> dict[str, torch.Tensor]:
    """The adapters of a RegionVLM, whole and on the CPU, by PEFT's names. A collective under ZeRO-3."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.startswith(_ADAPTERS):
            with gathered([parameter], modifier_rank=None):
                found[moa_name(name, in_llava=in_llava)] = parameter.detach().cpu().clone().contiguous()
    return found


def _elements(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def check_whole(adapter: Mapping[str, torch.Tensor], rank: int) -> None:
    """DataError for a LoRA tensor that is not a matrix of this rank, as one partition of ZeRO-3 is not."""
    for name, tensor in adapter.items():
        shape = tuple(tensor.shape)
        side = 0 if ".lora_A." in name else 1
        if len(shape) != 2 or shape[side] != rank or not tensor.numel():
            raise DataError(f"LoRA tensor {name} is {shape}, not a matrix of rank {rank}")


def other_parts(model: nn.Module, config: RunConfig, path: Path) -> dict[str, torch.Tensor]:
    """Every parameter that is neither LoRA nor of an adapter and that the published folders do not hold as it is."""
    published = folders.published_parts(config.model)
    held = _held(path)
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if lora.MARK not in name and not name.startswith(_ADAPTERS) and (name in held or not name.startswith(published))
    }


def _held(path: Path) -> set[str]:
    """Names of the tensors in a checkpoint: those that differ from the published weights."""
    return {name for name, _ in checkpoint.weights(path)}
