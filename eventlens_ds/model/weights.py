"""Named tensors into the parameters of a model, whole or partitioned by ZeRO-3.

In: a model and (name, tensor) pairs, held by every rank or by rank 0 alone. Out: the parameters set, and a report of
what was loaded, stayed new, or was not used. model/folders.py and runtime/checkpoint.py are where pairs come from.
Decision: a tensor that every rank can map from a file is never gathered. Each rank copies its own partition out of
the mapped file, so a node reads and holds one copy of the weights however many ranks it has.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from eventlens_ds.errors import DataError

Tensors = Iterable[tuple[str, torch.Tensor]]

_MEAN_ROWS = 4096
"""Rows averaged at a time when a vocabulary grows: bounds the float64 copy."""


@dataclass(frozen=True)
class LoadReport:
    """Names of parameters loaded, left as they were (new), and names of tensors nobody wanted (unused). overruled:
    tensors with values of their own that the model ties to another, whose values it has taken; known where they are."""

    source: str
    loaded: frozenset[str]
    new: frozenset[str]
    unused: frozenset[str]
    overruled: frozenset[str] = frozenset()

    def text(self) -> str:
        lines = [f"weights from {self.source}: {len(self.loaded)} loaded"]
        lines += [f"  new (stay as initialised): {listed(self.new)}"] if self.new else []
        lines += [f"  unused: {listed(self.unused)}"] if self.unused else []
        lines += [f"  tied here, their own values dropped: {listed(self.overruled)}"] if self.overruled else []
        return "\n".join(lines)


def listed(names: Collection[str]) -> str:
    """The first names of a set in order, and how many there are."""
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f", ... ({len(names)})" if len(names) > len(shown) else "")


def rank_and_size() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside a process group."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of a parameter, also when ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def gathered(parameters: Sequence[nn.Parameter], *, modifier_rank: int | None = 0) -> Iterator[None]:
    """Whole parameters inside; with a modifier rank its changes reach all partitions. A collective under ZeRO-3."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank):
        yield


def assign(
    model: nn.Module,
    tensors: Tensors,
    source: str,
    rename: Callable[[str], str | None] = lambda name: name,
    *,
    everywhere: bool = True,
    may_grow: Collection[str] = (),
) -> LoadReport:
    """Copy named tensors into the parameters and persistent buffers of a model.

    A collective: every rank passes the same names and shapes in the same order. `everywhere`: every rank has the
    values; otherwise rank 0 alone has them and the others pass meta tensors. `may_grow`: parameters that may have
    more rows than their tensor; new rows are the mean of the old ones (Hewitt 2021), so that they start as an average
    token. A tensor for `x.weight` finds its place under LoRA too (`x.base_layer.weight`).
    Raises DataError for a wrong shape, and for two tensors that are the same parameter but differ in name.
    """
    homes = _homes(model)
    names = Counter(canonical for canonical, _ in homes.values())
    tied: dict[str, tuple[str, torch.Tensor]] = {}
    overruled: set[str] = set()
    given: dict[str, str] = {}
    done: set[str] = set()
    unused: set[str] = set()
    for name, tensor in tensors:
        target = _at_home(rename(name), homes)
        if target is None:
            unused.add(name)
            continue
        canonical, home = homes[target]
        _check(source, name, tensor, home, target in may_grow)
        if given.setdefault(target, name) != name:
            raise DataError(f"{source}: tensors {given[target]} and {name} are both {target}")
        if names[canonical] > 1:
            other, values = tied.setdefault(canonical, (name, tensor))
            if not tensor.is_meta and not torch.equal(values, tensor):
                overruled.add(other if target == canonical else name)
        # Of tied weights the first name wins, whatever the order of the file.
        if target == canonical or canonical not in done:
            _write(home, tensor, everywhere)
        done.add(canonical)
    new = {name for name, _ in model.named_parameters()} - done
    return LoadReport(source, frozenset(done), frozenset(new), frozenset(unused), frozenset(overruled))


def _homes(model: nn.Module) -> dict[str, tuple[str, torch.Tensor]]:
    """Every name of a parameter or persistent buffer -> (its first name, itself); tied weights have several names."""
    first: dict[int, str] = {}
    homes: dict[str, tuple[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        homes[name] = first.setdefault(id(parameter), name), parameter
    for owner, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                full = f"{owner}.{name}" if owner else name
                homes[full] = full, buffer
    return homes


def _at_home(target: str | None, homes: dict[str, Any]) -> str | None:
    if target is None or target in homes:
        return target
    module, _, leaf = target.rpartition(".")
    wrapped = f"{module}.base_layer.{leaf}"
    return wrapped if wrapped in homes else None


def _check(source: str, name: str, tensor: torch.Tensor, home: torch.Tensor, may_grow: bool) -> None:
    shape, wanted = tuple(tensor.shape), full_shape(home)
    if shape == wanted or (may_grow and len(shape) == 2 and shape[0] < wanted[0] and shape[1:] == wanted[1:]):
        return
    raise DataError(f"{source}: tensor {name} is {shape}, the model has {wanted}")


def _write(home: torch.Tensor, tensor: torch.Tensor, everywhere: bool) -> None:
    """Put a tensor where it belongs: this rank's partition, the gathered parameter, or the whole one."""
    rank, size = rank_and_size()
    with torch.no_grad():
        if everywhere and _own_partition_is_writable(home):
            part = home.ds_tensor  # type: ignore[attr-defined]
            index = torch.distributed.get_rank(group=home.ds_process_group)  # type: ignore[attr-defined]
            start = index * part.ds_numel
            stop = min(start + part.ds_numel, home.ds_numel)  # type: ignore[attr-defined]
            if start < stop:
                part[: stop - start].copy_(_piece(tensor, start, stop))
        elif hasattr(home, "ds_id"):
            with gathered([home]):  # type: ignore[list-item]
                if rank == 0:
                    home.view(-1).copy_(_piece(tensor, 0, home.numel()))
        elif everywhere or size == 1:
            home.view(-1).copy_(_piece(tensor, 0, home.numel()))
        else:
            if rank == 0:
                home.view(-1).copy_(_piece(tensor, 0, home.numel()))
            _broadcast(home)


def _own_partition_is_writable(parameter: torch.Tensor) -> bool:
    """Partitioned in the plain way: in memory, without a second copy per node (hpZ) and without quantisation."""
    if not hasattr(parameter, "ds_id") or parameter.ds_status.name != "NOT_AVAILABLE":  # type: ignore[attr-defined]
        return False
    part = parameter.ds_tensor  # type: ignore[attr-defined]
    return (
        part.final_location is None
        and getattr(parameter, "ds_secondary_tensor", None) is None
        and not hasattr(part, "ds_quant_scale")
    )


def _piece(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a tensor row by row; beyond its end stands its mean row, again and again."""
    flat = tensor.reshape(-1)[start:stop]
    end = tensor.numel()
    if stop <= end:
        return flat
    mean = torch.zeros(tensor.shape[1], dtype=torch.float64)
    for rows in tensor.split(_MEAN_ROWS):
        mean += rows.double().sum(0)
    columns = torch.arange(max(start, end), stop) % tensor.shape[1]
    return torch.cat([flat, (mean / tensor.shape[0])[columns].to(tensor.dtype)])


def _broadcast(whole: torch.Tensor) -> None:
    """Rank 0's values to all ranks, over the device of the process group."""
    on_gpu = torch.distributed.get_backend() == "nccl"
    wire = whole.detach().to(torch.device("cuda", torch.cuda.current_device())) if on_gpu else whole.detach()
    torch.distributed.broadcast(wire, 0)
    if on_gpu:
        whole.copy_(wire)
