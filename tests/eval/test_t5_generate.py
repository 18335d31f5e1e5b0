"""Texts of T5: a packed row against transformers' generate on one sample at a time, greedy and with beams; scores.

In: rows of the small world, a T5 of width 32 without adapters. Out: token ids, compared one by one. Decision: the
reference gets the embeddings of a prompt, as LION hands them to T5, and none of our masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eventlens_ds.eval.beams import Search, search_row
from eventlens_ds.eval.generate import continue_row
from eventlens_ds.eval.score import score_choices
from eventlens_ds.model.region_vlm import RegionVLM
from tests.model.test_region_vlm import mixed_members
from tests.model.test_t5 import NO_ADAPTERS, alone, awake, leaves_of, plain, t5_config
from tests.small_world import SmallRun, small_run

pytestmark = pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
NEW = 8
OFTEN = 19
"""A token that this model likes to say."""


class Ids:
    """The tokenizer's ids as its text, so that texts are compared token by token."""

    def __init__(self, tokenizer: Any) -> None:
        self.eos, self.pad, self.size = tokenizer.eos, tokenizer.pad, len(tokenizer)

    def __len__(self) -> int:
        return self.size

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def run(world_folder: Path) -> SmallRun:
    return small_run(world_folder, t5_config(world_folder, linking="none"))


def spread(run: SmallRun) -> RegionVLM:
    """A model that says other words to other prompts and sometimes ends: attention weighs more than the last word."""
    model = awake(run, **NO_ADAPTERS).eval()
    with torch.no_grad():
        for block in model.language_model.decoder.block:
            block.layer[0].SelfAttention.q.weight.mul_(10)
            block.layer[0].SelfAttention.o.weight.mul_(10)
            block.layer[1].EncDecAttention.o.weight.mul_(20)
        model.language_model.decoder.final_layer_norm.weight.mul_(4)
        words = model.language_model.shared.weight
        words[run.tokenizer.eos] = 1.2 * words[OFTEN]
    return model


def reference(model: RegionVLM, run: SmallRun, **settings: Any) -> list[str]:
    """What transformers' T5 says to every sample of a row."""
    language, batch, found = plain(model), run.batch(mixed_members(run)), {}
    embeds = model.embed(batch)
    ids = Ids(run.tokenizer)
    for leaf, prompt, _ in leaves_of(batch):
        sample = int(batch.leaf_sample[leaf])
        if sample in found:
            continue
        made = language.generate(
            inputs_embeds=embeds[prompt[:-1]][None],
            attention_mask=torch.ones(1, len(prompt) - 1, dtype=torch.int64),
            decoder_start_token_id=ids.pad,
            eos_token_id=ids.eos,
            pad_token_id=ids.pad,
            do_sample=False,
            **settings,
        )[0].tolist()
        assert made[0] == ids.pad
        text = made[1:]
        found[sample] = ids.decode(text[: text.index(ids.eos)] if ids.eos in text else text)
    return [found[s] for s in range(len(batch.sample_ids))]


def test_greedy_is_token_for_token_that_of_transformers(run: SmallRun) -> None:
    model, batch = spread(run), run.batch(mixed_members(run))
    ids: Any = Ids(run.tokenizer)
    nobody: list[dict[tuple[int, ...], int]] = [{} for _ in batch.sample_ids]
    with torch.no_grad():
        expected = reference(model, run, max_new_tokens=NEW)
        found = continue_row(model, batch, ids, nobody, linking="none", device="cpu", max_new_tokens=NEW)
    assert [texts[0] for texts in found] == expected and len(set(expected)) > 1


@pytest.mark.parametrize("search", [Search(3, NEW, 1.0, 1.0, 0), Search(5, NEW), Search(4, NEW, 2.0, 3.0, 3)], ids=str)
def test_beams_are_token_for_token_those_of_transformers(run: SmallRun, search: Search) -> None:
    model, batch = spread(run), run.batch(mixed_members(run))
    ids: Any = Ids(run.tokenizer)
    nobody: list[dict[tuple[int, ...], int]] = [{} for _ in batch.sample_ids]
    with torch.no_grad():
        expected = reference(
            model,
            run,
            num_beams=search.beams,
            max_new_tokens=NEW,
            length_penalty=search.length_penalty,
            repetition_penalty=search.repetition_penalty,
            min_new_tokens=search.min_new_tokens or None,
        )
        found = search_row(model, batch, ids, nobody, search, linking="none", device="cpu")
    assert found == expected and len(set(expected)) > 1


def test_scores_are_those_of_each_candidate_alone(run: SmallRun) -> None:
    model = spread(run)
    run.data.tasks = ("vcr_answer", "vcr_rationale")
    data = small_run(Path(run.config.data.train[0]), run.config, tasks=("vcr_answer", "vcr_rationale")).data
    rows = score_choices(model, data, rank=0, world=1, device="cpu", vision_chunk=8, limit=8)
    assert len(rows) >= 8
    by_id = {row["id"]: row for row in rows}
    checked = 0
    for member in [(0, g) for g in range(len(data.groups[0]))][:4]:
        batch = data.batch([member], 0)
        logp = alone(model, batch)
        for question, sample in enumerate(batch.choice_sample.tolist()):
            if (row := by_id.get(batch.sample_ids[sample])) is None:
                continue
            means = [float(logp[batch.target_leaf == leaf].mean()) for leaf in batch.choice_leaves[question]]
            assert torch.allclose(torch.tensor(means), torch.tensor(row["scores"]), atol=1e-5)
            checked += 1
    assert checked
