"""LION inside a RegionVLM: both views of an image, the mixture of adapters and the soft prompt.

In: real rows of the small world, a model of width 32 with aggregator, Q-Former, mixture and soft prompt whose branches
do not start at zero. Out: embeddings, logits and gradients, compared with formulas written out here.
Decision: aggregator and Q-Former alone are held to their formulas in their own files; here is what joins them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eventlens_ds.config.load import load
from eventlens_ds.config.run_config import (
    AdapterConfig,
    AggregatorConfig,
    ModelConfig,
    QFormerConfig,
    RoIConfig,
    RunConfig,
)
from eventlens_ds.data.encode import encode, instruction, rendered_group
from eventlens_ds.data.prompts import text_of
from eventlens_ds.data.records import TASKS, Batch, Group
from eventlens_ds.data.transforms import load as load_image
from eventlens_ds.errors import UserError
from eventlens_ds.model.adapters import LEVELS, AdapterMixture, level_of
from eventlens_ds.model.processing import RegionVLMProcessor
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.model.stages import apply_stage, part_of
from tests.model.test_region_vlm import (
    changed,
    gradients,
    largest_relative,
    lay,
    logits_of,
    mixed_members,
    sees,
    weighted,
)
from tests.small_world import SmallRun, small_config, small_run

LION = ModelConfig(
    visual_input="all",
    aggregator=AggregatorConfig(layers=(1, 0), intermediate=48),
    qformer=QFormerConfig(queries=3, width=16, heads=2, layers=2, intermediate=24, instruction_tokens=12),
    adapters=AdapterConfig(router="mixture"),
    roi=RoIConfig(source="aggregator"),
    soft_prompt=True,
)
EVERY = ("caption", "event", "vcr_answer", "vcr_rationale")


def lion_config(folder: Path, **changes: Any) -> RunConfig:
    return replace(small_config(folder), model=replace(LION, **changes))


def awake(run: SmallRun) -> RegionVLM:
    """A model in which nothing starts at zero and every gate has values of its own."""
    model = run.model()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("aggregator", "qformer")) or ".gate_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def lion(world_folder: Path) -> SmallRun:
    return small_run(world_folder, lion_config(world_folder))


def tagged(run: SmallRun, member: tuple[int, int], tags: tuple[str, ...]) -> Group:
    group = run.data.group(*member)
    return replace(group, images=tuple(replace(image, tags=tags) for image in group.images))


def encoded(run: SmallRun, group: Group) -> Any:
    shards, vision = run.data.shards[0], run.spec.vision
    number = next(i for i in range(shards.num_images) if shards.image(i).key == group.images[0].key)
    payload = shards.image_bytes(number)
    load = lambda m: load_image(payload, group.images[m], vision.image_size, mean=vision.mean, std=vision.std)  # noqa: E731
    return encode(group, run.tokenizer, run.spec, load)


@pytest.mark.parametrize("width", [2048, 4096])
def test_parameters_of_one_feed_forward_layer(width: int) -> None:
    """LION-FlanT5-XL and -XXL: 536,706 and 1,073,282 a layer, 25.8 M and 51.5 M over 48."""
    with torch.device("meta"):
        layer = AdapterMixture(width, 64)
    count = sum(p.numel() for p in layer.parameters())
    assert count == {2048: 536_706, 4096: 1_073_282}[width]
    assert round(48 * count / 1e6, 1) == {2048: 25.8, 4096: 51.5}[width]


def mixture_by_hand(layer: AdapterMixture, x: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
    """sum_k G_k^t (.) s_k (W_up relu(W_down x + b) + c), token by token."""
    rows = []
    for features, task in zip(x, tasks.tolist()):
        gate = getattr(layer, f"gate_{level_of(TASKS[task])}")
        total = torch.zeros_like(features)
        for k, name in enumerate(LEVELS):
            part = {field: getattr(layer, f"{name}_{field}") for field in ("down", "down_bias", "up", "up_bias")}
            hidden = torch.relu(part["down"] @ features + part["down_bias"])
            total = total + gate[k] * getattr(layer, f"{name}_scale") * (part["up"] @ hidden + part["up_bias"])
        rows.append(total)
    return torch.stack(rows)


def random_layer(width: int = 12) -> AdapterMixture:
    layer = AdapterMixture(width, 4).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


@pytest.mark.P7
def test_the_mixture_is_its_formula_forward_and_backward() -> None:
    layer = random_layer()
    x = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    residual, tasks = torch.randn(20, 12, dtype=torch.float64), torch.arange(20) % len(TASKS)
    ours = layer(x, residual, tasks)
    theirs = residual + mixture_by_hand(layer, x, tasks)
    assert (ours - theirs).abs().max() <= 1e-6
    inputs = [x, *layer.parameters()]
    for one, two in zip(torch.autograd.grad(ours.sin().sum(), inputs), torch.autograd.grad(theirs.sin().sum(), inputs)):
        assert (one - two).abs().max() <= 1e-6


def test_gates_start_one_hot_so_a_level_has_its_own_adapter() -> None:
    layer = random_layer()
    layer.reset_parameters()
    with torch.no_grad():
        for level in LEVELS:
            getattr(layer, f"{level}_up").fill_(LEVELS.index(level) + 1.0)
    x = torch.rand(2, 12, dtype=torch.float64)
    tasks = torch.tensor([TASKS.index("rec"), TASKS.index("caption")])
    made = layer(x, torch.zeros_like(x), tasks)
    hidden = [torch.relu(x[i] @ getattr(layer, f"{LEVELS[i]}_down").T).sum() * (i + 1) for i in (0, 1)]
    assert torch.allclose(made, torch.stack(hidden)[:, None].expand(2, 12))


@pytest.mark.P7
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mixed_row_equals_the_pure_rows(lion: SmallRun, checkpointing: bool) -> None:
    members, model = mixed_members(lion), awake(lion).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    pure = [model(lion.batch([member])) for member in members]
    together = model(lion.batch(members))
    assert torch.allclose(torch.cat(pure), together, rtol=0, atol=1e-5)
    weights = torch.linspace(-1.0, -2.0, together.numel())
    apart = gradients(model, (torch.cat(pure) * weights).sum())
    assert {part_of(name) for name in apart} >= {"aggregator", "qformer", "router", "image_adapter", "region_adapter"}
    assert largest_relative(apart, gradients(model, (together * weights).sum())) <= 1e-5


@pytest.mark.P7
def test_routing_by_the_first_sample_is_seen(lion: SmallRun) -> None:
    """Negative control, and the defect of the released code: the level of the first sample for the whole batch."""
    batch, model = lion.batch(mixed_members(lion)), awake(lion).eval()
    first = replace(batch, task_ids=torch.full_like(batch.task_ids, int(batch.task_ids[0])))
    moved = changed(logits_of(model, batch), logits_of(model, first))
    levels = [level_of(TASKS[t]) for t in batch.task_ids.tolist()]
    assert moved.tolist() == [level != levels[0] for level in levels]


def test_visual_tokens_are_queries_then_class_token_and_grid(lion: SmallRun) -> None:
    model, batch = awake(lion).eval(), lion.batch(mixed_members(lion))
    assert lion.spec.vision.tokens == 3 + 1 + 16
    with torch.no_grad():
        made = model.embed(batch)
        states = model.encode_images(batch.pixel_values, 1)
        image = model.vision_tower.post_layernorm(states[-1])
        queries = model.qformer_projection(model.qformer(image, batch.instruction_ids, batch.instruction_mask))
        grid = model.aggregator_mlp(model.aggregator(states))
    for number in range(batch.pixel_values.shape[0]):
        own = made[(batch.image_slots // 20 == number) & (batch.image_slots >= 0)]
        assert torch.allclose(own, torch.cat([queries[number], grid[number]]), rtol=0, atol=1e-6)


@pytest.mark.P6
def test_an_instruction_reaches_its_own_image_and_no_other(lion: SmallRun) -> None:
    batch, model, tokens = lion.batch(mixed_members(lion)), awake(lion).eval(), lion.spec.vision.tokens
    before = logits_of(model, batch)
    for image in range(batch.pixel_values.shape[0]):
        ids = batch.instruction_ids.clone()
        ids[image, 0] = 7 if int(ids[image, 0]) != 7 else 8
        moved = changed(before, logits_of(model, replace(batch, instruction_ids=ids)))
        queries = (batch.image_slots >= image * tokens) & (batch.image_slots < image * tokens + 3)
        assert torch.equal(moved, sees(batch, queries))


def test_questions_share_a_group_only_without_an_instruction(world_folder: Path, lion: SmallRun) -> None:
    silent = replace(LION.qformer, instruction_tokens=0)
    shared = small_run(world_folder, lion_config(world_folder, qformer=silent))
    for run, together in ((lion, False), (shared, True)):
        groups = [run.data.group(*member) for member in run.groups_of("vcr_answer")]
        assert any(len(group.samples) > 1 for group in groups) == together
    one = [lion.data.group(*member) for member in lion.groups_of("caption")]
    assert any(len(group.samples) > 1 for group in one), "captions are asked for with the same words"
    group = shared.data.group(*next(m for m in shared.groups_of("vcr_answer")))
    with pytest.raises(ValueError, match="instructions for one set of visual tokens"):
        encoded(lion, group)


def test_the_instruction_is_the_end_of_the_question(lion: SmallRun) -> None:
    group = lion.data.group(*lion.groups_of("vcr_answer")[0])
    stem = rendered_group(group, lion.tokenizer, lion.spec).samples[0]
    ids = instruction(stem, lion.tokenizer, lion.spec)
    assert len(ids) <= 12 and text_of(stem.stem).removesuffix(" Answer:").endswith(lion.tokenizer.decode(list(ids)))
    batch = lion.batch([lion.groups_of("vcr_answer")[0]])
    assert batch.instruction_ids[0][batch.instruction_mask[0]].tolist() == list(ids)


def test_the_soft_prompt_survives_ten_thousand_tags(lion: SmallRun) -> None:
    tags = tuple(f"tag{i}" for i in range(10_000))
    member = lion.groups_of("caption")[0]
    group = tagged(lion, member, tags)
    text = text_of(rendered_group(group, lion.tokenizer, lion.spec).prefix)
    head, _, listed = text.partition("following tags: [")
    assert head.endswith("According to <hint>, you are allowed to use or partially use the ") and listed[-2:] == "]."
    kept = listed[:-2].split(", ")
    assert kept == list(tags[: len(kept)]) and kept
    made = encoded(lion, group)
    plain = encoded(lion, tagged(lion, member, ()))
    assert int(made.soft_slots.sum()) == 1 and not plain.soft_slots.any()
    head_tokens = (
        sum(len(lion.tokenizer.ids(t)) for t in (" According to", "]."))
        + 1
        + len(lion.tokenizer.ids(", you are allowed to use or partially use the following tags: ["))
    )
    spent = made.num_tokens - plain.num_tokens - head_tokens
    longest = max(len(lion.tokenizer.ids(f", {tag}")) for tag in tags)
    budget = lion.spec.style.tag_tokens
    assert budget - longest < spent <= budget


def test_a_budget_of_nothing_keeps_the_head(world_folder: Path) -> None:
    run = small_run(world_folder, lion_config(world_folder), tag_tokens=0)
    made = rendered_group(tagged(run, run.groups_of("caption")[0], ("dog",)), run.tokenizer, run.spec)
    assert text_of(made.prefix).endswith("use the following tags: [].")


@pytest.mark.P6
def test_the_hint_changes_what_follows_it_and_nothing_else(lion: SmallRun) -> None:
    """Text that spells the placeholder stays text: its token is not a soft slot."""
    spelled = tagged(lion, lion.groups_of("caption")[1], ("<hint>", "<extra_id_0>"))
    plain = tagged(lion, lion.groups_of("caption")[0], ())
    batch = lay(lion, encoded(lion, plain), encoded(lion, spelled))
    assert int(batch.soft_slots.sum()) == 1
    model = awake(lion).eval()
    before = logits_of(model, batch)
    with torch.no_grad():
        model.soft_prompt.hint.add_(1.0)
    assert torch.equal(changed(before, logits_of(model, batch)), sees(batch, batch.soft_slots))


STAGES = {
    "image": ("qformer", ("qformer", "image_adapter"), ("caption",)),
    "region": ("aggregator", ("aggregator", "region_adapter"), ("event", "vcr_answer")),
    "both": ("all", ("qformer", "aggregator", "adapters", "router", "soft_prompt"), EVERY),
}


@pytest.mark.P10
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_its_parts_and_every_tensor_of_them(world_folder: Path, stage: str) -> None:
    visual_input, parts, tasks = STAGES[stage]
    roi = RoIConfig(source="aggregator" if stage != "image" else "tower")
    run = small_run(world_folder, lion_config(world_folder, visual_input=visual_input, roi=roi), tasks=tasks)
    model = awake(run).train()
    apply_stage(model, parts, tasks)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {"image_adapter", "region_adapter"} | set(parts) if "adapters" in parts else set(parts)
    assert {part_of(name) for name in trained} == wanted - {"adapters"}
    batch = two_tags(run, tasks)
    weighted(model(batch)).backward()
    silent = {name for name in trained if (p := model.get_parameter(name)).grad is None or not p.grad.any()}
    assert not silent
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


def two_tags(run: SmallRun, tasks: tuple[str, ...]) -> Batch:
    members = [run.groups_of(task)[k] for k, task in enumerate(tasks)]
    return lay(run, *(encoded(run, tagged(run, member, ("dog", "ball"))) for member in members))


def test_a_level_without_data_keeps_its_gate(world_folder: Path) -> None:
    run = small_run(world_folder, lion_config(world_folder), tasks=("caption",))
    lines = {line.part: line for line in apply_stage(run.model(), ("router",), ("caption",))}
    assert lines["router"].trained == lines["router"].frozen and lines["router"].reasons == (
        "gate of a level without data",
    )


def test_a_task_without_adapter_is_refused(small: SmallRun) -> None:
    with pytest.raises(UserError, match="model.adapters.tasks: rec is in the data and has no adapter"):
        apply_stage(small.model(), ("adapters",), ("caption", "rec"))


def test_an_exported_processor_asks_as_training_does(lion: SmallRun) -> None:
    """The question reaches the Q-Former of a user's call too, and saved settings come back."""
    processor = RegionVLMProcessor.from_spec(lion.tokenizer, lion.spec)
    assert processor.spec == lion.spec and processor.to_dict()["instruction_tokens"] == 12
    asked = "why is [1] standing here today and not over there?"
    row = processor(np.zeros((48, 48, 3), np.uint8), [[1, 1, 20, 20]], ["person"], question=asked)
    assert row.instruction_mask.sum() == 12 and row.instruction_ids.shape[0] == 1


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("--model.visual_input=all", "model.aggregator.layers is empty"),
        ("--model.visual_input=qformer", "model.qformer.queries is 0"),
        ("--model.roi.source=aggregator", "model.aggregator.layers is empty"),
        ("--data.tag_tokens=9", "only with model.soft_prompt"),
        ("--model.aggregator.layers=[-1]", "counted from 0"),
    ],
)
def test_a_setting_without_its_part_is_refused(setting: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load("tiny_vcr", [setting])


def test_tasks_of_their_own_do_not_go_with_a_mixture() -> None:
    with pytest.raises(UserError, match="only under model.adapters.router task"):
        load("tiny_vcr", ["--model.adapters.router=mixture", "--model.adapters.tasks=[event]"])
