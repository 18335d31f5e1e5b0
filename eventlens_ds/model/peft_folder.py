"""A run exported with --peft: the base model from its own folder, LoRA, adapters and all other parts from ours.

In: OUT/region_vlm of `eventlens export RUN OUT --peft` (config.json, model.safetensors), OUT/adapter_model.safetensors
(LoRA), OUT/moa (the adapters, model/peft_moa.py) and the folders of published weights that config.json names. Out: a
`RegionVLM` with LoRA in place, not merged.
Decision: AutoModel reads it by a model_type of its own, so that no version of transformers takes it for a whole model
and fills what is missing with random values; a tensor that no source has, and a base whose sha256 is not the one of
training, are errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from eventlens_ds.config.run_config import LoraConfig, ModelConfig
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.model import lora
from eventlens_ds.model.configuration import RegionVLMConfig
from eventlens_ds.model.folders import LANGUAGE, load_folders, read_folder
from eventlens_ds.model.initial import new_model
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.model.weights import LoadReport, assign

PARTS = "region_vlm"
"""Sub-folder of all that is not LoRA; beside PEFT's adapter_config.json AutoModel would load the base model alone."""
ADAPTER = "adapter_model.safetensors"
MOA = "moa"
"""Sub-folder of the adapters, as PEFT's type MOA writes them."""
BASES = ("init_from", "vision_path", "language_path")
"""Fields of config.ModelConfig that name folders of published weights."""

_NO_EFFECT = ("_from_auto", "adapter_kwargs", "trust_remote_code", "local_files_only", "revision")
"""What AutoModel passes to every class and a folder on this machine has no use for."""


class RegionVLMPeftConfig(PreTrainedConfig):
    """config.json of the sub-folder.

    region_vlm: fields of RegionVLMConfig. lora: fields of config.LoraConfig. init_from, vision_path, language_path:
    folders of the published weights, as in the run; AutoModel.from_pretrained(OUT, language_path=DIR) names another
    place. base_sha256: of their weight files, by "model.language_path/FILE".
    """

    model_type = "eventlens_region_vlm_peft"

    def __init__(
        self,
        region_vlm: dict[str, Any] | None = None,
        lora: dict[str, Any] | None = None,
        init_from: str = "",
        vision_path: str = "",
        language_path: str = "",
        base_sha256: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.region_vlm = dict(region_vlm or {})
        self.lora = dict(lora or {})
        self.init_from, self.vision_path, self.language_path = init_from, vision_path, language_path
        self.base_sha256 = dict(base_sha256 or {})
        super().__init__(**kwargs)


class RegionVLMFromPeft:
    """What AutoModel finds for RegionVLMPeftConfig; it makes a RegionVLM and is never an object itself."""

    config_class = RegionVLMPeftConfig

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        config: RegionVLMPeftConfig,
        dtype: torch.dtype | None = None,
        output_loading_info: bool = False,
        **rest: Any,
    ) -> Any:
        """The model in evaluation mode, as from_pretrained of transformers; with `output_loading_info` and a report.

        Raises DataError when a file is missing, damaged or not of this model, UserError for an option it has not.
        """
        unknown = sorted(name for name, value in rest.items() if name not in _NO_EFFECT and value is not None)
        if unknown:
            raise UserError(f"{folder}: {unknown[0]} is not supported for a folder of `eventlens export --peft`")
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        model = _load(Path(folder), config, dtype or stored)
        nothing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return (model, nothing) if output_loading_info else model


def _load(folder: Path, config: RegionVLMPeftConfig, dtype: torch.dtype) -> RegionVLM:
    bases = {field: getattr(config, field) for field in BASES}
    for field, path in bases.items():
        if path and not Path(path).is_dir():
            raise DataError(
                f"{folder}: its base model.{field} {path} is not here; "
                f"AutoModel.from_pretrained(..., {field}=DIR) names another place"
            )
    targets = tuple(config.lora["target_modules"])
    # Every value is loaded below, so nothing needs to be drawn.
    model = new_model(
        RegionVLMConfig.from_dict(config.region_vlm),
        dtype=dtype,
        seed=0,
        lora_config=LoraConfig(**{**config.lora, "target_modules": targets}),
        from_files=("",),
    )
    base, covered = load_folders(model, ModelConfig(**bases))
    if base != config.base_sha256:
        files = sorted({*base, *config.base_sha256})
        changed = next(name for name in files if base.get(name) != config.base_sha256.get(name))
        raise DataError(f"{folder}: trained on other base weights, {changed} is not the same file")
    out = folder.absolute().parent
    sources = [assign(model, read_folder(folder), str(folder))]
    if config.lora["rank"]:
        names = {n: LANGUAGE + own for n, own in _lora_names(model, config).items()}
        sources.append(assign(model, _tensors(out / ADAPTER), str(out / ADAPTER), names.get))
    if (out / MOA).exists():
        sources.append(load_adapters(model, out / MOA))
    for report in sources:
        _refuse_unused(report)
        covered = covered | report.loaded
    missing = {name for name, _ in model.named_parameters()} - covered
    if missing:
        raise DataError(f"{folder}: no file has a tensor for {min(missing)} ({len(missing)} missing)")
    return model.eval()


def _lora_names(model: RegionVLM, config: RegionVLMPeftConfig) -> dict[str, str]:
    return lora.peft_names(model.language_model, in_llava=bool(config.init_from))


def _refuse_unused(report: LoadReport) -> None:
    if report.unused:
        raise DataError(f"{report.source}: another model, its tensor {min(report.unused)} has no place in this one")


def adapter_settings(config: RegionVLMConfig) -> dict[str, Any]:
    """Fields of peft_moa.MoAConfig that describe the adapters of a RegionVLM."""
    return {**config.adapters, "tasks": list(config.tasks)}


def moa_name(name: str, *, in_llava: bool = False) -> str:
    """Name of a RegionVLM's adapter parameter ("adapters.3.caption_up") in a folder of PEFT's type MOA."""
    _, layer, field = name.split(".")
    return f"base_model.model.model.{'language_model.' if in_llava else ''}layers.{layer}.moa_adapters.{field}"


def own_name(name: str) -> str | None:
    """The inverse of `moa_name` for either base; None for a name that is not of an adapter."""
    found = re.fullmatch(r"base_model\.model\.model\.(?:language_model\.)?layers\.(\d+)\.moa_adapters\.(\w+)", name)
    return f"adapters.{found[1]}.{found[2]}" if found else None


def load_adapters(model: RegionVLM, folder: str | Path) -> LoadReport:
    """Adapters from a folder of PEFT's type MOA, from our export or from `save_pretrained` of a language model alone.

    Raises DataError when the folder is of another type or setting, or its tensors are not exactly the model's.
    """
    folder = Path(folder)
    try:
        given = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}/adapter_config.json: cannot be read: {error}") from None
    if given.get("peft_type") != "MOA":
        raise DataError(f"{folder}: holds {given.get('peft_type')}, not MOA")
    for field, value in adapter_settings(cast(RegionVLMConfig, model.config)).items():
        if field != "dropout" and given.get(field) != value:
            raise DataError(f"{folder}: its adapters have {field} {given.get(field)}, the model's {value}")
    report = assign(model, _tensors(folder / ADAPTER), str(folder), own_name)
    _refuse_unused(report)
    if missing := {n for n, _ in model.named_parameters() if n.startswith("adapters.")} - report.loaded:
        raise DataError(f"{folder}: no tensor for {min(missing)} ({len(missing)} missing)")
    return report


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None
