"""RegionVLM: vision tower, projector, region features, linking, language model with task adapters.

Shapes: N images, P patches, R regions, T tokens of the row, K supervised tokens, V vision width, D model width.
The forward of one row:
  1. vision      pixel_values [N, 3, H, W] -> hidden states of the tower, in an agreed number of calls
  2. visual      projector, Q-Former or aggregator, or both of the last -> visual [N, P', D]
  3. regions     RoI-align of the chosen hidden states or of the aggregator -> regions [R, D]
  4. splice      visual tokens, region features and the soft prompt into the embeddings [T, D]
  5. language    decoder layers over the segment tree, or encoder and decoder (model/t5.py), adapters by task id
                 -> hidden [T, D]
  6. head        only at positions that predict a supervised token -> log-probability [K]
Decision: the forward takes one packed row and returns log-probabilities, not a loss, because every objective is a
sum over leaves with a denominator that only the step knows (P8).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, InstructBlipVisionModel, PreTrainedModel
from transformers import initialization as init

from eventlens_ds.data.records import Batch
from eventlens_ds.model.adapters import Adapters, Balance, Routing, adapt_layers, new_adapters
from eventlens_ds.model.aggregator import AggregatorMLP, VisionAggregator
from eventlens_ds.model.attention import attention_kwargs
from eventlens_ds.model.configuration import RegionVLMConfig
from eventlens_ds.model.post_norm import BertLinear, SelfInitialised, init_weights
from eventlens_ds.model.projector import Projector, grid_code, pool_patches
from eventlens_ds.model.qformer import QFormer
from eventlens_ds.model.regions import RegionEncoder
from eventlens_ds.model.splice import link_regions, splice_hint, splice_images
from eventlens_ds.model.t5 import T5


class SoftPrompt(nn.Module, SelfInitialised):
    """LION's learned vector before the tags of an image; it starts as an embedding of the language model does."""

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.hint = nn.Parameter(torch.empty(width))

    def initialise(self) -> None:
        init.normal_(self.hint, std=self.std)

    def forward(self, embeds_TD: torch.Tensor, soft_slots_T: torch.Tensor) -> torch.Tensor:
        return splice_hint(embeds_TD, self.hint, soft_slots_T)


class Encoded(NamedTuple):
    """visual [N', P', D] and regions [R', D] (None without linking) of a row, see `visual_tokens`, `encode_regions`."""

    visual: torch.Tensor
    regions: torch.Tensor | None


class RegionVLM(PreTrainedModel):
    config_class = RegionVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: RegionVLMConfig) -> None:
        super().__init__(config)
        vision_width, width = config.vision_config.hidden_size, config.text_config.hidden_size
        # Given explicitly, because each nested config would otherwise bring the dtype it was saved with.
        dtype = torch.get_default_dtype()
        self.vision_tower = _vision_tower(config, dtype)
        self.language_model = _language_model(config, dtype)
        if config.visual_input == "projector":
            self.projector = Projector(vision_width, width, config.dropout)
        self._add_branches(vision_width, width)
        if config.linking != "none":
            self.regions = RegionEncoder(
                vision_width,
                width,
                image_size=config.vision_config.image_size,
                patch_size=config.vision_config.patch_size,
                grid=config.grid,
                num_prefix_tokens=config.num_prefix_tokens,
                output_size=config.roi["output_size"],
                sampling_ratio=config.roi["sampling_ratio"],
                pool=config.roi["pool"],
                dropout=config.dropout,
            )
        self.adapters = nn.ModuleList(
            new_adapters(config.adapters, config.tasks, width)
            for _ in range(config.ffn_layers if config.adapters["bottleneck"] else 0)
        )
        self.post_init()

    def _add_branches(self, vision_width: int, width: int) -> None:
        """LION's two views of an image, as far as the configuration has them."""
        config = cast(RegionVLMConfig, self.config)
        if config.aggregator["layers"]:
            self.aggregator = VisionAggregator(
                vision_width,
                config.aggregator["heads"],
                config.aggregator["intermediate"],
                config.aggregator["layers"],
                dropout=config.dropout,
            )
            self.aggregator_mlp = AggregatorMLP(vision_width, width, config.dropout)
        if config.qformer["queries"]:
            shape = config.qformer
            self.qformer = QFormer(
                shape["width"],
                shape["heads"],
                shape["intermediate"],
                shape["layers"],
                vision_width=vision_width,
                num_queries=shape["queries"],
                vocabulary=shape["vocabulary"],
                positions=max(512, shape["instruction_tokens"]),
                dropout=config.dropout,
            )
            self.qformer_projection = BertLinear(shape["width"], width)
        if config.soft_prompt:
            # T5's embeddings start as N(0, factor), and so does LION's vector.
            spread = getattr(config.text_config, "initializer_factor", config.initializer_range)
            self.soft_prompt = SoftPrompt(width, spread)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Adapters):
            module.reset_parameters()
        elif not init_weights(module):
            super()._init_weights(module)

    def choose_kernels(self, backend: str) -> None:
        """Run RoI-align and adapters with one backend of ops/dispatch.py; "" chooses per op and device.

        Not part of the architecture: an exported model chooses again on the machine that loads it."""
        for module in self.modules():
            if isinstance(module, RegionEncoder | Adapters):
                module.backend = backend or None

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def encode_images(self, pixel_values: torch.Tensor, calls: int) -> tuple[torch.Tensor, ...]:
        """Hidden states of the tower, each [N', cls + P, V], where N' >= max(N, calls, 1).

        The tower runs `calls` times whatever N is, so that ranks with fewer images keep step (P5); images that
        are missing for that are zeros which no slot selects."""
        missing = max(calls, 1) - pixel_values.shape[0]
        if missing > 0:
            pixel_values = torch.cat([pixel_values, pixel_values.new_zeros(missing, *pixel_values.shape[1:])])
        # Reading a weight here would make ZeRO-3 gather it for the whole forward.
        dtype = self.vision_tower.dtype
        chunks = [
            self.vision_tower(part.to(dtype), output_hidden_states=True).hidden_states
            for part in pixel_values.tensor_split(max(calls, 1))
        ]
        return tuple(torch.cat(level) for level in zip(*chunks))

    def visual_tokens(
        self, states: tuple[torch.Tensor, ...], aggregated: torch.Tensor | None, batch: Batch
    ) -> torch.Tensor:
        """Visual tokens [N', P', D] of every image, see RegionVLMConfig.visual_tokens."""
        config = cast(RegionVLMConfig, self.config)
        prefix = config.num_prefix_tokens
        if config.visual_input == "projector":
            patches = states[config.vision_level][:, prefix:]
            return self._placed(self.projector(pool_patches(patches, config.grid, config.visual_pool)))
        parts = []
        if config.reads_qformer:
            ids, mask = _one_per_image(batch.instruction_ids, batch.instruction_mask, states[0].shape[0])
            # transformers' towers norm only what they return themselves; hidden states come without it.
            image = self.vision_tower.post_layernorm(states[-1])
            parts.append(self.qformer_projection(self.qformer(image, ids, mask)))
        if aggregated is not None and config.reads_aggregator:
            patches = pool_patches(aggregated[:, prefix:], config.grid, config.visual_pool)
            parts.append(self._placed(self.aggregator_mlp(torch.cat([aggregated[:, :prefix], patches], 1)), prefix))
        return torch.cat(parts, 1)

    def _placed(self, tokens: torch.Tensor, prefix: int = 0) -> torch.Tensor:
        """Tokens [N', prefix + side * side, D], those of the grid normalised and with the code of their places, if the
        configuration says so."""
        amplitude = self.config.visual_positions
        if not amplitude:
            return tokens
        before, grid = tokens[:, :prefix], tokens[:, prefix:]
        code = grid_code(math.isqrt(grid.shape[1]), grid.shape[2], grid.device) * amplitude
        # What a token adds to its image counts as much as the image: in an untrained tower the two differ by far. Both
        # are of equal size for every image and step, so that the code is neither drowned nor drowns what is there.
        whole, width = grid.mean(1, keepdim=True), grid.shape[2:]
        grid = (
            nn.functional.layer_norm(grid - whole, width) + nn.functional.layer_norm(whole, width) + code.to(grid.dtype)
        )
        return torch.cat([before, grid], 1)

    def encode_regions(self, levels: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Region features [R', D], R' >= 1: without regions one box over the first image stands in."""
        boxes, offsets = batch.boxes, batch.box_offsets
        size = float(self.config.vision_config.image_size)
        if boxes.shape[0] == 0:
            boxes = boxes.new_tensor([[0.0, 0.0, size, size]])
            offsets = torch.ones_like(offsets) if offsets.numel() > 1 else offsets.new_tensor([0, 1])
            offsets[0] = 0
        padded = levels[0].shape[0] + 1 - offsets.numel()
        if padded > 0:
            offsets = torch.cat([offsets, offsets[-1:].expand(padded)])
        return self.regions(levels, boxes, offsets)

    def encode(self, batch: Batch, vision_calls: int = 1) -> Encoded:
        """What the text of a row reads of its images; the same for every text behind the same images."""
        config = cast(RegionVLMConfig, self.config)
        states = self.encode_images(batch.pixel_values, vision_calls)
        aggregated = self.aggregator(states) if config.uses_aggregator else None
        visual = self.visual_tokens(states, aggregated, batch)
        if config.linking == "none":
            return Encoded(visual, None)
        levels = [states[i] for i in config.roi["levels"]]
        if aggregated is not None and config.roi["source"] == "aggregator":
            levels = [aggregated]
        return Encoded(visual, self.encode_regions(levels, batch))

    def embed(self, batch: Batch, vision_calls: int = 1, encoded: Encoded | None = None) -> torch.Tensor:
        """Embeddings [T, D] of a row, images and regions in place; `encoded` stands in for the tower's work."""
        config = cast(RegionVLMConfig, self.config)
        visual, regions = encoded or self.encode(batch, vision_calls)
        embeds = self.get_input_embeddings()(batch.input_ids[0])
        embeds = splice_images(embeds, visual, batch.image_slots)
        if config.soft_prompt:
            embeds = self.soft_prompt(embeds, batch.soft_slots)
        if regions is not None:
            embeds = link_regions(embeds, regions, batch.region_slots, config.linking)
        return embeds

    def forward(
        self,
        batch: Batch,
        vision_calls: int = 1,
        *,
        with_logits: bool = False,
        with_balance: bool = False,
        read: torch.Tensor | None = None,
        encoded: Encoded | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, Encoded]:
        """One row -> token_logp float32[max(K, 1)]; `with_logits` -> (token_logp, logits float32[T, vocabulary]), which
        are not-a-number at tokens that only an encoder reads; `with_balance` (router topk) -> (token_logp, load-balance
        loss times tokens, float32[]).

        A step of generation gives `read` int64[L], L >= 1: -> (logits float32[L, vocabulary] at those tokens, what was
        encoded of the images). The next step hands that back as `encoded`, and the tower rests; all ranks must (P5)."""
        if read is not None:
            encoded = encoded or self.encode(batch, vision_calls)
            hidden = self.states(self.embed(batch, encoded=encoded), batch)
            return _wide(self.language_model.lm_head(hidden[read])), encoded
        embeds = self.embed(batch, vision_calls, encoded)
        balance = Balance(group_members(batch, embeds.device)) if with_balance else None
        hidden = self.states(embeds, batch, balance)
        # A row without targets still runs the head, on its first position.
        wanted = batch.target_from if batch.target_from.numel() else batch.target_from.new_zeros(1)
        logits = _wide(self.language_model.lm_head(hidden[wanted]))
        logp = logits.log_softmax(-1)
        targets = batch.target_ids if batch.target_ids.numel() else batch.target_ids.new_zeros(1)
        token_logp = logp.gather(1, targets[:, None])[:, 0]
        if balance is not None:
            return token_logp, balance.mean()
        return (token_logp, _wide(self.language_model.lm_head(hidden))) if with_logits else token_logp

    def states(self, embeds: torch.Tensor, batch: Batch, balance: Balance | None = None) -> torch.Tensor:
        """The language model's states [T, D] at the tokens of a row, each of which predicts the next token."""
        config = cast(RegionVLMConfig, self.config)
        if config.encoder_decoder:
            assert balance is None, "a load-balance loss of T5 is refused with the configuration"
            return self.language_model.states(embeds, batch, config.text_config._attn_implementation, self._routing)
        return self.language_model.model(
            inputs_embeds=embeds[None],
            position_ids=batch.position_ids,
            use_cache=False,
            **self.attention_inputs(batch, embeds, balance),
        ).last_hidden_state[0]

    def _routing(self, task_ids_T: torch.Tensor, balance: Balance | None = None) -> Routing | None:
        return Routing(self.adapters, task_ids_T, balance) if len(self.adapters) else None

    def attention_inputs(self, batch: Batch, embeds: torch.Tensor, balance: Balance | None = None) -> dict[str, Any]:
        """Keyword arguments of the decoder: the segment tree in the form of the backend, and the routing."""
        inputs = attention_kwargs(
            self.config.text_config._attn_implementation,
            batch.parents,
            batch.bounds,
            embeds.shape[0],
            embeds.dtype,
            embeds.device,
        )
        routing = self._routing(batch.task_ids, balance)
        return inputs if routing is None else {**inputs, "routing": routing}


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """float32, or float64 of a float64 model, whose tests compare to more digits than float32 has."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _vision_tower(config: RegionVLMConfig, dtype: torch.dtype) -> Any:
    if config.vision_config.model_type == "instructblip_vision_model":
        # No Auto class knows it by itself.
        return InstructBlipVisionModel._from_config(config.vision_config, dtype=dtype)
    return AutoModel.from_config(config.vision_config, dtype=dtype)


def _language_model(config: RegionVLMConfig, dtype: torch.dtype) -> Any:
    """The language model of a configuration, with a place for adapters at every FFN."""
    source = config.adapters["source"]
    if config.encoder_decoder:
        return T5._from_config(config.text_config, dtype=dtype, source=source)
    model = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
    adapt_layers(model, source)
    return model


def group_members(batch: Batch, device: torch.device) -> torch.Tensor:
    """float32[G, T]: 1 where a token that is not padding belongs to a group of the row; all zero in a missing row."""
    starts = batch.bounds[batch.parents < 0, 0].long()[:, None]
    ends = torch.cat([starts[1:], starts.new_full((1, 1), batch.real_tokens)])
    position = torch.arange(batch.input_ids.shape[1])
    return ((position >= starts) & (position < ends)).float().to(device, non_blocking=True)


def _one_per_image(ids: torch.Tensor, mask: torch.Tensor, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Instructions [N, L'] with empty ones for images that stand in (P5)."""
    missing = images - ids.shape[0]
    if missing <= 0:
        return ids, mask
    length = ids.shape[1]
    return torch.cat([ids, ids.new_zeros(missing, length)]), torch.cat([mask, mask.new_zeros(missing, length)])
