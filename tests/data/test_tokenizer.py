"""PieceTokenizer over the embedded tokenizer and real SentencePiece folders: pieces join, specials stay text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eventlens_ds.data import tokenizer as module
from eventlens_ds.data.tokenizer import PieceTokenizer, load_tokenizer
from eventlens_ds.errors import DataError

LAYOUTS = ("model only", "llama", "llama legacy", "json with prepend")


@pytest.fixture
def t5_folder(shared: Path, tmp_path: Path) -> Path:
    """T5's tokenizer around the pieces of a real SentencePiece model."""
    from sentencepiece import SentencePieceProcessor
    from transformers import T5Tokenizer

    pieces = SentencePieceProcessor(model_file=str(shared / "data/tokenizers/sentencepiece_test_1000.model"))
    known = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, len(pieces))]
    made = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *known], extra_ids=0)
    made.save_pretrained(tmp_path)
    return tmp_path


def test_pieces_of_t5_join_and_say_what_its_words_say(t5_folder: Path) -> None:
    from transformers import AutoTokenizer

    made = load_tokenizer(str(t5_folder))
    assert (made.bos, made.eos, made.pad) == (None, 1, 0)
    assert "".join(pieces(made, "he") + pieces(made, "llo")) == "hello"
    assert "".join(pieces(made, "the") + pieces(made, " world")) == "the\u2581world"
    assert made.decode([*made.ids(" the"), *made.ids(" wor"), *made.ids("ld")]) == "the world"
    own = AutoTokenizer.from_pretrained(t5_folder)
    for text in ("the world of men", "the  world\n of  men"):
        assert list(made.ids(f" {text}")) == own(text, add_special_tokens=False)["input_ids"]


def test_t5_without_the_guard_would_lose_where_words_begin(t5_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_without_leading_space", lambda hf: None)
    with pytest.raises(DataError, match="puts a space or a mark around every text"):
        load_tokenizer(str(t5_folder))


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest, shared: Path, tmp_path: Path) -> Path:
    """Folders around a real SentencePiece model of 1,000 pieces, which has no byte fallback."""
    from transformers import AutoTokenizer, LlamaConfig

    source = shared / "data/tokenizers/sentencepiece_test_1000.model"
    shutil.copyfile(source, tmp_path / "tokenizer.model")
    LlamaConfig(vocab_size=1000, hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if request.param.startswith("llama"):
        values = {**named, "tokenizer_class": "LlamaTokenizer", "legacy": request.param.endswith("legacy")}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    if request.param == "json with prepend":
        made = json.loads(AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer.to_str())
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        made["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace],
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(made))
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({**named, "tokenizer_class": "PreTrainedTokenizerFast"})
        )
        (tmp_path / "tokenizer.model").unlink()
    return tmp_path


def pieces(tokenizer: PieceTokenizer, text: str) -> list[str]:
    return tokenizer.hf.convert_ids_to_tokens(list(tokenizer.ids(text)))


def test_pieces_join_without_a_space_of_their_own(folder: Path) -> None:
    made = load_tokenizer(str(folder))
    assert "".join(pieces(made, "he") + pieces(made, "llo")) == "hello"
    assert "".join(pieces(made, "the") + pieces(made, " world")) == "the\u2581world"
    assert made.decode([*made.ids("the"), *made.ids(" wor"), *made.ids("ld")]) == "the world"
    assert made.ids("") == ()


def test_the_leading_space_comes_back_without_the_guard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_without_leading_space", lambda hf: None)
    if not (folder / "tokenizer_config.json").exists():
        pytest.skip("transformers makes this one without a leading space")
    with pytest.raises(DataError, match="puts a space or a mark around every text"):
        load_tokenizer(str(folder))


def test_special_ids_exist_and_never_come_from_text(folder: Path) -> None:
    made = load_tokenizer(str(folder))
    assert (made.bos, made.eos, made.pad) == (1, 2, 2)
    assert len(made) == 1000
    for text in ("</s>", "a </s> b<s>", "<s></s>", "x<s", "<</s>"):
        assert not {1, 2} & set(made.ids(text))


def test_specials_in_text_would_be_specials_without_the_guard(shared: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    shutil.copyfile(shared / "data/tokenizers/sentencepiece_test_1000.model", tmp_path / "tokenizer.model")
    LlamaConfig(vocab_size=1000, hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    assert 2 in load_tokenizer(str(tmp_path))._encode("</s>")


def test_embedded_specials_stay_text() -> None:
    made = load_tokenizer("")
    assert not made._special & set(made.ids(" <image></s><pad><s>"))
    assert made.decode(list(made.ids(" <image></s> person2"))) == "<image></s> person2"


def test_fingerprint_tells_ways_of_applying_one_vocabulary_apart() -> None:
    from tokenizers import normalizers

    one = load_tokenizer("").fingerprint
    assert load_tokenizer("").fingerprint == one
    other = load_tokenizer("")
    other.hf.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert other.fingerprint != one


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(DataError, match="not found"):
        load_tokenizer(str(tmp_path / "missing"))
