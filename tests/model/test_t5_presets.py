"""Presets, folders and settings of T5: sizes of LION as published, weights bit-equal, refusals in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel, MT5Config, T5Config, T5ForConditionalGeneration

from eventlens_ds.config.load import load
from eventlens_ds.config.run_config import ModelConfig, RunConfig
from eventlens_ds.data.tokenizer import load_tokenizer
from eventlens_ds.errors import UserError
from eventlens_ds.model.attention import BLOCKS
from eventlens_ds.model.configuration import RegionVLMConfig
from eventlens_ds.model.presets import CLIP_STATISTICS, model_config
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.model.t5 import T5
from eventlens_ds.runtime.build_model import describe
from eventlens_ds.train.flops import StepFlops
from tests.model import tiny_folders as tiny

SIZES = {
    # language model, adapters and gates, MLP of the aggregator (millions)
    "lion-flant5xl": (2849.8, 25.8, 19.5),
    "lion-flant5xxl": (11135.3, 51.5, 31.0),
}


def millions(model: Any, *prefixes: str) -> float:
    return round(sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefixes)) / 1e6, 1)


@pytest.mark.parametrize("preset", SIZES)
def test_parameters_are_those_of_lion(preset: str) -> None:
    """Computed on the meta device from a recipe, as its dry run does."""
    architecture, _, spec = describe(load("lion_stage4", [f"--model.preset={preset}"]), dry=True)
    with torch.device("meta"):
        model = RegionVLM(architecture)
    language, adapters, mlp = SIZES[preset]
    assert millions(model, "language_model.") == language
    assert millions(model, "adapters.") == adapters
    assert millions(model, "aggregator.") == 49.1
    assert millions(model, "aggregator_mlp.") == mlp
    assert millions(model, "vision_tower.") == 986.0
    per_layer = {sum(p.numel() for p in layer.parameters()) for layer in model.adapters}
    assert len(model.adapters) == 48 and per_layer == {{"lion-flant5xl": 536_706, "lion-flant5xxl": 1_073_282}[preset]}
    assert model.language_model.lm_head.weight is not model.language_model.shared.weight
    assert architecture.text_config.dense_act_fn == "gelu"
    assert (architecture.image_mean, architecture.image_std) == tuple(map(list, CLIP_STATISTICS))
    # 32 queries, class token and 16 x 16 patches; the prompt ends with </s>.
    assert spec.vision.tokens == 32 + 257 and spec.vision.image_size == 224 and spec.encoder_decoder


def t5(vocabulary: int, **changes: Any) -> Any:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **{**shape, **changes})
    config.eos_token_id = 2
    return config


def saved(folder: Path, *, tied: bool, vocabulary: int) -> Any:
    """A T5 folder as transformers writes it; an untied one has a head of its own, as FLAN-T5."""
    config = t5(vocabulary, tie_word_embeddings=tied)
    model = tiny.randomised(T5._from_config(config, source="residual"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    config.save_pretrained(folder)
    text = (folder / "config.json").read_text()
    # Published files say so; transformers 5 writes true whatever it read.
    (folder / "config.json").write_text(
        text.replace('"tie_word_embeddings": true', f'"tie_word_embeddings": {str(tied).lower()}')
    )
    tiny.with_tokenizer(folder)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_t5_arrives_bit_equal(tmp_path: Path, tied: bool) -> None:
    theirs = saved(tmp_path / "t5", tied=tied, vocabulary=len(load_tokenizer("")))
    case = {"model": {"language_path": str(tmp_path / "t5")}}
    model, base, names = tiny.loaded(case, 0)
    ours = model.language_model
    assert (ours.lm_head.weight is ours.shared.weight) == tied == ours.config.scale_decoder_outputs
    assert ours.encoder.embed_tokens.weight is ours.shared.weight
    found = tiny.digests(model)
    expected = {f"language_model.{n}": tiny.digest(p) for n, p in theirs.named_parameters()}
    assert expected.items() <= found.items() and set(expected) <= names and base


def test_a_vocabulary_grows_in_embeddings_and_head(tmp_path: Path) -> None:
    size = len(load_tokenizer(""))
    theirs = saved(tmp_path / "t5", tied=False, vocabulary=size - 3)
    model, _, _ = tiny.loaded({"model": {"language_path": str(tmp_path / "t5")}}, 0)
    for ours, old in (
        (model.language_model.shared.weight, theirs.shared.weight),
        (model.language_model.lm_head.weight, theirs.lm_head.weight),
    ):
        assert torch.equal(ours[:-3], old) and torch.allclose(ours[-3:], old.mean(0).expand(3, -1))


def test_a_head_of_its_own_reads_the_unscaled_state(tmp_path: Path) -> None:
    """Against transformers, which loads such a folder untied because the two matrices differ."""
    saved(tmp_path / "t5", tied=False, vocabulary=20)
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").eval()
    assert not theirs.config.scale_decoder_outputs and theirs.lm_head.weight is not theirs.shared.weight
    ours = tiny.loaded({"model": {"language_path": str(tmp_path / "t5")}}, 0)[0].language_model.eval()
    # Three tokens of prompt, the start, two of an answer.
    starts = torch.arange(6) == 3
    tree = {"parents": torch.tensor([-1, 0]), "bounds": torch.tensor([[0, 4], [4, 6]]), "start_slots": starts}
    row: Any = SimpleNamespace(**tree, task_ids=torch.zeros(6, dtype=torch.int64))
    embeds = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours.lm_head(ours.states(embeds, row, BLOCKS, lambda _: None)[3:])
        expected = theirs(inputs_embeds=embeds[None, :3], decoder_inputs_embeds=embeds[None, 3:]).logits[0]
    assert (logits[:, : expected.shape[1]] - expected).abs().max() <= 1e-5


def test_the_preset_decides_the_activation_of_a_folder(tmp_path: Path) -> None:
    saved(tmp_path / "t5", tied=False, vocabulary=20)
    model = ModelConfig(preset="lion-flant5xl", language_path=str(tmp_path / "t5"))
    made = model_config(model, load_tokenizer(""), from_scratch_is_fine=True)
    assert made.text_config.dense_act_fn == "gelu" and made.text_config.d_model == 16
    made = model_config(ModelConfig(language_path=str(tmp_path / "t5")), load_tokenizer(""))
    assert made.text_config.dense_act_fn == "gelu_new"


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back(tmp_path: Path, tied: bool) -> None:
    architecture = model_config(ModelConfig(preset="tiny-t5"), load_tokenizer(""))
    architecture.text_config = t5(len(load_tokenizer("")), tie_word_embeddings=tied, dense_act_fn="gelu")
    architecture.text_config._attn_implementation = "sdpa"
    model = tiny.randomised(RegionVLM._from_config(architecture, dtype=torch.float32))
    model.save_pretrained(tmp_path)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert isinstance(again.config, RegionVLMConfig) and again.config.text_config.dense_act_fn == "gelu"
    assert again.language_model.config.scale_decoder_outputs == tied
    assert tiny.digests(again) == tiny.digests(model)


def refusal(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        describe(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_t5_cannot_have_is_refused_in_one_line(tmp_path: Path) -> None:
    said = refusal(load("tiny_vcr", ["--model.preset=tiny-t5", "--data.group_tokens=100"]))
    assert "data.group_tokens 100" in said and "share no group" in said
    assert "no varlen kernel" in refusal(load("tiny_vcr", ["--model.preset=tiny-t5", "--model.attention=varlen"]))
    routed = ["--model.preset=tiny-t5", "--model.adapters.router=topk", "--stage.train=[adapters,router]"]
    said = refusal(load("tiny_vcr", routed))
    assert "objective.load_balance" in said and "not for T5" in said
    for name in ("lion-flant5xl", "lion-flant5xxl"):
        assert "starts from published weights" in refusal(RunConfig(model=ModelConfig(preset=name)))
    saved(tmp_path / "t5", tied=True, vocabulary=20)
    config = T5Config.from_pretrained(tmp_path / "t5")
    config.decoder_start_token_id = 5
    config.save_pretrained(tmp_path / "t5")
    said = refusal(RunConfig(model=ModelConfig(language_path=str(tmp_path / "t5"))))
    assert "its padding token is 0, but the decoder of T5 starts with 5" in said
    MT5Config().save_pretrained(tmp_path / "mt5")
    tiny.with_tokenizer(tmp_path / "mt5")
    said = refusal(RunConfig(model=ModelConfig(language_path=str(tmp_path / "mt5"))))
    assert "mt5 is an encoder-decoder but not T5" in said


def test_flops_count_one_stack_a_token() -> None:
    architecture = model_config(ModelConfig(preset="tiny-t5"), load_tokenizer(""))
    with torch.device("meta"):
        model = RegionVLM(architecture)
    model.requires_grad_(False)
    language = model.language_model.encoder.block
    own = [*language.parameters(), *model.language_model.encoder.final_layer_norm.parameters()]
    adapters = [p for layer in model.adapters[:3] for p in layer.parameters()]
    # Forward, and backward through weights that do not learn.
    assert StepFlops(model, architecture)(10, 0) == (2 + 2) * 10 * sum(p.numel() for p in [*own, *adapters])
