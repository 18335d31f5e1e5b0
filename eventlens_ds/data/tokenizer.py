"""Tokenizers: a folder from disk, or the small one built from the grammar of the embedded world.

In: a folder (tokenizer.json, or tokenizer.model of SentencePiece), or nothing. Out: a `PieceTokenizer` that turns a
piece of text into ids and remembers it. Decision: pieces are tokenised one by one without special tokens and without
the space that Llama's tokenizers put before a text, so lengths add up and a piece may continue a word; visual and
region slots need no vocabulary entry because the model fills their embeddings (data/encode.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError

EMBEDDED_VOCABULARY = 1024
"""Upper bound on the vocabulary of the embedded tokenizer, 256 bytes and specials included."""

_MEMO_LIMIT = 200_000

_PIECES = r"0\.\d\d|\d|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+"
"""Where the embedded tokenizer may split: GPT-2's rule with digits apart, but the first three figures of a share of the
image are one piece, as in Pix2Seq's bins, so that a box as text is 13 tokens and not 25."""

_LEADING = ("Prepend", "Metaspace")

_PROBES = ("Hello", " Hello  world, 12.5", "person10's\n", "</s> caf\u00e9")
"""Texts that tell tokenizers of one vocabulary apart: spaces, digits, a newline, a special token, an accent."""


class PieceTokenizer:
    """Ids of text pieces. `fingerprint` names the vocabulary; `bos` may be None, `eos` ends every continuation."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self.hf = hf_tokenizer
        if hf_tokenizer.eos_token_id is None:
            raise DataError(f"tokenizer {hf_tokenizer.name_or_path}: has no end-of-sequence token")
        self.eos: int = hf_tokenizer.eos_token_id
        self.bos: int | None = hf_tokenizer.bos_token_id
        self.pad: int = hf_tokenizer.pad_token_id if hf_tokenizer.pad_token_id is not None else self.eos
        unknown = hf_tokenizer.unk_token_id
        added = {i: t.content for i, t in hf_tokenizer.added_tokens_decoder.items() if t.special}
        named = dict(zip(hf_tokenizer.all_special_ids, hf_tokenizer.all_special_tokens))
        special = {i: text for i, text in {**added, **named}.items() if i != unknown}
        self._special = frozenset(special)
        self._named = {text: i for i, text in special.items()}
        self._spelled = re.compile("(" + "|".join(re.escape(t) for t in special.values()) + ")")
        self._memo: dict[str, tuple[int, ...]] = {}
        _without_leading_space(hf_tokenizer)
        if hf_tokenizer.decode([*self.ids("a"), *self.ids("b")]).strip() != "ab":
            raise DataError(f"tokenizer {hf_tokenizer.name_or_path}: puts a space or a mark around every text")

    def __len__(self) -> int:
        return len(self.hf)

    def ids(self, text: str) -> tuple[int, ...]:
        """Ids of one piece, without special tokens; text that spells a special token stays plain text."""
        known = self._memo.get(text)
        if known is None:
            known = self._encode(text)
            if not self._special.isdisjoint(known):
                # Some vocabularies hold the special tokens as ordinary entries too.
                parts = enumerate(self._spelled.split(text))
                units = (u for i, part in parts for u in (part if i % 2 else (part,)) if u)
                known = tuple(i for unit in units for i in self._encode(unit) if i not in self._special)
            if len(self._memo) < _MEMO_LIMIT:
                self._memo[text] = known
        return known

    def special(self, text: str) -> int:
        """The id of a special token. Raises KeyError for any other text."""
        return self._named[text]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.hf(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return self.hf.decode(ids, skip_special_tokens=True).strip()

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the vocabulary and of how it is applied to a few texts."""
        vocabulary = sorted(self.hf.get_vocab().items())
        applied = [self.ids(text) for text in _PROBES]
        return hashlib.sha256(json.dumps([vocabulary, applied], ensure_ascii=True).encode()).hexdigest()[:16]


def _without_leading_space(hf_tokenizer: Any) -> None:
    """Switch off the dummy space that SentencePiece tokenizers put before every text they are given.

    T5's puts one before every word and drops the blanks themselves, so that a piece could not say whether it continues
    a word. With its split into words left out, blanks are what words begin with; runs of them stay one blank."""
    backend = getattr(hf_tokenizer, "backend_tokenizer", None)
    if backend is None or not any(mark in f"{backend.normalizer} {backend.pre_tokenizer}" for mark in _LEADING):
        return
    from tokenizers import Tokenizer

    made = json.loads(backend.to_str())
    stages = (made["pre_tokenizer"] or {}).get("pretokenizers", [])
    if {"WhitespaceSplit", "Metaspace"} <= {stage["type"] for stage in stages}:
        made["pre_tokenizer"]["pretokenizers"] = [stage for stage in stages if stage["type"] != "WhitespaceSplit"]
        one_blank = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
        normalizers = [stage for stage in (made["normalizer"], one_blank) if stage]
        made["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    for stage in ("normalizer", "pre_tokenizer"):
        made[stage] = _never_prepend(made[stage])
    changed = Tokenizer.from_str(json.dumps(made))
    backend.normalizer, backend.pre_tokenizer = changed.normalizer, changed.pre_tokenizer


def _never_prepend(stage: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer in the form of tokenizer.json, without its leading space."""
    if stage is None or stage["type"] == "Prepend":
        return None
    if stage["type"] == "Metaspace":
        return {**stage, "prepend_scheme": "never"}
    inner = next((key for key in ("normalizers", "pretokenizers") if key in stage), None)
    if inner is None:
        return stage
    kept = [made for made in map(_never_prepend, stage[inner]) if made is not None]
    return {**stage, inner: kept} if kept else None


def load_tokenizer(folder: str) -> PieceTokenizer:
    """Tokenizer of a folder; an empty name gives the embedded one. Raises DataError when it cannot be read."""
    if not folder:
        return PieceTokenizer(build_embedded())
    if not Path(folder).is_dir():
        raise DataError(f"tokenizer folder {folder}: not found")
    from transformers import AutoTokenizer

    try:
        return PieceTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"tokenizer folder {folder}: {str(error).splitlines()[0]}") from error


def build_embedded() -> Any:
    """Byte-level BPE trained on the grammar of the embedded world: one token for nearly every word of it, and
    any other text in bytes. Deterministic, so it is never stored in the repository."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from eventlens_ds.data.episode_text import template_words
    from eventlens_ds.data.prompts import HINT, RELATION_QUESTIONS, STEMS
    from eventlens_ds.data.sources import world_creature, world_regions, world_text

    frame = " Answer: Why? Event: Place: Objects: Describe the picture."
    asked = [f" {form.format('')}" for forms in RELATION_QUESTIONS.values() for form in forms]
    asked += [part for before, _, after in STEMS.values() for part in (before, after) if part] + list(HINT)
    hundredths = " ".join(f"0.{part:02d}" for part in range(100))
    # Training on words needs each often enough to be merged whole.
    forms = [frame, *asked, hundredths, *world_regions.corpus(), *template_words(), *world_creature.words()]
    text = [*world_text.corpus(), *forms * 50]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<image>", "<region>"]
    trainer = trainers.BpeTrainer(
        vocab_size=EMBEDDED_VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<image>", "<region>"],
    )
