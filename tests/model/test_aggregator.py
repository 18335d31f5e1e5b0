"""Vision aggregator: equal to its formula and to transformers' BertLayer, LN(h) at the start, its size, checkpointing.

The formulas are written out here in plain torch with a softmax of their own, in float64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from eventlens_ds.model.aggregator import AggregatorBlock, AggregatorMLP, VisionAggregator
from eventlens_ds.model.initial import draw
from eventlens_ds.model.post_norm import PostNormAttention, init_weights

WIDTH, HEADS, INTERMEDIATE, LAYERS = 24, 4, 20, (4, 2, 1)


def randomised(module: Any, seed: int = 0) -> Any:
    """A float64 module in which no parameter is zero or one."""
    torch.manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module


def states(count: int = 6, images: int = 3, tokens: int = 7) -> tuple[torch.Tensor, ...]:
    """Embedding and block outputs of a tower: [N, cls + P, V]."""
    torch.manual_seed(1)
    return tuple(torch.randn(images, tokens, WIDTH, dtype=torch.float64) for _ in range(count))


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm, eps: float = 1e-12) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def affine(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return x @ linear.weight.T + linear.bias


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x: torch.Tensor, source: torch.Tensor, part: PostNormAttention) -> torch.Tensor:
    """One head after another: LN(x + W_o [softmax(q k^T / sqrt d) v])."""
    queries, keys, values = affine(x, part.query), affine(source, part.key), affine(source, part.value)
    size = WIDTH // HEADS
    heads = []
    for start in range(0, WIDTH, size):
        q, k, v = (t[..., start : start + size] for t in (queries, keys, values))
        scores = (q @ k.transpose(1, 2) / math.sqrt(size)).exp()
        heads.append(scores / scores.sum(-1, keepdim=True) @ v)
    return layer_norm(x + affine(torch.cat(heads, -1), part.output), part.norm)


def block_formula(x: torch.Tensor, source: torch.Tensor, block: Any) -> torch.Tensor:
    x = attention(x, x, block.self_attention)
    x = attention(x, source, block.cross_attention)
    return layer_norm(x + affine(gelu(affine(x, block.ffn.up)), block.ffn.down), block.ffn.norm)


def aggregator_formula(h: dict[int, torch.Tensor], order: tuple[int, ...], made: VisionAggregator) -> torch.Tensor:
    x = h[order[0]]
    for layer, block in zip(order[1:], made.blocks, strict=True):
        x = block_formula(x, h[layer], block)
    return layer_norm(x, made.norm, eps=1e-5)


@pytest.mark.parametrize("layers", [LAYERS, (3,), (0, 4), (1, 1, 1, 1)], ids=str)
def test_aggregator_is_its_formula(layers: tuple[int, ...]) -> None:
    made = randomised(VisionAggregator(WIDTH, HEADS, INTERMEDIATE, layers))
    hidden = states()
    h = {k: hidden[k + 1] for k in range(5)}
    found = made(hidden)
    assert found.shape == hidden[0].shape
    torch.testing.assert_close(found, aggregator_formula(h, layers, made), rtol=0, atol=1e-10)


def test_another_order_of_keys_or_depths_differs() -> None:
    """The controls: the comparison sees swapped KV, swapped roles of x and KV, and indices without the embedding."""
    made = randomised(VisionAggregator(WIDTH, HEADS, INTERMEDIATE, LAYERS))
    hidden = states()
    h = {k: hidden[k + 1] for k in range(5)}
    found = made(hidden)
    off_by_one = {k: hidden[k] for k in range(5)}
    for wrong in (
        aggregator_formula(h, (4, 1, 2), made),
        aggregator_formula(h, (2, 4, 1), made),
        aggregator_formula(off_by_one, LAYERS, made),
    ):
        assert (found - wrong).abs().max() > 1e-2
    block = made.blocks[0]
    assert (block(h[4], h[2]) - block_formula(h[2], h[4], block)).abs().max() > 1e-2
    assert (block(h[4], h[2]) - block_formula(h[4], h[4], block)).abs().max() > 1e-2


def test_block_is_a_bert_layer_without_a_mask() -> None:
    """transformers' BertLayer as the released code builds it: a decoder with cross-attention, called without mask."""
    from transformers.models.bert.modeling_bert import BertLayer

    from eventlens_ds.model.lion_names import bert_layer

    config = BertConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        is_decoder=True,
        add_cross_attention=True,
        attn_implementation="eager",
    )
    theirs = randomised(BertLayer(config)).eval()
    ours = AggregatorBlock(WIDTH, HEADS, INTERMEDIATE).double()
    names = bert_layer("self")
    renamed = {f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": t for n, t in theirs.state_dict().items()}
    ours.load_state_dict(renamed)
    x, source = states(2)
    expected = theirs(x, encoder_hidden_states=source)
    torch.testing.assert_close(ours(x, source), expected, rtol=0, atol=1e-10)
    causal = torch.full((7, 7), -math.inf, dtype=torch.float64).triu(1)[None, None]
    assert (ours(x, source) - theirs(x, causal, encoder_hidden_states=source)).abs().max() > 1e-2


def test_a_new_aggregator_is_the_norm_of_its_first_layer() -> None:
    torch.manual_seed(0)
    made = VisionAggregator(WIDTH, HEADS, INTERMEDIATE, LAYERS).double()
    made.apply(init_weights)
    hidden = states()
    # The norms inside the blocks, which repeat each other, then the last one with its own eps.
    inside = nn.functional.layer_norm(hidden[LAYERS[0] + 1], (WIDTH,), eps=1e-12)
    expected = nn.functional.layer_norm(inside, (WIDTH,), eps=1e-5)
    torch.testing.assert_close(made(hidden), expected, rtol=0, atol=1e-9)
    changed = (*hidden[:2], hidden[2] + 1, hidden[3] * 2, *hidden[4:])
    assert torch.equal(made(changed), made(hidden))
    # The controls: the first layer does matter, and so does a branch once its output layer has moved.
    assert not torch.allclose(made((*hidden[:-1], hidden[-1].flip(1))), expected)
    nn.init.normal_(made.blocks[1].cross_attention.output.weight)
    assert not torch.allclose(made(changed), made(hidden))


def test_only_the_branch_outputs_start_at_zero() -> None:
    torch.manual_seed(0)
    made = VisionAggregator(64, 4, 128, LAYERS)
    made.apply(init_weights)
    for name, parameter in made.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or name.endswith(("output.weight", "ffn.down.weight")):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    zero = [n for n, p in made.named_parameters() if n.endswith("weight") and not p.any()]
    assert len(zero) == 3 * 2


class Holder(PreTrainedModel):
    """A model that holds the aggregator as RegionVLM holds its parts."""

    config_class = PreTrainedConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.aggregator = VisionAggregator(WIDTH, HEADS, INTERMEDIATE, LAYERS)
        self.mlp = AggregatorMLP(WIDTH, 16)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if not init_weights(module):
            super()._init_weights(module)


@pytest.mark.parametrize("drawn", [True, False], ids=["draw", "post_init"])
def test_initial_values_come_through_the_rules_of_the_model(drawn: bool) -> None:
    # Not the 0.02 that our parts bring: theirs must win over the rule of the model.
    torch.manual_seed(0)
    made = Holder(PreTrainedConfig(initializer_range=0.5))
    if drawn:
        for parameter in made.parameters():
            nn.init.constant_(parameter, 7.0)
        draw(made, seed=3)
    for block in made.aggregator.blocks:
        for linear in (block.self_attention.output, block.cross_attention.output, block.ffn.down):
            assert not linear.weight.any() and not linear.bias.any()
        assert block.cross_attention.key.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert (block.ffn.norm.weight == 1).all()
    assert made.mlp.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert (made.aggregator.norm.weight == 1).all() and not made.mlp.linear_2.bias.any()
    if drawn:
        first = {n: p.clone() for n, p in made.named_parameters()}
        draw(made, seed=3)
        assert all(torch.equal(p, first[n]) for n, p in made.named_parameters())


def test_without_our_rules_the_branches_would_not_start_at_zero() -> None:
    """The control."""

    class Plain(Holder):
        def _init_weights(self, module: nn.Module) -> None:
            PreTrainedModel._init_weights(self, module)

    torch.manual_seed(0)
    made = Plain(PreTrainedConfig(initializer_range=0.5))
    assert made.aggregator.blocks[0].ffn.down.weight.std().item() == pytest.approx(0.5, rel=0.15)


def test_checkpointing_recomputes_the_blocks_and_keeps_the_gradients() -> None:
    made = randomised(Holder(PreTrainedConfig())).train()
    calls = []
    made.aggregator.blocks[0].ffn.up.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            made.gradient_checkpointing_enable()
        made.zero_grad()
        # The tower is frozen, so no input of the first block has a gradient.
        made.mlp(made.aggregator(states())).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in made.named_parameters()})
    assert len(calls) == 1 + 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-12)
        assert gradient.abs().max() > 1e-6 or name.endswith("key.bias"), name


def test_layers_and_heads_that_do_not_fit() -> None:
    made = VisionAggregator(WIDTH, HEADS, INTERMEDIATE, LAYERS)
    with pytest.raises(ValueError, match=r"layers \[4, 2, 1\]: the tower has 4 blocks"):
        made(states(5))
    for layers in ((), (2, -1)):
        with pytest.raises(ValueError, match="blocks of the tower, counted from 0"):
            VisionAggregator(WIDTH, HEADS, INTERMEDIATE, layers)
    with pytest.raises(ValueError, match="width 24 is not a multiple of 5 heads"):
        VisionAggregator(WIDTH, 5, INTERMEDIATE, LAYERS)


@pytest.mark.parametrize(
    ("kind", "config"), [(InstructBlipVisionModel, InstructBlipVisionConfig), (CLIPVisionModel, CLIPVisionConfig)]
)
def test_hidden_state_k_plus_one_is_the_output_of_block_k(kind: Any, config: Any) -> None:
    """Also of the last block, before the tower's final norm."""
    tower = kind(
        config(
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=5,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.3)
    blocks: list[torch.Tensor] = []
    for layer in tower.encoder.layers:
        layer.register_forward_hook(lambda _m, _i, out: blocks.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        hidden = tower(torch.randn(2, 3, 28, 28), output_hidden_states=True).hidden_states
    assert len(hidden) == len(blocks) + 1
    chosen = VisionAggregator(WIDTH, HEADS, INTERMEDIATE, LAYERS).select(hidden)
    assert all(torch.equal(state, blocks[k]) for state, k in zip(chosen, LAYERS, strict=True))


def test_mlp_is_its_formula() -> None:
    made = randomised(AggregatorMLP(WIDTH, 10))
    assert made.linear_1.out_features == 4 * WIDTH
    v = states(1)[0]
    expected = affine(gelu(affine(v, made.linear_1)), made.linear_2)
    torch.testing.assert_close(made(v), expected, rtol=0, atol=1e-10)
    tanh = affine(nn.functional.gelu(affine(v, made.linear_1), approximate="tanh"), made.linear_2)
    assert (made(v) - tanh).abs().max() > 1e-5


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_lion() -> None:
    """About 49.1 M, and 19.5 M (FLAN-T5-XL) or 31.0 M (XXL) for the MLP."""
    with torch.device("meta"):
        aggregator = VisionAggregator(1408, 16, 3072, (38, 28, 18))
        mlps = {width: AggregatorMLP(1408, width) for width in (2048, 4096)}
    assert count(aggregator) == 49_072_128
    assert {width: count(mlp) for width, mlp in mlps.items()} == {2048: 19_471_872, 4096: 31_008_256}
    millions = [round(count(m) / 1e6, 1) for m in (aggregator, mlps[2048], mlps[4096])]
    assert millions == [49.1, 19.5, 31.0]
