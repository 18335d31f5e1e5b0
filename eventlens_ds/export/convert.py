"""`eventlens convert`: published InstructBLIP, LION or EVA-ViT weights become folders that a run starts from.

In: a .pth, .bin or .safetensors file, or a Hugging Face folder. Out: OUT/model.safetensors, our parts under our names,
for `--init-from OUT`; OUT/vision and OUT/language, Hugging Face folders for model.vision_path and model.language_path,
where the source holds tower and language model; OUT/convert.json, what became what.
Decision: a tensor that no rule places stops the conversion unless the caller left it out by name, so nothing is lost
without somebody having said so. Nothing in a file is run: only tensors and plain data are unpickled (P11).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from eventlens_ds.errors import DataError, UserError
from eventlens_ds.model import folders, lion_names
from eventlens_ds.model.lion_names import IMAGE_NORM, LANGUAGE, VISION, Join, NameMap
from eventlens_ds.runtime.commit import sha256_file

if TYPE_CHECKING:
    from eventlens_ds.config.run_config import RunConfig

KINDS: dict[str, Callable[[Iterable[str]], NameMap]] = {
    "instructblip": lion_names.from_instructblip,
    "lion": lion_names.from_lion,
    "eva": lion_names.from_eva,
}
"""What can be converted: transformers' InstructBLIP, a LION .pth, LAVIS' eva_vit_g.pth."""

FORMAT = 1
_FIRST_OF_TOWER = f"{VISION}.embeddings.patch_embedding.weight"


@dataclass
class Converted:
    """tensors under our names; sources: published names each was made of; the rest are notes for the reader."""

    tensors: dict[str, torch.Tensor]
    sources: dict[str, tuple[str, ...]]
    computed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The name map with shapes, and every published name that is not in it."""
        width = max((len(name) for name in self.sources), default=0)
        lines = [
            f"{name:{width}}  {list(self.tensors[name].shape)!s:16}  <- {' + '.join(made_of)}"
            for name, made_of in self.sources.items()
        ]
        notes = (
            ("made here", self.made),
            ("computed by the model, not copied", self.computed),
            ("left out", self.left_out),
            ("WITHOUT A PLACE", self.unmatched),
        )
        return "\n".join([*lines, *(f"{what}: {', '.join(names)}" for what, names in notes if names)])


def main(
    kind: str,
    source: Path,
    out: Path | None,
    *,
    leave_out: Sequence[str] = (),
    heads: int = 16,
    config: RunConfig | None = None,
) -> int:
    """Print the map and write OUT (None: only print). Returns 0.

    leave_out: beginnings of names, published or ours, that are not wanted. heads: of the tower, when the source is a
    bare file. config: a run that OUT is meant for; every tensor must fit its model. Raises DataError for tensors
    without a place, of a wrong shape or missing, UserError for an OUT that is not empty.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there and not empty; name a new folder")
    found = convert(kind, source, leave_out)
    print(found.text())
    if found.unmatched:
        first = found.unmatched[0]
        raise DataError(f"{source}: {len(found.unmatched)} tensors have no place, first {first}; --leave-out to go on")
    if config is not None:
        check(found, config, source)
    if out is not None:
        _publish(found, kind, source, out, heads)
    return 0


def convert(kind: str, source: Path, leave_out: Sequence[str] = ()) -> Converted:
    """The tensors of a source under our names. Raises DataError when it cannot be read, holds code, holds nothing of
    its kind, or has tensors to be joined that do not fit each other."""
    published = _read(source)
    left_out = [name for name in published if leave_out and name.startswith(tuple(leave_out))]
    computed = [name for name in published if name.endswith(folders.COMPUTED) and name not in left_out]
    apart = {*left_out, *computed}
    try:
        names = KINDS[kind](name for name in published if name not in apart)
        sources: dict[str, tuple[str, ...]] = {}
        tensors: dict[str, torch.Tensor] = {}
        joins: list[tuple[str, Join]] = [(ours, Join("", (theirs,))) for theirs, ours in names.mapped.items()]
        for ours, join in (*joins, *names.joined.items()):
            if ours in tensors:
                raise DataError(f"{sources[ours][0]} and {join.sources[0]} are both {ours}")
            parts = [published[name] for name in join.sources]
            tensors[ours], sources[ours] = join(parts) if join.kind else parts[0], join.sources
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    for prefix in leave_out:
        if not any(name.startswith(prefix) for name in (*published, *tensors)):
            raise UserError(f"--leave-out {prefix}: no tensor of {source} begins so")
    for ours in [name for name in tensors if leave_out and name.startswith(tuple(leave_out))]:
        left_out += sources.pop(ours)
        del tensors[ours]
    if not tensors:
        raise DataError(f"{source}: holds no tensor of {kind}; its first is {next(iter(published), 'none')}")
    found = Converted(tensors, sources, computed, left_out, names.unmatched)
    if _FIRST_OF_TOWER in tensors and f"{IMAGE_NORM}.weight" not in tensors:
        width = tensors[_FIRST_OF_TOWER].shape[0]
        tensors[f"{IMAGE_NORM}.weight"], tensors[f"{IMAGE_NORM}.bias"] = torch.ones(width), torch.zeros(width)
        found.made.append(f"{IMAGE_NORM} (the identity: the source has none; LION's file brings it)")
    return found


def _read(source: Path) -> dict[str, torch.Tensor]:
    if source.is_dir():
        return dict(folders.read_folder(source))
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder")
    return folders.read_file(source)


def check(found: Converted, config: RunConfig, source: Path) -> None:
    """DataError naming the first tensor that a run's model has no place or another shape for, or a parameter of a
    converted part that the source lacks. The model is on the meta device and costs no memory."""
    from eventlens_ds.model.region_vlm import RegionVLM
    from eventlens_ds.runtime.build_model import describe

    with torch.device("meta"):
        model = RegionVLM(describe(config, dry=True)[0])
    report = folders.load_parts(model, found.tensors.items(), str(source))
    print(report.text())


def _publish(found: Converted, kind: str, source: Path, out: Path, heads: int) -> None:
    """OUT, complete or not at all."""
    staging = out.with_name(f".{out.name}-{secrets.token_hex(4)}.tmp")
    staging.mkdir(parents=True)
    try:
        tower = _FIRST_OF_TOWER in found.tensors
        parts: dict[str, dict[str, torch.Tensor]] = {"": {}, "vision": {}, "language": {}}
        for name, tensor in found.tensors.items():
            part, _, rest = name.partition(".")
            where = "language" if part == LANGUAGE else "vision" if part == VISION and tower else ""
            parts[where][rest if where else name] = tensor
        configs = _configs(source, found, heads)
        for where, tensors in parts.items():
            if not tensors:
                continue
            (staging / where).mkdir(exist_ok=True)
            _save(tensors, staging / where / "model.safetensors")
            if where:
                text = json.dumps(configs(where), indent=1) + "\n"
                (staging / where / "config.json").write_text(text, encoding="utf-8")
        record = {
            "format": FORMAT,
            "from": kind,
            "sha256": {file.name: sha256_file(file) for file in _files(source)},
            "map": {ours: list(theirs) for ours, theirs in found.sources.items()},
            "made": found.made,
            "left_out": found.left_out,
        }
        (staging / folders.CONVERTED).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.rename(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _files(source: Path) -> list[Path]:
    return folders.weight_files(source) if source.is_dir() else [source]


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """safetensors refuses tensors that share memory; a second name of one is written as a copy."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor.clone() if shared or not tensor.is_contiguous() else tensor
    save_file({name: tensor.contiguous() for name, tensor in apart.items()}, str(file), metadata={"format": "pt"})
    file.chmod(0o644)


def _configs(source: Path, found: Converted, heads: int) -> Callable[[str], dict[str, Any]]:
    """config.json of tower or language model: the source folder's own, or for the tower read off the shapes."""

    def of(where: str) -> dict[str, Any]:
        if (source / "config.json").is_file():
            from transformers import AutoConfig

            whole = AutoConfig.from_pretrained(source, local_files_only=True)
            return (whole.vision_config if where == "vision" else whole.text_config).to_dict()
        if where == "vision":
            return tower_config(found.tensors, heads)
        raise DataError(f"{source}: holds a language model and no config.json: --leave-out {LANGUAGE}.")

    return of


def tower_config(tensors: dict[str, torch.Tensor], heads: int) -> dict[str, Any]:
    """Fields of an InstructBlipVisionConfig read off the shapes of its tensors; heads leave no trace there.

    Raises DataError for positions that are no square, UserError for heads that do not divide the width."""
    from transformers import InstructBlipVisionConfig

    width, _, patch, _ = tensors[_FIRST_OF_TOWER].shape
    layers = {name.split(".")[3] for name in tensors if name.startswith(f"{VISION}.encoder.layers.")}
    positions = tensors[f"{VISION}.embeddings.position_embedding"].shape[1]
    side = round((positions - 1) ** 0.5)
    if side * side != positions - 1:
        raise DataError(f"pos_embed has {positions} positions: not a class token and a square")
    if width % heads:
        raise UserError(f"--heads {heads}: the tower is {width} wide")
    return InstructBlipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors[f"{VISION}.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        image_size=side * patch,
        patch_size=patch,
        qkv_bias=f"{VISION}.encoder.layers.0.self_attn.qkv.bias" in tensors,
    ).to_dict()
