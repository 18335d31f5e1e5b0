"""RegionVLMConfig: what is needed to rebuild a RegionVLM, stored as config.json.

In: a vision config (CLIP, SigLIP, EVA-ViT-g), a text config (Llama, Qwen2, T5) and the choices of ours. Out: a
`PreTrainedConfig`. Decision: nested configs keep their own model_type, so any registered tower or causal LM of
transformers, and T5, can be named without a table of ours.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from eventlens_ds.config.run_config import AdapterConfig

ADAPTED = AdapterConfig().tasks
"""Tasks with an adapter in folders that name none."""
ADAPTERS = {name: value for name, value in asdict(AdapterConfig()).items() if name != "tasks"}
"""Settings of adapters that a folder does not give."""


class RegionVLMConfig(PreTrainedConfig):
    """Configuration of a RegionVLM.

    vision_level: hidden state of the tower that the projector reads (-1 last, -2 as in LLaVA).
    visual_pool: patches averaged per side into one visual token; must divide the grid.
    visual_input: projector | aggregator | qformer | all; aggregator: layers (empty: there is none), heads,
    intermediate; qformer: queries (0: there is none), width, heads, layers, intermediate, instruction_tokens,
    vocabulary. soft_prompt: tags are listed behind a learned vector.
    linking: add | insert | none. roi: source, output_size, sampling_ratio, pool, levels (see config.RoIConfig).
    adapters: bottleneck, source, dropout, router, experts, top_k, renormalise (see config.AdapterConfig); tasks: those
    with an adapter of their own, in the order of the adapters. qk_correlation: see model/mimetic.py.
    visual_positions: amplitude of model/projector.py's grid_code on the visual tokens of a grid.
    """

    model_type = "eventlens_region_vlm"
    has_no_defaults_at_init = True

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_level: int = -2,
        visual_pool: int = 1,
        visual_input: str = "projector",
        aggregator: dict[str, Any] | None = None,
        qformer: dict[str, Any] | None = None,
        soft_prompt: bool = False,
        linking: str = "add",
        roi: dict[str, Any] | None = None,
        adapters: dict[str, Any] | None = None,
        tasks: list[str] | None = None,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        qk_correlation: float = 0.0,
        visual_positions: float = 0.0,
        word_spread: float = 0.0,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        # Any: which fields a sub-config has depends on its own model_type.
        self.vision_config: Any = _sub_config(vision_config)
        self.text_config: Any = _sub_config(text_config)
        self.vision_level = vision_level
        self.visual_pool = visual_pool
        self.visual_input = visual_input
        self.aggregator = {"heads": 0, "intermediate": 3072, **(aggregator or {})}
        self.aggregator["layers"] = list(self.aggregator.get("layers", ()))
        self.qformer = {"queries": 0, "instruction_tokens": 0, **(qformer or {})}
        self.soft_prompt = soft_prompt
        self.linking = linking
        self.roi = {
            "source": "tower", "output_size": 7, "sampling_ratio": 2, "pool": "mean", "levels": [-2], **(roi or {})
        }  # fmt: skip
        self.adapters = {**ADAPTERS, **(adapters or {})}
        self.tasks = list(self.adapters.pop("tasks", None) or tasks or ADAPTED)
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.qk_correlation = qk_correlation
        self.visual_positions = visual_positions
        self.word_spread = word_spread
        self.image_mean = list(image_mean or (0.48145466, 0.4578275, 0.40821073))
        self.image_std = list(image_std or (0.26862954, 0.26130258, 0.27577711))
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        return self.text_config or self

    @property
    def encoder_decoder(self) -> bool:
        """The language model encodes the prompt and decodes the answer (T5)."""
        return bool(getattr(self.text_config, "is_encoder_decoder", False))

    @property
    def ffn_layers(self) -> int:
        """Feed-forward layers of the language model, each of which has a place for adapters."""
        layers = self.text_config.num_hidden_layers
        return layers + (self.text_config.num_decoder_layers if self.encoder_decoder else 0)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of one image."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    @property
    def num_prefix_tokens(self) -> int:
        """Class tokens before the patches: 1 for CLIP, 0 for SigLIP."""
        return 0 if self.vision_config.model_type == "siglip_vision_model" else 1

    @property
    def reads_aggregator(self) -> bool:
        """The aggregator's grid is a part of the prompt."""
        return self.visual_input in ("aggregator", "all")

    @property
    def uses_aggregator(self) -> bool:
        """The aggregator runs: for the prompt, or for regions."""
        return self.reads_aggregator or (self.linking != "none" and self.roi["source"] == "aggregator")

    @property
    def reads_qformer(self) -> bool:
        """The Q-Former's queries are a part of the prompt."""
        return self.visual_input in ("qformer", "all")

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image in the prompt: queries, then the class token (of the aggregator) and patches."""
        patches = (self.grid[0] // self.visual_pool) * (self.grid[1] // self.visual_pool)
        if self.visual_input == "projector":
            return patches
        queries = self.qformer["queries"] if self.reads_qformer else 0
        return queries + (self.num_prefix_tokens + patches if self.reads_aggregator else 0)


def _sub_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    if isinstance(config, dict):
        values = dict(config)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    return config
