"""The mixture's Triton kernels under the interpreter, against the double loop, and mutants that have to fail.

Every kind of gate on every path in float32, a few in float16; sizes that fill no tile; outputs that start as NaN and
indices that start out of range; adapters and tokens of infinity that must not be read. Each mutant is the source of a
kernel module with one mistake in it; the comparison that the real kernels pass must see it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from eventlens_ds.ops.moa import AdapterStack, TaskOneHot, grouped, kernel, kernel_cases, kernel_config, moa
from tests.ops import moa_loop
from tests.ops.moa_loop import KINDS, draw, run, worst

SIZES = {"odd": (37, 3, 5, 37), "one token": (1, 4, 5, 37), "one adapter": (5, 1, 20, 7), "none": (0, 2, 5, 37)}
TILES = (70, 2, 5, 20)
"""More rows of an adapter than a tile holds."""
PATHS = ("dense", "sparse", "segments")
OUT_OF_RANGE = 2**30


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN and indices out of range, so that what a kernel forgets to write is seen."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else OUT_OF_RANGE)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


def segments_of(path: str, tokens: int) -> torch.Tensor | None:
    return torch.tensor([0, tokens // 2, tokens // 2, tokens]) if path == "segments" else None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_equal_the_double_loop(kind: str, path: str) -> None:
    for sizes in (SIZES["odd"], SIZES["one token"]):
        segments = segments_of(path, sizes[0])
        got = run(kind, sizes, torch.float32, segments, backend="triton", path=path)
        assert worst(got, run(kind, sizes, torch.float32, segments, spelled_out=True)) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sizes", ["one adapter", "none"])
@pytest.mark.parametrize("kind", ["one_hot", "vectors", "top_all"])
def test_kernels_at_the_edges(kind: str, sizes: str, path: str) -> None:
    segments = segments_of(path, SIZES[sizes][0])
    got = run(kind, SIZES[sizes], torch.float32, segments, backend="triton", path=path)
    assert worst(got, run(kind, SIZES[sizes], torch.float32, segments, spelled_out=True)) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
def test_activations(activation: str, path: str) -> None:
    segments = segments_of(path, SIZES["odd"][0])
    got = run("top2", SIZES["odd"], torch.float32, segments, activation, backend="triton", path=path)
    assert worst(got, run("top2", SIZES["odd"], torch.float32, segments, activation, spelled_out=True)) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_float16(path: str) -> None:
    segments = segments_of(path, SIZES["odd"][0])
    for kind in ("one_hot", "top2"):
        got = run(kind, SIZES["odd"], torch.float16, segments, backend="triton", path=path)
        assert worst(got, run(kind, SIZES["odd"], torch.float16, segments, spelled_out=True)) < 5e-3


@pytest.mark.parametrize("path", PATHS)
def test_float32_masters_and_float16_features(path: str) -> None:
    """As under autocast: gradients come back in the type of the masters, the residual keeps its own."""
    x, residual = draw(9, 8, dtype=torch.float16), draw(9, 8, seed=1, dtype=torch.float32)
    leaves = [w.requires_grad_() for w in moa_loop.make_stack(3, 4, 8, torch.float32)]
    ids = torch.tensor([0, 2, -1])
    segments = torch.tensor([0, 4, 5, 9])
    gates = TaskOneHot(ids)
    results = []
    for backend in ("reference", "triton"):
        out = moa(x, residual, AdapterStack(*leaves), gates, segments, backend=backend, path=path)
        assert out.dtype == torch.float32
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert all(g.dtype == torch.float32 for g in gradients)
        results.append([out.detach(), *gradients])
    assert worst(results[1], results[0]) < 5e-3


@pytest.mark.P7
@pytest.mark.parametrize("path", ["sparse", "segments"])
def test_infinity_in_an_unused_adapter_or_token_is_not_read(path: str) -> None:
    x, stack = draw(9, 8, dtype=torch.float32), moa_loop.make_stack(3, 4, 8, torch.float32)
    for weight in stack:
        weight[1] = float("inf")
    x[4] = float("inf")
    leaves = [w.requires_grad_() for w in stack]
    gates, segments = TaskOneHot(torch.tensor([0, -1, 2])), torch.tensor([0, 4, 5, 9])
    out = moa(x, torch.zeros_like(x), AdapterStack(*leaves), gates, segments, backend="triton", path=path)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.isfinite().all() and not out[4].any()
    assert all(g.isfinite().all() and not g[1].any() for g in gradients)


@pytest.mark.parametrize("path", PATHS)
def test_bitwise_repeatable(path: str) -> None:
    segments = segments_of(path, SIZES["odd"][0])
    first, second = (run("top2", SIZES["odd"], torch.float32, segments, backend="triton", path=path) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("renormalise", [True, False])
def test_route_equals_the_torch_form(renormalise: bool) -> None:
    for tokens, adapters, k in ((70, 5, 2), (3, 64, 64), (9, 1, 1), (0, 4, 2)):
        logits = draw(tokens, adapters, dtype=torch.float32).mul(2).round()
        expected, got = grouped.route(logits, k, renormalise), kernel.route(logits, k, renormalise)
        assert torch.equal(got[1], expected[1]) and torch.allclose(got[0], expected[0], atol=1e-6)
        grad = draw(tokens, k, seed=1, dtype=torch.float32)
        arguments = (grad, logits, *expected, renormalise)
        assert torch.allclose(kernel.route_backward(*arguments), grouped.route_backward(*arguments), atol=1e-6)


def test_logits_of_nan_stay_inside() -> None:
    """They have no order; the experts are still adapters that exist, and the weights say what happened."""
    logits = torch.tensor([[float("nan")] * 3, [0.0, float("nan"), 1.0]])
    weights, experts = kernel.route(logits, 2, True)
    assert ((experts >= 0) & (experts < 3)).all() and weights.isnan().any(1).all()


def test_sort_is_stable() -> None:
    for count, k, keys in ((700, 1, 3), (33, 4, 9), (5, 1, 600), (0, 2, 4), (64, 1, 1)):
        values = torch.randint(keys, (count, k), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        expected, got = grouped.sort_rows(values, keys), kernel.sort_rows(values, keys)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_partial_sums_over_tokens() -> None:
    """Weight gradients are split over the tokens when there are few tiles and many rows."""
    config = kernel_config.over_rows(16, 4, 80)
    assert kernel_config.parts_of(16, 32, 1, 128, config) > 1
    sizes = (128, 1, 16, 32)
    got = run("one_hot", sizes, torch.float32, backend="triton", path="sparse")
    assert worst(got, run("one_hot", sizes, torch.float32, spelled_out=True)) < 1e-5


def test_every_launch_is_a_compile_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the choosers return over all ranks is in the list of the compile gate."""
    listed = {
        (
            case.fn.__name__,
            case.constexprs["BM"],
            case.constexprs["BN"],
            case.constexprs["BK"],
            case.num_warps,
            case.archs,
        )
        for case in kernel_cases.compile_cases()
        if "BN" in case.constexprs
    }
    choosers = {
        "down_kernel": kernel_config.to_rank,
        "hidden_backward_kernel": kernel_config.to_rank,
        "up_kernel": kernel_config.from_rank,
        "sum_rows_kernel": kernel_config.over_rows,
    }
    for name, chooser in choosers.items():
        for rank in range(1, 600):
            for size in (2, 4):
                for arch in (80, 90):
                    tile = chooser(rank, size, arch)
                    assert (name, tile.BM, tile.BN, tile.BK, tile.num_warps, (arch,)) in listed
    adapters = {case.constexprs["E2"] for case in kernel_cases.compile_cases() if case.name.startswith("gate")}
    assert {kernel_config.gate_tile(columns)["E2"] for columns in range(1, 81)} == adapters


MUTANTS: dict[str, tuple[str, str, str, int, str, str]] = {
    # name: (module, text, replacement, which occurrence, kind, path)
    "last adapter skipped": ("sparse", "(groups < last)", "(groups < last - 2)", 0, "one_hot", "sparse"),
    "down bias dropped": ("sparse", "acc += tl.load(bias_ptr", "acc += 0.0 * tl.load(bias_ptr", 0, "one_hot", "sparse"),
    "up bias dropped": ("sparse", "acc += gate[:, None]", "acc += 0.0 * gate[:, None]", 0, "one_hot", "sparse"),
    "residual dropped": ("sparse", "if BASE:", "if BASE and False:", 0, "one_hot", "sparse"),
    "gate twice, up": ("sparse", "ACT) * gate[:, None])", "ACT) * gate[:, None] * gate[:, None])", 0, "top2", "sparse"),
    "gate twice, up weights": (
        "sparse",
        "ACT) * gate[:, None])",
        "ACT) * gate[:, None] * gate[:, None])",
        1,
        "top2",
        "sparse",
    ),
    "last row of a tile, down": (
        "sparse",
        "rows < end",
        "rows < tl.minimum(end, first + BM - 1)",
        0,
        "one_hot",
        "sparse",
    ),
    "last row of a tile, up": (
        "sparse",
        "rows < end",
        "rows < tl.minimum(end, first + BM - 1)",
        1,
        "one_hot",
        "sparse",
    ),
    "last row of a tile, back": ("sparse", "rows < end", "rows < tl.minimum(end, first + BM - 1)", 2, "top2", "sparse"),
    "last row of a chunk": ("sparse", "rows < end", "rows < tl.minimum(end, first + BK - 1)", 3, "one_hot", "sparse"),
    "up bias without gradient": ("sparse", "along_bias += tl.sum", "along_bias += 0.0 * tl.sum", 0, "top2", "sparse"),
    "one part only": ("sparse", "begin + part * BK, end", "begin + BK * 2, end", 0, "one_hot", "segments"),
    "ties to the highest": ("dense", "(e < columns)", "(e > columns)", 0, "top1", "dense"),
    "last adapter skipped, dense": ("dense", "for e in range(0, E):", "for e in range(0, E - 1):", 1, "soft", "dense"),
    "last adapter skipped, back": ("dense", "for e in range(0, E):", "for e in range(0, E - 1):", 2, "soft", "dense"),
    "gate twice, dense": ("dense", "activate(h, ACT) * scaled", "activate(h, ACT) * scaled * gate", 0, "soft", "dense"),
    "up bias dropped, dense": ("dense", "(gates * scale).to", "(gates * 0.0).to", 0, "soft", "dense"),
    "last token of a tile, dense": (
        "dense",
        "tokens < T - begin",
        "tokens < tl.minimum(T - begin, BM - 1)",
        0,
        "one_hot",
        "dense",
    ),
    "softmax without its sum": ("dense", "(dgate - tl.sum(gates * dgate, 1)[:, None])", "dgate", 0, "soft", "dense"),
    "route without its sum": ("dense", "(dgate - inner[:, None])", "dgate", 0, "top2", "sparse"),
}


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A function that puts a module with one mistake in the place of kernel_dense or kernel_sparse."""
    loaded: list[str] = []

    def put(which: str, old: str, new: str, occurrence: int) -> ModuleType:
        original = getattr(kernel, f"kernel_{which}")
        parts = Path(original.__file__).read_text().split(old)
        assert len(parts) > occurrence + 1, f"{old!r} occurs {len(parts) - 1} times"
        text = old.join(parts[: occurrence + 1]) + new + old.join(parts[occurrence + 1 :])
        name = f"mutant_{which}"
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        loaded.append(name)
        spec.loader.exec_module(module)
        monkeypatch.setattr(kernel, f"kernel_{which}", module)
        return module

    yield put
    for name in loaded:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name: str, mutate: Any) -> None:
    which, old, new, occurrence, kind, path = MUTANTS[name]
    segments = segments_of(path, TILES[0])
    expected = run(kind, TILES, torch.float32, segments, spelled_out=True)
    mutate(which, old, new, occurrence)
    assert not worst(run(kind, TILES, torch.float32, segments, backend="triton", path=path), expected) < 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_control_without_a_mistake(path: str, mutate: Any) -> None:
    """The same sizes through the same loader pass when nothing is changed."""
    for which in ("dense", "sparse"):
        mutate(which, "@triton.jit", "@triton.jit", 0)
    segments = segments_of(path, TILES[0])
    got = run("top2", TILES, torch.float32, segments, backend="triton", path=path)
    assert worst(got, run("top2", TILES, torch.float32, segments, spelled_out=True)) < 1e-5


def test_unstable_sort_is_seen(mutate: Any) -> None:
    mutate("sparse", "tl.cumsum(mine, 0) - 1", "tl.sum(mine, 0)[None, :] - tl.cumsum(mine, 0)", 0)
    with pytest.raises(AssertionError):
        test_sort_is_stable()
