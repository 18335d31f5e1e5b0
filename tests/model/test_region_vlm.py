"""RegionVLM as a whole: tree rows equal flat rows (P4), every image and region counts (P6), routing is per token (P7).

In: real rows of the small world, a model of width 32 with adapters that are not the identity. Out: logits and
gradients, compared. Decision: every comparison has a control in which the property is broken and the test sees it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eventlens_ds.config.run_config import ModelConfig
from eventlens_ds.data.collate import collate
from eventlens_ds.data.encode import encode
from eventlens_ds.data.records import Batch, EncodedGroup, Group, RegionRef, Sample
from eventlens_ds.data.transforms import load as load_image
from eventlens_ds.model import attention
from eventlens_ds.model.adapters import Routing
from eventlens_ds.model.region_vlm import RegionVLM
from tests.small_world import SmallRun, small_config, small_run


def mixed_members(run: SmallRun) -> list[tuple[int, int]]:
    """One group of every task."""
    return [run.groups_of(task)[k] for k, task in enumerate(("caption", "event", "vcr_answer", "vcr_rationale"))]


def gradients(model: RegionVLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_relative(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Largest difference of gradients, each relative to the largest value of its tensor and at least to 1e-3.

    The gradient of an adapter's scale is one sum over all tokens and channels, whose terms cancel to a number that says
    nothing of its rounding: it is taken relative to the largest value of all tensors of its adapter."""
    assert one.keys() == two.keys()

    def size(name: str) -> torch.Tensor:
        adapter = name.removesuffix("scale")
        alike = [one[n] for n in one if n == name or (adapter != name and n.startswith(adapter))]
        return torch.stack([grad.abs().max() for grad in alike]).max().clamp(min=1e-3)

    return max(float((one[n] - two[n]).abs().max() / size(n)) for n in one)


def weighted(logp: torch.Tensor) -> torch.Tensor:
    """A loss in which every token counts differently."""
    return (logp * torch.linspace(-1.0, -2.0, logp.numel())).sum()


def in_layout(run: SmallRun, layout: str, members: list[tuple[int, int]]) -> Batch:
    run.data.config = replace(run.data.config, layout=layout)
    return run.batch(members)


def tree_and_flat(folder: Path, linking: str, form: str) -> tuple[float, float]:
    """Largest difference of log-probabilities, and of gradients, between the layouts."""
    config = replace(small_config(folder), model=ModelConfig(linking=linking))  # type: ignore[arg-type]
    run = small_run(folder, config)
    model = run.model(attention=form).train()
    found = []
    for layout in ("tree", "flat"):
        batch = in_layout(run, layout, mixed_members(run))
        logp = model(batch)
        found.append((logp.detach(), gradients(model, weighted(logp)), batch.real_tokens))
    (one, grads, short), (two, other, long) = found
    assert short < long
    return float((one - two).abs().max()), largest_relative(grads, other)


@pytest.mark.P4
@pytest.mark.parametrize("form", ["sdpa", "varlen"])
@pytest.mark.parametrize("linking", ["add", "insert", "none"])
def test_tree_equals_flat_forward_and_backward(world_folder: Path, linking: str, form: str) -> None:
    forward, backward = tree_and_flat(world_folder, linking, form)
    assert forward <= 1e-5 and backward <= 1e-5


@pytest.mark.P4
def test_a_leaking_mask_is_seen(world_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: plain causal attention over the row."""
    causal: Callable[..., Any] = lambda parents, bounds, total: torch.ones(1, 1, total, total, dtype=torch.bool).tril()  # noqa: E731
    monkeypatch.setattr(attention, "tree_mask", causal)
    forward, backward = tree_and_flat(world_folder, "add", "sdpa")
    assert forward > 1e-3 and backward > 1e-3


def logits_of(model: RegionVLM, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch, with_logits=True)[1]


def group_of_tokens(batch: Batch) -> torch.Tensor:
    """int64[T]: the root segment of every token, which tells its group."""
    roots = torch.arange(len(batch.parents))
    for s, parent in enumerate(batch.parents.tolist()):
        roots[s] = roots[parent] if parent >= 0 else s
    segment = torch.searchsorted(batch.bounds[:, 1].long().contiguous(), torch.arange(batch.real_tokens), right=True)
    return roots[segment]


def sees(batch: Batch, marked: torch.Tensor) -> torch.Tensor:
    """bool[T]: tokens whose causal past in the tree holds a marked token."""
    mask = attention.tree_mask(batch.parents, batch.bounds, batch.real_tokens)[0, 0]
    return (mask & marked[None]).any(1)


def changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (before - after).abs().amax(1) > 1e-6


@pytest.mark.P6
def test_an_image_changes_what_follows_it_and_nothing_else(small: SmallRun) -> None:
    batch = small.batch(mixed_members(small))
    model, tokens = small.model().eval(), small.spec.vision.tokens
    before = logits_of(model, batch)
    assert batch.pixel_values.shape[0] == 4
    for image in range(4):
        pixels = batch.pixel_values.clone()
        pixels[image] += torch.randn(pixels[image].shape, generator=torch.Generator().manual_seed(image))
        moved = changed(before, logits_of(model, replace(batch, pixel_values=pixels)))
        own = (batch.image_slots >= image * tokens) & (batch.image_slots < (image + 1) * tokens)
        assert torch.equal(moved, sees(batch, own))
        assert len(group_of_tokens(batch)[moved].unique()) == 1


def shifted_box(batch: Batch, region: int) -> Batch:
    boxes = batch.boxes.clone()
    boxes[region] = (
        torch.tensor([3.0, 5.0, 40.0, 33.0]) if boxes[region, 0] > 8 else torch.tensor([20.0, 9.0, 47.0, 46.0])
    )
    return replace(batch, boxes=boxes)


@pytest.mark.P6
@pytest.mark.parametrize("linking", ["add", "insert"])
def test_a_box_changes_what_follows_its_mention_and_nothing_else(world_folder: Path, linking: str) -> None:
    config = replace(small_config(world_folder), model=ModelConfig(linking=linking))  # type: ignore[arg-type]
    run = small_run(world_folder, config)
    batch, model = run.batch(mixed_members(run)), run.model().eval()
    before = logits_of(model, batch)
    for region in range(len(batch.boxes)):
        moved = changed(before, logits_of(model, shifted_box(batch, region)))
        expected = sees(batch, batch.region_slots == region)
        assert expected.any() and torch.equal(moved, expected), region


@pytest.mark.P6
def test_without_linking_no_box_matters(world_folder: Path) -> None:
    """Negative control: the test above sees when regions do not reach the model."""
    run = small_run(world_folder, replace(small_config(world_folder), model=ModelConfig(linking="none")))
    batch, model = run.batch(mixed_members(run)), run.model().eval()
    assert torch.equal(logits_of(model, batch), logits_of(model, shifted_box(batch, 0)))


def two_image_group(run: SmallRun) -> EncodedGroup:
    """One sample over two pictures that mentions a region of each."""
    shards, vision = run.data.shards[0], run.spec.vision
    images = [shards.image(i) for i in (0, 1)]
    asked = ("who is older,", " ", RegionRef(0, 0), " or ", RegionRef(1, 1), "?")
    sample = Sample(
        id="two",
        source="test",
        task="vcr_answer",
        images=tuple(image.key for image in images),
        turns=(("question", asked),),
        candidates=(("the first",), ("the second",)),
        label=0,
    )
    return encode(
        Group("vcr_answer", tuple(images), (sample,)),
        run.tokenizer,
        run.spec,
        lambda m: load_image(shards.image_bytes(m), images[m], vision.image_size, mean=vision.mean, std=vision.std),
    )


def lay(run: SmallRun, *groups: EncodedGroup) -> Batch:
    vision = run.spec.vision
    return collate(list(groups), visual_tokens=vision.tokens, image_size=vision.image_size, seed=0)


@pytest.mark.P6
def test_the_second_image_of_a_sample_leaves_the_text_before_it_alone(small: SmallRun) -> None:
    batch, model, tokens = lay(small, two_image_group(small)), small.model().eval(), small.spec.vision.tokens
    before = logits_of(model, batch)
    for image in (0, 1):
        pixels = batch.pixel_values.clone()
        pixels[image] = pixels[image].flip(-1) + 0.5
        moved = changed(before, logits_of(model, replace(batch, pixel_values=pixels)))
        first = int((batch.image_slots == image * tokens).nonzero()[0])
        assert not moved[:first].any() and moved[first:].all()


@pytest.mark.P6
def test_a_mismatch_raises_with_both_numbers(small: SmallRun) -> None:
    group = two_image_group(small)
    lost_image = replace(group, pixel_values=group.pixel_values[:1], boxes=group.boxes[:1])
    with pytest.raises(ValueError, match="32 image slots for 16 visual tokens"):
        lay(small, lost_image)
    regions = sum(len(b) for b in group.boxes)
    wrong = group.region_slots.copy()
    wrong[np.flatnonzero(wrong >= 0)[0]] = regions
    with pytest.raises(ValueError, match=f"region slot {regions} of {regions} regions"):
        lay(small, replace(group, region_slots=wrong))


@pytest.mark.P7
@pytest.mark.parametrize("form", ["sdpa", "varlen"])
def test_a_mixed_row_equals_the_pure_rows(small: SmallRun, form: str) -> None:
    members, model = mixed_members(small), small.model(attention=form).train()
    pure = [model(small.batch([member])) for member in members]
    together = model(small.batch(members))
    assert torch.allclose(torch.cat(pure), together, rtol=0, atol=1e-5)
    weights = torch.linspace(-1.0, -2.0, together.numel())
    apart = gradients(model, (torch.cat(pure) * weights).sum())
    assert largest_relative(apart, gradients(model, (together * weights).sum())) <= 1e-5


@pytest.mark.P7
def test_routing_by_batch_is_seen(small: SmallRun) -> None:
    """Negative control: the whole row takes the adapter of its first token."""
    members, model = mixed_members(small), small.model().eval()
    batch = small.batch(members)
    by_batch = replace(batch, task_ids=torch.full_like(batch.task_ids, int(batch.task_ids[0])))
    moved = changed(logits_of(model, batch), logits_of(model, by_batch))
    assert torch.equal(moved, batch.task_ids != batch.task_ids[0])


def grads_of_two_tasks(small: SmallRun, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Two forwards of different tasks are open at once; another thread runs one backward through both."""
    model = small.model().train()
    calls: list[int] = []
    if checkpointing:
        model.activation_checkpointing_enable()
    model.adapters[0].register_forward_pre_hook(lambda *_: calls.append(0))
    event = small.batch(small.groups_of("event")[:1])
    # Of equal length, so that a wrong routing runs through without an error.
    losses = [weighted(model(replace(event, task_ids=torch.full_like(event.task_ids, task)))) for task in (1, 2)]
    found: list[dict[str, torch.Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(gradients(model, losses[0] + losses[1])))
    thread.start()
    thread.join()
    assert len(calls) == (4 if checkpointing else 2), "checkpointing recomputes each forward once"
    return found[0]


@pytest.mark.P7
def test_two_forwards_then_one_backward_from_another_thread(small: SmallRun) -> None:
    plain, recomputed = (grads_of_two_tasks(small, checkpointing) for checkpointing in (False, True))
    assert largest_relative(plain, recomputed) <= 1e-6


@pytest.mark.P7
def test_routing_on_a_module_attribute_is_wrong(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: recomputation finds the routing of the later forward, and nothing complains."""
    plain = grads_of_two_tasks(small, False)
    inputs = RegionVLM.attention_inputs
    current: dict[str, Routing] = {}

    def latest(layer: int, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return current["routing"](layer, x, residual)

    def keep(self: RegionVLM, *given: Any) -> dict[str, Any]:
        made = inputs(self, *given)
        current["routing"] = made["routing"]
        return {**made, "routing": latest}

    monkeypatch.setattr(RegionVLM, "attention_inputs", keep)
    assert largest_relative(plain, grads_of_two_tasks(small, False)) <= 1e-6
    assert largest_relative(plain, grads_of_two_tasks(small, True)) > 1e-2
