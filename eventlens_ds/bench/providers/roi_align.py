"""RoI-align providers: ours on every backend, and baselines in plain torch, all from tokens and boxes.

In: a Problem whose inputs are RoIInputs. Out: Runs of [R, P, Q, C], or [R, C] for the mean. Decision: each baseline
makes its own interpolation weights inside the timed call, as a training step with new boxes must, and follows the
border rule of torchvision, without which it would be another function. Forms: one matrix product per image with
dense weights (`bmm`); two products, one per axis (`einsum`); one product per sample row and column, averaged
afterwards (`scenic`, the form of google-research/scenic, projects/baselines/centernet/modeling/roi_align.py, written
anew); F.grid_sample; four gathered corners; F.embedding_bag over the corners. torchvision is in torchvision.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from eventlens_ds.bench.kernels.harness import Problem, Provider, Run
from eventlens_ds.ops import dispatch
from eventlens_ds.ops.roi_align import op, roi_align


@dataclass
class RoIInputs:
    """The arguments of the public op, and what the host knows of them without asking the device.

    levels require a gradient; image: int64[R], the image of each box; most: boxes of the fullest image; slots: place
    of each box when every image is padded to `most` boxes.
    """

    levels: list[torch.Tensor]
    boxes: torch.Tensor
    offsets: torch.Tensor
    image: torch.Tensor
    grid: tuple[int, int]
    output: tuple[int, int]
    scale: float
    sampling: int
    aligned: bool
    pool: Literal["mean"] | None
    prefix: int
    most: int
    slots: torch.Tensor

    def features(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Mean over levels without prefix tokens: [B, H * W, C]."""
        first = self.levels[0][:, self.prefix :]
        if len(self.levels) > 1:
            wide = torch.stack([level[:, self.prefix :] for level in self.levels]).mean(0, dtype=torch.float32)
            return wide.to(dtype or first.dtype)
        return first if dtype is None else first.to(dtype)

    def call(self, levels: list[torch.Tensor], boxes: torch.Tensor, backend: str | None) -> torch.Tensor:
        """The public op."""
        return roi_align(
            levels,
            boxes,
            self.offsets,
            self.grid,
            output_size=self.output,
            spatial_scale=self.scale,
            sampling_ratio=self.sampling,
            aligned=self.aligned,
            pool=self.pool,
            num_prefix_tokens=self.prefix,
            backend=backend,
        )

    def finish(self, pooled: torch.Tensor) -> torch.Tensor:
        """In the dtype of the public op."""
        return pooled.to(self.levels[0].dtype)


def inputs_of(problem: Problem) -> RoIInputs:
    found = problem.inputs["roi"]
    assert isinstance(found, RoIInputs)
    return found


Body = Callable[[RoIInputs], torch.Tensor]


def _plain(body: Body) -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        given = inputs_of(problem)
        return Run(lambda: body(given), given.levels, problem.grad_output)

    return prepare


def _compiled(body: Body) -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        given = inputs_of(problem)
        compiled = torch.compile(body, dynamic=False)
        return Run(lambda: compiled(given), given.levels, problem.grad_output)

    return prepare


def sample_positions(given: RoIInputs, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 positions [R, bins * samples] along one axis (0: y, 1: x) in cells, and which of them count."""
    cells, bins, samples = given.grid[axis], given.output[axis], given.sampling
    corner = given.boxes * given.scale - (0.5 if given.aligned else 0.0)
    start, size = corner[:, 1 - axis], corner[:, 3 - axis] - corner[:, 1 - axis]
    if not given.aligned:
        size = size.clamp(min=1.0)
    step = size / (bins * samples)
    index = torch.arange(bins * samples, device=start.device, dtype=start.dtype) + 0.5
    position = start[:, None] + index * step[:, None]
    return position.clamp(0, cells - 1), (position >= -1) & (position <= cells)


def axis_weights(given: RoIInputs, axis: int, per_sample: bool = False) -> torch.Tensor:
    """Interpolation weights along one axis: [R, bins, cells], or [R, bins * samples, cells] per sample."""
    position, counts = sample_positions(given, axis)
    cell = torch.arange(given.grid[axis], device=position.device, dtype=position.dtype)
    hat = (1 - (position[..., None] - cell).abs()).clamp(min=0) * counts[..., None]
    return hat if per_sample else hat.unflatten(1, (given.output[axis], given.sampling)).mean(2)


def _padded(given: RoIInputs, rows: torch.Tensor) -> torch.Tensor:
    """[R, ...] -> [B, most, ...] with zeros; a view when every image has as many boxes."""
    batch = len(given.levels[0])
    if len(rows) == batch * given.most:
        return rows.unflatten(0, (batch, -1))
    padded = rows.new_zeros(batch * given.most, *rows.shape[1:])
    return padded.index_copy(0, given.slots, rows).unflatten(0, (batch, -1))


def _unpadded(given: RoIInputs, padded: torch.Tensor) -> torch.Tensor:
    flat = padded.flatten(0, 1)
    return flat if len(flat) == len(given.boxes) else flat.index_select(0, given.slots)


def _dense_weights(given: RoIInputs) -> tuple[torch.Tensor, int, int]:
    """float32 weights [B, most * P * Q, H * W] and the bins of each axis."""
    wy, wx = axis_weights(given, 0), axis_weights(given, 1)
    if given.pool == "mean":
        wy, wx = wy.mean(1, keepdim=True), wx.mean(1, keepdim=True)
    weights = (wy[:, :, None, :, None] * wx[:, None, :, None, :]).flatten(3).flatten(1, 2)
    return _padded(given, weights).flatten(1, 2), wy.shape[1], wx.shape[1]


def bmm(given: RoIInputs, parts: int = 1) -> torch.Tensor:
    """One product per image: dense weights [R_b * P * Q, H * W] in the dtype of the features times the features.

    parts=2 adds what the weights lose by rounding to that dtype as a second product (high and low part).
    """
    weights, bins_y, bins_x = _dense_weights(given)
    features = given.features()
    high = weights.to(features.dtype)
    if parts == 1:
        pooled = torch.bmm(high, features)
    else:
        low = (weights - high.float()).to(features.dtype)
        pooled = torch.bmm(high, features).float() + torch.bmm(low, features).float()
    return _shaped(given, pooled, bins_y, bins_x)


def _shaped(given: RoIInputs, pooled: torch.Tensor, bins_y: int, bins_x: int) -> torch.Tensor:
    """[B, most * P * Q, C] -> the layout of the public op."""
    pooled = _unpadded(given, pooled.unflatten(1, (-1, bins_y, bins_x)))
    return given.finish(pooled.flatten(0, 2) if given.pool == "mean" else pooled)


def einsum(given: RoIInputs) -> torch.Tensor:
    """Separable: rows first, then columns, in float32."""
    wy, wx = axis_weights(given, 0), axis_weights(given, 1)
    if given.pool == "mean":
        wy, wx = wy.mean(1, keepdim=True), wx.mean(1, keepdim=True)
    features = given.features(torch.float32).unflatten(1, given.grid)
    strips = torch.einsum("brph,bhwc->brpwc", _padded(given, wy), features)
    pooled = torch.einsum("brqw,brpwc->brpqc", _padded(given, wx), strips)
    return _shaped(given, pooled.flatten(1, 3), wy.shape[1], wx.shape[1])


def scenic(given: RoIInputs) -> torch.Tensor:
    """Separable per sample: every sample is formed, then the samples of a bin are averaged."""
    wy, wx = axis_weights(given, 0, per_sample=True), axis_weights(given, 1, per_sample=True)
    features = given.features(torch.float32).unflatten(1, given.grid)
    strips = torch.einsum("brph,bhwc->brpwc", _padded(given, wy), features)
    samples = _unpadded(given, torch.einsum("brqw,brpwc->brpqc", _padded(given, wx), strips))
    return given.finish(_average(given, samples))


def _average(given: RoIInputs, samples: torch.Tensor) -> torch.Tensor:
    """[R, P * S, Q * S, C] -> [R, P, Q, C], or [R, C] for the mean."""
    if given.pool == "mean":
        return samples.mean((1, 2))
    split = samples.unflatten(2, (given.output[1], given.sampling)).unflatten(1, (given.output[0], given.sampling))
    return split.mean((2, 4))


def grid_sample(given: RoIInputs) -> torch.Tensor:
    """F.grid_sample of all samples of an image at once, in float32, then the average over each bin."""
    (y, counts_y), (x, counts_x) = sample_positions(given, 0), sample_positions(given, 1)
    height, width = given.grid
    places = torch.stack(
        torch.broadcast_tensors(
            (2 * x / max(1, width - 1) - 1)[:, None, :], (2 * y / max(1, height - 1) - 1)[:, :, None]
        ),
        -1,
    )
    features = given.features(torch.float32).transpose(1, 2).unflatten(2, given.grid)
    flat = _padded(given, places).flatten(1, 2)
    sampled = F.grid_sample(features, flat, mode="bilinear", padding_mode="border", align_corners=True)
    samples = _unpadded(given, sampled.movedim(1, -1).unflatten(1, (-1, places.shape[1])))
    counted = (counts_y[:, :, None] & counts_x[:, None, :])[..., None]
    return given.finish(_average(given, samples * counted))


def _corners(given: RoIInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the flat features [R, P * S, Q * S, 4] and their weights, of the four cells around each sample."""
    (y, counts_y), (x, counts_x) = sample_positions(given, 0), sample_positions(given, 1)
    height, width = given.grid
    y0, x0 = y.long(), x.long()
    fy, fx = y - y0, x - x0
    rows = torch.stack((y0, (y0 + 1).clamp(max=height - 1)), -1)
    columns = torch.stack((x0, (x0 + 1).clamp(max=width - 1)), -1)
    weight_y = torch.stack((1 - fy, fy), -1) * counts_y[..., None]
    weight_x = torch.stack((1 - fx, fx), -1) * counts_x[..., None]
    cells = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
    weights = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
    first = (given.image * (height * width)).view(-1, 1, 1, 1, 1)
    return (cells + first).flatten(3), weights.flatten(3)


def gather(given: RoIInputs) -> torch.Tensor:
    """Four gathered corners per sample in float32, as torchvision's deterministic path does it."""
    cells, weights = _corners(given)
    flat = given.features(torch.float32).flatten(0, 1)
    samples = sum(flat[cells[..., k]] * weights[..., k, None] for k in range(4))
    assert isinstance(samples, torch.Tensor)
    return given.finish(_average(given, samples))


def embedding_bag(given: RoIInputs) -> torch.Tensor:
    """F.embedding_bag: the 4 * S * S weighted cells of each bin summed in one call, without a buffer of samples."""
    cells, weights = _corners(given)
    samples, (bins_y, bins_x) = given.sampling, given.output
    if given.pool == "mean":
        cells, weights = cells.flatten(1), weights.flatten(1) / (bins_y * bins_x * samples * samples)
    else:
        cells, weights = (
            t.unflatten(2, (bins_x, samples)).unflatten(1, (bins_y, samples)).transpose(2, 3).flatten(0, 2).flatten(1)
            for t in (cells, weights / samples**2)
        )
    flat = given.features(torch.float32).flatten(0, 1)
    pooled = F.embedding_bag(cells, flat, per_sample_weights=weights, mode="sum")
    return given.finish(pooled if given.pool == "mean" else pooled.unflatten(0, (-1, bins_y, bins_x)))


def _needs_fixed_sampling(problem: Problem) -> str:
    return "" if inputs_of(problem).sampling > 0 else "written for a fixed number of samples"


def _rounded(problem: Problem) -> bool:
    """Whether weights in the dtype of the features lose bits; in float32 a low part would be zero."""
    return problem.dtype != torch.float32


def ours(backend: str | None) -> Provider:
    """The public op on one backend, from boxes to features; None leaves the choice to dispatch."""

    def prepare(problem: Problem) -> Run:
        given = inputs_of(problem)
        return Run(lambda: given.call(given.levels, given.boxes, backend), given.levels, problem.grad_output)

    def obstacle(problem: Problem) -> str:
        if backend is None:
            return ""
        return dispatch.available("roi_align", problem.device.type).get(backend, "no such backend")

    return Provider(f"ours {backend or 'as dispatched'}", prepare, obstacle, ours=True)


def ours_kernel(backend: str) -> Provider:
    """The pooling of one backend alone, its plan made beforehand, as further levels of the same boxes have it."""

    def prepare(problem: Problem) -> Run:
        given = inputs_of(problem)
        mean = given.pool == "mean"
        offsets = given.offsets
        tables = op.plan(
            given.boxes, given.grid, given.output, given.scale, given.sampling, given.aligned, mean, backend
        )
        grad = problem.grad_output[:, None, None] if mean else problem.grad_output

        def restore(output: torch.Tensor, grads: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
            return (output.flatten(0, 2) if mean else output), grads

        return Run(
            lambda: op.pool(given.levels, tables, offsets, given.grid, given.prefix, backend),
            given.levels,
            grad,
            restore,
        )

    def obstacle(problem: Problem) -> str:
        return dispatch.available("roi_align", problem.device.type).get(backend, "no such backend")

    return Provider(f"ours {backend} kernel", prepare, obstacle, scope="kernel", ours=True)


def bmm_kernel(problem: Problem) -> Run:
    """The product of `bmm` alone, its weights made beforehand."""
    given = inputs_of(problem)
    with torch.no_grad():
        weights, bins_y, bins_x = _dense_weights(given)
        weights = weights.to(given.levels[0].dtype)
    return Run(
        lambda: _shaped(given, torch.bmm(weights, given.features()), bins_y, bins_x),
        given.levels,
        problem.grad_output,
    )


def baselines() -> list[Provider]:
    """Every baseline in plain torch. The compiled ones take seconds to compile for each shape."""
    made = []
    for name, body in (("einsum", einsum), ("scenic", scenic)):
        made += [
            Provider(f"{name} eager", _plain(body), _needs_fixed_sampling),
            Provider(f"{name} compiled", _compiled(body), _needs_fixed_sampling),
        ]
    return [
        Provider("bmm", _plain(bmm), _needs_fixed_sampling),
        Provider("bmm kernel", bmm_kernel, _needs_fixed_sampling, scope="kernel"),
        Provider("bmm high+low", _plain(partial(bmm, parts=2)), _needs_fixed_sampling, _rounded),
        *made,
        Provider("grid_sample", _plain(grid_sample), _needs_fixed_sampling),
        Provider("gather", _plain(gather), _needs_fixed_sampling),
        Provider("embedding_bag", _plain(embedding_bag), _needs_fixed_sampling),
    ]
