"""`eventlens bench roi_align`: RoI-align on token grids, ours on every backend against the strongest baselines.

In: shapes, device, providers. Out: CSV rows (kernels/rows.py) and a table per shape on stdout. Decision: the result
that all must agree with is the reference in float64, from the same rounded features; the bytes that count as needed
are the cells that some box touches, not the whole feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from eventlens_ds.bench.kernels.command import Matrix, run
from eventlens_ds.bench.kernels.harness import MODES, Problem, Provider
from eventlens_ds.bench.providers import torchvision
from eventlens_ds.bench.providers.roi_align import RoIInputs, axis_weights, baselines, ours, ours_kernel

PATCH = 14
"""Pixels per cell, as in CLIP-L/14; 1 / 14 is not representable, which is part of the exercise."""


@dataclass(frozen=True)
class Shape:
    """One case. spread: how boxes fall on images: even, zipf (with empty images) or one (all on the first)."""

    batch: int
    grid: tuple[int, int]
    channels: int
    boxes: int
    bins: int = 7
    sampling: int = 2
    pool: Literal["mean"] | None = None
    levels: int = 1
    aligned: bool = True
    spread: str = "even"
    mix: str = "inside"
    every_dtype: bool = False

    @property
    def name(self) -> str:
        height, width = self.grid
        marks = [f"B{self.batch}", f"{height}x{width}", f"C{self.channels}", f"R{self.boxes}", f"P{self.bins}"]
        marks += [self.pool] if self.pool else []
        marks += [f"S{self.sampling}"] if self.sampling != 2 else []
        marks += [f"L{self.levels}"] if self.levels > 1 else []
        marks += [] if self.aligned else ["unaligned"]
        marks += [mark for mark in (self.spread, self.mix) if mark not in ("even", "inside")]
        return "-".join(marks)


CUDA = (
    Shape(64, (24, 24), 1408, 12, every_dtype=True),
    Shape(64, (24, 24), 1408, 12, pool="mean", every_dtype=True),
    Shape(8, (24, 24), 1408, 16, spread="zipf"),
    Shape(64, (16, 16), 1024, 12),
    Shape(32, (48, 48), 1664, 16),
    Shape(64, (24, 24), 1408, 64),
    Shape(64, (24, 24), 1408, 12, levels=3),
    Shape(256, (16, 16), 1408, 4, pool="mean"),
    Shape(32, (48, 48), 1664, 16, pool="mean"),
    Shape(8, (24, 24), 1408, 8, spread="one"),
    Shape(64, (24, 24), 1408, 12, bins=3),
    Shape(64, (24, 24), 1408, 12, bins=14),
    Shape(64, (24, 24), 1408, 12, sampling=4),
    Shape(64, (24, 24), 1408, 12, sampling=-1),
    Shape(64, (24, 24), 1408, 12, mix="spilling"),
    Shape(64, (24, 24), 1408, 12, mix="whole"),
    Shape(64, (24, 24), 1408, 12, aligned=False),
    Shape(256, (16, 16), 1408, 4),
    Shape(64, (24, 24), 1408, 12, bins=1, sampling=14),
)
"""Notes: EVA-G at 336 px first, the class of tower that InstructBLIP and LION use."""

CPU = (
    Shape(8, (24, 24), 1024, 12),
    Shape(8, (24, 24), 1024, 12, pool="mean"),
    Shape(4, (16, 16), 512, 8),
    Shape(4, (16, 16), 512, 8, pool="mean"),
    Shape(8, (12, 20), 256, 6, bins=3, spread="zipf", mix="spilling"),
    Shape(4, (24, 24), 512, 8, levels=3),
)

QUICK = (
    Shape(2, (12, 12), 64, 4),
    Shape(2, (12, 12), 64, 4, pool="mean"),
    Shape(3, (9, 12), 32, 3, bins=3, spread="zipf", mix="spilling"),
)


def boxes_per_image(shape: Shape) -> list[int]:
    """How many boxes fall on each image; they sum to batch * boxes."""
    total = shape.batch * shape.boxes
    if shape.spread == "even":
        return [shape.boxes] * shape.batch
    if shape.spread == "one":
        return [total] + [0] * (shape.batch - 1)
    shares = [1 / (1 + i) for i in range(shape.batch)]
    counts = [int(total * share / sum(shares)) for share in shares]
    # The last image stays empty, whatever Zipf's law says.
    counts[-1] = 0
    counts[0] += total - sum(counts)
    return counts


def draw_boxes(shape: Shape) -> torch.Tensor:
    """float32 [R, 4] in pixels. inside: sides of 0.2 to 0.6 of the image; spilling: half leave it; whole: all of it."""
    generator = torch.Generator().manual_seed(22)
    height, width = (PATCH * cells for cells in shape.grid)
    total = shape.batch * shape.boxes
    size = torch.tensor([width, height], dtype=torch.float32)
    if shape.mix == "whole":
        return torch.cat((torch.zeros(2), size)).repeat(total, 1)
    sides = size * (0.2 + 0.4 * torch.rand(total, 2, generator=generator))
    free = size - sides
    corner = torch.rand(total, 2, generator=generator) * free
    if shape.mix == "spilling":
        corner[::2] = corner[::2] - 0.7 * free[::2] + 0.7 * size * torch.rand(len(corner[::2]), 2, generator=generator)
    return torch.cat((corner, corner + sides), 1)


def problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """The inputs of one case, drawn from a seed, with the float64 result."""
    generator = torch.Generator(device=device).manual_seed(20)
    tokens = 1 + shape.grid[0] * shape.grid[1]
    levels = [
        torch.randn(shape.batch, tokens, shape.channels, generator=generator, device=device).to(dtype).requires_grad_()
        for _ in range(shape.levels)
    ]
    counts = boxes_per_image(shape)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    image = torch.repeat_interleave(torch.arange(shape.batch), torch.tensor(counts)).to(device)
    most = max(1, *counts)
    within = torch.arange(len(image), device=device) - offsets.to(device)[image]
    given = RoIInputs(
        levels=levels,
        boxes=draw_boxes(shape).to(device),
        offsets=offsets.to(device),
        image=image,
        grid=shape.grid,
        output=(shape.bins, shape.bins),
        scale=1 / PATCH,
        sampling=shape.sampling,
        aligned=shape.aligned,
        pool=shape.pool,
        prefix=1,
        most=most,
        slots=image * most + within,
    )
    wide = [level.detach().double().requires_grad_() for level in levels]
    expected = given.call(wide, given.boxes.double(), "reference")
    grad = torch.randn(expected.shape, generator=generator, device=device).to(dtype)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    return Problem(
        op="roi_align",
        case=shape.name,
        dtype=dtype,
        device=device,
        inputs={"roi": given},
        grad_output=grad,
        expected=expected.detach(),
        expected_grads=expected_grads,
        **_bytes(given, grad),
    )


def _bytes(given: RoIInputs, grad: torch.Tensor) -> dict[str, dict[str, int]]:
    """Bytes per mode: what must move, what is there before the call, and that with what the call returns."""
    features = sum(level.nbytes for level in given.levels)
    touched = _touched_cells(given) * given.levels[0].shape[-1] * given.levels[0].element_size() * len(given.levels)
    boxes, output = given.boxes.nbytes, grad.nbytes
    forward, backward = touched + boxes + output, output + boxes + features
    held, held_both = features + boxes, features + boxes + output
    return {
        "min_bytes": dict(zip(MODES, (forward, backward, forward + backward))),
        "held_bytes": dict(zip(MODES, (held, held_both + output, held_both))),
        "io_bytes": dict(zip(MODES, (held + output, held_both + output + features, held_both + output + features))),
    }


def _touched_cells(given: RoIInputs) -> int:
    """Cells, over all images, that some box gives a weight; a cell is read once however many boxes share it."""
    if given.sampling < 1:
        return int(given.offsets.diff().count_nonzero()) * given.grid[0] * given.grid[1]
    rows, columns = (axis_weights(given, axis).sum(1) > 0 for axis in (0, 1))
    cells = torch.zeros(len(given.levels[0]), *given.grid, device=rows.device)
    cells.index_put_((given.image,), (rows[:, :, None] & columns[:, None, :]).float(), accumulate=True)
    return int(cells.count_nonzero())


def providers(device: torch.device) -> list[Provider]:
    """Every provider; those that cannot run say so in their row."""
    backends = ("triton", "csrc", "reference")
    mine = [ours(None), *map(ours, backends), *map(ours_kernel, backends)]
    return [*mine, *baselines(), *torchvision.providers()]


def main(argv: Sequence[str]) -> int:
    shapes = {"cuda": CUDA, "cpu": CPU, "quick": QUICK}
    return run(Matrix("roi_align", shapes, problem, providers), argv)
