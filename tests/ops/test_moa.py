"""The mixture of adapters on a CPU against a literal double loop over tokens and adapters.

Every kind of gate on every path of the plain torch and compiled backends, gradients in float64, ties of the router,
mixed rows against pure rows (P7), adapters that overflow, segments, and the choice of a path. Negative controls show
that the comparisons see a wrong task or a tie broken otherwise.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from eventlens_ds.errors import UserError
from eventlens_ds.ops import extension
from eventlens_ds.ops.moa import (
    AdapterStack,
    Gates,
    SoftMixture,
    TaskOneHot,
    TaskVectors,
    TopKRouter,
    load_balance_loss,
    moa,
    paths,
    reference,
)
from tests.ops import moa_loop
from tests.ops.moa_loop import KINDS, draw, run, worst

TOKENS, ADAPTERS, RANK, WIDTH = 9, 4, 3, 5
SIZES = ((9, 4, 3, 5), (1, 4, 5, 37), (23, 1, 5, 7), (0, 3, 2, 5), (40, 6, 2, 3))
PATHS = ("dense", "sparse", "segments")


def make_stack(dtype: torch.dtype = torch.float64) -> AdapterStack:
    return moa_loop.make_stack(ADAPTERS, RANK, WIDTH, dtype)


def make_gates(kind: str, dtype: torch.dtype = torch.float64) -> Gates:
    return moa_loop.make_gates(kind, TOKENS, ADAPTERS, WIDTH, dtype)


def make_segments(tokens: int) -> torch.Tensor:
    """Five segments, of which the second and the last but one are empty."""
    return torch.tensor([0, tokens // 3, tokens // 3, tokens // 2, tokens // 2, tokens])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_double_loop(kind: str, sizes: tuple[int, int, int, int], path: str) -> None:
    """Output and every gradient, 1e-12 in float64 and 1e-5 in float32; T = 0 and 1, E = 1, k = E, odd sizes."""
    segments = make_segments(sizes[0]) if path == "segments" else None
    expected = run(kind, sizes, segments=segments, spelled_out=True)
    got = run(kind, sizes, segments=segments, backend="reference", path=path)
    assert worst(got, expected) < 1e-12
    single = run(kind, sizes, torch.float32, segments, backend="reference", path=path)
    assert worst(single, run(kind, sizes, torch.float32, segments, spelled_out=True)) < 1e-5


@pytest.mark.skipif(bool(extension.obstacle("cpu")), reason=extension.obstacle("cpu") or "built")
@pytest.mark.parametrize("path", ["sparse", "segments"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_routing_equals_the_double_loop(kind: str, sizes: tuple[int, int, int, int], path: str) -> None:
    segments = make_segments(sizes[0]) if path == "segments" else None
    got = run(kind, sizes, torch.float32, segments, backend="csrc", path=path)
    assert worst(got, run(kind, sizes, torch.float32, segments, spelled_out=True)) < 1e-5


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("activation", moa_loop.ACTIVATIONS)
def test_activations(activation: str, path: str) -> None:
    for kind in ("one_hot", "top2"):
        expected = run(kind, SIZES[0], activation=activation, spelled_out=True)
        assert worst(run(kind, SIZES[0], activation=activation, path=path), expected) < 1e-12


@pytest.mark.parametrize("columns", [7, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_in_blocks_of_adapters(kind: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference runs adapters in blocks when they do not fit one product."""
    expected = run(kind, SIZES[0], spelled_out=True)
    monkeypatch.setattr(reference, "DENSE_COLUMNS", columns)
    assert worst(run(kind, SIZES[0], path="dense"), expected) < 1e-12


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, path: str) -> None:
    """Finite differences, independent of the loop's autograd; without ties, where routing is not differentiable."""
    gates = make_gates(kind)
    if not isinstance(gates, TaskVectors | TaskOneHot):
        gates = replace(gates, logits=draw(TOKENS, ADAPTERS, seed=11))
    inputs = moa_loop.leaves_of(draw(TOKENS, WIDTH, seed=20), draw(TOKENS, WIDTH, seed=21), make_stack(), gates)

    def call(x: torch.Tensor, residual: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        routed: Gates = gates
        if isinstance(gates, TaskVectors):
            routed = replace(gates, vectors=rest[5])
        elif not isinstance(gates, TaskOneHot):
            routed = replace(gates, logits=rest[5])
        return moa(x, residual, AdapterStack(*rest[:5]), routed, activation="silu", path=path)

    fast = path == "sparse"
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs], fast_mode=fast)


@pytest.mark.P7
@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_row_equals_pure_rows(kind: str, path: str) -> None:
    """A row of several tasks gives each token what a row of its task alone gives it, forward and backward."""
    x, stack, gates = draw(TOKENS, WIDTH, seed=20), make_stack(), make_gates(kind)
    stack = AdapterStack(*(t.requires_grad_() for t in stack))
    whole = moa(x, x, stack, gates, path=path)
    parts, index = [], []
    for rows in (torch.arange(TOKENS)[i::3] for i in range(3)):
        if isinstance(gates, TaskVectors | TaskOneHot):
            part: Gates = replace(gates, task_ids=gates.task_ids[rows])
        else:
            part = replace(gates, logits=gates.logits[rows])
        parts.append(moa(x[rows], x[rows], stack, part, path=path))
        index.append(rows)
    pure = torch.cat(parts)[torch.cat(index).argsort()]
    assert (whole - pure).abs().max() < 1e-13
    weight = draw(TOKENS, WIDTH, seed=30)
    for a, b in zip(
        torch.autograd.grad((whole * weight).sum(), stack), torch.autograd.grad((pure * weight).sum(), stack)
    ):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.P7
def test_control_batch_level_routing_differs() -> None:
    """Routing the whole row by its first token's task, the mistake P7 forbids, is seen by the comparison."""
    x, stack = draw(TOKENS, WIDTH, seed=20), make_stack()
    gates = TaskOneHot(torch.arange(TOKENS) % ADAPTERS)
    per_batch = TaskOneHot(torch.full((TOKENS,), int(gates.task_ids[0])))
    assert (moa(x, x, stack, gates) - moa(x, x, stack, per_batch)).abs().max() > 1e-2


def test_ties_go_to_the_lowest_index() -> None:
    logits = torch.zeros(3, 6)
    logits[1, 4] = logits[1, 5] = 1.0
    logits[2, 3] = 1.0
    gates = reference.scalar_gates(TopKRouter(logits, k=2), 6)
    expected = torch.zeros(3, 6)
    expected[0, :2] = 0.5
    expected[1, 4:] = 0.5
    expected[2, 3], expected[2, 0] = torch.tensor([1.0, 0.0]).softmax(0)
    assert torch.allclose(gates, expected)
    many = reference.top_k_mask(torch.zeros(50, 64), 5)
    assert many[:, :5].all() and not many[:, 5:].any()


def test_router_runs_in_float32() -> None:
    """The softmax of bfloat16 logits is taken in float32; two experts that bfloat16 sums confuse stay apart."""
    logits = torch.tensor([[1.0, 0.9921875, -1.0]], dtype=torch.bfloat16)
    gates = reference.scalar_gates(SoftMixture(logits), 3)
    assert gates.dtype == torch.float32 and torch.equal(gates, logits.float().softmax(-1))
    assert not torch.equal(gates, logits.softmax(-1).float())


def test_renormalised_router_gives_no_gradient_to_the_rest() -> None:
    logits = draw(TOKENS, ADAPTERS, seed=11).requires_grad_()
    x, stack = draw(TOKENS, WIDTH, seed=20), make_stack()
    selected = reference.top_k_mask(logits, 2)
    (grad,) = torch.autograd.grad(moa(x, x, stack, TopKRouter(logits, 2)).pow(2).sum(), logits)
    assert not grad[~selected].any() and grad[selected].abs().min() > 0
    (leaky,) = torch.autograd.grad(moa(x, x, stack, TopKRouter(logits, 2, False)).pow(2).sum(), logits)
    assert leaky[~selected].abs().min() > 0


@pytest.mark.P5
@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_overflow_of_an_unused_adapter_is_selected_out(activation: str, path: str) -> None:
    """An adapter that is not used may be infinite: values and gradients of the others stay finite and unchanged."""
    x, stack = draw(TOKENS, WIDTH, seed=20), make_stack()
    broken = AdapterStack(*(t.clone() for t in stack))
    broken.down_bias[3] = float("inf")
    if path == "sparse":
        for weight in broken[:4]:
            weight[3] = float("inf")
    gates = TaskOneHot(torch.arange(TOKENS) % 3)
    results = []
    for weights in (stack, broken):
        leaves = [t.detach().requires_grad_() for t in weights]
        out = moa(x, x, AdapterStack(*leaves), gates, activation=activation, path=path)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for clean, other in zip(*results):
        assert torch.equal(clean, other)


@pytest.mark.P7
def test_infinite_padding_reaches_nobody() -> None:
    """A token without an adapter may be infinite on path sparse; on path dense it spoils gradients, as documented."""
    x, leaves = draw(TOKENS, WIDTH, seed=20), [t.requires_grad_() for t in make_stack()]
    x[4] = float("inf")
    gates = TaskOneHot(torch.where(torch.arange(TOKENS) == 4, -1, 1))
    finite = {}
    for path in ("sparse", "dense"):
        out = moa(x, torch.zeros_like(x), AdapterStack(*leaves), gates, path=path)
        gradients = torch.autograd.grad(out.sum(), leaves)
        finite[path] = bool(out.isfinite().all() and all(g.isfinite().all() for g in gradients))
    assert finite == {"sparse": True, "dense": False}


@pytest.mark.P5
@pytest.mark.parametrize("kind", ["one_hot", "top1", "vectors"])
def test_every_parameter_takes_part(kind: str) -> None:
    """Also an adapter that no token uses gets a gradient (of zeros), and a row without tokens still has a graph."""
    leaves = [t.requires_grad_() for t in make_stack()]
    for tokens in (2, 0):
        x = draw(tokens, WIDTH, seed=20)
        ids = torch.zeros(tokens, dtype=torch.int64)
        gates: Gates = {
            "one_hot": TaskOneHot(ids),
            "top1": TopKRouter(torch.zeros(tokens, ADAPTERS), 1),
            "vectors": TaskVectors(draw(3, ADAPTERS, WIDTH), ids),
        }[kind]
        grads = torch.autograd.grad(moa(x, x, AdapterStack(*leaves), gates).sum(), leaves)
        assert all(torch.isfinite(g).all() for g in grads)
        if kind == "one_hot":
            assert not any(g[1:].any() for g in grads)


def test_shapes_and_dtypes() -> None:
    stack = make_stack(torch.float32)
    x = draw(3, 3, WIDTH, seed=20, dtype=torch.float32)
    gates = make_gates("top2", torch.float32)
    flat = moa(x.view(-1, WIDTH), x.view(-1, WIDTH), stack, gates)
    assert torch.equal(moa(x, x, stack, gates).view(-1, WIDTH), flat)
    mixed = moa(x.bfloat16(), x, stack, gates)
    assert mixed.dtype == torch.float32 and (mixed - moa(x, x, stack, gates)).abs().max() < 0.1
    low = moa(x.bfloat16(), x.bfloat16(), AdapterStack(*(t.bfloat16() for t in stack)), gates)
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str) -> None:
    """bfloat16 autocast changes precision, not the dtype of the residual stream."""
    x, stack, gates = draw(TOKENS, WIDTH, seed=20, dtype=torch.float32), make_stack(torch.float32), make_gates(kind)
    exact = moa(x, x, stack, gates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = moa(x, x, stack, gates)
    assert got.dtype == torch.float32 and (got - exact).abs().max() < 0.05 * exact.abs().max()


def test_load_balance_loss() -> None:
    even = torch.eye(4).repeat(3, 1) * 50.0
    assert load_balance_loss(even, 1).item() == pytest.approx(1.0, abs=1e-5)
    one = torch.zeros(12, 4)
    one[:, 2] = 50.0
    assert load_balance_loss(one, 1).item() == pytest.approx(4.0, abs=1e-4)
    both = torch.cat([even, one])
    mask = torch.arange(24) < 12
    assert load_balance_loss(both, 1, mask).item() == pytest.approx(1.0, abs=1e-5)
    assert load_balance_loss(both, 1).item() > 1.1
    logits = draw(6, 4).requires_grad_()
    none = load_balance_loss(logits, 2, torch.zeros(6, dtype=torch.bool))
    assert none.item() == 0.0 and not torch.autograd.grad(none, logits)[0].any()
    assert torch.autograd.gradcheck(lambda t: load_balance_loss(t, 2), (logits,))


def test_clear_errors() -> None:
    x, stack = draw(TOKENS, WIDTH), make_stack()
    one_hot = TaskOneHot(torch.zeros(TOKENS, dtype=torch.int64))
    with pytest.raises(UserError, match="task 4 has no adapter, there are 4"):
        moa(x, x, stack, TaskOneHot(torch.full((TOKENS,), 4)))
    with pytest.raises(UserError, match="k=5"):
        moa(x, x, stack, TopKRouter(draw(TOKENS, ADAPTERS), 5))
    with pytest.raises(UserError, match="up is"):
        moa(x, x, stack._replace(up=stack.down), one_hot)
    with pytest.raises(UserError, match="residual is"):
        moa(x, x[:2], stack, one_hot)
    with pytest.raises(UserError, match="tanh"):
        moa(x, x, stack, one_hot, activation="tanh")
    with pytest.raises(UserError, match="9 tokens"):
        moa(x, x, stack, TaskOneHot(torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(UserError, match="expected \\[9, 4\\]"):
        moa(x, x, stack, SoftMixture(draw(TOKENS, 3)))
    with pytest.raises(UserError, match="vectors are"):
        moa(x, x, stack, TaskVectors(draw(2, 3, WIDTH), one_hot.task_ids))
    with pytest.raises(UserError, match="'cutlass' on cpu: no such backend"):
        moa(x, x, stack, one_hot, backend="cutlass")
    with pytest.raises(UserError, match="paths: dense, sparse, segments"):
        moa(x, x, stack, one_hot, path="diagonal")
    with pytest.raises(UserError, match="needs segments"):
        moa(x, x, stack, one_hot, path="segments")
    with pytest.raises(UserError, match="residual is on meta"):
        moa(x, x.to("meta"), stack, one_hot)
    with pytest.raises(UserError, match="the gate is on meta but x is on cpu"):
        moa(x, x, stack, TaskOneHot(one_hot.task_ids.to("meta")))
    with pytest.raises(UserError, match="x is torch.int64"):
        moa(x.long(), x, stack, one_hot)
    with pytest.raises(UserError, match="down is torch.int64"):
        moa(x, x, stack._replace(down=stack.down.long()), one_hot)


def test_segments_that_do_not_fit() -> None:
    x, stack = draw(TOKENS, WIDTH), make_stack()
    two = TaskOneHot(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="from 0 to 8 do not tile 9 tokens"):
        moa(x, x, stack, two, torch.tensor([0, 4, 8]))
    with pytest.raises(UserError, match="do not tile 9 tokens in order"):
        moa(x, x, stack, TaskOneHot(torch.zeros(3, dtype=torch.int64)), torch.tensor([0, 6, 4, 9]))
    with pytest.raises(UserError, match="\\[2\\] task ids for 3 segments"):
        moa(x, x, stack, two, torch.tensor([0, 4, 8, 9]))


def test_limits_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name, a size over a limit is refused with both numbers before any launch."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sizes = paths.Sizes("cpu", "float32", 4, 64, 2, None)
    for changed, path, message in (
        ({"adapters": 64, "rank": 65}, "dense", "4160 on path dense, which takes up to 4096"),
        ({"adapters": 65}, "sparse", "65 adapters, kernels take up to 64"),
        ({"segments": 600}, "segments", "1200 groups of rows, path segments takes up to 1024"),
        ({"adapters": 40, "used": 30}, "sparse", "1200 groups of rows, path sparse takes up to 1024"),
        ({"dtype": "float64"}, None, "float64, kernels take float32"),
    ):
        with pytest.raises(UserError, match=message):
            paths.choose(sizes._replace(**changed), "triton", path)
    with pytest.raises(UserError, match="csrc has no path dense|csrc on cpu|'csrc' on cpu"):
        paths.choose(sizes, "csrc", "dense")


def test_choice_of_a_path(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What suits the sizes, with the reason in the log once; a GPU's choices are made here without one."""
    monkeypatch.setattr(paths, "choose_backend", lambda op, device, name=None: name or "triton")
    paths._choose.cache_clear()
    small = paths.Sizes("cuda", "bfloat16", 4, 64, 2, None)
    expected = (
        (small, "dense", "E * r = 256 <= 512"),
        (small._replace(adapters=16), "sparse", "E * r = 1024 > 512"),
        (small._replace(adapters=16, used=16), "dense", "every token uses all 16 adapters"),
        (small._replace(used=1, segments=9), "segments", "9 segments with one adapter each"),
        (small._replace(adapters=16, segments=9), "segments", "E * r = 1024 > 512"),
        (small._replace(adapters=16, segments=900), "sparse", "E * r = 1024 > 512"),
    )
    with caplog.at_level(logging.INFO, logger=paths.__name__):
        for sizes, path, _ in expected * 2:
            assert paths.choose(sizes, None, None) == ("triton", path)
    assert [r.getMessage() for r in caplog.records] == [
        f"moa takes path {path} on cuda with triton: {reason}" for _, path, reason in expected
    ]
    assert paths.choose(small._replace(dtype="float64"), None, None) == ("reference", "dense")
    monkeypatch.setattr(paths, "choose_backend", lambda op, device, name=None: name or "reference")
    host = small._replace(device="cpu", dtype="float32")
    assert paths.choose(host, None, None) == ("reference", "dense")
    assert paths.choose(host._replace(used=1), None, None) == ("reference", "sparse")
    assert paths.choose(host._replace(used=1, segments=3), None, None) == ("reference", "segments")
    paths._choose.cache_clear()
