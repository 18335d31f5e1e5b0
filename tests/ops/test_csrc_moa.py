"""Routing primitives of csrc/, C++ and CUDA C++, against a stable sort and plain indexing.

Ties, NaN and infinite logits, every expert selected, experts without tokens, no tokens, several tiles of the sort. A
negative control shows that ties occur and that another order among them would be seen.
"""

from __future__ import annotations

import pytest
import torch

from tests.ops.csrc_engines import ENGINES, engine

SHAPES = [(1, 1, 1), (50, 6, 2), (300, 16, 4), (0, 4, 2), (70, 33, 33), (700, 3, 1), (900, 70, 2)]


@pytest.fixture(params=ENGINES)
def using(request: pytest.FixtureRequest):
    return engine(request.param)


def tied_logits(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Small integers, so that most rows hold ties; -0 and 0 are equal too."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator).round()
    return torch.where(torch.rand(tokens, experts, generator=generator) < 0.3, logits * -0.0, logits)


def selected(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Experts [T, k] by a stable descending sort."""
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_route(using, shape: tuple[int, int, int], renormalise: bool) -> None:
    tokens, count, k = shape
    logits = tied_logits(tokens, count)
    weights, experts = using.route(logits, k, renormalise)
    want = selected(logits, k)
    assert experts.dtype == torch.int32 and torch.equal(experts.long(), want)
    share = logits.softmax(-1).gather(1, want)
    share = share / share.sum(-1, keepdim=True) if renormalise else share
    assert torch.allclose(weights, share, atol=1e-6)


def test_ties_are_frequent_and_broken_by_the_lowest_index(using) -> None:
    logits = tied_logits(200, 6)
    experts = using.route(logits, 2, True)[1].long()
    last_wins = 5 - selected(logits.flip(1), 2)
    assert (experts != last_wins).any(1).float().mean() > 0.3, "the comparison would see another order"
    assert torch.equal(using.route(torch.zeros(1, 6), 2, True)[1], torch.tensor([[0, 1]], dtype=torch.int32))


def test_special_logits(using) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, inf, 1.0], [-inf, -inf, 0.0], [nan, 2.0, nan], [-inf, -inf, -inf]])
    weights, experts = using.route(logits, 2, True)
    assert experts.tolist() == [[1, 2], [2, 0], [0, 2], [0, 1]], "NaN sorts first, as in torch"
    assert weights[1].tolist() == [1.0, 0.0] and weights[2].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_sort_is_stable(using, shape: tuple[int, int, int]) -> None:
    tokens, count, k = shape
    experts = selected(tied_logits(tokens, count), k).int()
    order, offsets = using.sort_by_expert(experts, count)
    assert torch.equal(order.long(), torch.sort(experts.flatten(), stable=True).indices)
    want = torch.bincount(experts.flatten(), minlength=count).cumsum(0)
    assert offsets[0] == 0 and torch.equal(offsets[1:].long(), want)


def test_one_expert_gets_everything(using) -> None:
    experts = torch.full((1100, 1), 4, dtype=torch.int32)
    order, offsets = using.sort_by_expert(experts, 7)
    assert torch.equal(order, torch.arange(1100, dtype=torch.int32))
    assert offsets.tolist() == [0, 0, 0, 0, 0, 1100, 1100, 1100]


@pytest.mark.parametrize("channels", [1, 37, 64])
@pytest.mark.parametrize("shape", SHAPES[:5])
def test_gather_and_combine(using, shape: tuple[int, int, int], channels: int) -> None:
    tokens, count, k = shape
    generator = torch.Generator().manual_seed(1)
    weights, experts = using.route(tied_logits(tokens, count), k, False)
    order, _ = using.sort_by_expert(experts, count)
    x = torch.randn(tokens, channels, generator=generator)
    rows = using.gather(x, order, k)
    assert torch.equal(rows, x[order.long() // k])
    y = torch.randn(tokens * k, channels, generator=generator)
    by_slot = torch.empty_like(y)
    by_slot[order.long()] = y
    by_slot = by_slot.view(tokens, k, channels)
    want = torch.zeros(tokens, channels)
    for slot in range(k):
        want = want + weights[:, slot, None] * by_slot[:, slot]
    assert torch.allclose(using.combine(y, order, weights), want, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_combine_rounds_once(dtype: torch.dtype) -> None:
    using = engine("csrc")
    weights, experts = using.route(tied_logits(60, 6), 3, True)
    order, _ = using.sort_by_expert(experts, 6)
    y = torch.randn(180, 70, generator=torch.Generator().manual_seed(2)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    got, want = using.combine(y, order, weights), using.combine(y.to(wide), order, weights)
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))
    assert torch.equal(using.gather(y, order, 1), y[order.long()])


def test_wrong_arguments_are_refused() -> None:
    using = engine("csrc")
    with pytest.raises(RuntimeError, match="1 <= k <= 3 experts, got k=4"):
        using.route(torch.zeros(2, 3), 4, True)
    with pytest.raises(RuntimeError, match=r"expert 3 of slot 1 is outside \[0, 3\)"):
        using.sort_by_expert(torch.tensor([[0, 3]], dtype=torch.int32), 3)
    with pytest.raises(RuntimeError, match="order names slot 9 of 4"):
        using.gather(torch.zeros(2, 3), torch.tensor([0, 1, 9, 2], dtype=torch.int32), 2)
    with pytest.raises(RuntimeError, match="order has 4 in dimension 0, expected 2"):
        using.gather(torch.zeros(2, 3), torch.arange(4, dtype=torch.int32), 1)
