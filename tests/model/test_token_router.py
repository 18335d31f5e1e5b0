"""The per-token router: its formula, its load-balance loss, rows that do not depend on what they are packed with.

In: layers with random values, and real rows of the small world. Out: outputs, gradients and the balance, compared with
formulas written out here. Decision: all four settings of the op's gate are held to its reference in tests/ops; here is
what the model adds, the router's weight, the groups of the balance and the way the balance leaves a checkpointed layer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eventlens_ds.config.load import load
from eventlens_ds.config.run_config import AdapterConfig, ModelConfig, ObjectiveConfig
from eventlens_ds.data.records import TASKS
from eventlens_ds.errors import UserError
from eventlens_ds.model import objective
from eventlens_ds.model.adapters import TokenRouter, group_balance
from eventlens_ds.model.region_vlm import RegionVLM, group_members
from eventlens_ds.model.stages import apply_stage, part_of
from eventlens_ds.ops.moa import load_balance_loss
from tests.model.test_region_vlm import gradients, largest_relative, mixed_members
from tests.small_world import SmallRun, small_config, small_run

TOPK = AdapterConfig(router="topk", experts=3, top_k=2)


def router_run(folder: Path, adapters: AdapterConfig = TOPK) -> SmallRun:
    config = small_config(folder)
    return small_run(folder, replace(config, model=ModelConfig(adapters=adapters, attention="sdpa")))


@pytest.fixture(scope="module")
def routed(world_folder: Path) -> SmallRun:
    return router_run(world_folder)


def awake(run: SmallRun) -> RegionVLM:
    """A model whose router has an opinion; the adapters have values already."""
    model = run.model()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.adapters.named_parameters():
            if name.endswith("gate_weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def random_layer(k: int, renormalise: bool) -> TokenRouter:
    layer = TokenRouter(12, 4, 3, k, renormalise=renormalise)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return layer


def by_hand(layer: TokenRouter, x: torch.Tensor) -> torch.Tensor:
    """sum over the k best experts of p_e s_e (up relu(down x + b) + c), token by token."""
    rows = []
    for features in x:
        logits = layer.gate_weight @ features
        best = sorted(range(3), key=lambda e: -float(logits[e].detach()))[: layer.k]
        over = logits[best] if layer.renormalise else logits
        total = torch.zeros_like(features)
        for e in best:
            part = {field: getattr(layer, f"expert_{e}_{field}") for field in ("down", "down_bias", "up", "up_bias")}
            hidden = torch.relu(part["down"] @ features + part["down_bias"])
            weight = logits[e].exp() / over.exp().sum()
            total = total + weight * getattr(layer, f"expert_{e}_scale") * (part["up"] @ hidden + part["up_bias"])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.P7
@pytest.mark.parametrize(("k", "renormalise"), [(1, False), (2, True), (2, False), (3, True)])
def test_the_router_is_its_formula_forward_and_backward(k: int, renormalise: bool) -> None:
    layer = random_layer(k, renormalise)
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    residual = torch.randn(20, 12)
    ours = layer(x, residual, torch.zeros(20, dtype=torch.int64))
    theirs = residual + by_hand(layer, x)
    assert isinstance(ours, torch.Tensor) and (ours - theirs).abs().max() <= 1e-5
    inputs = [x, *layer.parameters()]
    grads = [torch.autograd.grad(out.sin().sum(), inputs, allow_unused=True) for out in (ours, theirs)]
    for one, two in zip(*grads):
        assert one is not None and (one - (torch.zeros_like(one) if two is None else two)).abs().max() <= 2e-5


@pytest.mark.parametrize("times", [1, 2])
def test_usage_shares_every_token_out_over_the_adapters_it_took(times: int) -> None:
    """Twice: a forward that activation checkpointing repeats does not count double."""
    layer = random_layer(2, True)
    x, tasks = torch.randn(30, 12), torch.arange(30) % 3
    with pytest.raises(RuntimeError, match="before watch"):
        layer.usage(torch.ones(len(TASKS)).double())
    layer.watch(True)
    for _ in range(times):
        layer(x, x, tasks)
    counted = layer.usage(torch.bincount(tasks, minlength=len(TASKS)).double())
    wanted, entropy = torch.zeros(len(TASKS), 3).double(), torch.zeros(len(TASKS)).double()
    for features, task in zip(x, tasks):
        chances = (layer.gate_weight @ features).softmax(0).detach().double()
        best = chances.topk(2)
        wanted[task, best.indices] += best.values / best.values.sum()
        entropy[task] -= (chances * chances.log()).sum()
    assert torch.allclose(counted.mass, wanted, atol=1e-5) and torch.allclose(counted.entropy, entropy, atol=1e-5)
    layer.watch(False)
    layer(x, x, tasks)
    with pytest.raises(RuntimeError, match="before watch"):
        layer.usage(torch.ones(len(TASKS)).double())


def test_the_choice_is_made_in_float32() -> None:
    layer, x = random_layer(2, True), torch.randn(50, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guarded, rounded = layer.logits(x), x @ layer.gate_weight.T
    plain = x @ layer.gate_weight.T
    assert torch.equal(guarded, plain) and not torch.equal(rounded.float(), plain)


@pytest.mark.P8
def test_the_balance_is_the_loss_of_every_group_times_its_tokens() -> None:
    logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    spans = [(0, 7), (7, 20), (20, 26)]  # four tokens of padding
    members = torch.zeros(3, 30)
    for group, (start, end) in enumerate(spans):
        members[group, start:end] = 1.0
    ours = group_balance(logits, 2, members)
    theirs = torch.stack([(end - start) * load_balance_loss(logits[start:end], 2) for start, end in spans]).sum()
    assert torch.allclose(ours, theirs)
    assert torch.allclose(*(torch.autograd.grad(total, logits)[0] for total in (ours, theirs)), atol=1e-6)
    assert 1.0 <= float(theirs) / 26 <= 1.5


def balance_of(model: RegionVLM, batch: Any) -> torch.Tensor:
    made = model(batch, with_balance=True)
    assert isinstance(made, tuple)
    return made[1]


@pytest.mark.P7
@pytest.mark.P8
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mixed_row_equals_the_pure_rows(routed: SmallRun, checkpointing: bool) -> None:
    members, model = mixed_members(routed), awake(routed).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    pure = [model(routed.batch([member]), with_balance=True) for member in members]
    logp, balance = model(routed.batch(members), with_balance=True)
    assert torch.allclose(torch.cat([one[0] for one in pure]), logp, rtol=0, atol=1e-5)
    apart = torch.stack([one[1] for one in pure]).sum()
    assert torch.allclose(apart, balance, rtol=1e-5)
    # All forwards are open; the last is the first to be recomputed.
    weights = torch.linspace(-1.0, -2.0, logp.numel())
    pure_loss = (torch.cat([one[0] for one in pure]) * weights).sum() + apart
    grads = gradients(model, pure_loss)
    assert {part_of(name) for name in grads} >= {"router", "adapters"}
    assert largest_relative(grads, gradients(model, (logp * weights).sum() + balance)) <= 2e-5


@pytest.mark.P7
def test_checkpointing_changes_no_gradient_of_the_balance(routed: SmallRun) -> None:
    batch, found = routed.batch(mixed_members(routed)), []
    for checkpointing in (False, True):
        model = awake(routed).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        found.append(gradients(model, balance_of(model, batch)))
    assert largest_relative(*found) <= 1e-6
    assert all(bool(found[0][f"adapters.{layer}.gate_weight"].any()) for layer in (0, 1))


@pytest.mark.P8
def test_a_balance_of_the_whole_row_would_depend_on_its_neighbours(
    routed: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: one group made of all tokens of the row, as a loss per micro-batch has it."""
    from eventlens_ds.model import region_vlm

    members, model = mixed_members(routed), awake(routed).eval()
    apart = sum(float(balance_of(model, routed.batch([member])).detach()) for member in members)
    monkeypatch.setattr(region_vlm, "group_members", lambda b, device: group_members(b, device).sum(0, keepdim=True))
    together = float(balance_of(model, routed.batch(members)).detach())
    assert abs(together - apart) > 1e-4 * apart


@pytest.mark.P7
def test_the_task_plays_no_part(routed: SmallRun) -> None:
    batch, model = routed.batch(mixed_members(routed)), awake(routed).eval()
    other = replace(batch, task_ids=torch.full_like(batch.task_ids, 1))
    assert not torch.equal(batch.task_ids, other.task_ids) and torch.equal(model(batch), model(other))


@pytest.mark.P5
def test_a_missing_row_has_no_balance_and_hangs_on_the_graph(routed: SmallRun) -> None:
    batch, model = routed.batch(()), awake(routed).train()
    logp, balance = model(batch, with_balance=True)
    config = replace(routed.config, objective=ObjectiveConfig(load_balance=1.0))
    made = objective.row_sums(logp, batch, config.objective, balance)
    denominators = objective.counts(batch, balance=True)
    assert objective.balances(config) and denominators.tolist() == [0.0] * 4 and made.sums.tolist() == [0.0] * 4
    objective.step_loss(made.sums, denominators, config.objective).backward()
    assert all(p.grad is not None for p in model.adapters.parameters())


@pytest.mark.P8
def test_the_step_loss_adds_the_mean_over_tokens(routed: SmallRun) -> None:
    batch, model = routed.batch(mixed_members(routed)), awake(routed).eval()
    logp, balance = model(batch, with_balance=True)
    assert objective.counts(batch, balance=True).tolist() == [*objective.counts(batch).tolist(), batch.real_tokens]
    config = ObjectiveConfig(load_balance=0.5)
    plain = objective.step_loss(objective.row_sums(logp, batch, config).sums, objective.counts(batch), config)
    whole = objective.step_loss(
        objective.row_sums(logp, batch, config, balance).sums, objective.counts(batch, balance=True), config
    )
    assert float(whole - plain) == pytest.approx(0.5 * float(balance) / batch.real_tokens, rel=1e-4)
    assert float(balance) / batch.real_tokens >= 1.0


@pytest.mark.P10
def test_a_stage_trains_experts_and_router_and_every_tensor_of_them(routed: SmallRun) -> None:
    model = awake(routed).train()
    apply_stage(model, ("adapters", "router"), ("event",))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"adapters.{name}" for name, _ in model.adapters.named_parameters()}
    model(routed.batch(mixed_members(routed))).sum().backward()
    assert not [name for name in trained if (p := model.get_parameter(name)).grad is None or not p.grad.any()]
    with pytest.raises(UserError, match="'image_adapter' is switched off"):
        apply_stage(model, ("image_adapter",), ("event",))


LEARNS = "--stage.train=[adapters,router]"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--model.adapters.experts=8"], "experts: 8: read only under model.adapters.router topk"),
        (["--model.adapters.renormalise=false"], "renormalise: False: read only under"),
        (["--objective.load_balance=0.5"], "only model.adapters.router topk has one"),
        (["--model.adapters.router=topk"], "the router is frozen in this stage"),
        (["--model.adapters.router=topk", LEARNS, "--model.adapters.top_k=5"], "5 of model.adapters.experts = 4"),
        (["--model.adapters.router=topk", LEARNS, "--model.adapters.top_k=1"], "with top_k 1 every gate is 1"),
        (["--model.adapters.router=topk", LEARNS, "--model.adapters.top_k=4"], "every token takes every adapter"),
        (["--model.adapters.router=topk", LEARNS, "--model.adapters.bottleneck=0"], "bottleneck is 0"),
        (["--model.adapters.router=topk", LEARNS, "--model.adapters.tasks=[event]"], "only under .*router task"),
    ],
)
def test_settings_that_would_not_be_read_are_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load("tiny_vcr", settings)


def test_weight_nought_switches_the_loss_off() -> None:
    config = load("tiny_vcr", ["--model.adapters.router=topk", LEARNS])
    assert objective.balances(config)
    off = ["--model.adapters.router=topk", LEARNS, "--objective.load_balance=0", "--model.adapters.top_k=4"]
    assert not objective.balances(load("tiny_vcr", off))
    assert not objective.balances(load("tiny_vcr", []))
