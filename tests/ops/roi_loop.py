"""The oracle of the RoI-align tests: a literal loop over boxes, bins, samples and corners, and random problems for it.

In: features [B, H, W, C] in float64 and boxes with their images. Out: `loop` pools them, `adjoint` spreads a gradient
back. Decision: both walk the same list of (bin, cell, weight) terms, made one sample at a time in the order of
operations of the original kernel (He et al., 2017; torchvision's bilinear_interpolate), and only channels are
vectorised; no window, no factorisation, nothing shared with the code under test, which `errors` compares with it.
Positions are rounded to `coordinates` (float32 for float32 ops): adaptive sampling and the border rule jump at exact
numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

NAN, INF = float("nan"), float("inf")


def loop(
    features: Any,
    boxes: Any,
    image_of_box: Any,
    grid: tuple[int, int],
    bins: tuple[int, int],
    scale: float,
    sampling: int,
    aligned: bool,
    coordinates: type = np.float64,
) -> np.ndarray:
    """Pool features [B, H, W, C] (or [B, H * W, C]) at boxes [R, 4]; returns float64 [R, P, Q, C]."""
    channels = np.shape(features)[-1]
    rows, cells, weights = terms(boxes, image_of_box, grid, bins, scale, sampling, aligned, coordinates)
    return add_up(features, rows, cells, weights, len(boxes) * bins[0] * bins[1]).reshape(-1, *bins, channels)


def adjoint(
    grad: Any,
    boxes: Any,
    image_of_box: Any,
    batch: int,
    grid: tuple[int, int],
    bins: tuple[int, int],
    scale: float,
    sampling: int,
    aligned: bool,
    coordinates: type = np.float64,
) -> np.ndarray:
    """Gradient of the features, float64 [B, H, W, C], for a gradient [R, P, Q, C] of the output."""
    channels = np.shape(grad)[-1]
    rows, cells, weights = terms(boxes, image_of_box, grid, bins, scale, sampling, aligned, coordinates)
    return add_up(grad, cells, rows, weights, batch * grid[0] * grid[1]).reshape(batch, *grid, channels)


def add_up(given: Any, to: np.ndarray, of: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """float64 [count, C]: row `to` of the result gets weight * row `of` of given [..., C], term by term."""
    channels = np.shape(given)[-1]
    flat = np.asarray(given, dtype=np.float64).reshape(-1, channels)
    out = np.zeros((count, channels))
    np.add.at(out, to, weights[:, None] * flat[of])
    return out


def terms(
    boxes: Any,
    image_of_box: Any,
    grid: tuple[int, int],
    bins: tuple[int, int],
    scale: float,
    sampling: int,
    aligned: bool,
    coordinates: type = np.float64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(flat bin, flat cell, weight) of every corner of every sample, in the order of the loop."""
    rows: list[int] = []
    cells: list[int] = []
    weights: list[float] = []
    for r, box in enumerate(np.asarray(boxes, dtype=coordinates)):
        if np.isnan(box).any():
            continue
        first = int(image_of_box[r]) * grid[0] * grid[1]
        offset = coordinates(0.5 if aligned else 0.0)
        x1, y1, x2, y2 = (c * coordinates(scale) - offset for c in box)
        ys, count_y = _positions(y1, y2 - y1, bins[0], sampling, aligned, coordinates)
        xs, count_x = _positions(x1, x2 - x1, bins[1], sampling, aligned, coordinates)
        count = max(count_y * count_x, 1)
        # Samples out of range add nothing; without them the loop stays short for boxes far larger than the grid.
        ys = [[y for y in bin_ys if -1.0 <= y <= grid[0]] for bin_ys in ys]
        xs = [[x for x in bin_xs if -1.0 <= x <= grid[1]] for bin_xs in xs]
        for p, bin_ys in enumerate(ys):
            for q, bin_xs in enumerate(xs):
                row = (r * bins[0] + p) * bins[1] + q
                for y in bin_ys:
                    for x in bin_xs:
                        for cell, weight in _corners(y, x, grid):
                            rows.append(row)
                            cells.append(first + cell)
                            weights.append(weight / count)
    return np.array(rows, np.int64), np.array(cells, np.int64), np.array(weights, np.float64)


def _positions(
    start: Any, length: Any, bins: int, sampling: int, aligned: bool, real: type
) -> tuple[list[list[float]], int]:
    """Positions of the samples of each bin along one axis, and how many a bin has; none for an infinite length."""
    if not aligned:
        length = max(length, real(1.0))
    bin_size = length / real(bins)
    if not np.isfinite(bin_size):
        return [[]] * bins, 0
    count = sampling if sampling > 0 else math.ceil(bin_size)
    found = []
    for p in range(bins):
        first = start + real(p) * bin_size
        found.append([float(first + (real(i) + real(0.5)) * bin_size / real(count)) for i in range(count)])
    return found, count


def _corners(y: float, x: float, grid: tuple[int, int]) -> Iterator[tuple[int, float]]:
    """The four (cell, weight) of one sample; none when it lies more than one cell outside."""
    height, width = grid
    if y < -1.0 or y > height or x < -1.0 or x > width:
        return
    y, x = max(y, 0.0), max(x, 0.0)
    y_low, x_low = int(y), int(x)
    if y_low >= height - 1:
        y_low = y_high = height - 1
        y = float(y_low)
    else:
        y_high = y_low + 1
    if x_low >= width - 1:
        x_low = x_high = width - 1
        x = float(x_low)
    else:
        x_high = x_low + 1
    ly, lx = y - y_low, x - x_low
    yield y_low * width + x_low, (1.0 - ly) * (1.0 - lx)
    yield y_low * width + x_high, (1.0 - ly) * lx
    yield y_high * width + x_low, ly * (1.0 - lx)
    yield y_high * width + x_high, ly * lx


@dataclass
class Problem:
    """One call of the op, drawn at random: settings, boxes sorted by image, and features.

    boxes are float32 numbers, so that they mean the same in both precisions.
    """

    grid: tuple[int, int]
    bins: tuple[int, int]
    scale: float
    sampling: int
    aligned: bool
    batch: int
    channels: int
    prefix: int
    boxes: np.ndarray
    image_of_box: np.ndarray
    seed: int
    tokens: torch.Tensor = field(init=False)
    _terms: dict[type, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        cells = self.prefix + self.grid[0] * self.grid[1]
        self.tokens = torch.randn(self.batch, cells, self.channels, generator=generator, dtype=torch.float64)

    @property
    def offsets(self) -> torch.Tensor:
        """int64[B + 1]"""
        counts = np.bincount(self.image_of_box, minlength=self.batch)
        return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int64)

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `loop` and `adjoint`."""
        return {
            "grid": self.grid,
            "bins": self.bins,
            "scale": self.scale,
            "sampling": self.sampling,
            "aligned": self.aligned,
        }

    def terms(self, coordinates: type = np.float64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The terms of the loop, made once per type of coordinates."""
        if coordinates not in self._terms:
            self._terms[coordinates] = terms(self.boxes, self.image_of_box, **self.settings, coordinates=coordinates)
        return self._terms[coordinates]

    def forward(self, tokens: torch.Tensor | None = None, coordinates: type = np.float64) -> torch.Tensor:
        """What the op must return for these tokens (default: its own), float64 [R, P, Q, C]."""
        given = (self.tokens if tokens is None else tokens).double()[:, self.prefix :].numpy()
        rows, cells, weights = self.terms(coordinates)
        found = add_up(given, rows, cells, weights, len(self.boxes) * self.bins[0] * self.bins[1])
        return torch.from_numpy(found).view(len(self.boxes), *self.bins, self.channels)

    def backward(self, grad: torch.Tensor, coordinates: type = np.float64) -> torch.Tensor:
        """What the gradient of the tokens must be, float64 [B, n + H * W, C]."""
        rows, cells, weights = self.terms(coordinates)
        found = add_up(grad.double().numpy(), cells, rows, weights, self.batch * self.grid[0] * self.grid[1])
        out = torch.zeros(self.tokens.shape, dtype=torch.float64)
        out[:, self.prefix :] = torch.from_numpy(found).view(self.batch, -1, self.channels)
        return out


KINDS = ("inside", "inside", "spilling", "outside", "whole", "inverted", "zero", "integer", "tiny", "large", "bad")


def random_box(rng: random.Random, width: float, height: float, kind: str) -> list[float]:
    """xyxy in input units, for an image of width x height of those units."""
    x, y = sorted(rng.uniform(0, width) for _ in range(2)), sorted(rng.uniform(0, height) for _ in range(2))
    if kind == "spilling":
        x, y = (sorted(rng.uniform(-0.5, 1.5) * side for _ in range(2)) for side in (width, height))
    elif kind == "outside":
        x, y = [v + 2.5 * width for v in x], [v - 3 * height for v in y]
    elif kind == "whole":
        x, y = [0.0, width], [0.0, height]
    elif kind == "inverted":
        x = x[::-1]
        y = y[::-1] if rng.random() < 0.5 else y
    elif kind == "zero":
        x = [x[0], x[0]]
        y = [y[0], y[0]] if rng.random() < 0.5 else y
    elif kind == "integer":
        x, y = [float(round(v)) for v in x], [float(round(v)) for v in y]
    elif kind == "tiny":
        x, y = [x[0], x[0] + 1e-3], [y[0], y[0] + 1e-3]
    elif kind == "large":
        x, y = [-3 * width, 2 * width + x[0]], [-2 * height - y[0], 3 * height]
    box = [x[0], y[0], x[1], y[1]]
    if kind == "bad":
        box[rng.randrange(4)] = rng.choice([NAN, INF, -INF])
    return box


def random_problem(
    seed: int, most_boxes: int = 4, most_cells: int = 7, most_bins: int = 3, hot_image: bool = False
) -> Problem:
    """A problem that is a pure function of its arguments; hot_image gives one image of several all the boxes."""
    rng = random.Random(seed)
    grid = (rng.randint(1, most_cells), rng.randint(1, most_cells))
    batch = rng.randint(2, 4) if hot_image else rng.randint(1, 3)
    # 1/14 cannot be represented, 1 and 1/4 can: both kinds of patch are in use.
    scale = rng.choice([1.0, 0.25, 1 / 14])
    count = rng.randint(1, most_boxes)
    boxes = [random_box(rng, grid[1] / scale, grid[0] / scale, rng.choice(KINDS)) for _ in range(count)]
    image = [rng.randrange(batch)] * count if hot_image else sorted(rng.randrange(batch) for _ in range(count))
    return Problem(
        grid=grid,
        bins=(rng.randint(1, most_bins), rng.randint(1, most_bins)),
        scale=scale,
        sampling=rng.choice([-1, 0, 1, 2, 3]),
        aligned=rng.random() < 0.5,
        batch=batch,
        channels=rng.randint(1, 3),
        prefix=rng.randint(0, 2),
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        image_of_box=np.array(image, dtype=np.int64),
        seed=seed,
    )


def errors(
    backend: Any, problem: Problem, dtype: torch.dtype, mean: bool = False, layout: Any = None
) -> tuple[float, float]:
    """Largest differences to the loop, forward and backward, of a module with plan, forward and backward.

    layout: a function that moves the tokens to other strides or another device. Neither boxes nor tokens are rounded
    between the two sides: the loop gets what the backend gets.
    """
    real = np.float64 if dtype == torch.float64 else np.float32
    tokens = problem.tokens.to(dtype)
    given = layout(tokens) if layout else tokens
    boxes = torch.from_numpy(problem.boxes).to(given.device, torch.float64 if real is np.float64 else torch.float32)
    tables = backend.plan(boxes, problem.grid, problem.bins, problem.scale, problem.sampling, problem.aligned, mean)
    got = backend.forward([given], *tables, problem.offsets, problem.grid, problem.prefix)
    generator = torch.Generator().manual_seed(problem.seed)
    grad = torch.randn(got.shape, generator=generator, dtype=torch.float64).to(dtype)
    want, spread = problem.forward(tokens, real), grad.double()
    if mean:
        want = want.mean((1, 2), keepdim=True)
        spread = (spread / (problem.bins[0] * problem.bins[1])).expand(-1, *problem.bins, -1)
    back = backend.backward(
        grad.to(given.device), *tables, problem.offsets, problem.grid, problem.prefix, problem.batch, 1
    )
    # The maximum of nothing is no error; NaN, which compares false with everything, counts as one.
    worst = [
        (found.cpu().double() - expected).abs().nan_to_num(nan=INF).amax().item() if expected.numel() else 0.0
        for found, expected in ((got, want), (back, problem.backward(spread, real)))
    ]
    return worst[0], worst[1]
