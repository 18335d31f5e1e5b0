"""LoRA on the language model: PEFT's layers put in place, under the names that stages and checkpoints know.

In: a causal LM, whole or partitioned by ZeRO-3, and config.model.lora. Out: the same model, with
W x + (alpha / rank) B A x in its target modules (Hu et al. 2021); A Kaiming-uniform, B zero, so the start is W x.
Decision: layers are injected and no PeftModel is wrapped around, so that the names of everything else stay; of a
target module alone `x.weight` becomes `x.base_layer.weight`. PEFT's own names exist in its folders alone: `peft_names`
is the one place that knows both.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import torch
from torch import nn

from eventlens_ds.config.run_config import LoraConfig
from eventlens_ds.errors import UserError
from eventlens_ds.model.weights import full_shape, gathered

MARK = ".lora_"
"""In the name of every LoRA parameter and of no other."""

_ADAPTER = "default"
"""PEFT's name of the only adapter; its files leave it out."""
_IN_LLAVA = "model.language_model."
"""Where the decoder of a LLaVA of transformers 5 is; its head stays `lm_head`."""


def inject(language_model: nn.Module, config: LoraConfig, seed: int) -> list[str]:
    """Put LoRA into the target modules; returns the names of the new parameters below `language_model`.

    Values follow from `seed` and the name alone. Under ZeRO-3 the new parameters are partitioned like the others.
    Raises UserError for a target that the model does not have.
    """
    import peft

    assert not any(MARK in name for name, _ in language_model.named_parameters()), "LoRA is in this model already"
    kinds = {name.rpartition(".")[2] for name, m in language_model.named_modules() if isinstance(m, nn.Linear)}
    for target in config.target_modules:
        if target.rpartition(".")[2] not in kinds:
            raise UserError(f"model.lora.target_modules: {target!r}: no such linear layer; known: {sorted(kinds)}")
    reference = next(language_model.parameters())
    before = {name for name, _ in language_model.named_parameters()}
    peft.inject_adapter_in_model(peft_config(config), language_model, adapter_name=_ADAPTER)
    added = {n: p for n, p in language_model.named_parameters() if MARK in n and n not in before}
    for name, parameter in added.items():
        _start(name, parameter, seed, reference.dtype)
    if hasattr(reference, "ds_id"):
        reference.convert_to_zero_parameters(param_list=list(added.values()))  # type: ignore[attr-defined]
    return sorted(added)


def _start(name: str, parameter: nn.Parameter, seed: int, dtype: torch.dtype) -> None:
    """A: Kaiming-uniform (a = sqrt 5) in float32, then the dtype of the model: PEFT would leave float32, which ZeRO
    cannot put into one buffer with bf16. B: zero."""
    whole = torch.zeros(parameter.shape)
    if ".lora_A." in name:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
    parameter.data = whole.to(device=parameter.device, dtype=dtype)


def peft_config(config: LoraConfig, base: str = "", *, in_llava: bool = False) -> Any:
    """peft.LoraConfig of these settings; with `base`, the folder of the base model, as PEFT saves it.

    in_llava: for the whole LLaVA as base model, whose vision tower has layers of the same names.
    """
    import peft

    targets: str | list[str] = list(config.target_modules)
    if in_llava:
        # A pattern must match the whole name of a module.
        targets = rf"({re.escape(_IN_LLAVA)}(.*\.)?)?({'|'.join(map(re.escape, config.target_modules))})"
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    saved: dict[str, Any] = {}
    if base:
        saved = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # it is only divided by the rank
        lora_dropout=config.dropout,
        target_modules=targets,
        **saved,
    )


def peft_names(language_model: nn.Module, *, in_llava: bool = False) -> dict[str, str]:
    """Names of the LoRA parameters in PEFT's adapter_model.safetensors -> their names below `language_model`."""
    names = {}
    for name, _ in language_model.named_parameters():
        if MARK not in name:
            continue
        below = name.replace(f".{_ADAPTER}.", ".")
        if in_llava and below.startswith("model."):
            below = _IN_LLAVA + below.removeprefix("model.")
        names[f"base_model.model.{below}"] = name
    return names


def peft_state(language_model: nn.Module, *, in_llava: bool = False) -> dict[str, torch.Tensor]:
    """The LoRA tensors, whole and on the CPU, by PEFT's names. A collective under ZeRO-3, where a plain state_dict
    would give empty tensors."""
    found = {}
    for name, own_name in peft_names(language_model, in_llava=in_llava).items():
        parameter = language_model.get_parameter(own_name)
        with gathered([parameter], modifier_rank=None):
            found[name] = parameter.detach().cpu().clone().contiguous()
        assert tuple(found[name].shape) == full_shape(parameter), f"{name} was not gathered"
    return found
