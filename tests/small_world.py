"""A run small enough for a unit test: an embedded world of a few images, a model of a few ten thousand parameters.

In: a folder, a few settings. Out: built shards; RunConfig, tokenizer, RegionVLMConfig and RunData that fit together.
Decision: everything comes from the functions that the commands call; only the architecture is smaller than any
preset, because ranks, stages and layouts multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from eventlens_ds.config.run_config import DataConfig, IOConfig, ModelConfig, RunConfig, TrainConfig


def build_world(out: Path, *, images: int, val_images: int, image_size: int = 64, seed: int = 0) -> Path:
    """`eventlens data build --source world` without a command line; returns `out`."""
    from eventlens_ds.data import build
    from eventlens_ds.data.sources import combined

    source = combined.draw_world(
        out.with_name(out.name + "-raw"), seed=seed, num_images=images, image_size=image_size, val_images=val_images
    )
    build.build(source, out, shard_images=16)
    return out


@dataclass
class SmallRun:
    """What `describe` and `training_data` give for a real configuration."""

    config: RunConfig
    tokenizer: Any
    architecture: Any
    spec: Any
    data: Any

    def batch(self, members: Sequence[tuple[int, int]], seed: int = 0) -> Any:
        return self.data.batch(members, seed)

    def groups_of(self, task: str, table: int = 0) -> list[tuple[int, int]]:
        """(table, group) of every group of a task."""
        from eventlens_ds.data.records import TASKS

        return [(table, g) for g, t in enumerate(self.data.groups[table].task.tolist()) if TASKS[t] == task]

    def model(self, seed: int = 0, **changes: Any) -> Any:
        """A RegionVLM with weights of a seed; adapters are given values, since they start as the identity."""
        import torch

        from eventlens_ds.model.region_vlm import RegionVLM

        torch.manual_seed(seed)
        made = RegionVLM._from_config(small_architecture(self.config, self.tokenizer, **changes), dtype=torch.float32)
        wake_adapters(made)
        return made


def wake_adapters(model: Any) -> None:
    """Random values where adapters start at zero: without them no test could tell one task from another."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.adapters.named_parameters():
            if name.endswith(("_up", "_bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def small_architecture(config: RunConfig, tokenizer: Any, attention: str = "sdpa", **changes: Any) -> Any:
    """RegionVLMConfig of width 32 with 2 layers a side and 16 visual tokens; `changes` are its own arguments. Preset
    tiny-t5 has a T5 in place of the Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, T5Config

    from eventlens_ds.model.attention import choose_form
    from eventlens_ds.model.configuration import RegionVLMConfig
    from eventlens_ds.model.presets import qformer_shape

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=12
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    encoder_decoder = config.model.preset == "tiny-t5"
    if encoder_decoder:
        shape = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        text = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **shape)
    text._attn_implementation = choose_form(attention, "cpu", None, encoder_decoder=encoder_decoder)
    settings: dict[str, Any] = {
        "vision_level": -1,
        "linking": config.model.linking,
        "roi": {"output_size": 2, "levels": [-1], "source": config.model.roi.source},
        "adapters": {**asdict(config.model.adapters), "bottleneck": 8},
        "visual_input": config.model.visual_input,
        "aggregator": {**asdict(config.model.aggregator), "heads": 2},
        "qformer": qformer_shape(config.model.qformer, len(tokenizer)),
        "soft_prompt": config.model.soft_prompt,
        "dropout": config.model.dropout,
    }
    return RegionVLMConfig(vision_config=vision, text_config=text, **{**settings, **changes})


def small_config(folder: Path, run: Path | str = "", **train: Any) -> RunConfig:
    """A RunConfig over `folder` with short rows, on the tasks that have an adapter by default."""
    return RunConfig(
        model=ModelConfig(attention="sdpa"),
        data=DataConfig(train=(str(folder),), row_tokens=512, workers=0, tasks=ModelConfig().adapters.tasks),
        train=TrainConfig(**{"lr": 1e-2, "warmup": 1, "threads": 1, "timeout_minutes": 1.0, **train}),
        io=IOConfig(run=str(run), tensorboard=False),
    )


@cache
def embedded_tokenizer() -> Any:
    """Trained once per process; it takes a second."""
    from eventlens_ds.data.tokenizer import load_tokenizer

    return load_tokenizer("")


def small_run(folder: Path, config: RunConfig | None = None, *, layout: str = "", **data: Any) -> SmallRun:
    """Everything of a run over `folder`; keyword arguments change its DataConfig."""
    from eventlens_ds.data.loader import RunData
    from eventlens_ds.data.prompts import PromptStyle
    from eventlens_ds.model.presets import encode_spec

    config = config or small_config(folder)
    config = replace(config, data=replace(config.data, **({"layout": layout} if layout else {}), **data))
    tokenizer = embedded_tokenizer()
    architecture = small_architecture(config, tokenizer)
    tag_tokens = config.data.tag_tokens if config.model.soft_prompt else -1
    style = PromptStyle(config.data.list_objects, config.data.event_context, tag_tokens, config.data.episodes.form)
    spec = encode_spec(architecture, style, config.model.qformer.tokenizer_path)
    made = RunData(
        config.data.train,
        config.data.split,
        config=config.data,
        tokenizer=tokenizer,
        tokenizer_path="",
        spec=spec,
        tasks=config.data.tasks,
    )
    return SmallRun(config, tokenizer, architecture, spec, made)


def small_engine(run: SmallRun, world: Any, folder: Path, *, stage: int = 3) -> Any:
    """train.engine.build for `run` with every parameter partitioned; returns its Trainable. A collective.

    folder: where the ZeRO file is written.
    """
    import json

    from eventlens_ds.launch.parity import ALWAYS_GATHER
    from eventlens_ds.train.engine import build

    zero = folder / f"zero{stage}-rank{world.rank}.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": stage, **ALWAYS_GATHER}}))
    config = replace(run.config, train=replace(run.config.train, zero=str(zero)))
    return build(config, run.architecture, world, config.data.tasks or run.architecture.tasks)
