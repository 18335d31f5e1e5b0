"""A recorder that finds the first module in which two ranks stopped doing the same thing (P5).

In: a model and, while installed, every module call and every DeepSpeed collective of this rank. Out: `check()` at
the end of a step: nothing, or a CollectiveMismatch naming the module, on all ranks.
Decision: a running 16-byte hash per rank and one small all-gather, on a gloo group of its own so that the GPU is not
waited for; only when the hashes differ are the lists exchanged. `strict` compares before each collective instead,
which turns a hang into the same error at the price of one all-gather per collective.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from eventlens_ds.runtime.distributed import gather_objects, in_group, rank_and_size

_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all_single",
    "barrier",
)
_NO_MODULE = "(outside the model)"
_KEPT = 100_000
"""Events remembered between checks; beyond it the hash goes on and only the naming gets coarser."""

Event = tuple[str, str, tuple[int, ...]]
"""(what: "call" or a collective, module in progress, shape or element counts of the tensors)."""


class CollectiveMismatch(RuntimeError):
    """Ranks made different module calls or collectives; the message names the first difference."""


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Sizes of the tensors handed to a collective; lists contribute one number per tensor."""
    sizes: list[int] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            sizes += [*value.shape, -1]
        elif isinstance(value, list | tuple):
            sizes += [item.numel() for item in value if isinstance(item, torch.Tensor)]
    return tuple(sizes)


def _first_tensor(value: Any) -> torch.Tensor | None:
    """The first tensor that takes part in backward inside a module's output."""
    if isinstance(value, torch.Tensor):
        return value if value.requires_grad else None
    if isinstance(value, dict):
        value = list(value.values())
    for item in value if isinstance(value, list | tuple) else ():
        found = _first_tensor(item)
        if found is not None:
            return found
    return None


class Recorder:
    """Records while installed: `with Recorder(engine.module) as recorder: step(); recorder.check()`.

    Module calls count as well as collectives, so a module without parameters, or a model under ZeRO-0, is covered.
    Constructing one is a collective (it makes a process group), and so is `check`.
    """

    def __init__(self, model: nn.Module, *, strict: bool = False) -> None:
        self._model = model
        self._strict = strict
        self._group = torch.distributed.new_group(backend="gloo") if in_group() else None
        self._handles: list[Any] = []
        self._wrapped: list[str] = []
        self._inside = False
        self._reset()

    def _reset(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.events: list[Event] = []
        self._stack: list[str] = []
        self._backward = _NO_MODULE

    def __enter__(self) -> Recorder:
        self.install()
        return self

    def __exit__(self, *exc: object) -> None:
        self.uninstall()

    @property
    def module(self) -> str:
        """Name of the module in progress, with " (backward)" after it when its gradient is being computed."""
        return self._stack[-1] if self._stack else self._backward

    @property
    def digest(self) -> str:
        """Hash of all calls and collectives since the last check; equal on every rank that did the same."""
        return self._hash.hexdigest()

    def install(self) -> None:
        """Hook the model and wrap DeepSpeed's communication backend, which must exist by now."""
        from deepspeed import comm

        assert not self._handles, "the recorder is installed already"
        self._reset()
        for name, module in self._model.named_modules():
            name = name or type(module).__name__
            # First of the pre-hooks: DeepSpeed's gathers the parameters, and they belong to this module.
            self._handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leaving(name), always_call=True))
        backend = comm.comm.cdb
        for name in _COLLECTIVES if backend is not None else ():
            if hasattr(backend, name):
                setattr(backend, name, self._recording(name, getattr(backend, name)))
                self._wrapped.append(name)

    def uninstall(self) -> None:
        """Take everything off again: the backend's methods are found on its class as before."""
        from deepspeed import comm

        for handle in self._handles:
            handle.remove()
        for name in self._wrapped:
            delattr(comm.comm.cdb, name)
        self._handles, self._wrapped = [], []

    def _entering(self, name: str) -> Callable[..., None]:
        event: Event = ("call", name, ())
        key = repr(event).encode()

        def hook(_module: nn.Module, _args: Any) -> None:
            self._stack.append(name)
            self._note(event, key)

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        label = f"{name} (backward)"

        def begins(_grad: torch.Tensor) -> None:
            self._backward = label

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            # Recomputation stops half way by an exception, so leave whatever was entered after this module as well.
            while self._stack and self._stack.pop() != name:
                pass
            tensor = _first_tensor(output)
            # A container may return its last child's tensor as it is; the child came first and keeps it.
            if tensor is not None and torch.is_grad_enabled() and not hasattr(tensor, "_recorded_by"):
                tensor._recorded_by = name  # type: ignore[attr-defined]
                tensor.register_hook(begins)

        return hook

    def _recording(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            event = (name, self.module, _shape(args, kwargs))
            self._note(event, repr(event).encode())
            if self._strict:
                self._compare()
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        return collective

    def _note(self, event: Event, key: bytes) -> None:
        self._hash.update(key)
        if len(self.events) < _KEPT:
            self.events.append(event)

    def _compare(self) -> None:
        """Raise on all ranks unless their hashes are equal."""
        if self._group is None:
            return
        mine = torch.frombuffer(bytearray(self._hash.digest()), dtype=torch.uint8)
        all_of_them = [torch.empty_like(mine) for _ in range(rank_and_size()[1])]
        torch.distributed.all_gather(all_of_them, mine, group=self._group)
        if any(not torch.equal(other, all_of_them[0]) for other in all_of_them):
            raise CollectiveMismatch(_first_difference(gather_objects(self.events, self._group)))

    def check(self) -> None:
        """End of a step: compare with the other ranks and start anew. CollectiveMismatch on all ranks."""
        self._compare()
        self._reset()


def _describe(event: list[Any] | None) -> str:
    if event is None:
        return "nothing more"
    what, module, shape = event
    return f"a call of {module}" if what == "call" else f"{what} of {tuple(shape)} in {module}"


def _first_difference(events: list[list[list[Any]]]) -> str:
    """One line about the first position at which a rank differs from rank 0."""
    for position in range(max(len(log) for log in events)):
        rows = [log[position] if position < len(log) else None for log in events]
        other = next((rank for rank, row in enumerate(rows) if row != rows[0]), None)
        if other is not None:
            return (
                f"ranks differ at event {position} of the step: rank 0 did {_describe(rows[0])}, "
                f"rank {other} did {_describe(rows[other])}"
            )
    return f"ranks differ after the first {_KEPT} events of the step"
