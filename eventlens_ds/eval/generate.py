"""Generation: every stem of a row is continued at once, one token per forward of the packed tree row.

In: a forward (engine or model) and a row of the plan, or a `Batch`. Out: texts, `num_samples` per sample of the row.
A step puts one leaf per wanted text below its stem, holding the tokens so far, and reads the logits at its end; what
it makes of them is up to a `Decoder`: the greedy and the nucleus one are here, beam search is in eval/beams.py.
Decision: no key-value cache and a number of forwards that is fixed or agreed over ranks. A forward is the one that
trains (same tree, adapters, splice), so it runs under ZeRO-3, and ranks with short answers or no row keep step (P5).
Images are encoded by the first forward alone, and the head runs only where a token is wanted.
A finished region name is linked to its region again in the next step, as a teacher-forced answer is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from eventlens_ds.data.collate import collate
from eventlens_ds.data.encode import Linking
from eventlens_ds.data.loader import RunData
from eventlens_ds.data.plan import draw
from eventlens_ds.data.prompts import PromptStyle, region_name, render
from eventlens_ds.data.records import Batch, Group
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.errors import UserError

Forward = Callable[..., tuple[torch.Tensor, Any]]
"""forward(batch, vision_calls, read=int64[L], encoded=None or what the last call returned) -> (logits [L, V], encoded),
as RegionVLM.forward."""

Mentions = Mapping[tuple[int, ...], int]
"""Token ids of a region's name -> its index in `Batch.boxes`."""

Finished = Callable[[bool], bool]
"""Given whether this rank is done, whether all are: a collective, asked before every forward but the first."""


class Decoder(Protocol):
    """Texts that grow by one token per forward."""

    def growing(self) -> Sequence[Leaf]:
        """The leaves whose next token is wanted, all of one length; none when every text is finished."""
        ...

    def take(self, logits_LV: torch.Tensor) -> None:
        """Logits over the tokenizer's vocabulary behind each leaf of `growing`."""
        ...


def generate(
    forward: Forward,
    data: RunData,
    members: Sequence[tuple[int, int]],
    *,
    device: str,
    vision_calls: int = 1,
    max_new_tokens: int = 20,
    num_samples: int = 1,
    top_p: float = 0.0,
    seed: int = 0,
) -> list[list[str]]:
    """Texts of every sample of a row, in the order of the row: one list of `num_samples` per sample.

    members: (table, group) pairs of a row; none runs the missing row as often and returns []. Always
    `max_new_tokens` forwards. top_p 0 is greedy, above it nucleus sampling (Holtzman et al. 2020, ICLR), in which each
    draw depends on (seed, sample id, number of the text, token) alone (P3). Raises UserError for impossible settings.
    """
    groups = [data.group(*member) for member in members]
    return continue_row(
        forward,
        data.batch(members, 0),
        data.tokenizer,
        region_mentions(groups, data.tokenizer, data.spec.style),
        linking=data.spec.linking,
        device=device,
        vision_calls=vision_calls,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        top_p=top_p,
        seed=seed,
    )


def region_mentions(groups: Sequence[Group], tokenizer: PieceTokenizer, style: PromptStyle) -> list[Mentions]:
    """For every sample of the groups of a row, how the regions of its group are spelled in tokens."""
    found: list[Mentions] = []
    offset = 0
    for group in groups:
        spelled: dict[tuple[int, ...], int] = {}
        for image, boxes in zip(group.images, render(group, style).regions):
            for slot, box in enumerate(boxes, offset):
                name = region_name(image.regions[box].name, box)
                spelled |= {tokenizer.ids(text): slot for text in (name, f" {name}")}
            offset += len(boxes)
        found += [spelled] * len(group.samples)
    return found


def continue_row(
    forward: Forward,
    batch: Batch,
    tokenizer: PieceTokenizer,
    mentions: Sequence[Mentions],
    *,
    linking: Linking,
    device: str,
    vision_calls: int = 1,
    max_new_tokens: int = 20,
    num_samples: int = 1,
    top_p: float = 0.0,
    seed: int = 0,
    finished: Finished | None = None,
) -> list[list[str]]:
    """`generate` for a batch whose samples each have at least one leaf; the leaves themselves are not read.

    mentions: one per sample, see `region_mentions`. finished: see `grow`.
    """
    if max_new_tokens < 1 or num_samples < 1 or not 0.0 <= top_p <= 1.0:
        raise UserError(
            f"generation: max_new_tokens {max_new_tokens} and num_samples {num_samples} must be at least 1, "
            f"top_p {top_p} between 0 and 1"
        )
    # Greedy texts are all the same, so one is computed.
    distinct = num_samples if top_p > 0 else 1
    prompt, ends = prompt_of(batch)
    texts = [
        _Text(end=end, mentions=spelled, sample_id=sample_id, number=n)
        for end, sample_id, spelled in zip(ends, batch.sample_ids, mentions, strict=True)
        for n in range(distinct)
    ]
    grow(
        forward,
        prompt,
        _Drawn(texts, top_p, seed, tokenizer.eos),
        tokenizer,
        linking=linking,
        device=device,
        vision_calls=vision_calls,
        max_new_tokens=max_new_tokens,
        finished=finished,
    )
    decoded = [tokenizer.decode(text.tokens) for text in texts]
    copies = num_samples // distinct
    return [decoded[s * distinct : (s + 1) * distinct] * copies for s in range(len(ends))]


def grow(
    forward: Forward,
    prompt: Batch,
    decoder: Decoder,
    tokenizer: PieceTokenizer,
    *,
    linking: Linking,
    device: str,
    vision_calls: int,
    max_new_tokens: int,
    finished: Finished | None = None,
) -> None:
    """Let a decoder grow behind the prompt of `prompt_of`.

    `max_new_tokens` forwards; with `finished` as many as the rank with the longest text needs.
    """
    idle = collate([], visual_tokens=0, image_size=prompt.pixel_values.shape[-1], seed=0, pad_id=tokenizer.pad)
    idle, prompt = idle.to(device), prompt.to(device)
    encoded = None
    with torch.no_grad():
        for token in range(max_new_tokens):
            growing = decoder.growing()
            if token and finished is not None and finished(not growing):
                break
            row = _with_leaves(prompt, growing, tokenizer.pad, linking) if growing else idle
            read = torch.tensor(_read_positions(prompt, growing) if growing else [0], device=row.input_ids.device)
            logits, encoded = forward(row, vision_calls, read=read, encoded=encoded)
            if growing:
                # A model may have more rows in its vocabulary than the tokenizer can spell.
                decoder.take(logits[:, : len(tokenizer)])


def choose(scores_V: torch.Tensor, top_p: float, uniform: float) -> int:
    """A token from logits: the largest, or with top_p > 0 the one at `uniform` in [0, 1) of the nucleus's mass.

    The nucleus is the smallest set of most likely tokens whose probability reaches `top_p`.
    """
    if top_p <= 0.0:
        return int(scores_V.argmax())
    mass, order = scores_V.softmax(-1).sort(descending=True, stable=True)
    reached = mass.cumsum(0)
    nucleus = int((reached - mass < top_p).sum())
    place = int(torch.searchsorted(reached[:nucleus], uniform * float(reached[nucleus - 1]), right=True))
    return int(order[min(place, nucleus - 1)])


@dataclass(kw_only=True)
class Leaf:
    """A text that grows. end: position of its stem's last token in the prompt."""

    end: int
    mentions: Mentions
    tokens: list[int] = field(default_factory=list)

    def region_slots(self, pad: int, linking: Linking) -> list[int]:
        """Region of every token so far, or -1: the last token of a name (add), or the pad token after it (insert)."""
        slots = [-1] * len(self.tokens)
        at = 0
        while at < len(self.tokens) and linking != "none":
            # The longest name first: person12 begins like person1.
            spelled = max((m for m in self.mentions if tuple(self.tokens[at : at + len(m)]) == m), key=len, default=())
            after = at + len(spelled)
            if spelled and linking == "add":
                slots[after - 1] = self.mentions[spelled]
            elif spelled and self.tokens[after : after + 1] == [pad]:
                slots[after] = self.mentions[spelled]
            at = max(after, at + 1)
        return slots


@dataclass(kw_only=True)
class _Text(Leaf):
    """One text of a sample, by its number."""

    sample_id: str
    number: int
    done: bool = False

    def take(self, token: int, eos: int) -> None:
        self.done = token == eos
        if not self.done:
            self.tokens.append(token)


class _Drawn:
    """Texts that take one token at a time, the most likely one or one of the nucleus."""

    def __init__(self, texts: Sequence[_Text], top_p: float, seed: int, eos: int) -> None:
        self.texts, self.top_p, self.seed, self.eos = texts, top_p, seed, eos

    def growing(self) -> list[_Text]:
        return [text for text in self.texts if not text.done]

    def take(self, logits_LV: torch.Tensor) -> None:
        for text, scores in zip(self.growing(), logits_LV.double().cpu()):
            name = f"token {len(text.tokens)}"
            uniform = draw(self.seed, text.number, text.sample_id, name) / 2**64 if self.top_p > 0 else 0.0
            text.take(choose(scores, self.top_p, uniform), self.eos)


def prompt_of(batch: Batch) -> tuple[Batch, list[int]]:
    """The batch without its leaves, and the position of every sample's last token in it."""
    parents, bounds = batch.parents.tolist(), batch.bounds.tolist()
    first_leaf = torch.searchsorted(batch.leaf_sample, torch.arange(len(batch.sample_ids)))
    first_target = torch.searchsorted(batch.target_leaf, first_leaf)
    old_ends = batch.target_from[first_target].tolist() if batch.sample_ids else []
    last_segment = {end: s for s, (start, end) in enumerate(bounds) if end > start}
    kept: set[int] = set()
    for end in old_ends:
        segment = last_segment[end + 1]
        while segment >= 0:
            kept.add(segment)
            segment = parents[segment]
    segments = sorted(kept) or [0]
    index = torch.cat([torch.arange(*bounds[s]) for s in segments])
    lengths = torch.tensor([bounds[s][1] - bounds[s][0] for s in segments])
    ends = lengths.cumsum(0)
    renumber = {s: i for i, s in enumerate(segments)} | {-1: -1}
    prompt = replace(
        batch,
        input_ids=batch.input_ids[:, index],
        position_ids=batch.position_ids[:, index],
        parents=torch.tensor([renumber[parents[s]] for s in segments], dtype=torch.int32),
        bounds=torch.stack([ends - lengths, ends], 1).int(),
        task_ids=batch.task_ids[index],
        image_slots=batch.image_slots[index],
        region_slots=batch.region_slots[index],
        soft_slots=batch.soft_slots[index],
        start_slots=batch.start_slots[index],
        target_from=batch.target_from[:0],
        target_ids=batch.target_ids[:0],
        target_leaf=batch.target_leaf[:0],
    )
    return prompt, torch.searchsorted(index, torch.tensor(old_ends, dtype=torch.int64)).tolist()


def _with_leaves(prompt: Batch, leaves: Sequence[Leaf], pad: int, linking: Linking) -> Batch:
    """The prompt with the tokens so far of every leaf as a child segment of its stem."""
    length = len(leaves[0].tokens)
    if not length:
        return prompt
    device = prompt.input_ids.device
    ends = torch.tensor([leaf.end for leaf in leaves])
    stems = torch.searchsorted(prompt.bounds[:, 1].long().contiguous(), ends, right=True)
    starts = prompt.input_ids.shape[1] + length * torch.arange(len(leaves))
    bounds = torch.stack([starts, starts + length], 1).int()
    ends = ends.to(device)
    tokens = torch.tensor([leaf.tokens for leaf in leaves], device=device).flatten()
    regions = torch.tensor([leaf.region_slots(pad, linking) for leaf in leaves], device=device).flatten()
    steps = torch.arange(1, length + 1, device=device)
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, tokens[None]], 1),
        position_ids=torch.cat([prompt.position_ids, (prompt.position_ids[0, ends, None] + steps).view(1, -1)], 1),
        parents=torch.cat([prompt.parents, stems.int()]),
        bounds=torch.cat([prompt.bounds, bounds]),
        task_ids=torch.cat([prompt.task_ids, prompt.task_ids[ends].repeat_interleave(length)]),
        image_slots=torch.cat([prompt.image_slots, torch.full_like(tokens, -1)]),
        region_slots=torch.cat([prompt.region_slots, regions]),
        soft_slots=torch.cat([prompt.soft_slots, torch.zeros_like(tokens, dtype=torch.bool)]),
        start_slots=torch.cat([prompt.start_slots, torch.zeros(len(tokens), dtype=torch.bool)]),
    )


def _read_positions(prompt: Batch, leaves: Sequence[Leaf]) -> list[int]:
    """Position whose logits give the next token of each leaf: the end of its stem, later its own last token."""
    length = len(leaves[0].tokens)
    if not length:
        return [leaf.end for leaf in leaves]
    first = prompt.input_ids.shape[1]
    return [first + length * (i + 1) - 1 for i in range(len(leaves))]
