"""Tiny published models in the layouts that real ones come in, and the same loads on one rank and on two.

In: a folder. Out: Hugging Face folders below it with random weights, and digests of what a RegionVLM holds after
loading them. Run as a program (`python -m tests.model.tiny_folders DIR`) it loads every case of DIR/cases.json on
each rank of a process group and writes DIR/rank<R>.json.
Decision: weights are drawn after construction for every tensor, so norms and biases differ from their initial values.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from eventlens_ds.config.run_config import AdapterConfig, LoraConfig, ModelConfig, RoIConfig, RunConfig, TrainConfig
from eventlens_ds.data.tokenizer import build_embedded
from eventlens_ds.runtime.failures import leave

TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 12,
}
LANGUAGE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


def randomised(model: Any, seed: int = 3) -> Any:
    """Every parameter drawn anew, so that none has the value a constructor gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def clip(**changes: Any) -> Any:
    text = {**TOWER, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return randomised(CLIPModel(CLIPConfig(vision_config={**TOWER, **changes}, text_config=text)))


def siglip() -> Any:
    text = {**TOWER, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return randomised(SiglipModel(SiglipConfig(vision_config=TOWER, text_config=text)))


def llama(vocabulary: int, **changes: Any) -> Any:
    return randomised(LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**LANGUAGE, **changes})))


def qwen(vocabulary: int) -> Any:
    return randomised(Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=True, **LANGUAGE)))


def llava(vocabulary: int) -> Any:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(vocab_size=vocabulary, **LANGUAGE),
        image_token_index=vocabulary - 1,
        vision_feature_layer=-2,
    )
    return randomised(LlavaForConditionalGeneration(config))


def save_bin(model: Any, folder: Path, *, shards: int = 1, rename: Callable[[str], str] = lambda n: n) -> None:
    """pytorch_model.bin, or shards with an index, and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    state = {rename(name): tensor.clone() for name, tensor in model.state_dict().items()}
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    placed = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(state.items())[i::shards])
        torch.save(part, folder / name)
        placed |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def with_tokenizer(folder: Path) -> None:
    build_embedded().save_pretrained(folder)


def digest(tensor: torch.Tensor) -> str:
    """Of shape, dtype and every bit."""
    whole = tensor.detach().cpu().contiguous()
    data = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tuple(whole.shape)} {whole.dtype}".encode() + data).hexdigest()


def of_vision(model: Any) -> dict[str, str]:
    tower = getattr(model, "vision_model", model)
    return {f"vision_tower.{n}": digest(p) for n, p in tower.named_parameters() if not n.startswith("head.")}


def of_language(model: Any) -> dict[str, str]:
    return {f"language_model.{n}": digest(p) for n, p in model.named_parameters()}


def run_config(case: dict[str, Any]) -> RunConfig:
    """RunConfig of a case: fields of ModelConfig, and dtype, seed, zero of TrainConfig."""
    fields = {"adapters": AdapterConfig(bottleneck=4), "roi": RoIConfig(output_size=2), **case.get("model", {})}
    if isinstance(fields.get("lora"), dict):
        fields["lora"] = LoraConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields["lora"].items()})
    return RunConfig(model=ModelConfig(**fields), train=TrainConfig(**case.get("train", {})))


def settings(stage: int, dtype: str = "fp32") -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def loaded(case: dict[str, Any], stage: int) -> Any:
    """The model of a case as a run builds it, before the optimizer."""
    from eventlens_ds.model.folders import load_folders
    from eventlens_ds.runtime.build_model import describe, new_model

    config = run_config(case)
    architecture, _, _ = describe(config, dry=True)
    # As small as the folders' models where a part comes from scratch.
    for name, sizes in (("vision_config", TOWER), ("text_config", LANGUAGE)):
        if case.get("shrink", False):
            for key, value in sizes.items():
                setattr(getattr(architecture, name), key, value)
    model = new_model(config, architecture, settings(stage, config.train.dtype))
    base, names = load_folders(model, config.model)
    return model, base, names


def digests(model: Any) -> dict[str, str]:
    """Digest of every whole parameter and buffer; a collective under ZeRO-3."""
    from eventlens_ds.model.weights import gathered

    found = {}
    for name, parameter in model.named_parameters():
        with gathered([parameter], modifier_rank=None):
            found[name] = digest(parameter.data)
    return found | {f"buffer {name}": digest(buffer) for name, buffer in model.named_buffers()}


def _all_cases(folder: Path) -> None:
    from eventlens_ds.runtime.distributed import start, stop

    world = start(threads=1, timeout_minutes=1.0)
    results = {}
    try:
        for name, case in json.loads((folder / "cases.json").read_text()).items():
            model, base, names = loaded(case, 3)
            partitioned = all(hasattr(p, "ds_id") and p.numel() == 0 for p in model.parameters())
            results[name] = {
                "digests": digests(model),
                "base": base,
                "names": sorted(names),
                "partitioned": partitioned,
            }
        (folder / f"rank{world.rank}.json").write_text(json.dumps(results))
    finally:
        stop()


def on_two_ranks(folder: Path, cases: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of two ZeRO-3 ranks holds after loading the cases."""
    from eventlens_ds.runtime.local_ranks import spawn

    (folder / "cases.json").write_text(json.dumps(cases))
    assert spawn(2, [str(folder)], module="tests.model.tiny_folders") == 0
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


if __name__ == "__main__":
    leave(lambda: _all_cases(Path(sys.argv[1])))
