"""The tokenizer of a Q-Former's question: word pieces of BERT, as published Q-Formers read them.

In: a folder of a BERT tokenizer. Out: ids "[CLS] question [SEP]" of at most `limit` tokens.
Decision: a longer question loses its beginning and keeps both marks, as in the released code (truncation_side left).
The released code adds "[DEC]" as one more entry; it is added here where the folder lacks it, so that the vocabulary has
the published size (30523), and no question ever holds it. Text that spells a special token stays text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError

SMALLEST = 3
"""Tokens of the shortest question: both marks and a word."""


class QuestionTokenizer:
    """Ids of questions; `fingerprint` names the vocabulary. Raises DataError without [CLS] and [SEP]."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self.hf = hf_tokenizer
        if hf_tokenizer.cls_token_id is None or hf_tokenizer.sep_token_id is None:
            raise DataError(f"tokenizer {hf_tokenizer.name_or_path}: has no [CLS] and [SEP], so it is not BERT's")
        if hf_tokenizer.bos_token is None:
            hf_tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        self._memo = functools.lru_cache(maxsize=200_000)(self._encode)

    def __len__(self) -> int:
        return len(self.hf)

    def ids(self, text: str, limit: int) -> tuple[int, ...]:
        """At most `limit` ids, `SMALLEST` at least."""
        words = self._memo(text)
        return (self.hf.cls_token_id, *words[-(limit - 2) :], self.hf.sep_token_id)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.hf(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the vocabulary and of how it is applied to one text."""
        content = [sorted(self.hf.get_vocab().items()), self._encode("Who\u2019s caf\u00e9 12.5 [SEP]?")]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@functools.cache
def question_tokenizer(folder: str) -> QuestionTokenizer:
    """The tokenizer of a folder, one per process. Raises DataError when it cannot be read."""
    if not Path(folder).is_dir():
        raise DataError(f"model.qformer.tokenizer_path {folder}: no such folder")
    from transformers import AutoTokenizer

    try:
        return QuestionTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise DataError(f"model.qformer.tokenizer_path {folder}: {str(error).splitlines()[0]}") from error
