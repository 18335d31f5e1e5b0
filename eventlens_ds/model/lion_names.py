"""Names of published Q-Former and LION weights -> names of our parts.

In: names (of a state dict). Out: (mapped, unmatched): published name -> our name, and what no rule places, in order.
Verified, at runtime against transformers 5 (tests/model/test_lion_names.py): every name of InstructBLIP, and the names
inside a BertLayer. LION's are those of the modules in JiuTian-LION's models/lion_t5.py and lion_adapters.py (commit
7578437); no checkpoint file has been read.
Decision: nothing is guessed by similarity and nothing is dropped; the caller says which unmatched names it accepts
(heads, computed buffers, adapters).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

QFORMER, QFORMER_PROJECTION = "qformer", "qformer_projection"
AGGREGATOR, AGGREGATOR_MLP = "aggregator", "aggregator_mlp"
VISION, LANGUAGE = "vision_tower", "language_model"
IMAGE_NORM = f"{VISION}.post_layernorm"
"""Names of our parts in the model that holds them. The norm before the Q-Former is the tower's own in transformers,
and a module beside the tower ("ln_vision") in LAVIS."""


class NameMap(NamedTuple):
    """mapped: published name -> our name; unmatched: published names that have no place here."""

    mapped: dict[str, str]
    unmatched: list[str]


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
    """Names of LION's own modules (the trained parts).

    Adapters, routers, soft prompt and `visual_encoder` have no rule.
    """
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
    return _place(names, modules, layers, {})


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
    found = NameMap({}, [])
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
