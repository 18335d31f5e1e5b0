"""Presets: shapes of the models a recipe can name, and the RegionVLMConfig that RunConfig describes.

In: `ModelConfig`, the size of the vocabulary. Out: a `RegionVLMConfig` and the tokenizer path. Decision: a preset
is only a shape. Published weights come from folders (model.vision_path, model.language_path); a preset that is meant
for published weights refuses to train from scratch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
    T5Config,
)

from eventlens_ds.config.run_config import ModelConfig, QFormerConfig
from eventlens_ds.data.encode import EncodeSpec, Linking, VisionSpec
from eventlens_ds.data.prompts import PromptStyle
from eventlens_ds.data.question_tokenizer import question_tokenizer
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.errors import UserError
from eventlens_ds.model.attention import choose_form
from eventlens_ds.model.configuration import RegionVLMConfig

log = logging.getLogger(__name__)

CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP_STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TOWERS = ("clip_vision_model", "siglip_vision_model", "instructblip_vision_model")
FLAN_T5: dict[str, dict[str, Any]] = {
    "lion-flant5xl": {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "tie_word_embeddings": False},
    "lion-flant5xxl": {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "tie_word_embeddings": False},
}
"""Sizes by preset; both have 24 + 24 layers, heads of 64 and an output matrix of their own."""


PRESETS = ("tiny", "small", "base", "vicuna7b-clipL336", "qwen-siglip", "tiny-t5", *FLAN_T5)

TINY_INIT = 0.08
"""Standard deviation of the tiny preset's weights, about 1 / sqrt(width): with 0.02 it learns far more slowly."""
SMALL_INIT = 0.07
"""The same for the small preset."""


@dataclass(frozen=True)
class Preset:
    """from_scratch: the preset may be trained from random weights (tower included). text_changes: fields of the
    language model's configuration that a folder does not decide."""

    vision: PreTrainedConfig
    text: PreTrainedConfig
    vision_level: int
    from_scratch: bool
    about: str
    visual_pool: int = 1
    initializer_range: float = 0.02
    text_changes: dict[str, Any] = field(default_factory=dict)


def preset(name: str, vocabulary: int) -> Preset:
    """A preset by name. Raises UserError naming the known ones."""
    if name == "tiny":
        about = "demo size; the tower is trained from scratch"
        return _from_scratch(vocabulary, width=128, layers=3, heads=4, image_size=96, spread=TINY_INIT, about=about)
    if name == "small":
        about = "size of world_small; the tower is trained from scratch"
        return _from_scratch(vocabulary, width=192, layers=4, heads=6, image_size=144, spread=SMALL_INIT, about=about)
    if name == "tiny-t5":
        return _tiny_t5(vocabulary)
    if name in FLAN_T5:
        return _lion(name)
    clip_l = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    if name == "base":
        text = LlamaConfig(
            vocab_size=max(vocabulary, 32000),
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            max_position_embeddings=4096,
        )
        return Preset(clip_l, text, -2, True, "CLIP-L/14-336 shape with a Llama-shaped 1.5 B language model")
    if name == "vicuna7b-clipL336":
        return Preset(
            clip_l,
            LlamaConfig(max_position_embeddings=4096),
            -2,
            False,
            "Vicuna-7B v1.5 with CLIP-L/14-336, the LLaVA-1.5 pair",
        )
    if name == "qwen-siglip":
        vision = SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        )
        qwen = Qwen2Config(
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        )
        return Preset(vision, qwen, -2, False, "Qwen2.5-1.5B shape with SigLIP-so400m/14-384")
    raise UserError(f"model.preset {name!r}: known presets are {', '.join(PRESETS)}")


def _tiny_t5(vocabulary: int) -> Preset:
    """The tower of tiny before a T5 of its size; the head is tied to the embeddings, as it learns faster so."""
    text = T5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
    )
    return replace(preset("tiny", vocabulary), text=text, about="tiny with an encoder-decoder, trained from scratch")


def _lion(name: str) -> Preset:
    """EVA-ViT-g/14 as transformers' InstructBLIP has it, before FLAN-T5-XL or -XXL (LION-4B, LION-12B)."""
    vision = InstructBlipVisionConfig(
        hidden_size=1408,
        intermediate_size=6144,
        num_hidden_layers=39,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        qkv_bias=True,
    )
    text = T5Config(
        vocab_size=32128,
        d_kv=64,
        num_layers=24,
        feed_forward_proj="gated-gelu",
        **FLAN_T5[name],
    )
    about = f"EVA-ViT-g/14-224 with FLAN-T5-{name.removeprefix('lion-flant5').upper()}, the pair of LION"
    # LION runs FLAN-T5 with exact GELU in place of the approximation it was trained with [released code].
    return Preset(vision, text, -1, False, about, text_changes={"dense_act_fn": "gelu"})


def _from_scratch(
    vocabulary: int, *, width: int, layers: int, heads: int, image_size: int, spread: float, about: str
) -> Preset:
    """Tower and language model of one width and depth, for the embedded world; patches of 12 px, pooled 2 x 2."""
    shape: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "initializer_range": spread,
    }
    return Preset(
        CLIPVisionConfig(intermediate_size=4 * width, image_size=image_size, patch_size=12, **shape),
        LlamaConfig(
            vocab_size=vocabulary,
            intermediate_size=2 * width,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            **shape,
        ),
        vision_level=-1,
        visual_pool=2,
        initializer_range=spread,
        from_scratch=True,
        about=about,
    )


def model_config(
    model: ModelConfig,
    tokenizer: PieceTokenizer,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    from_scratch_is_fine: bool = False,
) -> RegionVLMConfig:
    """The architecture of a run; device and dtype decide what model.attention "auto" means.

    `from_scratch_is_fine` allows a shape without its published weights (dry run, tests).
    """
    known = preset(model.preset, len(tokenizer))
    vision, text, level = _parts(model, known, from_scratch_is_fine)
    if model.image_size:
        folder = model.vision_path or model.init_from
        if folder and model.image_size != vision.image_size:
            raise UserError(f"model.image_size {model.image_size}: the tower in {folder} takes {vision.image_size}")
        vision.image_size = model.image_size
    if len(tokenizer) > text.vocab_size:
        # Only a folder's vocabulary can be too small: those of presets are made to fit.
        folder = model.language_path or model.init_from or "preset " + model.preset
        log.info("%s: vocabulary grows from %d to %d for the tokenizer", folder, text.vocab_size, len(tokenizer))
        text.vocab_size = len(tokenizer)
    for key, value in known.text_changes.items():
        if getattr(text, key) != value:
            log.info("preset %s: %s of the language model is %r, not %r", model.preset, key, value, getattr(text, key))
            setattr(text, key, value)
    encoder_decoder = bool(getattr(text, "is_encoder_decoder", False))
    if encoder_decoder:
        _check_t5(text, model, tokenizer)
    if model.qk_correlation and (encoder_decoder or model.language_path or model.init_from):
        why = "T5 has no such start" if encoder_decoder else "a published language model keeps its own weights"
        raise UserError(f"model.qk_correlation {model.qk_correlation}: {why}; set it to 0")
    if model.word_spread:
        if encoder_decoder or model.language_path or model.init_from:
            why = "T5 keeps its own start" if encoder_decoder else "a published language model keeps its own weights"
            raise UserError(f"model.word_spread {model.word_spread}: {why}; set it to 0")
        text.tie_word_embeddings = False
    text._attn_implementation = choose_form(model.attention, device, dtype, encoder_decoder=encoder_decoder)
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False
    mean, std = _statistics(vision, model.vision_path or model.init_from)
    return RegionVLMConfig(
        vision_config=vision,
        text_config=text,
        vision_level=level,
        visual_pool=model.visual_pool or (known.visual_pool if vision is known.vision else 1),
        visual_input=model.visual_input,
        aggregator={**asdict(model.aggregator), "heads": model.aggregator.heads or vision.num_attention_heads},
        qformer=qformer_shape(model.qformer, text.vocab_size),
        soft_prompt=model.soft_prompt,
        linking=model.linking,
        roi={**asdict(model.roi), "levels": list(model.roi.levels or (level,))},
        adapters=asdict(model.adapters),
        dropout=model.dropout,
        initializer_range=known.initializer_range,
        qk_correlation=model.qk_correlation,
        visual_positions=model.visual_positions,
        word_spread=model.word_spread,
        image_mean=list(mean),
        image_std=list(std),
    )


def encode_spec(config: RegionVLMConfig, style: PromptStyle, question_folder: str = "") -> EncodeSpec:
    """What the data side must know of an architecture. question_folder: model.qformer.tokenizer_path."""
    mean, std = ((x[0], x[1], x[2]) for x in (config.image_mean, config.image_std))
    vision = VisionSpec(config.vision_config.image_size, config.visual_tokens, mean, std)
    instruction_tokens = config.qformer["instruction_tokens"] if config.reads_qformer else 0
    folder = question_folder if instruction_tokens else ""
    linking = cast(Linking, config.linking)
    positions = 0 if config.encoder_decoder else int(getattr(config.text_config, "max_position_embeddings", 0) or 0)
    return EncodeSpec(vision, linking, style, instruction_tokens, folder, config.encoder_decoder, positions)


def qformer_shape(qformer: QFormerConfig, vocabulary: int) -> dict[str, Any]:
    """The Q-Former of a run, with as many words as its tokenizer has. The tokenizer's folder is no part of it."""
    shape = asdict(qformer)
    folder = shape.pop("tokenizer_path")
    return {**shape, "vocabulary": len(question_tokenizer(folder)) if folder else vocabulary}


def _check_t5(text: Any, model: ModelConfig, tokenizer: PieceTokenizer) -> None:
    """Raises UserError for an encoder-decoder other than T5, and for a tokenizer whose padding token, with which
    T5's decoder starts, is another one than the model's."""
    if text.model_type != "t5":
        raise UserError(
            f"model.language_path {model.language_path}: {text.model_type} is an encoder-decoder but not T5"
        )
    start = getattr(text, "decoder_start_token_id", None)
    start = text.pad_token_id if start is None else start
    if start != tokenizer.pad:
        where = model.tokenizer_path or model.language_path or "the embedded tokenizer"
        raise UserError(f"{where}: its padding token is {tokenizer.pad}, but the decoder of T5 starts with {start}")


def _parts(model: ModelConfig, known: Preset, from_scratch_is_fine: bool) -> tuple[Any, Any, int]:
    """Configurations of tower and language model and the level that is read: from folders, else from the preset."""
    if model.init_from:
        for key, path in (("model.vision_path", model.vision_path), ("model.language_path", model.language_path)):
            if path:
                raise UserError(f"{key}: model.init_from brings tower and language model; name one or the other")
        return _llava_parts(model.init_from)
    vision = _folder_config(model.vision_path, "model.vision_path") if model.vision_path else known.vision
    text = _folder_config(model.language_path, "model.language_path") if model.language_path else known.text
    if not known.from_scratch and not from_scratch_is_fine:
        for key, path in (("model.vision_path", model.vision_path), ("model.language_path", model.language_path)):
            if not path:
                raise UserError(f"{key}: preset {model.preset!r} starts from published weights; name their folder")
    vision = getattr(vision, "vision_config", vision)
    if vision.model_type not in TOWERS:
        raise UserError(f"model.vision_path {model.vision_path}: {vision.model_type} is not one of {', '.join(TOWERS)}")
    if not hasattr(text, "vocab_size"):
        raise UserError(f"model.language_path {model.language_path}: {text.model_type} is not a causal language model")
    return vision, text, known.vision_level


def _llava_parts(folder: str) -> tuple[Any, Any, int]:
    """Those of a LLaVA-1.5 folder. Raises UserError for what our projector would compute otherwise."""
    llava = _folder_config(folder, "model.init_from")
    if llava.model_type != "llava" or llava.vision_config.model_type not in TOWERS:
        raise UserError(f"model.init_from {folder}: {llava.model_type} is not the LLaVA-1.5 layout")
    wanted = {
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "multimodal_projector_bias": True,
    }
    for key, value in wanted.items():
        if getattr(llava, key) != value:
            raise UserError(f"model.init_from {folder}: {key} is {getattr(llava, key)!r}, only {value!r} is supported")
    if not isinstance(llava.vision_feature_layer, int):
        raise UserError(f"model.init_from {folder}: vision_feature_layer {llava.vision_feature_layer} is not one level")
    llava.text_config.tie_word_embeddings = llava.tie_word_embeddings
    return llava.vision_config, llava.text_config, llava.vision_feature_layer


def _statistics(vision: Any, folder: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of pixels: the folder's own when it says so, else those its kind was trained with."""
    usual = SIGLIP_STATISTICS if vision.model_type == "siglip_vision_model" else CLIP_STATISTICS
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = Path(folder) / name
        if not folder or not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            found = found.get("image_processor", found)
            mean, std = found.get("image_mean", usual[0]), found.get("image_std", usual[1])
            if len(mean) == len(std) == 3 and all(isinstance(x, int | float) for x in (*mean, *std)) and min(std) > 0:
                return mean, std
        except (ValueError, AttributeError, TypeError):
            pass
        raise UserError(f"{path}: image_mean and image_std are not three numbers each")
    return usual


def _folder_config(folder: str, key: str) -> Any:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{key} {folder}: no config.json there")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key} {folder}: {str(error).splitlines()[0]}") from error
