"""Optimizer shards of one number of ranks as those of another, made while they are loaded.

In: a committed checkpoint of W ranks under ZeRO 1-3. Out: the shard that rank r of any other number would have
saved, for DeepSpeed's own loading code; or every trained tensor with its moments, whole.
Decision: DeepSpeed's answer is a converted copy on disk ("universal"), with a pointer of its own that goes stale. A
shard is a slice of a vector whose layout the manifest holds, so the slices of the new ranks are cut from the mapped
files of the old ones: no copy, no lock, no second pointer, and nothing to verify but the checkpoint itself.
ZeRO-3 cuts each parameter into equal pieces, ZeRO 1 and 2 the vector of a whole optimizer group; both pad the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from eventlens_ds.errors import DataError

Load = Callable[[Path], Any]
"""Reads one file with the classes that are allowed, its tensors mapped."""

_STATE, _BASE = "optimizer_state_dict", "base_optimizer_state"
_FLAT3, _FLAT12 = "fp32_flat_groups", "single_partition_of_fp32_groups"
_ALIGNED = 2
"""ZeRO 1 and 2 pad a group to a multiple of this times the number of ranks."""


class Shards:
    """The optimizer shards of a checkpoint. Raises DataError where they are not laid out as the manifest says."""

    def __init__(self, path: Path, manifest: dict[str, Any], load: Load) -> None:
        self.path, self.world, self.stage = path, int(manifest["world_size"]), int(manifest["zero_stage"])
        self.layout: list[list[str]] = manifest["layout"]
        self.shapes = {name: list(shape) for name, shape, _ in manifest["parameters"]}
        names = [name for name in manifest["files"] if name.endswith("_optim_states.pt")]
        ordered = [next((n for n in names if f"pp_rank_{rank}_mp" in n), None) for rank in range(self.world)]
        if not self.stage or None in ordered or len(names) != self.world:
            raise DataError(f"{path}: not the optimizer shards of {self.world} ranks under ZeRO")
        self._files = [load(path / str(name)) for name in ordered]
        self.shards = [file[_STATE] for file in self._files]

    def _moments(self, rank: int) -> dict[Any, Any]:
        states: dict[Any, Any] = self.shards[rank][_STATE if self.stage == 3 else _BASE]["state"]
        return states

    def _flats(self, rank: int) -> list[torch.Tensor]:
        flats: list[torch.Tensor] = self.shards[rank][_FLAT3 if self.stage == 3 else _FLAT12]
        return flats

    def numel(self, name: str) -> int:
        return math.prod(self.shapes[name])

    def _vectors(self, group: int) -> dict[str, list[torch.Tensor]]:
        """Every flat vector of a group by name ("fp32", "exp_avg", ...), one part per old rank."""
        found = {"fp32": [self._flats(rank)[group] for rank in range(self.world)]}
        for key, value in self._moments(0)[group].items():
            if isinstance(value, torch.Tensor) and value.dim():
                found[key] = [self._moments(rank)[group][key] for rank in range(self.world)]
        return found

    def _cut(self, group: int, parts: list[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """The part of a flat vector that rank `rank` of `size` holds, padded with zeros."""
        if self.stage != 3:
            total = sum(map(self.numel, self.layout[group]))
            each = -(-total // (_ALIGNED * size)) * _ALIGNED
            return _slice(_joined(parts, self.path)[:total], rank * each, each)
        pieces, at = [], 0
        for name in self.layout[group]:
            old, new = -(-self.numel(name) // self.world), -(-self.numel(name) // size)
            whole = torch.cat([part[at : at + old] for part in parts])[: self.numel(name)]
            pieces.append(_slice(whole, rank * new, new))
            at += old
        if any(part.numel() != at for part in parts):
            raise DataError(f"{self.path}: group {group} holds {parts[0].numel()} numbers a rank, its names {at}")
        return torch.cat(pieces)

    def shard(self, rank: int, size: int) -> dict[str, Any]:
        """The file of rank `rank` of `size`, as DeepSpeed would have written it with the same tensors."""
        source = self.shards[0]
        flats, states = [], {}
        for group in range(len(self.layout)):
            vectors = {key: self._cut(group, parts, rank, size) for key, parts in self._vectors(group).items()}
            flat = vectors.pop("fp32")
            if self.stage != 3:
                total = sum(map(self.numel, self.layout[group]))
                flat = flat[: max(0, min(flat.numel(), total - rank * flat.numel()))]
            flats.append(flat)
            states[group] = {**self._moments(0)[group], **vectors}
        key, flat_key = (_STATE, _FLAT3) if self.stage == 3 else (_BASE, _FLAT12)
        count = source["partition_count"]
        made = {
            **source,
            key: {**source[key], "state": states},
            flat_key: flats,
            "partition_count": [size] * len(count) if isinstance(count, list) else size,
        }
        return {**self._files[0], _STATE: made}

    def tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(parameter, "fp32" or the name of a moment, flat tensor without padding) of everything that is trained."""
        for group, names in enumerate(self.layout):
            for key, parts in self._vectors(group).items():
                vector, at = self._cut(group, parts, 0, 1), 0
                for name in names:
                    yield name, key, vector[at : at + self.numel(name)]
                    at += self.numel(name)


def _joined(parts: list[torch.Tensor], path: Path) -> torch.Tensor:
    if len({part.dtype for part in parts}) != 1:
        raise DataError(f"{path}: shards of different types")
    return torch.cat(parts)


def _slice(vector: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """vector[start : start + length], filled up with zeros."""
    piece = vector[start : start + length]
    return torch.cat([piece, piece.new_zeros(length - piece.numel())]) if piece.numel() < length else piece
