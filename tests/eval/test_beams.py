"""Beam search against transformers' own, token for token, and packed rows against rows alone.

In: a random Llama of 16 words and prompts of random tokens; the small run of the session. Out: nothing but verdicts.
Decision: the reference is called with embeddings, as LION calls it, and its settings are drawn so that texts end early
and late; a search that ignores one of its settings must be noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eventlens_ds.data.collate import collate
from eventlens_ds.data.records import Batch, EncodedGroup
from eventlens_ds.errors import UserError
from eventlens_ds.eval.beams import Search, search_row
from eventlens_ds.eval.generate import continue_row, region_mentions
from tests.eval.test_generate import Counted
from tests.small_world import SmallRun

pytestmark = pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")

WORDS, END = 16, 3
SETTINGS = [
    Search(beams=2, max_new_tokens=6, repetition_penalty=1.0, min_new_tokens=0),
    Search(beams=5, max_new_tokens=12, repetition_penalty=1.0, min_new_tokens=0),
    Search(beams=5, max_new_tokens=12, length_penalty=2.0, repetition_penalty=1.0, min_new_tokens=0),
    Search(beams=4, max_new_tokens=12, length_penalty=-1.0, repetition_penalty=1.0, min_new_tokens=3),
    Search(beams=5, max_new_tokens=12),
    Search(beams=3, max_new_tokens=1),
]


class Numbers:
    """A tokenizer of numbers: token 7 reads "7"."""

    eos, pad = END, 0

    def __len__(self) -> int:
        return WORDS

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class Language:
    """A Llama behind the forward of RegionVLM: every path of the tree is a sequence of its own."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=WORDS, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=64, bos_token_id=1, eos_token_id=END, pad_token_id=0,
            )
        ).eval()  # fmt: skip
        with torch.no_grad():
            self.model.lm_head.weight.mul_(25)
        self.rows: list[int] = []

    def __call__(self, batch: Batch, vision_calls: int, *, read: torch.Tensor, encoded: Any) -> Any:
        self.rows.append(batch.real_tokens)
        logits = torch.zeros(batch.input_ids.shape[1], WORDS)
        parents, bounds = batch.parents.tolist(), batch.bounds.tolist()
        paths = []
        for s in range(len(bounds)):
            path, at = [], s
            while at >= 0:
                path.append(torch.arange(*bounds[at]))
                at = parents[at]
            paths.append(torch.cat(path[::-1]))
            assert torch.equal(batch.position_ids[0, paths[-1]], torch.arange(len(paths[-1])))
        # What is filled in behind a path is not seen from it.
        index = torch.nn.utils.rnn.pad_sequence(paths, batch_first=True)
        found = self.model(batch.input_ids[0, index]).logits
        for path, (start, end), each in zip(paths, bounds, found):
            logits[start:end] = each[len(path) - (end - start) : len(path)]
        return logits[read], None

    def reference(self, prompt: Sequence[int], search: Search) -> str:
        embeds = self.model.model.embed_tokens(torch.tensor([list(prompt)]))
        made = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
            num_beams=search.beams,
            max_new_tokens=search.max_new_tokens,
            length_penalty=search.length_penalty,
            repetition_penalty=search.repetition_penalty,
            min_new_tokens=search.min_new_tokens or None,
            do_sample=False,
        )
        return Numbers().decode([t for t in made[0].tolist() if t != END])


def prompts() -> list[tuple[list[int], list[list[int]]]]:
    """(shared prefix, stems) of three groups."""
    rng = np.random.default_rng(1)
    draw = lambda n: rng.integers(4, WORDS, n).tolist()  # noqa: E731
    return [(draw(5), [draw(3), draw(2)]), (draw(2), [draw(4)]), (draw(3), [draw(1), draw(2), draw(6)])]


def group(number: int, prefix: list[int], stems: list[list[int]]) -> EncodedGroup:
    """The tree of a group without images, each stem with one leaf that is its end alone."""
    ids, parents, bounds = list(prefix), [-1], [(0, len(prefix))]
    for stem in stems:
        for tokens, parent in ((stem, 0), ([END], len(parents))):
            bounds.append((len(ids), len(ids) + len(tokens)))
            ids += tokens
            parents.append(parent)
    nowhere = np.full(len(ids), -1, np.int64)
    count = len(stems)
    return EncodedGroup(
        task_id=0,
        input_ids=np.asarray(ids, np.int64),
        parents=np.asarray(parents, np.int32),
        bounds=np.asarray(bounds, np.int32),
        image_slots=nowhere,
        region_slots=nowhere,
        soft_slots=np.zeros(len(nowhere), np.bool_),
        start_slots=np.zeros(len(nowhere), np.bool_),
        instruction=np.zeros(0, np.int64),
        leaf_segment=np.arange(2, 2 * count + 1, 2, dtype=np.int32),
        leaf_sample=np.arange(count, dtype=np.int32),
        leaf_weight=np.ones(count, np.float32),
        choices=[],
        pixel_values=[],
        boxes=[],
        sample_ids=[f"{number}/{i}" for i in range(count)],
    )


def row_of(wanted: Sequence[tuple[list[int], list[list[int]]]]) -> Batch:
    return collate([group(n, *each) for n, each in enumerate(wanted)], visual_tokens=0, image_size=8, seed=0)


def found_by(language: Language, search: Search, wanted: Sequence[Any], **more: Any) -> list[str]:
    batch = row_of(wanted)
    mentions: list[dict[tuple[int, ...], int]] = [{} for _ in batch.sample_ids]
    numbers: Any = Numbers()
    return search_row(language, batch, numbers, mentions, search, linking="none", device="cpu", **more)


def expected_of(language: Language, search: Search) -> list[str]:
    return [language.reference([*prefix, *stem], search) for prefix, stems in prompts() for stem in stems]


@pytest.mark.parametrize("search", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_row_gives_what_transformers_gives_each_prompt(search: Search, seed: int) -> None:
    language = Language(seed)
    found = found_by(language, search, prompts())
    assert found == expected_of(language, search)
    assert len(set(found)) > 1


@pytest.mark.parametrize(
    "change",
    [{"beams": 1}, {"length_penalty": -3.0}, {"repetition_penalty": 3.0}, {"min_new_tokens": 12}],
    ids=str,
)
def test_every_setting_tells(change: dict[str, Any]) -> None:
    """Negative control: on these prompts a search that ignored a setting would not give what transformers gives."""
    search = SETTINGS[1]
    languages = (Language(seed) for seed in range(3))
    assert any(found_by(m, search._replace(**change), prompts()) != found_by(m, search, prompts()) for m in languages)


def test_the_prompts_end_early_and_late() -> None:
    """What the comparison above covers: searches of one row that stop at different lengths, some at the limit."""
    lengths = {len(t.split()) for seed in range(3) for t in found_by(Language(seed), SETTINGS[1], prompts())}
    assert min(lengths) < 6 and max(lengths) == SETTINGS[1].max_new_tokens, lengths


@pytest.mark.P5
def test_forwards_are_counted_or_agreed() -> None:
    search = SETTINGS[1]._replace(max_new_tokens=20, length_penalty=-3.0)
    language = Language()
    fixed = found_by(language, search, prompts()[:1])
    assert len(language.rows) == 20 and language.rows[-1] == 0, "a finished row runs on as the missing row"
    alone = Language()
    assert found_by(alone, search, prompts()[:1], finished=lambda done: done) == fixed
    assert len(alone.rows) < 20 and 0 not in alone.rows
    # Another rank grows on: this one keeps step until both are done.
    others = iter([False] * 4 + [True])
    slow = Language()
    assert found_by(slow, search, prompts()[:1], finished=lambda done: done and next(others)) == fixed
    assert len(slow.rows) == len(alone.rows) + 4
    missing = Language()
    assert found_by(missing, search, []) == [] and missing.rows == [0] * 20


@pytest.mark.P4
def test_a_packed_row_of_images_searches_as_its_groups_do_alone(small: SmallRun) -> None:
    forward = Counted(small.model())
    members = [*small.groups_of("event")[:2], *small.groups_of("caption")[:1]]
    search = Search(beams=3, max_new_tokens=4)

    def texts(row: list[tuple[int, int]], linking: Any = small.spec.linking) -> list[str]:
        groups = [small.data.group(*member) for member in row]
        mentions = region_mentions(groups, small.tokenizer, small.spec.style)
        asked: dict[str, Any] = {"linking": linking, "device": "cpu"}
        return search_row(forward, small.batch(row), small.tokenizer, mentions, search, **asked)

    packed = texts(members)
    assert packed == [text for member in members for text in texts([member])]
    assert len(set(packed)) > 1 and forward.images[:4] == [3] * 4


def test_one_beam_without_its_second_thoughts_is_greedy(small: SmallRun) -> None:
    """The best single path, unless a longer text overtakes one that has ended."""
    forward = Counted(small.model())
    row = small.groups_of("event")[:1]
    mentions = region_mentions([small.data.group(*m) for m in row], small.tokenizer, small.spec.style)
    asked: dict[str, Any] = {"linking": small.spec.linking, "device": "cpu"}
    search = Search(beams=1, max_new_tokens=4, repetition_penalty=1.0, min_new_tokens=0)
    greedy = continue_row(forward, small.batch(row), small.tokenizer, mentions, max_new_tokens=4, **asked)
    assert search_row(forward, small.batch(row), small.tokenizer, mentions, search, **asked) == [t for (t,) in greedy]


def test_impossible_searches_are_one_line() -> None:
    for search, message in (
        (Search(beams=0), "beams 0"),
        (Search(max_new_tokens=0), "max_new_tokens 0"),
        (Search(repetition_penalty=0.0), "repetition_penalty 0.0 above 0"),
        (Search(beams=9), "beams 9 with a vocabulary of 16 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            found_by(Language(), search, prompts())
