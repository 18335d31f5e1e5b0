"""Published weights become folders of ours, and the modules that load them compute what was published.

The layout of a LION file is written out in `lion_file`, from the modules of its released code (models/lion_t5.py,
lion_adapters.py, eva_vit.py); no published file has been read. Formulas are written out beside what they check.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipVisionModel, T5Config

from eventlens_ds.cli import main as cli
from eventlens_ds.data.records import TASKS
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.export import convert
from eventlens_ds.model import folders
from eventlens_ds.model.adapters import AdapterMixture
from eventlens_ds.model.qformer import QFormer
from eventlens_ds.runtime.build_model import weights_of_run

WIDTH, HEADS, PATCH, SIDE = 24, 4, 14, 2
LANGUAGE, BOTTLENECK, ENCODER, DECODER = 12, 3, 2, 1


def lion_file() -> dict[str, torch.Tensor]:
    """A LION .pth on tiny shapes: tower, one adapter mixture per FFN, soft prompt, the norm before the Q-Former."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, WIDTH),
        "visual_encoder.pos_embed": (1, SIDE * SIDE + 1, WIDTH),
        "visual_encoder.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "visual_encoder.patch_embed.proj.bias": (WIDTH,),
        "ln_vision.weight": (WIDTH,),
        "ln_vision.bias": (WIDTH,),
        "soft_prompt_hint": (LANGUAGE,),
    }
    for b in range(2):
        block = f"visual_encoder.blocks.{b}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (WIDTH,), f"{block}.{norm}.bias": (WIDTH,)}
        shapes |= {
            f"{block}.attn.q_bias": (WIDTH,),
            f"{block}.attn.v_bias": (WIDTH,),
            f"{block}.attn.qkv.weight": (3 * WIDTH, WIDTH),
            f"{block}.attn.proj.weight": (WIDTH, WIDTH),
            f"{block}.attn.proj.bias": (WIDTH,),
            f"{block}.mlp.fc1.weight": (32, WIDTH),
            f"{block}.mlp.fc1.bias": (32,),
            f"{block}.mlp.fc2.weight": (WIDTH, 32),
            f"{block}.mlp.fc2.bias": (WIDTH,),
        }
    for adapter in adapters_of_file():
        shapes |= {f"{adapter}.router_ratio1": (2, LANGUAGE), f"{adapter}.router_ratio2": (2, LANGUAGE)}
        for k in (0, 1):
            shapes |= {
                f"{adapter}.adapters.{k}.scale": (1,),
                f"{adapter}.adapters.{k}.down_proj.weight": (BOTTLENECK, LANGUAGE),
                f"{adapter}.adapters.{k}.down_proj.bias": (BOTTLENECK,),
                f"{adapter}.adapters.{k}.up_proj.weight": (LANGUAGE, BOTTLENECK),
                f"{adapter}.adapters.{k}.up_proj.bias": (LANGUAGE,),
            }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def adapters_of_file() -> list[str]:
    """In the order of our `adapters.<i>`."""
    encoder = [f"t5_model.encoder.block.{b}.layer.1.adapter" for b in range(ENCODER)]
    return encoder + [f"t5_model.decoder.block.{b}.layer.2.adapter" for b in range(DECODER)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lion") / "stage3.pth"
    torch.save({"model": lion_file(), "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def made(file: Path) -> Path:
    """Converted by the command, which a folder in its way stops."""
    out = file.parent / "made"
    argv = ["convert", "--from", "lion", str(file), "--out", str(out), "--heads", str(HEADS)]
    assert cli(argv) == 0
    assert cli(argv) == 2
    return out


def ours(layers: int = ENCODER + DECODER) -> nn.Module:
    """What a model of ours holds of such a file, beside the tower."""
    parts = nn.Module()
    parts.adapters = nn.ModuleList(AdapterMixture(LANGUAGE, BOTTLENECK) for _ in range(layers))
    parts.soft_prompt = nn.Module()
    parts.soft_prompt.hint = nn.Parameter(torch.zeros(LANGUAGE))
    return parts


def test_adapters_and_routers_compute_the_released_formula(made: Path) -> None:
    published, model = lion_file(), ours()
    report = weights_of_run(model, str(made))
    assert not report.new and not report.unused
    assert torch.equal(model.soft_prompt.hint, published["soft_prompt_hint"])
    x, residual = torch.randn(2, 5, LANGUAGE).double()
    model.double()
    for number, root in enumerate(adapters_of_file()):
        p = {n.removeprefix(f"{root}."): t.double() for n, t in published.items() if n.startswith(f"{root}.")}
        heads = []
        for k in (0, 1):
            a = {n.removeprefix(f"adapters.{k}."): t for n, t in p.items() if n.startswith(f"adapters.{k}.")}
            down = torch.relu(x @ a["down_proj.weight"].T + a["down_proj.bias"])
            heads.append((down @ a["up_proj.weight"].T + a["up_proj.bias"]) * a["scale"])
        # router_idx of the released code: 0 for region_level, 1 for everything else.
        for task, index in (("rec", 0), ("reg", 0), ("caption", 1), ("vqa", 1)):
            expected = residual + heads[0] * p["router_ratio1"][index] + heads[1] * p["router_ratio2"][index]
            found = model.adapters[number](x, residual, torch.full((5,), TASKS.index(task)))
            assert (found - expected).abs().max() <= 1e-6, (root, task)
            swapped = residual + heads[0] * p["router_ratio2"][index] + heads[1] * p["router_ratio1"][index]
            assert (found - swapped).abs().max() > 1e-2, "control: gates of the other adapter"


def eva(p: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """Forward of the released EVA-ViT: pre-norm blocks, one fused projection whose keys have no bias."""
    x = F.conv2d(pixels, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([p["cls_token"], x.flatten(2).transpose(1, 2)], 1) + p["pos_embed"]
    for b in range(2):
        w = {n.removeprefix(f"blocks.{b}."): t for n, t in p.items() if n.startswith(f"blocks.{b}.")}
        y = F.layer_norm(x, (WIDTH,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        bias = torch.cat([w["attn.q_bias"], torch.zeros(WIDTH), w["attn.v_bias"]])
        q, k, v = (y @ w["attn.qkv.weight"].T + bias).view(1, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1) @ v
        x = x + attention.transpose(1, 2).reshape(1, -1, WIDTH) @ w["attn.proj.weight"].T + w["attn.proj.bias"]
        y = F.layer_norm(x, (WIDTH,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        y = F.gelu(y @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
        x = x + y @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    return x


def test_the_tower_folder_computes_the_released_blocks(made: Path) -> None:
    tower = InstructBlipVisionModel.from_pretrained(made / "vision").eval().double()
    state = {n: t.double() for n, t in lion_file().items()}
    prefix = "visual_encoder."
    published = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    torch.set_default_dtype(torch.float64)
    try:
        pixels = torch.randn(1, 3, SIDE * PATCH, SIDE * PATCH)
        expected = eva(published, pixels)
        with torch.no_grad():
            found = tower(pixels, output_hidden_states=True)
    finally:
        torch.set_default_dtype(torch.float32)
    scale = expected.abs().max()
    assert (found.hidden_states[-1] - expected).abs().max() / scale <= 1e-6
    normed = F.layer_norm(expected, (WIDTH,), state["ln_vision.weight"], state["ln_vision.bias"], 1e-6)
    assert (found.last_hidden_state - normed).abs().max() <= 1e-6
    published["blocks.1.attn.q_bias"] = published["blocks.1.attn.v_bias"]
    assert (eva(published, pixels) - expected).abs().max() / scale > 1e-4, "control: the bias matters"


def test_a_bare_tower_gets_the_identity_for_its_norm_and_says_so(tmp_path: Path, capsys: Any) -> None:
    prefix = "visual_encoder."
    state = {n.removeprefix(prefix): t for n, t in lion_file().items() if n.startswith(prefix)}
    # As published: a block that LAVIS never runs, and the head of its pretraining.
    state |= {n.replace("blocks.1.", "blocks.2."): t for n, t in state.items() if n.startswith("blocks.1.")}
    torch.save({**state, "head.bias": torch.zeros(1)}, tmp_path / "eva.pth")
    argv = ["convert", "--from", "eva", str(tmp_path / "eva.pth"), "--out", str(tmp_path / "out"), "--heads", "4"]
    assert cli(argv) == 3
    assert "first head.bias" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli([*argv, "--leave-out", "blocks.2.,head."]) == 0
    assert "made here: vision_tower.post_layernorm" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/vision/config.json").read_text())
    assert (config["num_hidden_layers"], config["image_size"], config["qkv_bias"]) == (2, SIDE * PATCH, True)
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(1)
    text = T5Config(vocab_size=50, d_model=LANGUAGE, d_kv=4, d_ff=20, num_layers=1, num_heads=2)
    config = InstructBlipConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "image_size": SIDE * PATCH,
            "patch_size": PATCH,
        },
        qformer_config={
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 20,
            "max_position_embeddings": 9,
        },
        text_config=text.to_dict(),
        num_query_tokens=5,
    )
    model = InstructBlipForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("blip") / "theirs"
    model.save_pretrained(folder)
    return model, folder


def test_instructblip_gives_the_same_queries(blip: tuple[Any, Path]) -> None:
    theirs, folder = blip
    out = folder.parent / "ours"
    assert cli(["convert", "--from", "instructblip", str(folder), "--out", str(out)]) == 0
    parts: Any = nn.ModuleDict(
        {
            "qformer": QFormer(16, 4, 20, 3, vision_width=WIDTH, num_queries=5, vocabulary=40, positions=9),
            "qformer_projection": nn.Linear(16, LANGUAGE),
        }
    )
    assert not weights_of_run(parts, str(out)).new
    tower = InstructBlipVisionModel.from_pretrained(out / "vision").eval()
    theirs.double(), parts.double(), tower.double()
    torch.manual_seed(2)
    pixels, ids = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH).double(), torch.randint(1, 40, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        expected = theirs.get_image_features(pixels, ids, mask).pooler_output
        found = parts.qformer_projection(parts.qformer(tower(pixels).last_hidden_state, ids, mask))
        other = parts.qformer_projection(parts.qformer(tower(pixels).last_hidden_state, ids.flip(0), mask))
    assert (found - expected).abs().max() <= 1e-6
    assert (found - other).abs().max() > 1e-6, "control: the instruction matters"
    assert json.loads((out / "language/config.json").read_text())["d_model"] == LANGUAGE
    assert dict(folders.read_folder(out / "language"))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.P11
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_file_that_carries_code_is_refused(tmp_path: Path, capsys: Any, as_zip: bool) -> None:
    file, mark = tmp_path / "bad.pth", tmp_path / "executed"
    state = {"model": lion_file(), "extra": Payload(mark)}
    torch.save(state, file, _use_new_zipfile_serialization=as_zip)
    assert cli(["convert", "--from", "lion", str(file)]) == 3
    assert "refused, it holds more than tensors" in capsys.readouterr().err and not mark.exists()
    pickle.loads(pickle.dumps(state["extra"]))
    assert mark.exists(), "control: the payload works"


def saved(tmp_path: Path, state: dict[str, Any]) -> Path:
    torch.save(state, tmp_path / "x.pth")
    return tmp_path / "x.pth"


ROUTER = adapters_of_file()[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{ROUTER}.router_ratio2": torch.ones(3, LANGUAGE)}, rf"{ROUTER}.router_ratio2 is \(3, 12\)"),
        ({"visual_encoder.blocks.1.attn.v_bias": torch.ones(5)}, r"blocks.1.attn.v_bias is \(5,\)"),
        ({"soft_prompt_hint": "text"}, "soft_prompt_hint is str, not a tensor"),
    ],
)
def test_what_cannot_be_joined_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        convert.convert("lion", saved(tmp_path, {**lion_file(), **change}))


def test_half_of_a_pair_has_no_place(tmp_path: Path) -> None:
    state = lion_file()
    halves = ["visual_encoder.blocks.0.attn.q_bias", f"{ROUTER}.router_ratio1"]
    del state["visual_encoder.blocks.0.attn.v_bias"], state[f"{ROUTER}.router_ratio2"]
    assert convert.convert("lion", saved(tmp_path, state)).unmatched == halves
    del state[f"{ROUTER}.router_ratio1"]
    with pytest.raises(DataError, match="single adapter without a router"):
        convert.convert("lion", saved(tmp_path, state))


def test_a_model_refuses_missing_extra_and_misshapen_tensors(made: Path) -> None:
    tensors = dict(folders.read_folder(made))
    name = "adapters.1.gate_image_level"
    with pytest.raises(DataError, match=rf"no tensor for {name} \(1 missing\)"):
        folders.load_parts(ours(), ((n, t) for n, t in tensors.items() if n != name), "FILE")
    with pytest.raises(DataError, match=rf"no place for adapters.2.*\({5 * 2 + 2} in all\)"):
        folders.load_parts(ours(layers=2), tensors.items(), "FILE")
    with pytest.raises(DataError, match=rf"tensor {name} is \(2, 5\), the model has \(2, {LANGUAGE}\)"):
        folders.load_parts(ours(), {**tensors, name: torch.ones(2, 5)}.items(), "FILE")
    without = ours()
    del without.soft_prompt
    assert folders.load_parts(without, tensors.items(), "FILE").unused == {
        "soft_prompt.hint",
        "vision_tower.post_layernorm.weight",
        "vision_tower.post_layernorm.bias",
    } & set(tensors)


def test_leaving_out_takes_names_of_either_side_and_misses_aloud(file: Path) -> None:
    found = convert.convert("lion", file, ["visual_encoder.", "adapters."])
    assert set(found.tensors) == {
        "soft_prompt.hint",
        "vision_tower.post_layernorm.weight",
        "vision_tower.post_layernorm.bias",
    }
    assert f"{ROUTER}.router_ratio1" in found.left_out and not found.unmatched
    with pytest.raises(UserError, match="--leave-out Qformer.cls: no tensor"):
        convert.convert("lion", file, ["Qformer.cls"])
    with pytest.raises(DataError, match="holds no tensor of instructblip"):
        convert.convert("instructblip", file)


def test_a_recipe_checks_every_shape(file: Path, capsys: Any) -> None:
    """tiny_lion_3 has adapters of another width: refused by name, nothing written."""
    argv = [
        "convert",
        "--from",
        "lion",
        str(file),
        "--config",
        "tiny_lion_3",
        "--leave-out",
        "visual_encoder.,ln_vision.",
    ]
    assert cli(argv) == 3
    assert "adapters.0.region_level_down is (3, 12), the model has (32, 128)" in capsys.readouterr().err
