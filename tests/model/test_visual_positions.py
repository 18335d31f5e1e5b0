"""The code of row and column on the visual tokens of a grid.

In: a grid, small models with a projector and with both of LION's branches. Out: the code by its formula, and on which
tokens it lies. Decision: what it is good for is no test's business; LOG.md has experiments.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eventlens_ds.config.load import load
from eventlens_ds.errors import UserError
from eventlens_ds.model import initial
from eventlens_ds.model.projector import grid_code
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.runtime.build_model import describe


def test_the_code_is_its_formula_and_tells_every_place() -> None:
    side, width = 4, 24
    code = grid_code(side, width, torch.device("cpu"))
    for place in range(side * side):
        row, column = divmod(place, side)
        for i in range(width // 4):
            rate = math.pi / 2 * (2 * side) ** (-i / (width // 4))
            found = code[place, i :: width // 4].tolist()
            wanted = [math.sin(column * rate), math.cos(column * rate), math.sin(row * rate), math.cos(row * rate)]
            assert found == pytest.approx(wanted, abs=1e-5)
    apart = torch.cdist(code, code) + torch.eye(side * side) * 9
    assert apart.min() > 0.5


def model(recipe: str, amplitude: float) -> RegionVLM:
    config = load(recipe)
    config = replace(config, model=replace(config.model, visual_positions=amplitude))
    architecture, _, _ = describe(config)
    return initial.new_model(architecture, dtype=torch.float32, seed=0).eval()


def normed(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens - tokens.mean(2, keepdim=True)) / (tokens.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()


def tokens(made: RegionVLM, images: int = 2) -> torch.Tensor:
    """Visual tokens [images, P', D] of noise."""
    size = made.config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))[:images]
    words = torch.ones(images, 3, dtype=torch.int64)
    batch: Any = SimpleNamespace(instruction_ids=words, instruction_mask=words.bool())
    with torch.no_grad():
        states = made.encode_images(pixels, 1)
        aggregated = made.aggregator(states) if hasattr(made, "aggregator") else None
        return made.visual_tokens(states, aggregated, batch)


@pytest.mark.parametrize(("recipe", "before"), [("tiny_lion_0a", 0), ("tiny_lion_2", 1), ("tiny_lion_3", 9)])
def test_it_lies_on_the_grid_and_on_nothing_before_it(recipe: str, before: int) -> None:
    """before: queries of the Q-Former and the class token."""
    plain, placed = tokens(model(recipe, 0.0)), tokens(model(recipe, 1.5))
    side = math.isqrt(plain.shape[1] - before)
    assert side * side == plain.shape[1] - before
    assert torch.equal(plain[:, :before], placed[:, :before])
    grid = plain[:, before:]
    whole = grid.mean(1, keepdim=True)
    code = 1.5 * grid_code(side, plain.shape[2], plain.device)
    torch.testing.assert_close(placed[:, before:], normed(grid - whole) + normed(whole) + code, atol=1e-3, rtol=0)
    alone = tokens(model(recipe, 1.5), images=1)
    torch.testing.assert_close(alone, placed[:1], atol=1e-5, rtol=0)


def test_queries_alone_have_no_places() -> None:
    with pytest.raises(UserError, match=r"model.visual_positions: 1.0: queries of the Q-Former lie on no grid"):
        load("tiny_lion_1", ["--model.visual_positions=1"])
