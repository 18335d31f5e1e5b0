"""Published folders into a RegionVLM: every layout, bit-equal, whole and on two ZeRO-3 ranks; damage in one line."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eventlens_ds.errors import DataError, UserError
from eventlens_ds.model import folders, weights
from tests.model import tiny_folders as tiny

GROWN = 3


class Layouts:
    """Folders, the cases that load them, and the digests expected of each."""

    def __init__(self, root: Path) -> None:
        from eventlens_ds.data.tokenizer import load_tokenizer

        self.root = root
        self.vocabulary = len(load_tokenizer(""))
        self.cases: dict[str, Any] = {}
        self.expected: dict[str, dict[str, str]] = {}
        self._towers()
        self._languages()
        self._others()
        self.plain = {name: tiny.loaded(case, 0) for name, case in self.cases.items()}
        self.ranks = tiny.on_two_ranks(root, self.cases)

    def _add(self, name: str, expected: dict[str, str], train: dict[str, Any] | None = None, **model: Any) -> None:
        self.cases[name] = {"model": model, "train": train or {}, "shrink": True}
        self.expected[name] = expected

    def _towers(self) -> None:
        clip, siglip = tiny.clip(), tiny.siglip()
        clip.save_pretrained(self.root / "clip_full")
        clip.vision_model.save_pretrained(self.root / "clip_vision")
        tiny.save_bin(clip, self.root / "clip_bin")
        state = torch.load(self.root / "clip_bin/pytorch_model.bin")
        # What the published CLIP files hold beside the weights.
        state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        torch.save(state, self.root / "clip_bin/pytorch_model.bin", _use_new_zipfile_serialization=False)
        siglip.save_pretrained(self.root / "siglip", max_shard_size="8KB")
        for name in ("clip_full", "clip_vision", "clip_bin"):
            self._add(name, tiny.of_vision(clip), vision_path=str(self.root / name))
        # The language model starts from random weights here; its keys are mixed before they are partitioned.
        self._add("siglip", tiny.of_vision(siglip), vision_path=str(self.root / "siglip"), qk_correlation=0.5)

    def _languages(self) -> None:
        llama, tied, qwen = (
            tiny.llama(self.vocabulary),
            tiny.llama(self.vocabulary, tie_word_embeddings=True),
            # transformers adds <|endoftext|> to any tokenizer beside a Qwen2 configuration.
            tiny.qwen(self.vocabulary + 1),
        )
        tiny.save_bin(llama, self.root / "llama_bins", shards=3)
        llama.save_pretrained(self.root / "llama_shards", max_shard_size="20KB")
        tiny.save_bin(tied, self.root / "llama_tied")
        qwen.save_pretrained(self.root / "qwen")
        for name, model in (("llama_bins", llama), ("llama_shards", llama), ("llama_tied", tied), ("qwen", qwen)):
            tiny.with_tokenizer(self.root / name)
            self._add(name, tiny.of_language(model), language_path=str(self.root / name))
        half = tiny.llama(self.vocabulary).half()
        half.save_pretrained(self.root / "half")
        tiny.with_tokenizer(self.root / "half")
        self._add("half_to_fp32", tiny.of_language(half.float()), language_path=str(self.root / "half"))
        rounded = half.bfloat16()
        self._add("half_to_bf16", tiny.of_language(rounded), {"dtype": "bf16"}, language_path=str(self.root / "half"))

    def _others(self) -> None:
        llama = tiny.llama(self.vocabulary - GROWN)
        llama.save_pretrained(self.root / "smaller")
        tiny.with_tokenizer(self.root / "smaller")
        self.small = llama
        expected = {n: d for n, d in tiny.of_language(llama).items() if n not in folders.ROWS_PER_TOKEN}
        self._add("grown", expected, language_path=str(self.root / "smaller"))
        expected = tiny.of_language(tiny.llama(self.vocabulary))
        for kind in ("q_proj", "v_proj"):
            expected = {n.replace(f".{kind}.", f".{kind}.base_layer."): d for n, d in expected.items()}
        self._add("lora", expected, language_path=str(self.root / "llama_shards"), lora={"rank": 2})


NAMES = (
    "clip_full clip_vision clip_bin siglip llama_bins llama_shards llama_tied qwen half_to_fp32 half_to_bf16 grown lora"
)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    return Layouts(tmp_path_factory.mktemp("folders"))


@pytest.mark.parametrize("name", NAMES.split())
def test_every_tensor_of_a_folder_arrives_bit_equal(layouts: Layouts, name: str) -> None:
    model, base, names = layouts.plain[name]
    found = tiny.digests(model)
    expected = layouts.expected[name]
    assert expected.items() <= found.items()
    assert set(expected) <= names
    assert all(len(sha) == 64 for sha in base.values()) and base


@pytest.mark.parametrize("name", NAMES.split())
def test_two_partitioned_ranks_hold_what_one_whole_model_holds(layouts: Layouts, name: str) -> None:
    """Also the parts from scratch: initial weights do not depend on ZeRO stage or world size."""
    model, base, names = layouts.plain[name]
    found = tiny.digests(model)
    for rank in layouts.ranks:
        assert rank[name]["partitioned"]
        assert rank[name]["base"] == base
        assert rank[name]["names"] == sorted(names)
        assert rank[name]["digests"] == found


def test_old_rows_stay_bit_equal_when_the_vocabulary_grows(layouts: Layouts) -> None:
    model, _, _ = layouts.plain["grown"]
    old = layouts.small
    for new, before in (
        (model.language_model.model.embed_tokens.weight, old.model.embed_tokens.weight),
        (model.language_model.lm_head.weight, old.lm_head.weight),
    ):
        rows = layouts.vocabulary - GROWN
        assert new.shape[0] == layouts.vocabulary
        assert torch.equal(new[:rows], before)
        torch.testing.assert_close(new[rows:], before.mean(0).expand(GROWN, -1))
    assert model.config.text_config.vocab_size == layouts.vocabulary
    assert model.language_model.get_input_embeddings().num_embeddings == layouts.vocabulary


def test_only_token_matrices_may_grow() -> None:
    with pytest.raises(DataError, match=r"weight is \(2, 4\), the model has \(3, 4\)"):
        weights.assign(nn.Linear(4, 3, bias=False), [("weight", torch.ones(2, 4))], "file")


def test_tied_tensors_that_differ_take_the_first_name_in_any_order() -> None:
    for names in (("a", "b"), ("b", "a")):
        model = nn.Module()
        model.a = nn.Parameter(torch.zeros(2))
        model.b = model.a
        values = {"a": torch.ones(2), "b": torch.full((2,), 2.0)}
        report = weights.assign(model, [(n, values[n]) for n in names], "file")
        assert torch.equal(model.a, torch.ones(2)) and report.loaded == {"a"} and not report.new
        assert report.overruled == {"b"} and "their own values dropped: b" in report.text()
        same = weights.assign(model, [(n, torch.ones(2)) for n in names], "file")
        assert same.overruled == set() and "dropped" not in same.text()


def test_two_tensors_for_one_parameter_are_an_error() -> None:
    with pytest.raises(DataError, match="tensors x.bias and y.bias are both bias"):
        weights.assign(nn.Linear(1, 1), [("x.bias", torch.ones(1)), ("y.bias", torch.ones(1))], "file", lambda n: n[2:])


@pytest.fixture
def shards(layouts: Layouts, tmp_path: Path) -> Path:
    return Path(shutil.copytree(layouts.root / "llama_bins", tmp_path / "copy"))


def error_of(folder: Path, **model: Any) -> str:
    with pytest.raises(UserError) as caught:
        tiny.loaded({"model": model or {"language_path": str(folder)}, "shrink": True}, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "pytorch_model-00002-of-00003.bin").unlink()
    assert "pytorch_model-00002-of-00003.bin, which is not there" in error_of(shards)


def test_a_shard_of_another_model_is_named(shards: Path) -> None:
    shutil.copy(shards / "pytorch_model-00001-of-00003.bin", shards / "pytorch_model-00002-of-00003.bin")
    assert "00002-of-00003.bin: has no tensor" in error_of(shards)


def test_an_index_cannot_name_a_file_elsewhere(shards: Path) -> None:
    index = shards / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../pytorch_model.bin"}}))
    assert "which is not a file beside it" in error_of(shards)


def test_a_broken_index_is_named(shards: Path) -> None:
    (shards / "pytorch_model.bin.index.json").write_text("{")
    assert "not an index of weight files" in error_of(shards)


def test_a_truncated_file_is_named(shards: Path, layouts: Layouts, tmp_path: Path) -> None:
    file = shards / "pytorch_model-00001-of-00003.bin"
    file.write_bytes(file.read_bytes()[:-2000])
    assert "00001-of-00003.bin: cannot be read" in error_of(shards)
    other = Path(shutil.copytree(layouts.root / "qwen", tmp_path / "qwen"))
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2000])
    assert "model.safetensors: cannot be read" in error_of(other)


def test_a_wrong_shape_names_tensor_and_both_shapes(shards: Path) -> None:
    file = shards / "pytorch_model-00001-of-00003.bin"
    state = torch.load(file)
    name = next(n for n in state if n.endswith("proj.weight"))
    state[name] = state[name][:, :-1].clone()
    torch.save(state, file)
    message = error_of(shards)
    assert name in message and "the model has" in message


def test_a_missing_tensor_is_named(shards: Path) -> None:
    index = shards / "pytorch_model.bin.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    name = next(n for n, shard in placed.items() if "00001" in shard)
    file = shards / placed.pop(name)
    torch.save({n: t for n, t in torch.load(file).items() if n != name}, file)
    index.write_text(json.dumps({"weight_map": placed}))
    assert f"has no tensor for language_model.{name} (1 missing)" in error_of(shards)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.P11
def test_a_pickled_payload_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = shards / "made"
    file = shards / "pytorch_model-00001-of-00003.bin"
    torch.save({**torch.load(file), "extra": Payload(made)}, file)
    assert "refused, it holds more than tensors" in error_of(shards)
    assert not made.exists()
    # The control: with the guard off the same file runs its code.
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.load(file, weights_only=False)
    assert made.is_dir()


@pytest.mark.P11
def test_a_plain_pickle_and_other_objects_are_refused(shards: Path) -> None:
    file = shards / "pytorch_model-00001-of-00003.bin"
    file.write_bytes(pickle.dumps({"a": 1}))
    assert str(file) in error_of(shards)
    torch.save({"epoch": 3}, file)
    assert "epoch is int, not a tensor" in error_of(shards)
    torch.save([torch.ones(1)], file)
    assert "not a dictionary of tensors but list" in error_of(shards)


def test_folders_without_weights_or_of_another_kind(tmp_path: Path, layouts: Layouts) -> None:
    (tmp_path / "config.json").write_text((layouts.root / "llama_bins/config.json").read_text())
    tiny.with_tokenizer(tmp_path)
    assert "no model.safetensors, pytorch_model.bin or their index" in error_of(tmp_path)
    assert "is not one of clip_vision_model" in error_of(tmp_path, vision_path=str(layouts.root / "qwen"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory, layouts: Layouts) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llava")
    model = tiny.llava(layouts.vocabulary)
    model.save_pretrained(folder)
    tiny.with_tokenizer(folder)
    return model, folder


def in_memory_names(llava: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in llava.state_dict().items()}


def published_names(llava: Any) -> dict[str, torch.Tensor]:
    """As in llava-hf/llava-1.5-7b-hf."""
    names = {}
    for name, tensor in llava.state_dict().items():
        name = name.removeprefix("model.")
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        name = name.replace("lm_head.", "language_model.lm_head.")
        name = name.replace("language_model.", "language_model.model.") if "lm_head" not in name else name
        names[name] = tensor.clone()
    names["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    return names


@pytest.mark.parametrize("naming", [None, in_memory_names, published_names])
def test_llava_gives_the_same_logits(
    llava: tuple[Any, Path], tmp_path: Path, naming: Any, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, folder = llava
    if naming is not None:
        folder = Path(shutil.copytree(folder, tmp_path / "renamed"))
        (folder / "model.safetensors").unlink()
        torch.save(naming(theirs), folder / "pytorch_model.bin")
    with caplog.at_level(logging.INFO):
        case = {"model": {"init_from": str(folder), "linking": "none", "attention": "sdpa"}}
        ours, _, names = tiny.loaded(case, 0)
    assert "multi_modal_projector.* -> projector.*" in caplog.text
    assert {n for n, _ in ours.named_parameters()} - names == {
        n for n, _ in ours.named_parameters() if n.startswith("adapters.")
    }
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 24, 24)
    image = theirs.config.image_token_index
    ids = torch.tensor([[5, 9, image, image, image, image, 7, 11, 30]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits[0]
        found = ours.eval()(_row(ids, pixels, image), 1, with_logits=True)[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # The control: the weights matter for this comparison.
    with torch.no_grad():
        ours.projector.linear_1.weight.mul_(1.1)
        changed = ours(_row(ids, pixels, image), 1, with_logits=True)[1]
    assert (changed - expected).abs().max() > 1e-3


def _row(ids: torch.Tensor, pixels: torch.Tensor, image: int) -> Any:
    """The same sequence as a packed row of one segment."""
    from eventlens_ds.data.collate import collate

    length = ids.shape[1]
    row = collate([], visual_tokens=4, image_size=24, seed=0, pad_id=0)
    slots = torch.where(ids[0] == image, (ids[0] == image).cumsum(0) - 1, -1)
    from dataclasses import replace

    return replace(
        row,
        input_ids=torch.where(ids == image, 0, ids),
        position_ids=torch.arange(length)[None],
        parents=torch.tensor([-1], dtype=torch.int32),
        bounds=torch.tensor([[0, length]], dtype=torch.int32),
        pixel_values=pixels,
        image_slots=slots,
        region_slots=torch.full((length,), -1),
        soft_slots=torch.zeros(length, dtype=torch.bool),
        start_slots=torch.zeros(length, dtype=torch.bool),
        task_ids=torch.zeros(length, dtype=torch.int64),
    )


def test_an_unexpected_tensor_in_llava_is_an_error(llava: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = llava
    folder = Path(shutil.copytree(folder, tmp_path / "more"))
    (folder / "model.safetensors").unlink()
    torch.save({**in_memory_names(theirs), "model.image_newline": torch.ones(16)}, folder / "pytorch_model.bin")
    assert "unexpected tensor model.image_newline" in error_of(folder, init_from=str(folder))


def test_llava_that_computes_otherwise_is_refused(llava: tuple[Any, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava[1], tmp_path / "full"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_feature_select_strategy": "full"}))
    assert "vision_feature_select_strategy is 'full'" in error_of(folder, init_from=str(folder))
    assert "name one or the other" in error_of(folder, init_from=str(folder), language_path=str(folder))
