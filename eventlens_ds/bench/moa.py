"""`eventlens bench moa`: the mixture of adapters, ours on every path and backend against the strongest baselines.

In: shapes, device, providers. Out: CSV rows (kernels/rows.py) and a table per shape on stdout. Decision: weights are
drawn so that the mixture is as large as the residual: an error in the adapters cannot hide behind it. FLOPs that count
as needed are those of the selected adapters, whichever path computes more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eventlens_ds.bench.kernels.command import Matrix, run
from eventlens_ds.bench.kernels.harness import MODES, Problem, Provider
from eventlens_ds.bench.providers import moa as implementations
from eventlens_ds.bench.providers.moa import MoAInputs
from eventlens_ds.ops.moa import AdapterStack


@dataclass(frozen=True)
class Shape:
    """T tokens of width D, E adapters of rank r, k of them per token.

    routing: token (uniform over adapters), zipf (popular ones first, the last never used), tasks (segments, one
    adapter each; adapters above `segments` stay unused).
    """

    tokens: int
    width: int
    adapters: int
    rank: int
    k: int
    routing: str = "token"
    segments: int = 0
    every_dtype: bool = False

    @property
    def name(self) -> str:
        sizes = f"T{self.tokens}-D{self.width}-E{self.adapters}-r{self.rank}-k{self.k}"
        return sizes if self.routing == "token" else f"{sizes}-{self.routing}"


CUDA = (
    Shape(16384, 4096, 4, 64, 2, every_dtype=True),
    Shape(16384, 4096, 16, 128, 2),
    Shape(16384, 4096, 4, 64, 1, routing="tasks", segments=16),
    Shape(16384, 4096, 8, 64, 2),
    Shape(16384, 4096, 16, 64, 2),
    Shape(16384, 4096, 16, 16, 2),
    Shape(16384, 4096, 2, 16, 1),
    Shape(2048, 4096, 4, 64, 2),
    Shape(16384, 4096, 4, 64, 4),
    Shape(512, 4096, 4, 64, 2),
    Shape(16384, 2048, 4, 64, 2),
    Shape(16384, 8192, 4, 64, 2),
    Shape(65536, 4096, 4, 64, 2),
    Shape(16384, 4096, 8, 32, 1),
    Shape(16384, 4096, 16, 128, 2, routing="zipf"),
    Shape(2048, 4096, 16, 128, 2),
)

CPU = (
    Shape(2048, 512, 4, 64, 2),
    Shape(2048, 512, 16, 128, 2),
    Shape(2048, 512, 4, 64, 1, routing="tasks", segments=8),
    Shape(2048, 1024, 4, 64, 2),
    Shape(2048, 1024, 16, 128, 2),
    Shape(2048, 1024, 4, 64, 1, routing="tasks", segments=8),
    Shape(2048, 512, 4, 16, 2),
    Shape(2048, 512, 8, 64, 2),
    Shape(2048, 512, 16, 64, 2),
)

QUICK = (
    Shape(96, 64, 4, 16, 2),
    Shape(96, 64, 4, 16, 4),
    Shape(96, 64, 4, 16, 1, routing="tasks", segments=5),
)


def problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """The inputs of one case, drawn from a seed, with the float64 result."""
    generator = torch.Generator(device=device).manual_seed(21)

    def draw(*size: int, scale: float = 1.0, kind: torch.dtype = dtype) -> torch.Tensor:
        return (scale * torch.randn(*size, generator=generator, device=device)).to(kind).requires_grad_()

    count, rank, width = shape.adapters, shape.rank, shape.width
    stack = AdapterStack(
        draw(count, rank, width, scale=width**-0.5),
        draw(count, rank, scale=0.1),
        draw(count, width, rank, scale=rank**-0.5),
        draw(count, width, scale=0.1),
        (1 + 0.1 * torch.randn(count, generator=generator, device=device)).requires_grad_(),
    )
    given = MoAInputs(draw(shape.tokens, width), draw(shape.tokens, width), stack, shape.k)
    if shape.routing == "tasks":
        _add_segments(given, shape, device)
    else:
        logits = torch.randn(shape.tokens, count, generator=generator, device=device)
        if shape.routing == "zipf":
            logits -= torch.arange(1.0, count + 1, device=device).log()
            logits[:, -1] = -1e4
        given.logits = logits.requires_grad_()
    wide = _wide(given)
    expected = wide.call("reference", "dense")
    grad = torch.randn(shape.tokens, width, generator=generator, device=device).to(dtype)
    return Problem(
        op="moa",
        case=shape.name,
        dtype=dtype,
        device=device,
        inputs={"moa": given},
        grad_output=grad,
        expected=expected.detach(),
        expected_grads=torch.autograd.grad(expected, wide.leaves, grad.double()),
        flops={mode: times * 4 * shape.tokens * shape.k * rank * width for mode, times in zip(MODES, (1, 2, 3))},
        **_bytes(given, grad),
    )


def _add_segments(given: MoAInputs, shape: Shape, device: torch.device) -> None:
    """Segments of unequal length, their tasks in turn."""
    edges = [round(shape.tokens * (i / shape.segments) ** 1.5) for i in range(shape.segments + 1)]
    tasks = [i % shape.adapters for i in range(shape.segments)]
    given.segments = torch.tensor(edges)
    given.tasks = torch.tensor(tasks, device=device)
    given.bounds = tuple(zip(edges, edges[1:], tasks))
    given.task_of_token = torch.repeat_interleave(given.tasks, given.segments.diff().to(device))


def _wide(given: MoAInputs) -> MoAInputs:
    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().double().requires_grad_()

    logits = None if given.logits is None else widen(given.logits)
    stack = AdapterStack(*map(widen, given.adapters))
    return MoAInputs(
        widen(given.x), widen(given.residual), stack, given.k, logits, given.segments, given.tasks, given.task_of_token
    )


def _bytes(given: MoAInputs, grad: torch.Tensor) -> dict[str, dict[str, int]]:
    """Bytes per mode. The gradient of the residual is the incoming one, so nobody has to write it."""
    x, residual = given.x.nbytes, given.residual.nbytes
    small = sum(leaf.nbytes for leaf in given.leaves[2:])
    forward, backward = x + residual + small + grad.nbytes, grad.nbytes + x + small + x + small
    held, held_both = x + residual + small, x + residual + small + grad.nbytes
    returned = held_both + grad.nbytes + x + small
    return {
        "min_bytes": dict(zip(MODES, (forward, backward, forward + backward))),
        "held_bytes": dict(zip(MODES, (held, held_both + grad.nbytes, held_both))),
        "io_bytes": dict(zip(MODES, (held + grad.nbytes, returned, returned))),
    }


def providers(device: torch.device) -> list[Provider]:
    """Every provider; those that cannot run say so in their row."""
    return implementations.providers()


def main(argv: Sequence[str]) -> int:
    shapes = {"cuda": CUDA, "cpu": CPU, "quick": QUICK}
    return run(Matrix("moa", shapes, problem, providers), argv)
