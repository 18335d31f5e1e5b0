"""Initial weights: the distribution of every part, equal under every ZeRO stage, device order and dtype.

That two ZeRO-3 ranks hold the same bits as one whole model is tested in test_weights.py, for every layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eventlens_ds.config.run_config import ModelConfig
from eventlens_ds.data.tokenizer import load_tokenizer
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.model import initial
from eventlens_ds.model.presets import model_config
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.runtime import build_model
from tests.model import tiny_folders as tiny


def built(**train: Any) -> RegionVLM:
    return tiny.loaded({"train": train}, 0)[0]


def kinds(model: RegionVLM) -> dict[str, float]:
    """Standard deviation by kind of parameter; the tiny preset is large enough for one per cent or two."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        part, leaf = name.split(".")[0], name.split(".")[-1]
        inside = "embedding" if "embed" in name else "norm" if "norm" in name or "layrnorm" in name else "linear"
        kind = leaf.split("_", 1)[-1].removeprefix("answer_").removeprefix("rationale_") if part == "adapters" else leaf
        groups.setdefault(f"{part} {inside} {kind}", []).append(parameter.detach().flatten())
    return {kind: float(torch.cat(values).std()) for kind, values in groups.items()}


def test_the_distribution_is_that_of_transformers() -> None:
    ours = built()
    torch.manual_seed(0)
    theirs = RegionVLM._from_config(ours.config, dtype=torch.float32)
    expected = kinds(theirs)
    for kind, std in kinds(ours).items():
        assert std == pytest.approx(expected[kind], rel=0.05, abs=1e-6), kind
    assert kinds(ours)["language_model embedding weight"] == pytest.approx(
        ours.config.text_config.initializer_range, rel=0.02
    )
    assert kinds(ours)["adapters linear up"] == 0 < kinds(ours)["adapters linear down"]


def test_values_depend_on_the_seed_only() -> None:
    torch.manual_seed(5)
    first = tiny.digests(built(seed=1))
    torch.manual_seed(6)
    torch.rand(3)
    before = torch.get_rng_state()
    assert tiny.digests(built(seed=1)) == first
    # Nothing else in the process sees that values were drawn.
    assert torch.equal(torch.get_rng_state(), before)
    other = tiny.digests(built(seed=2))
    drawn = {n for n, p in built().named_parameters() if p.detach().float().std() > 0}
    assert all(other[n] != first[n] for n in drawn)


def test_bf16_starts_from_the_rounded_fp32_weights() -> None:
    whole = dict(built().named_parameters())
    for name, parameter in built(dtype="bf16").named_parameters():
        assert torch.equal(parameter, whole[name].bfloat16()), name


def test_a_part_does_not_depend_on_the_others() -> None:
    full, bare = tiny.digests(built()), tiny.digests(tiny.loaded({"model": {"linking": "none"}}, 0)[0])
    assert bare.items() <= full.items() and len(bare) < len(full)


def test_a_parameter_nobody_initialises_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = built()
    ours.projector.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match="projector.extra has no initial value"):
        initial.draw(ours, 0)


def correlations(model: RegionVLM) -> list[float]:
    """Of query and key weights, per layer of the language model; the first query head of each key head."""
    found = []
    for layer in model.language_model.model.layers:
        attention = layer.self_attn
        key = attention.k_proj.weight.detach()
        query = attention.q_proj.weight.detach().view(key.shape[0] // attention.head_dim, -1, attention.head_dim, 128)
        found.append(float(torch.corrcoef(torch.stack([query[:, 0].flatten(), key.flatten()]))[0, 1]))
    return found


@pytest.mark.parametrize("key_heads", [4, 2])
def test_query_and_key_weights_start_as_correlated_as_asked(key_heads: int) -> None:
    config = built().config
    config.text_config.num_key_value_heads = key_heads
    plain = initial.new_model(config, dtype=torch.float32, seed=1)
    config.qk_correlation = 0.7
    alike = initial.new_model(config, dtype=torch.float32, seed=1)
    assert correlations(alike) == pytest.approx([0.7] * 3, abs=0.05)
    assert correlations(plain) == pytest.approx([0.0] * 3, abs=0.05)
    before, after = dict(plain.named_parameters()), dict(alike.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"language_model.model.layers.{i}.self_attn.k_proj.weight" for i in range(3)}
    for name in changed:
        assert after[name].std().item() == pytest.approx(before[name].std().item(), rel=0.03), name


def test_words_start_as_far_apart_as_asked_before_a_head_of_their_own() -> None:
    tokenizer = load_tokenizer("")
    made = [
        initial.new_model(model_config(ModelConfig(word_spread=spread), tokenizer), dtype=torch.float32, seed=1)
        for spread in (0.0, 1.0)
    ]
    (tied, plain), (own, spread) = ([m.get_output_embeddings().weight, m.get_input_embeddings().weight] for m in made)
    assert tied is plain and own is not spread
    assert plain.std().item() == pytest.approx(0.08, rel=0.03)
    assert spread.std().item() == pytest.approx(1.0, rel=0.03)
    assert own.std().item() == pytest.approx(0.08, rel=0.03)
    before, after = (dict(m.named_parameters()) for m in made)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model.model.embed_tokens.weight"}


@pytest.mark.parametrize(("setting", "t5"), [("qk_correlation", "T5 has no"), ("word_spread", "T5 keeps")])
def test_published_and_t5_models_refuse_another_start(setting: str, t5: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("")
    tiny.llama(len(tokenizer)).save_pretrained(tmp_path)
    for model, why in (({"language_path": str(tmp_path)}, "its own weights"), ({"preset": "tiny-t5"}, t5)):
        config = ModelConfig(**{setting: 0.5}, **model)
        with pytest.raises(UserError, match=f"{setting} 0.5: .*{why}"):
            model_config(config, tokenizer, from_scratch_is_fine=True)


def test_a_start_that_does_not_fit_the_loaded_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, name = built(), "language_model.model.norm.weight"
    monkeypatch.setattr(build_model.commit, "resolve", lambda path: path)
    monkeypatch.setattr(build_model, "_from_lead", lambda path: iter([(name, torch.ones(128))]))
    assert build_model.weights_of_run(ours, "run").loaded == {name}
    words, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    shape = ours.get_input_embeddings().weight.shape
    untied = [(words, torch.zeros(shape)), (head, torch.ones(shape))]
    monkeypatch.setattr(build_model, "_from_lead", lambda path: iter(untied))
    with pytest.raises(DataError, match=f"--init-from run: {head} has values of its own"):
        build_model.weights_of_run(ours, "run")
    monkeypatch.setattr(build_model, "_from_lead", lambda path: iter([(name, torch.ones(128))]))
    ours.config.qk_correlation = 0.5
    with pytest.raises(UserError, match="qk_correlation 0.5: run brings the language model's weights"):
        build_model.weights_of_run(ours, "run")
