"""Encoders that class similarity is measured with: a CLIP folder, or the vision tower of a run of ours.

In: a folder. Out: the `Encoder` of eval/neighbours.py. Decision: everything comes from local folders (P12), and images
go through data/transforms.py like any image of ours, squashed to the input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eventlens_ds.data.transforms import CLIP_MEAN, CLIP_STD
from eventlens_ds.errors import DataError, UserError


class Clip:
    """Image and text features of a Hugging Face CLIP folder. Raises UserError when it is none."""

    mean, std = CLIP_MEAN, CLIP_STD

    def __init__(self, folder: str) -> None:
        from transformers import AutoConfig, AutoTokenizer, CLIPModel

        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"--clip {folder}: no config.json there")
        try:
            kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            if kind != "clip":
                raise UserError(f"--clip {folder}: is a {kind} model, not CLIP")
            self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--clip {folder}: {str(error).splitlines()[0]}") from None
        self.size: int = self.model.config.vision_config.image_size

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.visual_projection(self.model.vision_model(pixels).pooler_output)

    def texts(self, names: Sequence[str]) -> torch.Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        made = []
        for name in names:
            ids = torch.tensor([self.tokenizer(name)["input_ids"][:longest]])
            made.append(self.model.text_projection(self.model.text_model(ids).pooler_output))
        return torch.cat(made)


class Tower:
    """Mean visual token of a run of ours: its vision tower and projector. It has no text side."""

    def __init__(self, run: str) -> None:
        from eventlens_ds.config import load
        from eventlens_ds.config.deepspeed import deepspeed_dict
        from eventlens_ds.runtime import checkpoint
        from eventlens_ds.runtime.build_model import describe, trained_model

        path = checkpoint.resolve(Path(run))
        if path is None:
            raise DataError(f"--run {run}: holds no checkpoint")
        config = load.load(str(path.parent.parent / "config.yaml"))
        architecture, _, spec = describe(config)
        if architecture.visual_input != "projector":
            raise UserError(f"--run {run}: its visual tokens are {architecture.visual_input}, not the projector's")
        self.model = trained_model(config, architecture, path, deepspeed_dict(config, 1, zero="zero0")).eval()
        self.size, self.mean, self.std = spec.vision.image_size, spec.vision.mean, spec.vision.std

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        config: Any = self.model.config
        states = self.model.encode_images(pixels, 1)
        return self.model.projector(states[config.vision_level][:, config.num_prefix_tokens :].mean(1))

    def texts(self, names: Sequence[str]) -> None:
        return None
