"""A packed row for an encoder-decoder: which of its tokens form encoder and decoder sequences (P4).

In: the segment tree of a row and the tokens at which the decoder starts (`Batch.start_slots`), one at the end of every
stem. Out: `Sequences`:
  encoder   one sequence per start: all tokens of the path from the root to it, the start left out
  decoder   one per child of the segment that ends with the start: the start, then the child; without children the
            start alone. All children of a stem read the same encoder sequence
Decision: an encoder that looks both ways cannot share a prefix between questions, because the prefix sees what
follows it; so a path is repeated for every start, and what is gathered here is exactly what each sample has alone.
Sequences are contiguous, so T5's bias, which depends on the distance of two tokens, needs no positions.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import torch

from eventlens_ds.model.attention import ancestor_matrix


class Span(NamedTuple):
    """Queries [q0, q1) see keys [k0, k1) and no others."""

    q0: int
    q1: int
    k0: int
    k1: int


@dataclass(frozen=True)
class Sequences:
    """Encoder and decoder sequences of a row of T tokens, end to end.

    encoder int64[E], decoder int64[M]  the row's token behind each encoder and each decoder token
    encoder_bounds, decoder_bounds      (start, end) of every sequence
    source                              the encoder sequence that each decoder sequence reads
    read int64[T]                       the decoder token behind each token of the row, -1 for a token that only the
                                        encoder reads: nothing is predicted from it
    """

    encoder: torch.Tensor
    decoder: torch.Tensor
    encoder_bounds: tuple[tuple[int, int], ...]
    decoder_bounds: tuple[tuple[int, int], ...]
    source: tuple[int, ...]
    read: torch.Tensor

    @property
    def encoder_spans(self) -> tuple[Span, ...]:
        return tuple(Span(*bounds, *bounds) for bounds in self.encoder_bounds)

    @property
    def decoder_spans(self) -> tuple[Span, ...]:
        return tuple(Span(*bounds, *bounds) for bounds in self.decoder_bounds)

    @property
    def cross_spans(self) -> tuple[Span, ...]:
        return tuple(Span(*bounds, *self.encoder_bounds[s]) for bounds, s in zip(self.decoder_bounds, self.source))


def sequences(parents: torch.Tensor, bounds: torch.Tensor, start_slots: torch.Tensor) -> Sequences:
    """The sequences of a row. parents int32[S], bounds int32[S, 2], start_slots bool[T], all on the CPU.

    A start that is its whole path (the missing row) is encoded itself, since attention over nothing is undefined.
    Raises ValueError for a row without a start, which was made for a decoder-only model, and for a start that is not
    the last token of its segment.
    """
    starts = start_slots.nonzero()[:, 0].tolist()
    if not starts:
        raise ValueError("no token of the row starts a decoder: it was encoded for a decoder-only model")
    ends = bounds[:, 1].tolist()
    tokens = [torch.arange(start, end) for start, end in bounds.tolist()]
    above = ancestor_matrix(parents)
    children: dict[int, list[int]] = {}
    for segment, parent in enumerate(parents.tolist()):
        children.setdefault(parent, []).append(segment)
    encoder: list[torch.Tensor] = []
    decoder: list[torch.Tensor] = []
    source: list[int] = []
    for start in starts:
        stem = bisect_right(ends, start)
        if ends[stem] != start + 1:
            raise ValueError(
                f"the start at token {start} is not the last token of its segment, which ends at {ends[stem]}"
            )
        path = torch.cat([tokens[s] for s in above[stem].nonzero()[:, 0].tolist()])
        first = torch.tensor([start])
        for leaf in children.get(stem, ()):
            decoder.append(torch.cat([first, tokens[leaf]]))
        if stem not in children:
            decoder.append(first)
        source += [len(encoder)] * max(1, len(children.get(stem, ())))
        encoder.append(path[:-1] if len(path) > 1 else path)
    flat = torch.cat(decoder)
    # Candidates share their start; its state is the same in each of them, and the first is read.
    read = torch.full((len(start_slots),), len(flat)).scatter_reduce(0, flat, torch.arange(len(flat)), "amin")
    read = read.masked_fill(read == len(flat), -1)
    return Sequences(torch.cat(encoder), flat, _bounds(encoder), _bounds(decoder), tuple(source), read)


def _bounds(parts: list[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    found, at = [], 0
    for part in parts:
        found.append((at, at + len(part)))
        at += len(part)
    return tuple(found)


def span_mask(spans: tuple[Span, ...], queries: int, keys: int, *, causal: bool = False) -> torch.Tensor:
    """bool[1, 1, queries, keys], True where a query sees a key: spans as one 4-D mask. Memory grows with the row's
    square; the form for comparison and for backends without a form of their own."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for q0, q1, k0, k1 in spans:
        mask[q0:q1, k0:k1] = True
    return (mask.tril() if causal else mask)[None, None]
