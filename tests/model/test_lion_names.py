"""Published names to ours: every tensor of transformers' InstructBLIP and of BERT layers arrives bit-equal.

The LION names below are those of the modules in its released code; no checkpoint file has been read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, InstructBlipConfig, InstructBlipForConditionalGeneration, T5Config

from eventlens_ds.model import lion_names
from eventlens_ds.model.aggregator import AggregatorMLP, VisionAggregator
from eventlens_ds.model.qformer import QFormer

WIDTH, VISION, QUERIES, LAYERS, LANGUAGE = 16, 24, 5, 3, 12


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    config = InstructBlipConfig(
        vision_config={
            "hidden_size": VISION,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        qformer_config={
            "vocab_size": 40,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": 20,
            "max_position_embeddings": 9,
        },
        text_config=T5Config(vocab_size=50, d_model=LANGUAGE, d_kv=4, d_ff=20, num_layers=1, num_heads=2).to_dict(),
        num_query_tokens=QUERIES,
    )
    model = InstructBlipForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def our_parts(theirs: Any) -> nn.ModuleDict:
    """What a model with our Q-Former holds; tower and language model are transformers' own."""
    from transformers import AutoModelForSeq2SeqLM, InstructBlipVisionModel

    return nn.ModuleDict(
        {
            lion_names.VISION: InstructBlipVisionModel(theirs.config.vision_config),
            lion_names.LANGUAGE: AutoModelForSeq2SeqLM.from_config(theirs.config.text_config),
            lion_names.QFORMER: QFormer(
                WIDTH, 4, 20, LAYERS, vision_width=VISION, num_queries=QUERIES, vocabulary=40, positions=9
            ),
            lion_names.QFORMER_PROJECTION: nn.Linear(WIDTH, LANGUAGE),
        }
    )


def moved(state: dict[str, torch.Tensor], mapped: dict[str, str]) -> dict[str, torch.Tensor]:
    return {mapped[name]: tensor for name, tensor in state.items() if name in mapped}


def test_every_tensor_of_instructblip_arrives_bit_equal(theirs: Any) -> None:
    state = theirs.state_dict()
    mapped, unmatched, joined = lion_names.from_instructblip(state)
    assert joined == {}
    assert unmatched == [] and set(mapped) == set(state)
    ours = our_parts(theirs)
    # Strict: nothing of ours stays without a tensor either.
    ours.load_state_dict(moved(state, mapped))
    arrived = ours.state_dict()
    assert all(torch.equal(arrived[mapped[name]], tensor) for name, tensor in state.items())
    assert len(arrived) == len(state)


def test_the_same_image_gives_the_same_tokens(theirs: Any) -> None:
    """Tower, its norm, Q-Former and projection, as get_image_features of transformers."""
    ours: Any = our_parts(theirs).eval()
    ours.load_state_dict(moved(theirs.state_dict(), lion_names.from_instructblip(theirs.state_dict()).mapped))
    torch.manual_seed(1)
    pixels, ids = torch.randn(2, 3, 28, 28), torch.randint(1, 40, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        expected = theirs.get_image_features(pixels, ids, mask).pooler_output
        image = ours[lion_names.VISION](pixels).last_hidden_state
        found = ours[lion_names.QFORMER_PROJECTION](ours[lion_names.QFORMER](image, ids, mask))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_name_without_a_place_is_listed(theirs: Any) -> None:
    """In the order of the file: heads, computed buffers, layers and leaves that no rule knows."""
    strange = [
        "qformer.embeddings.position_ids",
        "qformer.encoder.layer.0.attention.attention.query.scale",
        "qformer.encoder.layer.0.attention.self.query.weight",
        "qformer.encoder.layer.x.attention.attention.query.weight",
        "my_query_tokens",
        "itm_head.weight",
    ]
    found = lion_names.from_instructblip([strange[0], *theirs.state_dict(), *strange[1:]])
    assert found.unmatched == strange
    assert len(found.mapped) == len(theirs.state_dict())


def as_lavis(name: str) -> str | None:
    """InstructBLIP in transformers -> the original names; None: not among the trained parts."""
    if name.startswith("qformer."):
        name = name.replace("qformer.", "Qformer.bert.", 1).replace("attention.attention.", "attention.self.")
        return name.replace("embeddings.layernorm", "embeddings.LayerNorm")
    for ours, original in (("language_projection.", "t5_proj."), ("vision_model.post_layernorm.", "ln_vision.")):
        if name.startswith(ours):
            return name.replace(ours, original)
    return name if name == "query_tokens" else None


def aggregator_state(root: str = "fusion_adapter.blocks") -> dict[str, torch.Tensor]:
    """Two of transformers' own BertLayers below `root`, the norm after them and the MLP."""
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(
        hidden_size=VISION, num_attention_heads=4, intermediate_size=20, is_decoder=True, add_cross_attention=True
    )
    theirs = {f"{root}.{n}": t for n, t in nn.ModuleList(BertLayer(config) for _ in range(2)).state_dict().items()}
    state = {
        **theirs,
        "ln_adapter.weight": torch.empty(VISION),
        "ln_adapter.bias": torch.empty(VISION),
    }
    mlp = nn.Sequential(nn.Linear(VISION, 4 * VISION), nn.GELU(), nn.Linear(4 * VISION, LANGUAGE))
    state |= {f"adapter_proj.{name}": tensor for name, tensor in mlp.state_dict().items()}
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


def test_every_tensor_of_a_lion_file_arrives_bit_equal(theirs: Any) -> None:
    torch.manual_seed(2)
    state = {as_lavis(n): t for n, t in theirs.state_dict().items() if as_lavis(n) is not None}
    assert "Qformer.bert.encoder.layer.2.intermediate_query.dense.weight" in state
    assert "Qformer.bert.encoder.layer.0.crossattention.self.key.bias" in state
    state |= aggregator_state()
    rest = {
        "Qformer.cls.predictions.bias": torch.ones(2),
        "t5_model.encoder.block.0.layer.0.adapter.adapters.0.down_proj.weight": torch.ones(2),
    }

    mapped, unmatched, _ = lion_names.from_lion({**state, **rest})
    assert unmatched == list(rest) and set(mapped) == set(state)
    ours = nn.ModuleDict(
        {
            **{n: our_parts(theirs)[n] for n in (lion_names.QFORMER, lion_names.QFORMER_PROJECTION)},
            lion_names.VISION: nn.ModuleDict({"post_layernorm": nn.LayerNorm(VISION)}),
            lion_names.AGGREGATOR: VisionAggregator(VISION, 4, 20, (1, 0, 0)),
            lion_names.AGGREGATOR_MLP: AggregatorMLP(VISION, LANGUAGE),
        }
    )
    ours.load_state_dict(moved(state, mapped))
    arrived = ours.state_dict()
    assert all(torch.equal(arrived[mapped[name]], tensor) for name, tensor in state.items())
    assert len(arrived) == len(state)


def test_both_layouts_lead_to_the_same_names(theirs: Any) -> None:
    direct = lion_names.from_instructblip(theirs.state_dict()).mapped
    original = {name: as_lavis(name) for name in theirs.state_dict() if as_lavis(name) is not None}
    by_lavis = lion_names.from_lion(original.values()).mapped
    assert {name: by_lavis[lavis] for name, lavis in original.items()} == {name: direct[name] for name in original}


def test_other_roots_are_listed_and_nothing_is_dropped() -> None:
    state = [name for name in aggregator_state("fusion_adapter") if name.startswith("fusion_adapter.")]
    assert lion_names.from_lion(state) == ({}, state, {})
