"""RegionVLMConfig: it survives a round trip through config.json, nested configurations included."""

from __future__ import annotations

from pathlib import Path

import pytest

from eventlens_ds.config.run_config import ModelConfig
from eventlens_ds.data.tokenizer import load_tokenizer
from eventlens_ds.model.configuration import RegionVLMConfig
from eventlens_ds.model.presets import model_config


@pytest.mark.parametrize("preset", ["tiny", "base", "vicuna7b-clipL336", "qwen-siglip", "tiny-t5", "lion-flant5xl"])
def test_it_survives_config_json(tmp_path: Path, preset: str) -> None:
    made = model_config(ModelConfig(preset=preset), load_tokenizer(""), from_scratch_is_fine=True)
    made.save_pretrained(tmp_path)
    again = RegionVLMConfig.from_pretrained(tmp_path)
    assert type(again.vision_config) is type(made.vision_config)
    assert type(again.text_config) is type(made.text_config)
    before, after = made.to_dict(), again.to_dict()
    assert {k: v for k, v in after.items() if k != "_name_or_path"} == {
        k: v for k, v in before.items() if k != "_name_or_path"
    }
    assert (again.grid, again.visual_tokens, again.num_prefix_tokens) == (
        made.grid,
        made.visual_tokens,
        made.num_prefix_tokens,
    )


def test_class_tokens_and_grid_follow_the_tower() -> None:
    tokenizer = load_tokenizer("")
    clip = model_config(ModelConfig(preset="base"), tokenizer)
    siglip = model_config(ModelConfig(preset="qwen-siglip"), tokenizer, from_scratch_is_fine=True)
    assert (clip.grid, clip.num_prefix_tokens) == ((24, 24), 1)
    assert (siglip.grid, siglip.num_prefix_tokens) == ((27, 27), 0)
