"""Beam search over packed tree rows: the beams of a sample are children of its stem, as all continuations are.

In: a forward, a batch, `Search` settings. Out: the best text of every sample. A step scores all beams of a row in one
forward; each sample keeps its own search:
  1. extend    the 2 B best of B beams times the vocabulary, by summed log-probability
  2. finish    those of the first B that end are put by, their score divided by length ** length_penalty
  3. go on     with the first B that do not end, until no beam can overtake the B finished texts
Decision: token for token what transformers' generate(num_beams=B) does (early_stopping False) when it is given the
embeddings of a prompt, as LION gives it: the repetition penalty then counts the generated tokens (of T5 with its start)
and not the prompt.
The number of forwards is that of eval/generate.py, so ranks keep step (P5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from eventlens_ds.data.encode import Linking
from eventlens_ds.data.records import Batch
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.errors import UserError
from eventlens_ds.eval.generate import Finished, Forward, Leaf, Mentions, grow, prompt_of


class Search(NamedTuple):
    """How to search; the defaults are LION's.

    length_penalty: exponent of the length (its end counted) that divides the score of a finished text.
    repetition_penalty: factor of the log-probability of every token that the text already holds.
    min_new_tokens: tokens before the text may end.
    """

    beams: int = 5
    max_new_tokens: int = 256
    length_penalty: float = 1.0
    repetition_penalty: float = 1.5
    min_new_tokens: int = 1


def search_row(
    forward: Forward,
    batch: Batch,
    tokenizer: PieceTokenizer,
    mentions: Sequence[Mentions],
    search: Search,
    *,
    linking: Linking,
    device: str,
    vision_calls: int = 1,
    finished: Finished | None = None,
) -> list[str]:
    """The best text of every sample of a batch, as generate.continue_row gives its texts. Raises UserError for
    impossible settings."""
    check(search, len(tokenizer))
    prompt, ends = prompt_of(batch)
    roots = [_Beam(end=end, mentions=spelled) for end, spelled in zip(ends, mentions, strict=True)]
    # The text of an encoder-decoder begins with the token its decoder starts with.
    begin = [tokenizer.pad] if prompt.start_slots.any() else []
    decoder = _Beams([_Sample([root]) for root in roots], search, tokenizer.eos, begin)
    grow(
        forward,
        prompt,
        decoder,
        tokenizer,
        linking=linking,
        device=device,
        vision_calls=vision_calls,
        max_new_tokens=search.max_new_tokens,
        finished=finished,
    )
    return [tokenizer.decode([t for t in sample.best() if t != tokenizer.eos]) for sample in decoder.samples]


def check(search: Search, vocabulary: int) -> None:
    """Raises UserError for settings that no search can have."""
    if search.beams < 1 or search.max_new_tokens < 1 or search.repetition_penalty <= 0:
        raise UserError(
            f"beam search: beams {search.beams} and max_new_tokens {search.max_new_tokens} must be at least 1, "
            f"repetition_penalty {search.repetition_penalty} above 0"
        )
    if 2 * search.beams > vocabulary:
        raise UserError(
            f"beam search: beams {search.beams} with a vocabulary of {vocabulary} tokens; at most half of it"
        )


@dataclass(kw_only=True)
class _Beam(Leaf):
    score: float = 0.0
    """Sum of the log-probabilities of its tokens."""


@dataclass
class _Sample:
    """The search of one sample. finished: (score, tokens) of ended texts, the best first, at most B."""

    running: list[_Beam]
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def advance(self, candidates: Sequence[tuple[float, int, int]], search: Search, eos: int) -> None:
        """candidates: (score, beam, token), the best first, twice as many as beams."""
        length = len(self.running[0].tokens) + 1
        last = length == search.max_new_tokens
        grown = [
            (token == eos or last, replace(self.running[beam], tokens=[*self.running[beam].tokens, token], score=score))
            for score, beam, token in candidates
        ]
        ended = [(b.score / length**search.length_penalty, b.tokens) for over, b in grown[: search.beams] if over]
        self.finished = sorted(self.finished + ended, key=lambda f: -f[0])[: search.beams]
        self.running = [beam for over, beam in grown if not over][: search.beams]
        full = len(self.finished) == search.beams
        self.done = last or (full and self.running[0].score / length**search.length_penalty <= self.finished[-1][0])

    def best(self) -> list[int]:
        return self.finished[0][1]


class _Beams:
    """The Decoder of a row of searches."""

    def __init__(self, samples: Sequence[_Sample], search: Search, eos: int, begin: list[int]) -> None:
        self.samples, self.search, self.eos, self.begin = samples, search, eos, begin

    def growing(self) -> list[_Beam]:
        return [beam for sample in self.samples if not sample.done for beam in sample.running]

    def take(self, logits_LV: torch.Tensor) -> None:
        searching = [sample for sample in self.samples if not sample.done]
        beams = self.growing()
        logp = self._processed(logits_LV.float().log_softmax(-1), beams)
        totals = logp + torch.tensor([beam.score for beam in beams], device=logp.device)[:, None]
        # At the first token a sample has one beam, afterwards B.
        best = totals.reshape(len(searching), -1).topk(2 * self.search.beams)
        vocabulary = logits_LV.shape[1]
        for sample, scores, places in zip(searching, best.values.tolist(), best.indices.tolist(), strict=True):
            candidates = [(score, *divmod(place, vocabulary)) for score, place in zip(scores, places)]
            sample.advance(candidates, self.search, self.eos)

    def _processed(self, logp_LV: torch.Tensor, beams: Sequence[_Beam]) -> torch.Tensor:
        length = len(beams[0].tokens)
        if len(self.begin) + length and self.search.repetition_penalty != 1.0:
            said = torch.tensor([self.begin + beam.tokens for beam in beams], device=logp_LV.device)
            logp_LV = logp_LV.scatter(1, said, logp_LV.gather(1, said) * self.search.repetition_penalty)
        if length < self.search.min_new_tokens:
            logp_LV[:, self.eos] = -torch.inf
        return logp_LV
