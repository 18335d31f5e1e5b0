"""Questions of a Q-Former in BERT's word pieces: ids by hand, what is cut, and where the setting reaches.

The vocabulary is a small one written here; transformers' BertTokenizer applies it as it applies the published one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizer, BertTokenizerFast

import eventlens_ds.model  # noqa: F401 - registers the classes
from eventlens_ds.config.load import load
from eventlens_ds.config.run_config import QFormerConfig
from eventlens_ds.data.encode import instruction, rendered_group
from eventlens_ds.data.prompts import text_of
from eventlens_ds.data.question_tokenizer import QuestionTokenizer, question_tokenizer
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.model.processing import RegionVLMProcessor
from tests.small_world import embedded_tokenizer, small_config, small_run

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "why", "is", "the", "dog", "here", "##s", "?", "[", "]", "sep"]
WORDS += [
    "describe",
    "picture",
    ".",
    *"abcdefghijklmnopqrstuvwxyz0123456789",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(WORDS)))
    BertTokenizerFast(vocab={w: i for i, w in enumerate(dict.fromkeys(WORDS))}).save_pretrained(folder / "saved")
    return folder / "saved"


def test_ids_are_bert_s_and_the_end_is_kept(bert: Path) -> None:
    made = question_tokenizer(str(bert))
    at = {word: i for i, word in enumerate(dict.fromkeys(WORDS))}
    question = [at[w] for w in ("why", "is", "the", "dog", "##s", "here", "?")]
    assert made.ids("Why is the dogs here?", 128) == (2, *question, 3)
    assert made.ids("Why is the dogs here?", 5) == (2, *question[-3:], 3)
    # As the released code asks for it: truncation_side left.
    theirs = BertTokenizer.from_pretrained(bert, truncation_side="left")
    for limit in (3, 5, 128):
        told = theirs("Why is the dogs here?", truncation=True, max_length=limit)["input_ids"]
        assert list(made.ids("Why is the dogs here?", limit)) == told
    assert len(made) == len(theirs) + 1 and made.hf.convert_tokens_to_ids("[DEC]") == len(theirs)
    # Text that spells a mark stays text.
    assert made.ids("[SEP]", 128) == (2, at["["], at["sep"], at["]"], 3)
    other = QuestionTokenizer(BertTokenizerFast.from_pretrained(bert, do_lower_case=False))
    assert len(made.fingerprint) == 16 and other.fingerprint == QuestionTokenizer(other.hf).fingerprint


def lion(folder: Path, tokenizer: str) -> Any:
    config = small_config(folder)
    qformer = QFormerConfig(
        2, width=16, heads=2, layers=2, intermediate=24, instruction_tokens=9, tokenizer_path=tokenizer
    )
    model = replace(config.model, visual_input="qformer", qformer=qformer)
    return small_run(folder, replace(config, model=model))


def test_the_setting_reaches_rows_model_lengths_and_processor(world_folder: Path, bert: Path, tmp_path: Path) -> None:
    run, plain = lion(world_folder, str(bert)), lion(world_folder, "")
    words = question_tokenizer(str(bert))
    assert run.architecture.qformer["vocabulary"] == len(words) != plain.architecture.qformer["vocabulary"]
    assert "tokenizer_path" not in run.architecture.qformer, "a folder of one machine is no part of a model"
    member = run.groups_of("vcr_answer")[0]
    text = rendered_group(run.data.group(*member), run.tokenizer, run.spec).samples[0]
    asked = instruction(text, run.tokenizer, run.spec)
    bare = text_of(text.stem).removesuffix(" Answer:")
    assert bare != text_of(text.stem) and asked == words.ids(bare, 9)
    batch = run.batch([member])
    assert batch.instruction_ids[0][batch.instruction_mask[0]].tolist() == list(asked)
    assert run.data.tables[0].fingerprint != plain.data.tables[0].fingerprint

    processor = RegionVLMProcessor.from_spec(run.tokenizer, run.spec)
    processor.save_pretrained(tmp_path)
    assert str(bert) not in (tmp_path / "processor_config.json").read_text()
    loaded = RegionVLMProcessor.from_pretrained(tmp_path)
    assert loaded.question_words == str(tmp_path / "question_tokenizer")
    picture = np.zeros((48, 48, 3), np.uint8)
    rows = [p(picture, question="why is the dog here?") for p in (processor, loaded)]
    assert rows[0].instruction_ids.tolist() == rows[1].instruction_ids.tolist()
    assert rows[0].instruction_ids[0].tolist() == list(words.ids("why is the dog here?", 9))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--model.qformer.tokenizer_path=x"], "queries is 0, so there is no Q-Former"),
        (
            ["--model.qformer.tokenizer_path=x", "--model.qformer.queries=2", "--model.qformer.instruction_tokens=0"],
            "instruction_tokens is 0, below 3",
        ),
    ],
)
def test_a_setting_that_nobody_reads_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(None, settings)


def test_a_folder_that_is_none_and_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer_path .*nowhere: no such folder"):
        question_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no \[CLS\] and \[SEP\]"):
        QuestionTokenizer(embedded_tokenizer().hf)
