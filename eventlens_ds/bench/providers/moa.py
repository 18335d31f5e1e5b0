"""Mixture-of-adapters providers: ours on every path and backend, and baselines in plain torch.

In: a Problem whose inputs are MoAInputs. Out: Runs of [T, D]. Decision: every baseline makes its selection and gates
from the logits inside the timed call and adds residual, biases and scales, as the op does. Forms: `mm` computes all
adapters with two cuBLAS products and a pointwise step between them (the form to beat up to about 512 hidden columns);
`bmm` keeps an output per adapter; `grouped_mm` sorts rows by adapter and calls F.grouped_mm; `expert loop` is the
loop with index_add_ of PEFT- and MixLoRA-style layers; `segment loop` slices contiguous segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from eventlens_ds.bench.kernels.harness import Problem, Provider, Run
from eventlens_ds.ops import dispatch
from eventlens_ds.ops.moa import AdapterStack, Gates, SoftMixture, TaskOneHot, TopKRouter, moa

PATHS = ("dense", "sparse", "segments")


@dataclass
class MoAInputs:
    """x, residual [T, D], the adapters, and either logits [T, E] with k, or a task per segment of tokens.

    Everything that is a float requires a gradient. bounds: the segments as plain numbers; task_of_token: int64[T].
    """

    x: torch.Tensor
    residual: torch.Tensor
    adapters: AdapterStack
    k: int
    logits: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    tasks: torch.Tensor | None = None
    task_of_token: torch.Tensor | None = None
    bounds: tuple[tuple[int, int, int], ...] = ()
    """(start, end, task) of each segment"""

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.x, self.residual, *self.adapters, *([] if self.logits is None else [self.logits])]

    def call(self, backend: str | None, path: str | None) -> torch.Tensor:
        """The public op."""
        return moa(
            self.x,
            self.residual,
            self.adapters,
            self.gates(),
            self.segments,
            activation="gelu",
            backend=backend,
            path=path,
        )

    def gates(self) -> Gates:
        if self.logits is None:
            assert self.tasks is not None
            return TaskOneHot(self.tasks)
        return SoftMixture(self.logits) if self.k == self.logits.shape[1] else TopKRouter(self.logits, self.k)

    def selection(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 gates [T, k] and adapters [T, k], by torch.topk: the logits have no ties."""
        if self.logits is None:
            assert self.task_of_token is not None
            chosen = self.task_of_token[:, None]
            return torch.ones_like(chosen, dtype=torch.float32), chosen
        values, chosen = torch.topk(self.logits, self.k, dim=-1)
        return values.softmax(-1), chosen

    def all_gates(self) -> torch.Tensor:
        """float32 [T, E], zero for adapters that are not selected, with the scales."""
        count = self.adapters.scale.shape[0]
        if self.logits is not None and self.k == count:
            return self.logits.softmax(-1) * self.adapters.scale
        gates, chosen = self.selection()
        return gates.new_zeros(len(gates), count).scatter(1, chosen, gates) * self.adapters.scale


def inputs_of(problem: Problem) -> MoAInputs:
    found = problem.inputs["moa"]
    assert isinstance(found, MoAInputs)
    return found


def mm(given: MoAInputs) -> torch.Tensor:
    """Two products over all adapters; the pointwise step applies activation and gates."""
    down, down_bias, up, up_bias, _ = given.adapters
    gates = given.all_gates().to(given.x.dtype)
    hidden = torch.addmm(down_bias.flatten(), given.x, down.flatten(0, 1).T)
    active = (F.gelu(hidden).unflatten(1, down_bias.shape) * gates[..., None]).flatten(1)
    base = torch.addmm(given.residual, gates, up_bias)
    return torch.addmm(base, active, up.transpose(1, 2).flatten(0, 1))


def bmm(given: MoAInputs) -> torch.Tensor:
    """One batched product per projection; an output [T, D] of every adapter exists at once."""
    down, down_bias, up, up_bias, _ = given.adapters
    gates = given.all_gates().to(given.x.dtype)
    repeated = given.x.expand(down.shape[0], -1, -1)
    hidden = torch.baddbmm(down_bias[:, None], repeated, down.transpose(1, 2))
    outputs = torch.baddbmm(up_bias[:, None], F.gelu(hidden), up.transpose(1, 2))
    return given.residual + (outputs * gates.T[..., None]).sum(0)


def grouped_mm(given: MoAInputs) -> torch.Tensor:
    """Rows sorted by adapter, two grouped products, rows put back and summed over the slots."""
    down, down_bias, up, up_bias, scale = given.adapters
    gates, chosen = given.selection()
    order = chosen.flatten().argsort(stable=True)
    rows = chosen.flatten()[order]
    ends = torch.bincount(rows, minlength=down.shape[0]).cumsum(0).to(torch.int32)
    x = given.x[order // chosen.shape[1]]
    hidden = F.gelu(F.grouped_mm(x, down.transpose(1, 2), offs=ends) + down_bias[rows])
    outputs = F.grouped_mm(hidden, up.transpose(1, 2), offs=ends) + up_bias[rows]
    weights = (gates.flatten()[order] * scale[rows]).to(x.dtype)
    placed = (outputs * weights[:, None])[order.argsort()]
    return given.residual + placed.unflatten(0, chosen.shape).sum(1)


def expert_loop(given: MoAInputs) -> torch.Tensor:
    """One adapter after the other on the tokens that selected it; waits for the device once per adapter."""
    down, down_bias, up, up_bias, scale = given.adapters
    gates, chosen = given.selection()
    total = given.residual.clone()
    for e in range(down.shape[0]):
        tokens, slots = torch.where(chosen == e)
        hidden = F.gelu(F.linear(given.x[tokens], down[e], down_bias[e]))
        weights = (gates[tokens, slots] * scale[e]).to(hidden.dtype)
        total.index_add_(0, tokens, F.linear(hidden, up[e], up_bias[e]) * weights[:, None])
    return total


def segment_loop(given: MoAInputs) -> torch.Tensor:
    """One adapter per contiguous segment, without gathering tokens."""
    down, down_bias, up, up_bias, scale = given.adapters
    parts = []
    for start, end, e in given.bounds:
        hidden = F.gelu(F.linear(given.x[start:end], down[e], down_bias[e]))
        parts.append(given.residual[start:end] + F.linear(hidden, up[e], up_bias[e]) * scale[e].to(hidden.dtype))
    return torch.cat(parts)


def _run(problem: Problem, forward: Callable[[], torch.Tensor]) -> Run:
    return Run(forward, inputs_of(problem).leaves, problem.grad_output)


def _plain(body: Callable[[MoAInputs], torch.Tensor]) -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        given = inputs_of(problem)
        return _run(problem, lambda: body(given))

    return prepare


def _compiled(problem: Problem) -> Run:
    given = inputs_of(problem)
    compiled = torch.compile(mm, dynamic=False)
    return _run(problem, lambda: compiled(given))


def ours(path: str | None, backend: str | None) -> Provider:
    """The public op on one path of one backend; None for both leaves the choice to dispatch."""

    def prepare(problem: Problem) -> Run:
        given = inputs_of(problem)
        return _run(problem, lambda: given.call(backend, path))

    def obstacle(problem: Problem) -> str:
        if backend is None:
            return ""
        return dispatch.available("moa", problem.device.type).get(backend, "no such backend")

    name = f"ours {path} {backend}" if path else "ours as dispatched"
    return Provider(name, prepare, obstacle, applies=_has_segments if path == "segments" else _always, ours=True)


def _always(problem: Problem) -> bool:
    return True


def _has_segments(problem: Problem) -> bool:
    """Otherwise tokens are routed one by one, and there is nothing to slice."""
    return inputs_of(problem).segments is not None


def providers() -> list[Provider]:
    """Every provider; csrc routes only, so it has no dense path."""

    def no_grouped_mm(problem: Problem) -> str:
        return "" if hasattr(F, "grouped_mm") else f"torch {torch.__version__} has no F.grouped_mm"

    mine = [
        ours(path, backend)
        for backend in ("triton", "csrc", "reference")
        for path in PATHS
        if (path, backend) != ("dense", "csrc")
    ]
    return [
        ours(None, None),
        *mine,
        Provider("mm eager", _plain(mm)),
        Provider("mm compiled", _compiled),
        Provider("bmm", _plain(bmm)),
        Provider("grouped_mm", _plain(grouped_mm), no_grouped_mm),
        Provider("expert loop", _plain(expert_loop)),
        Provider("segment loop", _plain(segment_loop), applies=_has_segments),
    ]
