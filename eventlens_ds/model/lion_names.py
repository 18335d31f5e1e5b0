"""Names of published Q-Former, LION and EVA-ViT weights -> names of our parts.

In: names (of a state dict). Out: published name -> our name, our tensors that are made of several published ones, and
what no rule places, in order.
Verified, at runtime against transformers 5 (tests/model/test_lion_names.py): every name of InstructBLIP, and the names
inside a BertLayer. LION's are those of the modules in JiuTian-LION's models/lion_t5.py, lion_adapters.py and
eva_vit.py (commit 7578437); no checkpoint file has been read. Adapters are numbered as model/t5.py numbers them:
adapters.<i> beside the FFNs of the encoder, then of the decoder (0..23 and 24..47 of FLAN-T5-XL).
Decision: nothing is guessed by similarity and nothing is dropped; the caller says which unmatched names it accepts
(heads, computed buffers, blocks of the tower that are never run).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch

from eventlens_ds.errors import DataError
from eventlens_ds.model.adapters import LEVELS

QFORMER, QFORMER_PROJECTION = "qformer", "qformer_projection"
AGGREGATOR, AGGREGATOR_MLP = "aggregator", "aggregator_mlp"
VISION, LANGUAGE = "vision_tower", "language_model"
IMAGE_NORM = f"{VISION}.post_layernorm"
"""Names of our parts in the model that holds them. The norm before the Q-Former is the tower's own in transformers,
and a module beside the tower ("ln_vision") in LAVIS."""
SOFT_PROMPT, ADAPTERS = "soft_prompt.hint", "adapters"


class Join(NamedTuple):
    """One tensor of ours made of several published ones.

    kind "qkv_bias": q_bias [D], v_bias [D] -> [3 D], zero for the keys, which have none. kind "gates": router_ratio1
    and router_ratio2, each [tasks, D], one per adapter -> their rows `row`, [2, D]."""

    kind: str
    sources: tuple[str, ...]
    row: int = 0

    def __call__(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The tensors of `sources`, in their order -> ours. Raises DataError naming one of another shape."""
        shapes = [tuple(t.shape) for t in tensors]
        for source, shape in zip(self.sources, shapes):
            wanted = 1 if self.kind == "qkv_bias" else 2
            if len(shape) != wanted or shape != shapes[0] or (wanted == 2 and shape[0] != len(LEVELS)):
                raise DataError(f"tensor {source} is {shape}; it does not go with {self.sources[0]} {shapes[0]}")
        if self.kind == "qkv_bias":
            return torch.cat([tensors[0], torch.zeros_like(tensors[0]), tensors[1]])
        return torch.stack([tensor[self.row] for tensor in tensors])


class NameMap(NamedTuple):
    """mapped: published name -> our name; joined: our name -> the published ones it is made of; unmatched: published
    names that have no place here."""

    mapped: dict[str, str]
    unmatched: list[str]
    joined: dict[str, Join]


class _Layers(NamedTuple):
    """Modules of numbered layers: `source` (a regular expression) + number + module -> target + number + module."""

    source: str
    target: str
    modules: dict[str, str]


def from_instructblip(names: Iterable[str]) -> NameMap:
    """Names of transformers' InstructBlipForConditionalGeneration.

    Tower and language model keep their names below `vision_tower.` and `language_model.`.
    """
    modules = {
        "language_projection": QFORMER_PROJECTION,
        "qformer.embeddings.word_embeddings": f"{QFORMER}.word_embeddings",
        "qformer.embeddings.position_embeddings": f"{QFORMER}.position_embeddings",
        "qformer.embeddings.layernorm": f"{QFORMER}.norm",
    }
    layers = _Layers(r"qformer\.encoder\.layer\.", f"{QFORMER}.layers.", _qformer_layer("attention"))
    return _place(names, modules, [layers], {"vision_model.": f"{VISION}.", "language_model.": f"{LANGUAGE}."})


def from_lion(names: Iterable[str]) -> NameMap:
    """Names of a LION file: its own modules, the adapters and routers inside `t5_model`, and tower and language model
    where the file holds them.

    Raises DataError for adapters without a router: which level such a single adapter belongs to is not in its name.
    """
    names = list(names)
    modules = {
        "t5_proj": QFORMER_PROJECTION,
        "ln_vision": IMAGE_NORM,
        "Qformer.bert.embeddings.word_embeddings": f"{QFORMER}.word_embeddings",
        "Qformer.bert.embeddings.position_embeddings": f"{QFORMER}.position_embeddings",
        "Qformer.bert.embeddings.LayerNorm": f"{QFORMER}.norm",
        "ln_adapter": f"{AGGREGATOR}.norm",
        "adapter_proj.0": f"{AGGREGATOR_MLP}.linear_1",
        "adapter_proj.2": f"{AGGREGATOR_MLP}.linear_2",
    }
    layers = [
        _Layers(r"Qformer\.bert\.encoder\.layer\.", f"{QFORMER}.layers.", _qformer_layer("self")),
        _Layers(r"fusion_adapter\.blocks\.", f"{AGGREGATOR}.blocks.", bert_layer("self")),
    ]
    tower_names = [name for name in names if name.startswith(_TOWER)]
    router_names = [name for name in names if _ROUTER.fullmatch(name)]
    tower, adapters = from_eva(tower_names, _TOWER), _from_routers(router_names)
    apart = {*tower_names, *router_names}
    prefixes = {"t5_model.": f"{LANGUAGE}.", "soft_prompt_hint": SOFT_PROMPT}
    rest = _place([n for n in names if n not in apart], modules, layers, prefixes)
    lost = {*rest.unmatched, *tower.unmatched, *adapters.unmatched}
    mapped = {**tower.mapped, **adapters.mapped, **rest.mapped}
    return NameMap(
        {name: mapped[name] for name in names if name in mapped},
        [name for name in names if name in lost],
        {**tower.joined, **adapters.joined},
    )


_TOWER = "visual_encoder."
_ROUTER = re.compile(r"t5_model\.(encoder|decoder)\.block\.(\d+)\.layer\.(\d+)\.adapter\.(.+)")
"""An adapter lies in a block's FFN: layer 1 in the encoder, 2 in the decoder."""
_ADAPTER = {
    "down_proj.weight": "down", "down_proj.bias": "down_bias", "up_proj.weight": "up", "up_proj.bias": "up_bias",
    "scale": "scale",
}  # fmt: skip
_RATIOS = ("router_ratio1", "router_ratio2")


def from_eva(names: Iterable[str], prefix: str = "") -> NameMap:
    """Names of EVA-ViT as LAVIS and LION have it (`prefix` before each) -> transformers' InstructBLIP vision model.

    The norm after the last block is not in such a file: LAVIS has it beside the tower, as `ln_vision`.
    """
    modules = {f"{prefix}patch_embed.proj": f"{VISION}.embeddings.patch_embedding"}
    inside = {
        "norm1": "layer_norm1", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection",
        "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    single = {"cls_token": "class_embedding", "pos_embed": "position_embedding"}
    blocks = rf"{re.escape(prefix)}blocks\."
    found = _place(names, modules, [_Layers(blocks, f"{VISION}.encoder.layers.", inside)], {})
    rest, joined = [], {}
    known = set(found.unmatched)
    for name in found.unmatched:
        match = re.fullmatch(rf"({blocks}(\d+)\.attn\.)([qv])_bias", name)
        if name.removeprefix(prefix) in single and name.startswith(prefix):
            found.mapped[name] = f"{VISION}.embeddings.{single[name.removeprefix(prefix)]}"
        elif match is not None and {f"{match[1]}q_bias", f"{match[1]}v_bias"} <= known:
            join = Join("qkv_bias", (f"{match[1]}q_bias", f"{match[1]}v_bias"))
            joined[f"{VISION}.encoder.layers.{match[2]}.self_attn.qkv.bias"] = join
        else:
            rest.append(name)
    return NameMap(found.mapped, rest, joined)


def _from_routers(names: list[str]) -> NameMap:
    """Names that `_ROUTER` matches: two adapters and two tensors of gates per FFN."""
    found = NameMap({}, [], {})
    parsed = [(name, *_ROUTER.fullmatch(name).groups()) for name in names]  # type: ignore[union-attr]
    encoder_blocks = 1 + max((int(block) for _, stack, block, *_ in parsed if stack == "encoder"), default=-1)
    routers = Counter((stack, block) for _, stack, block, _, rest in parsed if rest in _RATIOS)
    for name, stack, block, layer, rest in parsed:
        target = f"{ADAPTERS}.{int(block) + (encoder_blocks if stack == 'decoder' else 0)}"
        match = re.fullmatch(r"adapters\.([01])\.(.+)", rest)
        if layer != ("1" if stack == "encoder" else "2"):
            found.unmatched.append(name)
        elif rest in _RATIOS and routers[stack, block] == len(_RATIOS):
            sources = tuple(name.removesuffix(rest) + ratio for ratio in _RATIOS)
            for row, level in enumerate(LEVELS):
                found.joined[f"{target}.gate_{level}"] = Join("gates", sources, row)
        elif match is None or match[2] not in _ADAPTER:
            found.unmatched.append(name)
        elif not routers[stack, block]:
            raise DataError(f"{name}: a single adapter without a router; its level is not in the file")
        else:
            found.mapped[name] = f"{target}.{LEVELS[int(match[1])]}_{_ADAPTER[match[2]]}"
    return found


def bert_layer(inner: str, ffn: str = "ffn", suffix: str = "") -> dict[str, str]:
    """Modules of a BERT layer with cross-attention -> ours.

    inner: the module inside `attention` that holds the projections ("self" in BERT, "attention" in transformers'
    Q-Former). suffix: of `intermediate` and `output`; ffn: our name for the two.
    """
    modules = {
        f"intermediate{suffix}.dense": f"{ffn}.up",
        f"output{suffix}.dense": f"{ffn}.down",
        f"output{suffix}.LayerNorm": f"{ffn}.norm",
    }
    for theirs, ours in (("attention", "self_attention"), ("crossattention", "cross_attention")):
        modules |= {f"{theirs}.{inner}.{kind}": f"{ours}.{kind}" for kind in ("query", "key", "value")}
        modules[f"{theirs}.output.dense"] = f"{ours}.output"
        modules[f"{theirs}.output.LayerNorm"] = f"{ours}.norm"
    return modules


def _qformer_layer(inner: str) -> dict[str, str]:
    return bert_layer(inner, "text_ffn") | bert_layer(inner, "query_ffn", "_query")


def _place(
    names: Iterable[str], modules: dict[str, str], layers: Iterable[_Layers], prefixes: dict[str, str]
) -> NameMap:
    found = NameMap({}, [], {})
    for name in names:
        target = _target(name, modules, layers, prefixes)
        if target is None:
            found.unmatched.append(name)
            continue
        found.mapped[name] = target
    return found


def _target(name: str, modules: dict[str, str], layers: Iterable[_Layers], prefixes: dict[str, str]) -> str | None:
    if name == "query_tokens":
        return f"{QFORMER}.query_tokens"
    for source, target in prefixes.items():
        if name.startswith(source):
            return target + name[len(source) :]
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if module in modules:
        return f"{modules[module]}.{leaf}"
    for rule in layers:
        match = re.fullmatch(rf"{rule.source}(\d+)\.(.+)", module)
        if match is not None and match[2] in rule.modules:
            return f"{rule.target}{match[1]}.{rule.modules[match[2]]}.{leaf}"
    return None
