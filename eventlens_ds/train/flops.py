"""Model FLOPs of an optimizer step, for MFU.

In: a model whose stage is set, the tokens and images of a step. Out: FLOPs of the tower, the projector and region
encoder, and the language model. Decision: products of weights only. The attention products of a segment tree depend
on every tree of the step and are left out, so the MFU reported is a lower bound. Of an encoder-decoder a token passes
one stack: all are counted as the encoder's, whose layers are the smaller ones, and the head is left out.
"""

from __future__ import annotations

from torch import nn

from eventlens_ds.model.configuration import RegionVLMConfig
from eventlens_ds.model.stages import numel, part_of
from eventlens_ds.train.metrics import part_flops

PER_TOKEN = frozenset({"language", "adapters", "image_adapter", "region_adapter", "router", "lora"})
"""Parts that see every token of a row; the others see the patches of its images."""


class StepFlops:
    """Counts once what every part costs per token."""

    def __init__(self, model: nn.Module, config: RegionVLMConfig) -> None:
        self.sizes: dict[str, list[int]] = {}
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "embeddings" in name or _beyond_encoder(name, config):
                continue
            size = self.sizes.setdefault(part_of(name), [0, 0])
            count = numel(parameter)
            if ".expert_" in name:
                # A token takes top_k of them, whichever path computes more.
                count = count * config.adapters["top_k"] // config.adapters["experts"]
            size[0] += count
            size[1] += count if parameter.requires_grad else 0
        self.patches = config.grid[0] * config.grid[1] + config.num_prefix_tokens

    def __call__(self, tokens: int, images: int) -> float:
        """FLOPs of a step with `tokens` tokens in the language model and `images` pictures."""
        total = 0.0
        trains_vision = self.sizes.get("vision", [0, 0])[1] > 0
        for part, (size, trained) in self.sizes.items():
            seen = tokens if part in PER_TOKEN else images * self.patches
            backward = part != "vision" or trains_vision
            total += part_flops(seen, size, trained=trained / max(1, size), backward=backward)
        return total


def _beyond_encoder(name: str, config: RegionVLMConfig) -> bool:
    """A parameter of an encoder-decoder that tokens of the prompt do not pass: decoder, its adapters, head."""
    if not config.encoder_decoder:
        return False
    parts = name.split(".")
    if parts[0] == "adapters":
        return int(parts[1]) >= config.text_config.num_hidden_layers
    return parts[0] == "language_model" and parts[1] != "encoder"
