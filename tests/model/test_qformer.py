"""Q-Former: equal to transformers' InstructBlipQFormerModel with the same weights, with, without and with padded text.

The layer is also written out in plain torch, float64. No module runs on some ranks only (P5).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel, PreTrainedConfig, PreTrainedModel

from eventlens_ds.model import lion_names
from eventlens_ds.model.post_norm import PostNormAttention, PostNormFFN, init_weights
from eventlens_ds.model.qformer import QFormer

WIDTH, HEADS, QUERIES, VISION, LAYERS = 16, 4, 5, 24, 4
MASKS = {
    "full": [[1] * 6] * 3,
    "padded": [[1] * 6, [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    "padded_left": [[1] * 6, [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "none_in_one": [[1] * 6, [0] * 6, [1, 1, 0, 0, 0, 0]],
    "empty": [[]] * 3,
}


def our_qformer(**changes: Any) -> QFormer:
    return QFormer(WIDTH, HEADS, 20, LAYERS, vision_width=VISION, num_queries=QUERIES, vocabulary=40, **changes)


def pair(dtype: torch.dtype = torch.float64, frequency: int = 2) -> tuple[QFormer, Any]:
    """Ours and transformers' with one set of weights, none of them zero or one."""
    config = InstructBlipQFormerConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=20,
        encoder_hidden_size=VISION,
        cross_attention_frequency=frequency,
    )
    theirs = InstructBlipQFormerModel(config).to(dtype).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.4)
    state = {f"qformer.{name}": tensor for name, tensor in theirs.state_dict().items()}
    state["query_tokens"] = torch.randn(1, QUERIES, WIDTH, dtype=dtype)
    mapped, unmatched, joined = lion_names.from_instructblip(state)
    assert not unmatched and not joined
    ours = our_qformer(cross_attention_frequency=frequency).to(dtype)
    ours.load_state_dict({mapped[n].removeprefix("qformer."): t for n, t in state.items()})
    return ours, theirs


def inputs(mask: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    seen = torch.tensor(MASKS[mask], dtype=torch.int64)
    return torch.randn(3, 7, VISION, dtype=dtype), torch.randint(1, 40, seen.shape), seen


def expected_of(theirs: Any, queries: torch.Tensor, image: torch.Tensor, ids: Any, mask: Any) -> torch.Tensor:
    """As InstructBlipForConditionalGeneration calls its Q-Former."""
    queries = queries.expand(image.shape[0], -1, -1)
    seen = torch.ones(queries.shape[:2], dtype=torch.int64)
    out = theirs(
        input_ids=ids,
        attention_mask=seen if mask is None else torch.cat([seen, mask], 1),
        query_embeds=queries,
        encoder_hidden_states=image,
        encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.int64),
    )
    return out.last_hidden_state[:, :QUERIES]


@pytest.mark.parametrize("frequency", [2, 1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_equals_transformers(mask: str, frequency: int) -> None:
    ours, theirs = pair(frequency=frequency)
    image, ids, seen = inputs(mask)
    found = ours(image, ids, seen)
    assert found.shape == (3, QUERIES, WIDTH)
    torch.testing.assert_close(found, expected_of(theirs, ours.query_tokens, image, ids, seen), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mask", ["padded", "empty"])
def test_equals_transformers_in_fp32(mask: str) -> None:
    ours, theirs = pair(torch.float32)
    image, ids, seen = inputs(mask, torch.float32)
    expected = expected_of(theirs, ours.query_tokens, image, ids, seen)
    torch.testing.assert_close(ours(image, ids, seen.bool()), expected, rtol=1e-5, atol=1e-6)


def test_no_instruction_is_transformers_without_ids() -> None:
    ours, theirs = pair()
    image, ids, seen = inputs("empty")
    expected = expected_of(theirs, ours.query_tokens, image, None, None)
    torch.testing.assert_close(ours(image, ids, seen), expected, rtol=0, atol=1e-10)


def test_gradients_equal_those_of_transformers() -> None:
    ours, theirs = pair()
    image, ids, seen = inputs("padded")
    queries = ours.query_tokens.detach().clone().requires_grad_()
    expected_of(theirs, queries, image, ids, seen).pow(3).sum().backward()
    ours(image, ids, seen).pow(3).sum().backward()
    found = {f"qformer.{n}": p.grad for n, p in ours.named_parameters()}
    torch.testing.assert_close(found["qformer.query_tokens"], queries.grad, rtol=1e-9, atol=1e-9)
    named = {f"qformer.{n}": p.grad for n, p in theirs.named_parameters()}
    idle = {f"qformer.{name}" for name in ours.idle_parameters()}
    for name, target in lion_names.from_instructblip(named).mapped.items():
        if target in idle:
            assert found[target] is None and not named[name].any()
        else:
            torch.testing.assert_close(found[target], named[name], rtol=1e-9, atol=1e-9)


def test_what_the_comparison_must_see() -> None:
    """The controls: text, its mask, its order, the image and the cross-attention of every second layer matter."""
    ours, _ = pair()
    image, ids, seen = inputs("full")
    found = ours(image, ids, seen)
    _, _, padded = inputs("padded")
    for other in (
        ours(image, ids.flip(1), seen),
        ours(image, ids, padded),
        ours(image, ids[:, :0], seen[:, :0]),
        ours(image.flip(0), ids, seen),
    ):
        assert (other - found).abs().max() > 1e-3
    only_first = our_qformer(cross_attention_frequency=LAYERS).double()
    only_first.load_state_dict({n: t for n, t in ours.state_dict().items() if n in only_first.state_dict()})
    assert (only_first(image, ids, seen) - found).abs().max() > 1e-3


def test_padding_is_not_read() -> None:
    ours, _ = pair()
    image, ids, seen = inputs("padded")
    found = ours(image, ids, seen)
    assert torch.equal(ours(image, torch.where(seen == 0, 7, ids), seen), found)
    alone = ours(image[1:2], ids[1:2, :3], seen[1:2, :3])
    torch.testing.assert_close(found[1:2], alone, rtol=0, atol=1e-10)
    assert not torch.allclose(ours(image, torch.where(seen == 1, 7, ids), seen), found)


def norm(x: torch.Tensor, part: nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt() * part.weight + part.bias


def attend(x: torch.Tensor, source: torch.Tensor, part: PostNormAttention, seen: torch.Tensor) -> torch.Tensor:
    """x [T, H], source [S, C], seen bool[S]; padding is cut away, not masked."""
    source = source[seen]
    out = []
    for head in range(HEADS):
        rows = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        q, k, v = (
            t @ linear.weight[rows].T + linear.bias[rows]
            for t, linear in ((x, part.query), (source, part.key), (source, part.value))
        )
        out.append(torch.softmax(q @ k.T / math.sqrt(WIDTH // HEADS), -1) @ v)
    return norm(x + torch.cat(out, -1) @ part.output.weight.T + part.output.bias, part.norm)


def feed(x: torch.Tensor, part: PostNormFFN) -> torch.Tensor:
    inner = x @ part.up.weight.T + part.up.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return norm(x + inner @ part.down.weight.T + part.down.bias, part.norm)


def formula(made: Any, image: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One sample: image [S, V], ids and mask [L]."""
    q = norm(made.query_tokens[0], made.norm)
    t = norm(made.word_embeddings.weight[ids] + made.position_embeddings.weight[: len(ids)], made.norm)
    seen = torch.cat([torch.ones(QUERIES), mask]).bool()
    for index, layer in enumerate(made.layers):
        both = attend(torch.cat([q, t]), torch.cat([q, t]), layer.self_attention, seen)
        q, t = both[:QUERIES], both[QUERIES:]
        if index % 2 == 0:
            q = attend(q, image, layer.cross_attention, torch.ones(len(image), dtype=torch.bool))
        q, t = feed(q, layer.query_ffn), feed(t, layer.text_ffn)
    return q


@pytest.mark.parametrize("mask", MASKS)
def test_qformer_is_its_formula(mask: str) -> None:
    ours, _ = pair()
    image, ids, seen = inputs(mask)
    expected = torch.stack([formula(ours, *sample) for sample in zip(image, ids, seen)])
    torch.testing.assert_close(ours(image, ids, seen), expected, rtol=0, atol=1e-10)


def test_queries_and_text_have_ffns_of_their_own() -> None:
    ours, _ = pair()
    image, ids, seen = inputs("full")
    found = ours(image, ids, seen)
    for layer in ours.layers:
        layer.query_ffn, layer.text_ffn = layer.text_ffn, layer.query_ffn
    assert (ours(image, ids, seen) - found).abs().max() > 1e-2


@pytest.mark.P5
@pytest.mark.parametrize("mask", ["full", "empty"])
def test_the_same_modules_run_with_and_without_an_instruction(mask: str) -> None:
    """So ZeRO-3 gathers the same parameters on every rank, and every parameter but the idle ones has a gradient."""
    ours, _ = pair()
    ran: list[str] = []
    for name, module in ours.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    image, ids, seen = inputs(mask)
    ours(image, ids, seen).sum().backward()
    idle = ours.idle_parameters()
    assert idle and all(name.startswith(f"layers.{LAYERS - 1}.text_ffn.") for name in idle)
    assert {n for n, p in ours.named_parameters() if p.grad is None} == set(idle)
    leaves = {name for name, module in ours.named_modules() if not list(module.children())}
    assert leaves - set(ran) == {name for name in leaves if name.startswith(f"layers.{LAYERS - 1}.text_ffn.")}
    if mask == "empty":
        assert not ours.word_embeddings.weight.grad.any()


class Holder(PreTrainedModel):
    config_class = PreTrainedConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.qformer = our_qformer()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if not init_weights(module):
            super()._init_weights(module)


def test_initial_values_and_checkpointing() -> None:
    torch.manual_seed(0)
    made = Holder(PreTrainedConfig(initializer_range=0.5)).double().train()
    for name, parameter in made.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
    calls = []
    made.qformer.layers[0].query_ffn.up.register_forward_hook(lambda *_: calls.append(1))
    image, ids, seen = inputs("padded")
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            made.gradient_checkpointing_enable()
        made.zero_grad()
        made.qformer(image, ids, seen).pow(3).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None})
    assert len(calls) == 1 + 2
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_shapes_that_do_not_fit() -> None:
    made = our_qformer(positions=5)
    image, ids, seen = inputs("full", torch.float32)
    with pytest.raises(ValueError, match="6 instruction tokens, 5 positions"):
        made(image, ids, seen)
    # Without the guard attention would broadcast the one image over three instructions.
    with pytest.raises(ValueError, match="1 images, 3 instructions"):
        made(image[:1], ids[:, :5], seen[:, :5])
    layer = made.layers[0].cross_attention
    assert layer(torch.zeros(3, QUERIES, WIDTH), image[:1]).shape[0] == 3


def test_parameter_count_of_lion() -> None:
    """BERT-base with six cross-attentions and twelve more FFNs: about 186 M, as transformers counts."""
    with torch.device("meta"):
        ours = QFormer(768, 12, 3072, 12, vision_width=1408, num_queries=32, vocabulary=30523)
        theirs = InstructBlipQFormerModel(InstructBlipQFormerConfig(vocab_size=30523))
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) + 32 * 768
