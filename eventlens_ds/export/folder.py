"""`eventlens export RUN OUT`: a checkpoint becomes a Hugging Face folder that needs nothing else.

In: a run folder or one checkpoint of it. Out: config.json, model.safetensors (in parts when large), tokenizer files,
processor_config.json, README.md, and export.json, which says what it was made from. Published weights that stayed
frozen are included, LoRA is merged. Loads by AutoModel and AutoProcessor after `import eventlens_ds.model`.
export/peft_folder.py writes another kind of folder by the same steps.
Decision: everything is written beside OUT, read back and compared tensor by tensor, and only then moved there, so
OUT never holds half an export; what another program wrote into OUT is never touched.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from eventlens_ds.config import load as config_load
from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.export import card
from eventlens_ds.runtime import capsule, checkpoint, commit

log = logging.getLogger(__name__)

PART_SIZE = "5GB"
"""Largest weight file."""
RECORD = "export.json"
FORMAT = 1


class Source(NamedTuple):
    """What an export is made from: a checkpoint, its run's configuration, the model with its weights, a processor."""

    path: Path
    config: RunConfig
    model: Any
    processor: Any


def main(run: Path, out: Path, *, part_size: str = PART_SIZE) -> int:
    """Export a whole model and return 0; raises what `export` raises."""
    return export(run, out, partial(_write_whole, part_size=part_size))


def export(
    run: Path,
    out: Path,
    write: Callable[[Path, Source], dict[str, Any]],
    refuse: Callable[[RunConfig, Path], None] = lambda config, path: None,
) -> int:
    """Fill OUT by `write(staging folder, source)`, which returns what the record says beside `_facts`. Returns 0.

    refuse: raises for a configuration and checkpoint that `write` cannot serve, before the model is built.
    Raises UserError when OUT holds something else, DataError when the checkpoint is damaged or of another model.
    """
    from transformers.utils import logging as transformers_logging

    from eventlens_ds.model.processing import RegionVLMProcessor
    from eventlens_ds.runtime.build_model import describe, trained_model

    transformers_logging.disable_progress_bar()
    _refuse_foreign(out)
    path = checkpoint.resolve(run)
    if path is None:
        raise DataError(f"{run}: holds no checkpoint")
    config = _config_of(path)
    refuse(config, path)
    architecture, tokenizer, spec = describe(config)
    model = trained_model(config, architecture, path, {"zero_optimization": {"stage": 0}})
    with _staged(out) as staging:
        written = write(staging, Source(path, config, model, RegionVLMProcessor.from_spec(tokenizer, spec)))
        _readable(staging)
        facts = {**_facts(path, config, model), **written}
        (staging / "README.md").write_text(card.text(out.name, path, config, facts), encoding="utf-8")
        facts["files"] = [*sorted(_files(staging)), RECORD]
        (staging / RECORD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        _publish(staging, out)
    log.info("%s of %s is in %s", path.name, path.parent.parent, out)
    return 0


def _write_whole(staging: Path, source: Source, part_size: str) -> dict[str, Any]:
    merged = merge_lora(source.model)
    source.model.save_pretrained(staging, max_shard_size=part_size)
    compare(staging, source.model)
    source.processor.save_pretrained(staging)
    return {"lora_merged": merged}


def merge_lora(model: nn.Module) -> int:
    """Fold LoRA into the matrices it is added to, so that the folder needs no PEFT; returns how many."""
    found = [(name, m) for name, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]
    for name, layer in found:
        parent, _, child = name.rpartition(".")
        merge: Any = layer
        merge.merge()
        setattr(model.get_submodule(parent), child, merge.get_base_layer())
    return len(found)


def compare(folder: Path, model: nn.Module) -> None:
    """Every parameter and persistent buffer of the model is in the weight files of `folder`, bit by bit.

    Raises DataError naming the first tensor that is not, e.g. on a disk that lost bytes.
    """
    compare_tensors(sorted(folder.glob("*.safetensors")), model.state_dict())


def compare_tensors(files: Sequence[Path], wanted: Mapping[str, torch.Tensor]) -> None:
    """`compare` of some tensors with the files that should hold them and nothing else."""
    seen: set[int] = set()
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name not in wanted or not _same(tensors.get_tensor(name), wanted[name]):
                    raise DataError(f"{file}: tensor {name} is not what was written")
                seen.add(wanted[name].data_ptr())
    # Tied weights are stored once and share their memory.
    lost = [name for name, tensor in wanted.items() if tensor.numel() and tensor.data_ptr() not in seen]
    if lost:
        raise DataError(f"{files[0].parent if files else '.'}: no weight file holds {lost[0]} ({len(lost)} missing)")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.view(torch.uint8), _bytes_of(b)))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)


def _config_of(path: Path) -> RunConfig:
    file = path.parent.parent / "config.yaml"
    if not file.is_file():
        raise DataError(f"{file}: not found; a checkpoint is exported from inside its run folder")
    return config_load.load(str(file))


def _facts(path: Path, config: RunConfig, model: nn.Module) -> dict[str, Any]:
    """What the folder was made from; paths of this machine stay out, because the folder is made to be given away."""
    manifest = commit.read_manifest(path)
    return {
        "format": FORMAT,
        "checkpoint": path.name,
        "step": manifest["step"],
        "checkpoint_sha256": commit.sha256_file(path / commit.MANIFEST),
        "config_hash": config_load.hash(config),
        "published_weights": sorted(manifest["base"].values()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": capsule.versions(),
    }


def _readable(folder: Path) -> None:
    """safetensors makes files that only their owner may read; give them the rights of the others."""
    rights = next(folder.rglob("config.json")).stat().st_mode & 0o777
    for file in folder.rglob("*.safetensors"):
        file.chmod(rights)


def _refuse_foreign(out: Path) -> None:
    """UserError unless OUT is absent, empty, or holds exactly an earlier export."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder to export to")
    present = _files(out) if out.exists() else set()
    foreign = sorted(present - _earlier(out))
    if foreign:
        raise UserError(f"{out}: holds {foreign[0]}, which no export wrote; name an empty folder")


def _files(folder: Path) -> set[str]:
    """Everything below a folder that is not a folder itself, by its path there."""
    return {
        entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_symlink() or not entry.is_dir()
    }


def _earlier(out: Path) -> set[str]:
    """The files of an earlier export in OUT, by their paths there."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        names = record["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    if not isinstance(names, list) or not all(isinstance(n, str) and _inside(n) for n in names):
        return set()
    return {*names, RECORD}


def _inside(name: str) -> bool:
    """Whether a path leads to a file in the folder it is relative to, or in one of its sub-folders."""
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside OUT that is gone afterwards. UserError when it cannot be written."""
    staging = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        yield staging
    except OSError as error:
        raise UserError(f"{out}: cannot write: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in _earlier(out):
        (out / name).unlink(missing_ok=True)
    # The record comes last: a folder with one is whole.
    for name in [*sorted(_files(staging) - {RECORD}), RECORD]:
        (out / name).parent.mkdir(exist_ok=True)
        os.replace(staging / name, out / name)
    for folder in (entry for entry in out.iterdir() if entry.is_dir() and not any(entry.iterdir())):
        folder.rmdir()
