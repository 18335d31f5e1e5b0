"""T5 in a RegionVLM: a packed row is each sample alone in transformers' own T5, adapters and routing included (P4, P7).

In: real rows of the small world, a T5 of width 32 with 2 + 2 layers. Out: log-probabilities, gradients and texts,
compared with T5ForConditionalGeneration on one sequence at a time. Decision: plain T5 gets the embeddings of the
model and nothing else of it: neither masks, nor spans, nor the order of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.data.records import CHOICE_TASKS, TASKS, Batch
from eventlens_ds.model import encoder_decoder, t5
from eventlens_ds.model.encoder_decoder import Span, sequences
from eventlens_ds.model.region_vlm import RegionVLM
from tests.model.test_region_vlm import changed, gradients, largest_relative, logits_of, mixed_members
from tests.small_world import SmallRun, small_config, small_run


def t5_config(folder: Path, **model: Any) -> RunConfig:
    config = small_config(folder)
    return replace(config, model=replace(config.model, preset="tiny-t5", **model))


@pytest.fixture(scope="module")
def run(world_folder: Path) -> SmallRun:
    return small_run(world_folder, t5_config(world_folder))


def awake(run: SmallRun, *, form: str = "blocks", **changes: Any) -> RegionVLM:
    """A T5 in which neither a norm nor a head is what a constructor makes it."""
    model = run.model(attention=form, **changes)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name or "relative_attention_bias" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def plain(model: RegionVLM) -> T5ForConditionalGeneration:
    """transformers' T5 with the weights of the model."""
    config = T5Config(**{**model.config.text_config.to_dict(), "decoder_start_token_id": 0})
    config._attn_implementation = "eager"
    made = T5ForConditionalGeneration(config)
    weights = {n: p for n, p in model.language_model.state_dict().items()}
    made.load_state_dict(weights)
    return made.eval()


def leaves_of(batch: Batch) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(leaf, prompt positions, answer positions) from the tree, written without the code under test."""
    parents, bounds = batch.parents.tolist(), batch.bounds.tolist()
    leaves = [s for s in range(len(parents)) if s not in parents]
    for leaf, segment in enumerate(leaves):
        path, node = [], parents[segment]
        while node >= 0:
            path.insert(0, node)
            node = parents[node]
        yield leaf, torch.cat([torch.arange(*bounds[s]) for s in path]), torch.arange(*bounds[segment])


def alone(model: RegionVLM, batch: Batch) -> torch.Tensor:
    """Log-probability of every supervised token, each leaf alone in plain T5."""
    language, found = plain(model), []
    with torch.no_grad():
        embeds = model.embed(batch)
        for leaf, prompt, answer in leaves_of(batch):
            own = batch.target_ids[batch.target_leaf == leaf]
            # The last token of the prompt is the decoder's start; the last of the answer predicts nothing.
            given = torch.cat([embeds[prompt[-1:]], embeds[answer[:-1]]])
            logits = language(inputs_embeds=embeds[prompt[:-1]][None], decoder_inputs_embeds=given[None]).logits[0]
            found.append(logits.log_softmax(-1).gather(1, own[:, None])[:, 0])
    return torch.cat(found)


NO_ADAPTERS = {"adapters": {"bottleneck": 0}}


@pytest.mark.P4
@pytest.mark.parametrize("linking", ["add", "insert", "none"])
@pytest.mark.parametrize("form", ["blocks", "sdpa"])
def test_a_packed_row_is_each_sample_alone_in_plain_t5(world_folder: Path, linking: str, form: str) -> None:
    run = small_run(world_folder, t5_config(world_folder, linking=linking))
    model = awake(run, form=form, **NO_ADAPTERS).eval()
    batch = run.batch(mixed_members(run))
    assert {TASKS[t] for t in batch.leaf_task.tolist()} >= CHOICE_TASKS | {"caption"}
    with torch.no_grad():
        assert (model(batch) - alone(model, batch)).abs().max() <= 1e-5


@pytest.mark.P4
def test_labels_of_plain_t5_start_where_a_stem_ends(world_folder: Path) -> None:
    """transformers shifts labels by itself: our start is its start, and the prompt ends with </s> as T5's text does."""
    run = small_run(world_folder, t5_config(world_folder, linking="none"))
    model = awake(run, **NO_ADAPTERS).eval()
    batch = run.batch(mixed_members(run))
    language = plain(model)
    with torch.no_grad():
        embeds, logp = model.embed(batch), model(batch)
        for leaf, prompt, _ in leaves_of(batch):
            own = batch.target_ids[batch.target_leaf == leaf]
            loss = language(inputs_embeds=embeds[prompt[:-1]][None], labels=own[None]).loss
            assert abs(float(loss + logp[batch.target_leaf == leaf].mean())) <= 1e-5
            assert batch.input_ids[0, prompt[-2:]].tolist() == [run.tokenizer.eos, run.tokenizer.pad]


@pytest.mark.P4
@pytest.mark.parametrize("form", ["blocks", "sdpa"])
def test_sequences_that_see_each_other_are_seen(run: SmallRun, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one encoder sequence for the whole row, or no masks."""
    model, batch = awake(run, form=form, **NO_ADAPTERS).eval(), run.batch(mixed_members(run))
    everything = lambda spans, q, k, causal=False: torch.ones(1, 1, q, k, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(t5, "span_mask", everything)
    whole = property(lambda row: (Span(0, len(row.encoder), 0, len(row.encoder)),))
    monkeypatch.setattr(encoder_decoder.Sequences, "encoder_spans", whole)
    with torch.no_grad():
        assert (model(batch) - alone(model, batch)).abs().max() > 1e-3


def test_sequences_of_a_tree_by_hand() -> None:
    """Prefix 0-2; stem 3-5 whose last token starts, with leaves 6-7 and 8; stem 9-10 without a leaf."""
    parents = torch.tensor([-1, 0, 1, 1, 0])
    bounds = torch.tensor([[0, 3], [3, 6], [6, 8], [8, 9], [9, 11]])
    starts = torch.zeros(11, dtype=torch.bool)
    starts[[5, 10]] = True
    row = sequences(parents, bounds, starts)
    assert row.encoder.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 9]
    assert row.decoder.tolist() == [5, 6, 7, 5, 8, 10]
    assert row.encoder_bounds == ((0, 5), (5, 9)) and row.decoder_bounds == ((0, 3), (3, 5), (5, 6))
    assert row.source == (0, 0, 1) and row.cross_spans == (Span(0, 3, 0, 5), Span(3, 5, 0, 5), Span(5, 6, 5, 9))
    assert row.read.tolist() == [-1, -1, -1, -1, -1, 0, 1, 2, 4, -1, 5]


def test_a_row_that_is_not_for_t5_is_refused(small: SmallRun, run: SmallRun) -> None:
    with pytest.raises(ValueError, match="encoded for a decoder-only model"):
        awake(run)(small.batch(mixed_members(small)))
    starts = torch.tensor([True, False])
    with pytest.raises(ValueError, match="the start at token 0 is not the last token of its segment, which ends at 2"):
        sequences(torch.tensor([-1]), torch.tensor([[0, 2]]), starts)


@pytest.mark.P5
def test_the_missing_row_runs_every_module(run: SmallRun) -> None:
    model = awake(run).train()
    called: set[str] = set()
    for name, module in model.language_model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    logp = model(run.batch([]))
    assert logp.shape == (1,) and bool(logp.isfinite())
    missing = set(called)
    called.clear()
    model(run.batch(mixed_members(run)))
    assert missing == called


@pytest.mark.P4
def test_layouts_agree_forward_and_backward(world_folder: Path, run: SmallRun) -> None:
    flat = small_run(world_folder, t5_config(world_folder), layout="flat")
    model, found = awake(run).double().train(), []
    for each in (run, flat):
        batch = each.batch(mixed_members(run))
        logp = model(batch)
        found.append((logp.detach(), gradients(model, (logp * torch.linspace(-1.0, -2.0, logp.numel())).sum())))
    (one, grads), (two, other) = found
    assert (one - two).abs().max() <= 1e-5 and largest_relative(grads, other) <= 1e-7


@pytest.mark.P7
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", ["blocks", "sdpa"])
def test_a_mixed_row_equals_the_pure_rows(run: SmallRun, checkpointing: bool, form: str) -> None:
    members, model = mixed_members(run), awake(run, form=form).double().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    pure = [model(run.batch([member])) for member in members]
    together = model(run.batch(members))
    assert torch.allclose(torch.cat(pure), together, rtol=0, atol=1e-5)
    weights = torch.linspace(-1.0, -2.0, together.numel())
    apart = gradients(model, (torch.cat(pure) * weights).sum())
    assert {name.split(".")[1] for name in apart if name.startswith("adapters")} == {"0", "1", "2", "3"}
    assert largest_relative(apart, gradients(model, (together * weights).sum())) <= 1e-9


@pytest.mark.P7
def test_a_task_reaches_encoder_and_decoder_of_its_samples_alone(run: SmallRun) -> None:
    """Another task for one sample moves its scores and no others, through each half of the layers on its own."""
    batch, model = run.batch(mixed_members(run)), awake(run).eval()
    before = logits_of(model, batch)
    first = batch.task_ids == batch.task_ids[0]
    moved = replace(batch, task_ids=torch.where(first, batch.task_ids[-1], batch.task_ids))
    read = ~before.isnan().any(1)
    for half in (range(2), range(2, 4)):
        mixed = awake(run).eval()
        for layer in set(range(4)) - set(half):
            for name, parameter in mixed.adapters[layer].named_parameters():
                if name.endswith("_scale"):
                    parameter.data.zero_()
        own, other = logits_of(mixed, batch), logits_of(mixed, moved)
        assert torch.equal(changed(own, other)[read], first[read])


def test_logits_are_undefined_at_what_only_the_encoder_reads(run: SmallRun) -> None:
    batch, model = run.batch(mixed_members(run)), awake(run).eval()
    logits = logits_of(model, batch)
    predicts = torch.zeros(batch.real_tokens, dtype=torch.bool)
    for _, prompt, answer in leaves_of(batch):
        predicts[prompt[-1]] = predicts[answer] = True
    assert torch.equal(logits.isnan().all(1), ~predicts) and torch.equal(logits.isnan().any(1), ~predicts)


@pytest.mark.parametrize("source", ["residual", "normed"])
@pytest.mark.parametrize(("half", "number"), [("encoder", 1), ("decoder", 3)])
def test_a_block_is_its_formula(run: SmallRun, source: str, half: str, number: int) -> None:
    """y = x + FFN(norm x) + A(x) after attention, with LION's un-normalised x or with the normed one."""
    model = awake(run, adapters={"bottleneck": 8, "source": source}).eval()
    batch, block = run.batch(mixed_members(run)[:1]), getattr(model.language_model, half).block[1]
    seen: dict[str, torch.Tensor] = {}
    block.layer[-2].register_forward_hook(lambda _m, _i, out: seen.update(x=out[0]))
    block.register_forward_hook(lambda _m, _i, out: seen.update(y=out[0]))
    model.adapters[number].register_forward_hook(lambda _m, given, _o: seen.update(tasks=given[2]))
    with torch.no_grad():
        model(batch)
        x, ffn = seen["x"], block.layer[-1]
        normed = ffn.layer_norm(x)
        gate, linear, out = (getattr(ffn.DenseReluDense, n).weight for n in ("wi_0", "wi_1", "wo"))
        hidden = torch.nn.functional.gelu(normed @ gate.T, approximate="tanh") * (normed @ linear.T)
        u = x if source == "residual" else normed
        part = {f: getattr(model.adapters[number], f"caption_{f}") for f in ("down", "down_bias", "up", "up_bias")}
        added = torch.relu(u @ part["down"].T + part["down_bias"]) @ part["up"].T + part["up_bias"]
    assert (seen["tasks"] == TASKS.index("caption")).all()
    assert (seen["y"] - (x + hidden @ out.T + added)).abs().max() <= 1e-5


def test_neither_spans_nor_mask_is_refused(run: SmallRun) -> None:
    model = awake(run)
    with pytest.raises(ValueError, match="must not see each other"):
        model.language_model(
            inputs_embeds=torch.zeros(1, 3, 32), decoder_input_ids=torch.zeros(1, 1, dtype=torch.int64)
        )


def test_samples_of_t5_share_no_group(run: SmallRun, small: SmallRun) -> None:
    """Its budget counts what it computes: a prefix per question."""
    for task in ("event", "vcr_answer"):
        assert any(len(small.data.group(*m).samples) > 1 for m in small.groups_of(task))
        assert all(len(run.data.group(*m).samples) == 1 for m in run.groups_of(task))
    batch = run.batch(mixed_members(run))
    row = sequences(batch.parents, batch.bounds, batch.start_slots)
    starts = int(batch.start_slots.sum())
    # Every token once, but for the start of further candidates.
    assert len(row.encoder) + starts == batch.real_tokens - batch.target_ids.numel()
    assert len(row.decoder) == batch.target_ids.numel() + len(batch.leaf_weight)
