"""Within the first steps of a run: which trainable tensors learned nothing, and whether a frozen one changed (P10).

In: the module of an engine, and after every optimizer step the tasks that were in it. Out: after STEPS steps, one log
line for every trainable tensor whose gradient was zero on all ranks, with the reason; a RuntimeError on all ranks
that names a frozen tensor of which a byte changed.
Decision: a hook on each tensor keeps one flag on its own device, so nothing is gathered and nothing waits; ranks
are asked once, at the end. A rank hashes the bytes of frozen tensors that it holds, which under ZeRO-3 is its shard.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable

import torch
from torch import nn

from eventlens_ds.model.adapters import level_of
from eventlens_ds.runtime.distributed import all_reduce_sum, rank_and_size

log = logging.getLogger(__name__)

STEPS = 3
"""Optimizer steps watched. One is not enough: an adapter that starts as the identity moves its last matrix first."""


def digests(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, str]:
    """sha256 by name of the bytes this rank holds: the whole tensor, or its shard under ZeRO-3."""
    found = {}
    for name, parameter in parameters:
        held = getattr(parameter, "ds_tensor", parameter).detach().cpu().contiguous().reshape(-1)
        found[name] = hashlib.sha256(held.view(torch.uint8).numpy().data).hexdigest()
    return found


class Audit:
    """Watches the parameters of `module` from now on; call `after_step` after every optimizer step.

    `silent` is None until STEPS steps are done, then [(name, reason)]. The hooks come off by themselves.
    """

    def __init__(self, module: nn.Module, steps: int = STEPS) -> None:
        self.silent: list[tuple[str, str]] | None = None
        self._left = steps
        self._tasks: set[str] = set()
        named = list(module.named_parameters())
        self._frozen = [(name, p) for name, p in named if not p.requires_grad]
        self._before = digests(self._frozen)
        self._trained = [name for name, p in named if p.requires_grad]
        self._arrived: dict[str, torch.Tensor] = {}
        """Name -> bool[]: whether any gradient of it was nonzero; no entry: no gradient arrived."""
        self._handles = [p.register_hook(self._watch(name)) for name, p in named if p.requires_grad]

    def _watch(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(grad: torch.Tensor) -> None:
            active = grad.detach().any()
            seen = self._arrived.get(name)
            self._arrived[name] = active if seen is None else seen | active

        return hook

    def after_step(self, tasks: Iterable[str]) -> None:
        """One optimizer step is done; `tasks` had samples in it on any rank. A collective at the last step watched."""
        if self.silent is not None:
            return
        self._tasks.update(tasks)
        self._left -= 1
        if self._left <= 0:
            self._conclude()

    def _conclude(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.silent = self._silent()
        if rank_and_size()[0] == 0:
            for name, reason in self.silent:
                log.warning("trainable but without gradient: %s: %s", name, reason)
        self._refuse_changes()
        self._arrived, self._frozen, self._before = {}, [], {}

    def _silent(self) -> list[tuple[str, str]]:
        device = next(iter(self._arrived.values())).device if self._arrived else torch.device("cpu")
        never = torch.zeros((), dtype=torch.bool, device=device)
        flags = [[float(name in self._arrived), float(self._arrived.get(name, never))] for name in self._trained]
        counted = all_reduce_sum(torch.tensor(flags, device=device).reshape(-1, 2))
        return [
            (name, self._reason(name, arrived > 0))
            for name, (arrived, active) in zip(self._trained, counted.tolist())
            if not active
        ]

    def _reason(self, name: str, arrived: bool) -> str:
        parts = name.split(".")
        fed = {name for task in self._tasks for name in (task, level_of(task), f"gate_{level_of(task)}")}
        if parts[0] == "adapters" and parts[-1].startswith("expert_"):
            return "no token took this adapter in these steps"
        fed.add("gate_weight")
        if parts[0] == "adapters" and not any(parts[-1].startswith(f"{name}_") or parts[-1] == name for name in fed):
            return "no sample of its task in these steps"
        if not arrived:
            return "the loss does not depend on it"
        return "its gradient was exactly zero in every row of these steps"

    def _refuse_changes(self) -> None:
        """RuntimeError on all ranks when a frozen tensor changed on any."""
        now = digests(self._frozen)
        changed = torch.tensor([float(now[name] != self._before[name]) for name, _ in self._frozen] or [0.0])
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
            changed = changed.cuda()
        ranks = all_reduce_sum(changed).tolist()
        names = [name for (name, _), count in zip(self._frozen, ranks) if count]
        if names:
            raise RuntimeError(f"{len(names)} frozen tensors changed during training, first {names[0]}")
