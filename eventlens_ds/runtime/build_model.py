"""The model that a configuration describes: architecture, initial weights, weights of a checkpoint.

In: a RunConfig and, for a trained model, one committed checkpoint. Out: a `RegionVLM`, whole or partitioned by ZeRO-3.
The stages of a trained model:
  1. describe      architecture and tokenizer
  2. new_model     initial weights
  3. weights       published folders, then the checkpoint; together they must cover every parameter
Decision: evaluation and export rebuild a model here without an optimizer, and a tensor that is missing, unknown or of
another shape is an error: a half-loaded model would give numbers that look real.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.data.encode import EncodeSpec
from eventlens_ds.data.episode_text import chat_words
from eventlens_ds.data.prompts import PromptStyle
from eventlens_ds.data.tokenizer import PieceTokenizer, load_tokenizer
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.model import folders, initial, lora, weights
from eventlens_ds.model.configuration import RegionVLMConfig
from eventlens_ds.model.presets import encode_spec, model_config
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.runtime import checkpoint, commit
from eventlens_ds.runtime.distributed import broadcast_object, rank_and_size

log = logging.getLogger(__name__)


def tokenizer_path(config: RunConfig) -> str:
    """Folder of the tokenizer; empty for the embedded one."""
    return config.model.tokenizer_path or config.model.language_path or config.model.init_from


def model_dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.train.dtype == "bf16" else torch.float32


def describe(config: RunConfig, *, dry: bool = False) -> tuple[RegionVLMConfig, PieceTokenizer, EncodeSpec]:
    """Architecture, tokenizer and what the data side must know, before any weight exists."""
    tokenizer = load_tokenizer(tokenizer_path(config))
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    architecture = model_config(
        config.model,
        tokenizer,
        device="cuda" if on_gpu else "cpu",
        dtype=model_dtype(config),
        from_scratch_is_fine=dry,
    )
    if architecture.encoder_decoder and config.model.adapters.router == "topk" and config.objective.load_balance:
        raise UserError("objective.load_balance: router topk has it for decoder-only models, not for T5; set it to 0")
    if architecture.encoder_decoder and config.data.group_tokens:
        raise UserError(
            f"data.group_tokens {config.data.group_tokens}: T5 encodes a prefix anew for every question, so samples "
            "share no group; leave it at 0"
        )
    tag_tokens = config.data.tag_tokens if config.model.soft_prompt else -1
    episodes = config.data.episodes
    chat = (
        chat_words(tokenizer.hf, tokenizer_path(config) or "the embedded tokenizer")
        if episodes.form == "chat"
        else None
    )
    style = PromptStyle(config.data.list_objects, config.data.event_context, tag_tokens, episodes.form, chat)
    return architecture, tokenizer, encode_spec(architecture, style, config.model.qformer.tokenizer_path)


def new_model(config: RunConfig, architecture: RegionVLMConfig, settings: dict[str, Any]) -> RegionVLM:
    """The model with initial weights drawn from train.seed, LoRA included, partitioned when the settings say ZeRO-3.
    Parts that `load_folders` will fill hold no values yet."""
    made = initial.new_model(
        architecture,
        dtype=model_dtype(config),
        seed=config.train.seed,
        zero3=settings if settings["zero_optimization"]["stage"] == 3 else None,
        lora_config=config.model.lora,
        from_files=folders.published_parts(config.model),
    )
    made.choose_kernels(config.model.kernels)
    return made


def weights_of_run(model: nn.Module, source: str) -> weights.LoadReport:
    """--init-from: weights of a run or checkpoint, read by rank 0 alone, or of a folder of `eventlens convert`. A
    collective.

    Raises DataError when nothing there verifies, for LoRA that this model has no place for, for an output matrix that
    this model ties to its word embeddings, and for a converted part that does not fit; UserError for
    model.qk_correlation, which loaded weights would replace."""
    if (Path(source) / folders.CONVERTED).is_file():
        return folders.load_parts(model, folders.read_folder(Path(source)), source)
    path = commit.resolve(Path(source))
    if path is None:
        raise DataError(f"--init-from {source}: holds no checkpoint")
    report = weights.assign(model, _from_lead(path), str(path), everywhere=False)
    mixed = getattr(getattr(model, "config", None), "qk_correlation", 0.0)
    if mixed and any(name.startswith("language_model.") for name in report.loaded):
        raise UserError(f"model.qk_correlation {mixed}: {source} brings the language model's weights; set it to 0")
    overruled = broadcast_object(sorted(report.overruled))
    if overruled:
        why = "has values of its own, and this model ties it to another tensor; set model.word_spread as it was there"
        raise DataError(f"--init-from {path}: {overruled[0]} {why}")
    lost = {name for name in report.unused if lora.MARK in name}
    if lost:
        raise DataError(f"--init-from {path}: was trained with LoRA ({min(lost)}), set model.lora as it was there")
    return report


def _from_lead(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """`checkpoint.weights` on rank 0; the same names and shapes as meta tensors on the others. A collective."""
    lead = rank_and_size()[0] == 0
    tensors = checkpoint.weights(path) if lead else iter(())
    while True:
        header: list[Any] | None = None
        tensor, problem = torch.empty(0), ""
        if lead:
            try:
                name, tensor = next(tensors, ("", tensor))
                header = [name, list(tensor.shape)] if name else None
            except DataError as error:
                problem = str(error)
        header, problem = broadcast_object([header, problem])
        if problem:
            raise DataError(problem)
        if header is None:
            return
        yield header[0], tensor if lead else torch.empty(header[1], device="meta")


def trained_model(config: RunConfig, architecture: RegionVLMConfig, path: Path, settings: dict[str, Any]) -> RegionVLM:
    """The model of a run with the weights of its checkpoint `path`, without an optimizer; `settings` are DeepSpeed's.
    A collective.

    Raises DataError when the checkpoint is damaged, belongs to another model or to other published weights.
    """
    made = new_model(config, architecture, settings)
    base, published = folders.load_folders(made, config.model)
    trained_on = commit.read_manifest(path)["base"]
    if base != trained_on:
        changed = next(n for n in sorted({*base, *trained_on}) if base.get(n) != trained_on.get(n))
        raise DataError(f"{path}: trained on other base weights, {changed} is not the same file")
    report = weights.assign(made, _from_lead(path), str(path), everywhere=False)
    if report.unused:
        raise DataError(f"{path}: another model, its tensor {min(report.unused)} has no place in this one")
    missing = report.new - published
    if missing:
        raise DataError(f"{path}: another model, it has no tensor for {min(missing)} ({len(missing)} missing)")
    return made
