"""Every image of an episode reaches its query, and no image of another episode does (P6).

In: creatures, a small model with weights of a seed. Out: logits and embeddings. Decision: the released code embeds the
last image alone and nobody saw it for months, so each demonstration is perturbed by itself, and the released splice is
the control that these tests would have caught it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eventlens_ds.data.controls import apply_control, last_images
from eventlens_ds.data.episodes import Drawn
from eventlens_ds.model.projector import pool_patches
from tests.creature_world import episode_run


@pytest.fixture(scope="module")
def run(creatures):
    return episode_run(creatures, strategy="2-way-random", shots=3, form="plain")


def logits_of(model, batch, control: str = "none") -> list[torch.Tensor]:
    """Logits float32[k, V] at the answer of every episode of a row."""
    with torch.no_grad():
        _, logits = model(apply_control(batch, control), 1, with_logits=True)
    sample = batch.leaf_sample[batch.target_leaf]
    return [logits[batch.target_from[sample == s]] for s in range(len(batch.sample_ids))]


def perturbed(batch, image: int):
    pixels = batch.pixel_values.clone()
    pixels[image] = pixels[image].flip(-1) + 0.5
    return replace(batch, pixel_values=pixels)


@pytest.mark.P6
@pytest.mark.parametrize("attention", ["sdpa", "eventlens_blocks"])
def test_every_image_changes_its_own_query_and_no_other(run, attention):
    batch = run.batch([(0, 0), (0, 1), (0, 2)])
    model = run.model()
    model.config.text_config._attn_implementation = attention
    model.language_model.config._attn_implementation = attention
    plain = logits_of(model, batch)
    owner = [max(s for s, first in enumerate(batch.sample_image) if first <= i) for i in range(len(batch.pixel_values))]
    assert owner.count(0) >= 3 and set(owner) == {0, 1, 2}
    for image, own in enumerate(owner):
        found = logits_of(model, perturbed(batch, image))
        for sample in range(3):
            moved = float((found[sample] - plain[sample]).abs().max())
            if sample == own:
                assert moved > 1e-4, f"image {image} does not reach the query of its episode"
            else:
                assert moved == 0, f"image {image} leaks into episode {sample}"


@pytest.mark.P6
def test_the_released_splice_would_fail_the_test_above(run):
    """Control: with the last image alone embedded, no demonstration reaches the query; the query's image does."""
    batch, model = run.batch([(0, 0), (0, 1)]), run.model()
    plain, correct = logits_of(model, batch, "released_splice"), logits_of(model, batch)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(plain, correct))
    for image, is_query in enumerate(last_images(batch).tolist()):
        found = logits_of(model, perturbed(batch, image), "released_splice")
        moved = max(float((a - b).abs().max()) for a, b in zip(found, plain))
        assert (moved > 1e-4) == is_query


@pytest.mark.P6
def test_blank_demonstrations_leave_the_query(run):
    batch = run.batch([(0, 0), (0, 1)])
    shown = apply_control(batch, "blank_demos").pixel_values.flatten(1).abs().sum(1) > 0
    assert shown.tolist() == last_images(batch).tolist() and int(shown.sum()) == 2
    assert last_images(run.batch(())).numel() == 0, "a missing row has no image"


@pytest.mark.P6
@pytest.mark.parametrize("shots", [*range(17)])
def test_the_splice_equals_a_loop_over_images(creatures, shots):
    """1, 3 .. 33 images in one row: visual tokens stand where a loop over single images puts them."""
    from eventlens_ds.data.episodes import Episode, Lengths
    from eventlens_ds.data.loader import RunData

    run = episode_run(creatures, shots=1, row_tokens=4096, form="plain")
    model, rows = run.model(), run.data.episodes[0].rows
    episode = Episode("e", (0, 1) * shots, ("a", "b") * shots, ("a", "b"), tuple(range(2 * shots + 1)), 0, "Q <image>?")

    class One:
        """A set of this one episode."""

        def __init__(self) -> None:
            self.rows, self.size, self.fingerprint = rows, 1, "one"
            self.length = lambda _: Lengths(run.tokenizer, run.spec).tokens(episode.labels, ("a",), episode.query)
            self.group = lambda _: rows.group(episode, False)

        def table(self, name: str):
            import numpy as np

            from eventlens_ds.data.packing import GroupTable

            return GroupTable(name, "one", np.asarray([self.length(0)]), np.asarray([2 * shots + 1]))

    made: Drawn = One()  # type: ignore[assignment]
    data = RunData.of_episodes("", rows.shards, made, config=run.config.data, tokenizer=run.tokenizer, spec=run.spec)
    batch = data.batch([(0, 0)], 0)
    with torch.no_grad():
        embeds = model.embed(batch, 1 + shots)
        expected = model.get_input_embeddings()(batch.input_ids[0]).clone()
        at = (batch.image_slots >= 0).nonzero()[:, 0].view(2 * shots + 1, -1)
        for image, positions in enumerate(at):
            states = model.vision_tower(batch.pixel_values[image : image + 1], output_hidden_states=True).hidden_states
            patches = states[model.config.vision_level][:, 1:]
            expected[positions] = model.projector(pool_patches(patches, model.config.grid, 1))[0]
    assert at.shape == (2 * shots + 1, run.spec.vision.tokens)
    assert torch.allclose(embeds, expected, atol=2e-5), float((embeds - expected).abs().max())


@pytest.mark.P5
def test_images_are_encoded_once_in_the_agreed_number_of_calls(creatures):
    run = episode_run(creatures, shots=8, row_tokens=1024, form="plain")
    plan, model = run.data.plan(seed=0, rows_per_step=2), run.model()
    seen: list[int] = []
    model.vision_tower.register_forward_hook(lambda _m, args, _kw, _o: seen.append(len(args[0])), with_kwargs=True)
    for chunk in (4, 16):
        calls = plan.vision_calls(0, 0, 2, chunk)
        rows = plan.step(0)
        assert calls == max(-(-row.images // chunk) for row in rows)
        for row in rows:
            seen.clear()
            with torch.no_grad():
                model(run.batch(row.groups), calls)
            assert len(seen) == calls and sum(seen) == row.images and max(seen) <= chunk


@pytest.mark.P4
@pytest.mark.parametrize("form", ["released", "plain", "short"])
def test_learning_every_answer_changes_no_probability(creatures, form):
    """The chain of turns computes what one prefix computes; its extra leaves are the answers inside the context."""
    last = episode_run(creatures, shots=2, form=form)
    every = episode_run(creatures, shots=2, form=form, supervise="all")
    model = last.model()
    for numbers in ([(0, 0)], [(0, 1), (0, 2)]):
        one, other = last.batch(numbers), every.batch(numbers)
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.position_ids, other.position_ids)
        with torch.no_grad():
            few, many = model(one), model(other)
        for sample in range(len(numbers)):
            leaves = (other.leaf_sample == sample).nonzero()[:, 0]
            assert len(leaves) == 5, "four demonstrations and the query"
            (own,) = (one.leaf_sample == sample).nonzero()[:, 0]
            chained, alone = many[other.target_leaf == leaves[-1]], few[one.target_leaf == own]
            assert torch.allclose(chained, alone, atol=1e-5)
            labels = every.data.group(*numbers[sample]).samples[0].examples
            seen = [float(label in labels[:i]) for i, label in enumerate(labels)]
            assert other.leaf_weight[leaves].tolist() == [*seen, 1.0] and sum(seen) == 2


def test_an_answer_inside_the_context_is_predicted_from_its_question(creatures):
    run = episode_run(creatures, shots=1, form="plain", supervise="all")
    batch = run.batch([(0, 0)])
    examples = run.data.group(0, 0).samples[0].examples
    for leaf, label in enumerate(examples):
        at = batch.target_leaf == leaf
        assert run.tokenizer.decode(batch.target_ids[at].tolist()) == f'there is "{label}" in the image.'
        first = int(batch.target_from[at][0])
        assert run.tokenizer.decode(batch.input_ids[0, first : first + 1].tolist()) == "?"
