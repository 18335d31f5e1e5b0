"""Hugging Face model folders: their weight files, read tensor by tensor, and where each tensor belongs in a RegionVLM.

In: a folder with model.safetensors, pytorch_model.bin, or shards with an index; the settings model.vision_path,
model.language_path and model.init_from. Out: the model's parameters set, names loaded, sha256 of every file.
Decision: files are mapped, never read whole, and mapped anew after every CHUNK bytes, so pages already copied do not
stay with the process. A .bin file is opened with weights_only: one that carries code is refused (P11).
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eventlens_ds.config.run_config import ModelConfig
from eventlens_ds.errors import DataError
from eventlens_ds.model.weights import LoadReport, Tensors, assign, rank_and_size

log = logging.getLogger(__name__)

CHUNK = 16 << 20
"""Bytes of tensors read from a file between two openings."""

LANGUAGE, VISION = "language_model.", "vision_tower."
ROWS_PER_TOKEN = tuple(
    f"{LANGUAGE}{name}.weight"
    for name in ("model.embed_tokens", "shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
)
"""Parameters with one row per token: they grow with the tokenizer."""

_WRAPPERS = ("", "vision_model.", "model.vision_model.", "vision_tower.vision_model.", "vision_tower.", LANGUAGE)
"""Prefixes under which towers and language models are saved, alone or inside another model."""

LLAVA_MAP: tuple[tuple[str, str], ...] = (
    # On disk, as published and as save_pretrained of transformers 5 still writes it.
    ("vision_tower.vision_model.", VISION),
    ("vision_tower.", VISION),
    ("multi_modal_projector.", "projector."),
    ("language_model.", LANGUAGE),
    # In memory since transformers 4.52.
    ("model.vision_tower.vision_model.", VISION),
    ("model.vision_tower.", VISION),
    ("model.multi_modal_projector.", "projector."),
    ("model.language_model.", f"{LANGUAGE}model."),
    ("lm_head.", f"{LANGUAGE}lm_head."),
)
"""LLaVA-1.5 prefix -> prefix of a RegionVLM; the longest that fits is taken."""

COMPUTED = ("position_ids", "inv_freq")
"""Buffers that older files hold and every model computes for itself."""

CONVERTED = "convert.json"
"""File that marks a folder of `eventlens convert`."""


def load_folders(model: nn.Module, config: ModelConfig) -> tuple[dict[str, str], set[str]]:
    """Published weights of model.init_from, model.vision_path and model.language_path, in this order. A collective.

    Returns sha256 by "key/file name" and the names of the parameters loaded. Raises DataError when a file is missing,
    damaged, holds code, or when a tensor is missing or has another shape.
    """
    hashes: dict[str, str] = {}
    names: set[str] = set()
    if config.init_from:
        report = load_llava(model, Path(config.init_from))
        names |= report.loaded
        hashes |= _hashes("model.init_from", Path(config.init_from))
    parts = (("model.vision_path", config.vision_path, VISION), ("model.language_path", config.language_path, LANGUAGE))
    for key, folder, prefix in parts:
        if not folder:
            continue
        report = assign(model, read_folder(Path(folder)), folder, _below(model, prefix), may_grow=ROWS_PER_TOKEN)
        log.info("%s", LoadReport(folder, report.loaded, frozenset(), report.unused).text())
        missing = {n for n in report.new if n.startswith(prefix) and ".lora_" not in n}
        if missing:
            raise DataError(f"{folder}: has no tensor for {min(missing)} ({len(missing)} missing)")
        names |= report.loaded
        hashes |= _hashes(key, Path(folder))
    return hashes, names


def load_llava(model: nn.Module, folder: Path) -> LoadReport:
    """Tower, projector and language model from a LLaVA-1.5 folder, by LLAVA_MAP, which is logged.

    Region encoder and adapters do not exist there and stay new. Raises DataError for a tensor the map does not place,
    and for a parameter of the three parts that the folder lacks.
    """
    used: dict[str, str] = {}

    def rename(name: str) -> str | None:
        fits = [(source, target) for source, target in LLAVA_MAP if name.startswith(source)]
        if not fits:
            return None
        source, target = max(fits, key=lambda pair: len(pair[0]))
        used[source] = target
        return target + name[len(source) :]

    report = assign(model, read_folder(folder), str(folder), rename, may_grow=ROWS_PER_TOKEN)
    for source, target in used.items():
        log.info("%s: %s* -> %s*", folder, source, target)
    unexpected = {n for n in report.unused if not n.endswith(COMPUTED)}
    if unexpected:
        raise DataError(f"model.init_from {folder}: unexpected tensor {min(unexpected)} ({len(unexpected)} in all)")
    missing = {n for n in report.new if n.startswith((VISION, LANGUAGE, "projector.")) and ".lora_" not in n}
    if missing:
        raise DataError(f"model.init_from {folder}: has no tensor for {min(missing)} ({len(missing)} missing)")
    log.info("%s", report.text())
    return report


def load_parts(model: nn.Module, tensors: Tensors, source: str) -> LoadReport:
    """Parts of a model from tensors under our names, as `eventlens convert` writes them. A collective.

    A part that the model does not have is reported as unused. Raises DataError for a tensor that a part of the model
    has no place for, and for a parameter of a part that the source holds only in pieces; of the tower it may hold any.
    """
    report = assign(model, tensors, source)
    present = {name.partition(".")[0] for name, _ in model.named_parameters()}
    extra = {n for n in report.unused if n.partition(".")[0] in present}
    if extra:
        raise DataError(f"{source}: the model has no place for {min(extra)} ({len(extra)} in all)")
    touched = {n.partition(".")[0] for n in report.loaded} - {VISION[:-1]}
    missing = {n for n in report.new if n.partition(".")[0] in touched}
    if missing:
        raise DataError(f"{source}: has no tensor for {min(missing)} ({len(missing)} missing)")
    return report


def published_parts(config: ModelConfig) -> tuple[str, ...]:
    """Prefixes of the parameters that `load_folders` will set, so that nobody draws initial values for them."""
    if config.init_from:
        return VISION, LANGUAGE, "projector."
    return ((VISION,) if config.vision_path else ()) + ((LANGUAGE,) if config.language_path else ())


def _below(model: nn.Module, prefix: str) -> Callable[[str], str | None]:
    """Rename the tensors of a folder to parameters below `prefix`, whatever wrapper they were saved from."""
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)] + list(model.state_dict())
    known = {n.replace(".base_layer.", ".") for n in names}

    def rename(name: str) -> str | None:
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper) and prefix + name[len(wrapper) :] in known:
                return prefix + name[len(wrapper) :]
        return None

    return rename


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors before .bin, a single file before an index."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return [folder / shard for shard in sorted(set(_weight_map(index).values()))]
    raise DataError(f"{folder}: no model.safetensors, pytorch_model.bin or their index")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, checked: the shards are files beside the index."""
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(placed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: not an index of weight files: {type(error).__name__}: {error}") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise DataError(f"{index}: names {shard!r}, which is not a file beside it")
        if not (index.parent / shard).is_file():
            raise DataError(f"{index}: names {shard}, which is not there")
    return placed


def read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a folder in a fixed order. A tensor is mapped from its file and costs memory only where it is
    touched; it is not for keeping."""
    files = weight_files(folder)
    index = folder / f"{'model' if files[0].suffix == '.safetensors' else 'pytorch_model'}{files[0].suffix}.index.json"
    placed = _weight_map(index) if len(files) > 1 else {}
    for file in files:
        names = _names(file)
        lost = [name for name, shard in placed.items() if shard == file.name and name not in names]
        if lost:
            raise DataError(f"{file}: has no tensor {min(lost)}, which {index.name} places there")
        chunk: list[str] = []
        size = 0
        for name, tensor_bytes in names.items():
            chunk.append(name)
            size += tensor_bytes
            if size >= CHUNK:
                yield from _open(file, chunk)
                chunk, size = [], 0
        yield from _open(file, chunk)


def _names(file: Path) -> dict[str, int]:
    """Bytes of every tensor of a file, in the file's order."""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as tensors:
                shapes = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
                return {name: _elements(s.get_shape()) * 4 for name, s in shapes.items()}
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None
    return {name: tensor.numel() * tensor.element_size() for name, tensor in _load_bin(file).items()}


def _elements(shape: list[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _open(file: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Some tensors of a file from one opening of it."""
    if not names:
        return
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            for name in names:
                yield name, tensors.get_tensor(name)
    else:
        state = _load_bin(file)
        for name in names:
            yield name, state.pop(name)


def read_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one .safetensors, .bin or .pth file, mapped. A training checkpoint gives those of its "model".

    Raises DataError for a file that cannot be read, or holds more than tensors and plain data.
    """
    if file.suffix == ".safetensors":
        return dict(_open(file, list(_names(file))))
    return _load_bin(file, inside="model")


def _load_bin(file: Path, inside: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a .bin file, mapped. Files in torch's format of before 1.6 cannot be mapped and are read.
    inside: where a dictionary has this entry, the tensors are its."""
    try:
        try:
            state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        cause = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise DataError(f"{file}: refused, it holds more than tensors: {cause}") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None
    if isinstance(state, dict) and isinstance(state.get(inside), dict):
        state = state[inside]
    if not isinstance(state, dict):
        raise DataError(f"{file}: not a dictionary of tensors but {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise DataError(f"{file}: {name} is {type(value).__name__}, not a tensor")
    return state


def _hashes(key: str, folder: Path) -> dict[str, str]:
    """sha256 of every weight file. The ranks share the work."""
    files = weight_files(folder)
    rank, size = rank_and_size()
    own = [_sha256(file) if i % size == rank else bytes(32) for i, file in enumerate(files)]
    digests = torch.frombuffer(bytearray(b"".join(own)), dtype=torch.uint8).to(torch.int32)
    if size > 1:
        on_gpu = torch.distributed.get_backend() == "nccl"
        wire = digests.to(torch.device("cuda", torch.cuda.current_device())) if on_gpu else digests
        # Each digest is zero on all ranks but one, so the sum is the digest.
        torch.distributed.all_reduce(wire)
        digests = wire.cpu()
    rows = digests.to(torch.uint8).reshape(len(files), 32)
    return {f"{key}/{file.name}": bytes(row.tolist()).hex() for file, row in zip(files, rows)}


def _sha256(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
