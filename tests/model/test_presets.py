"""Presets and folders to a RegionVLMConfig: whose value wins, and what is refused in one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.config.run_config import ModelConfig
from eventlens_ds.data.tokenizer import PieceTokenizer, load_tokenizer
from eventlens_ds.errors import UserError
from eventlens_ds.model.presets import CLIP_STATISTICS, SIGLIP_STATISTICS, model_config, preset
from tests.model import tiny_folders as tiny


@pytest.fixture(scope="module")
def tokenizer() -> PieceTokenizer:
    return load_tokenizer("")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PieceTokenizer) -> Path:
    root = tmp_path_factory.mktemp("folders")
    tiny.clip().config.save_pretrained(root / "clip")
    tiny.siglip().config.save_pretrained(root / "siglip")
    tiny.llama(len(tokenizer) - 5).config.save_pretrained(root / "llama")
    tiny.llava(len(tokenizer)).config.save_pretrained(root / "llava")
    return root


def refusal(tokenizer: PieceTokenizer, **model: Any) -> str:
    with pytest.raises(UserError) as caught:
        model_config(ModelConfig(**model), tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_published_presets_refuse_to_start_from_nothing(tokenizer: PieceTokenizer, folders: Path) -> None:
    for name in ("vicuna7b-clipL336", "qwen-siglip"):
        assert "starts from published weights" in refusal(tokenizer, preset=name)
        assert model_config(ModelConfig(preset=name), tokenizer, from_scratch_is_fine=True)
        assert "model.language_path" in refusal(tokenizer, preset=name, vision_path=str(folders / "clip"))
    for name in ("tiny", "small", "base"):
        assert preset(name, len(tokenizer)).from_scratch and model_config(ModelConfig(preset=name), tokenizer)
    assert "known presets are tiny, small, base" in refusal(tokenizer, preset="huge")


def test_a_folder_brings_its_own_sizes(tokenizer: PieceTokenizer, folders: Path) -> None:
    made = model_config(ModelConfig(vision_path=str(folders / "clip")), tokenizer)
    assert (made.vision_config.hidden_size, made.vision_config.image_size) == (16, 24)
    # A preset's pooling belongs to its own tower.
    assert made.visual_pool == 1 and made.visual_tokens == 4
    assert model_config(ModelConfig(), tokenizer).visual_pool == preset("tiny", 9).visual_pool
    text = "the tower in .* takes 24"
    with pytest.raises(UserError, match=text):
        model_config(ModelConfig(vision_path=str(folders / "clip"), image_size=48), tokenizer)


def test_the_vocabulary_grows_only_for_the_tokenizer(
    tokenizer: PieceTokenizer, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        made = model_config(ModelConfig(language_path=str(folders / "llama")), tokenizer)
    assert made.text_config.vocab_size == len(tokenizer)
    assert f"vocabulary grows from {len(tokenizer) - 5} to {len(tokenizer)}" in caplog.text
    assert model_config(ModelConfig(preset="base"), tokenizer).text_config.vocab_size == 32000


def test_pixel_statistics_come_from_the_folder(tokenizer: PieceTokenizer, folders: Path) -> None:
    path = folders / "siglip"
    made = model_config(ModelConfig(vision_path=str(path)), tokenizer)
    assert (tuple(made.image_mean), tuple(made.image_std)) == SIGLIP_STATISTICS
    clip = folders / "clip/preprocessor_config.json"
    made = model_config(ModelConfig(vision_path=str(clip.parent)), tokenizer)
    assert (tuple(made.image_mean), tuple(made.image_std)) == CLIP_STATISTICS
    for text, mean in (({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}, [0.1, 0.2, 0.3]),):
        clip.write_text(json.dumps(text))
        assert model_config(ModelConfig(vision_path=str(clip.parent)), tokenizer).image_mean == mean
    clip.write_text(json.dumps({"image_mean": [0.1], "image_std": [1]}))
    assert f"{clip}: image_mean" in refusal(tokenizer, vision_path=str(clip.parent))
    clip.unlink()


def test_llava_decides_level_and_parts(tokenizer: PieceTokenizer, folders: Path) -> None:
    made = model_config(ModelConfig(preset="vicuna7b-clipL336", init_from=str(folders / "llava")), tokenizer)
    assert made.vision_level == -2 and made.roi["levels"] == [-2] and made.text_config.hidden_size == 16
    both = {"init_from": str(folders / "llava"), "vision_path": str(folders / "clip")}
    assert "name one or the other" in refusal(tokenizer, **both)
    assert "is not the LLaVA-1.5 layout" in refusal(tokenizer, init_from=str(folders / "llama"))


def test_missing_and_broken_folders_are_named(tokenizer: PieceTokenizer, tmp_path: Path) -> None:
    assert f"model.vision_path {tmp_path}: no config.json there" in refusal(tokenizer, vision_path=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert str(tmp_path) in refusal(tokenizer, language_path=str(tmp_path))
