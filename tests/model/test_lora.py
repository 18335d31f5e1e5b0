"""LoRA in the language model: names, values, who learns, and a ZeRO-3 run that is saved and resumed (two ranks)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eventlens_ds.config.run_config import LoraConfig, StageConfig
from eventlens_ds.errors import UserError
from eventlens_ds.model import lora
from eventlens_ds.model.stages import apply_stage, part_of
from eventlens_ds.runtime.failures import leave
from tests.model import tiny_folders as tiny
from tests.small_world import small_architecture, small_config

RANK = {"rank": 2, "alpha": 4.0}


def case(**train: Any) -> dict[str, Any]:
    return {"model": {"lora": RANK, "attention": "sdpa"}, "train": train, "shrink": True}


def test_names_stay_and_the_start_changes_nothing() -> None:
    plain, _, _ = tiny.loaded({"shrink": True}, 0)
    made, _, _ = tiny.loaded(case(), 0)
    before = {n: tiny.digest(p) for n, p in plain.named_parameters()}
    after = {n.replace(".base_layer.", "."): tiny.digest(p) for n, p in made.named_parameters() if lora.MARK not in n}
    assert after == before
    wrapped = {n for n, _ in made.named_parameters() if ".base_layer." in n}
    assert {n.split(".")[-3] for n in wrapped} == {"q_proj", "v_proj"} and len(wrapped) == 4
    hidden = torch.randn(1, 3, 16)
    layers = [m.language_model.model.layers[0].self_attn.q_proj for m in (plain, made)]
    assert torch.equal(layers[0](hidden), layers[1](hidden))
    with torch.no_grad():
        layers[1].lora_B["default"].weight.fill_(0.1)
    assert not torch.equal(layers[0](hidden), layers[1](hidden))


def test_values_follow_from_seed_and_name() -> None:
    def values(model: Any) -> dict[str, str]:
        return {n: tiny.digest(p) for n, p in model.named_parameters() if lora.MARK in n}

    first, again, other = (values(tiny.loaded(case(seed=seed), 0)[0]) for seed in (0, 0, 1))
    assert first == again
    downs = [n for n in first if ".lora_A." in n]
    assert all(first[n] != other[n] for n in downs) and len({first[n] for n in downs}) == len(downs)
    made, _, _ = tiny.loaded(case(), 0)
    for name, parameter in made.named_parameters():
        if ".lora_B." in name:
            assert not parameter.any()
        if ".lora_A." in name:
            # Kaiming-uniform with a = sqrt 5 is uniform within 1 / sqrt(width).
            assert 0.5 * 16**-0.5 < float(parameter.detach().abs().max()) <= 16**-0.5


def test_bf16_models_get_bf16_matrices() -> None:
    made, _, _ = tiny.loaded(case(dtype="bf16"), 0)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}


def test_only_lora_learns_in_its_stage() -> None:
    made, _, _ = tiny.loaded(case(), 0)
    apply_stage(made, ("lora",), ("event",))
    assert {part_of(n) for n, p in made.named_parameters() if p.requires_grad} == {"lora"}
    ids = torch.arange(6)[None]
    made.language_model(input_ids=ids, attention_mask=None).logits.sum().backward()
    touched = {n for n, p in made.named_parameters() if p.grad is not None}
    assert touched == {n for n, _ in made.named_parameters() if lora.MARK in n}
    apply_stage(made, ("language",), ("event",))
    assert {part_of(n) for n, p in made.named_parameters() if p.requires_grad} == {"language"}


def test_wrong_targets_and_double_wrapping() -> None:
    made, _, _ = tiny.loaded(case(), 0)
    with pytest.raises(AssertionError, match="LoRA is in this model already"):
        lora.inject(made.language_model, LoraConfig(rank=2), 0)
    with pytest.raises(UserError, match="'query': no such linear layer; known:.*q_proj"):
        tiny.loaded({"model": {"lora": {"rank": 2, "target_modules": ["query"]}}, "shrink": True}, 0)


def _job(folder: Path) -> None:
    """Train LoRA for four steps; save after two, and do the last two again from the checkpoint."""
    from eventlens_ds.model.weights import gathered
    from eventlens_ds.runtime import checkpoint
    from eventlens_ds.runtime.build_model import weights_of_run
    from eventlens_ds.runtime.distributed import start, stop
    from eventlens_ds.train.engine import build
    from eventlens_ds.train.loop import optimizer_step
    from eventlens_ds.train.run import training_data
    from tests.small_world import small_run

    world = start(threads=1, timeout_minutes=1.0)
    run = small_run(folder / "built")
    out: dict[str, Any] = {}
    for dtype in ("fp32", "bf16"):
        home = folder / dtype
        zero = folder / "zero3.json"
        zero.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
        config = small_config(folder / "built", home, zero=str(zero), dtype=dtype, rows_per_step=2)
        config = replace(
            config, model=replace(config.model, lora=LoraConfig(**RANK)), stage=StageConfig(train=("lora",))
        )
        data = training_data(config, run.tokenizer, run.spec)
        batch = data.batch([(0, world.rank)], 0)

        def digests(engine: Any) -> dict[str, str]:
            found = {}
            for name, parameter in engine.module.named_parameters():
                with gathered([parameter], modifier_rank=None):
                    found[name] = tiny.digest(parameter.data)
            return found

        def made(config: Any = config) -> Any:
            return build(config, small_architecture(config, run.tokenizer), world, ("event", "vcr_answer"))

        trainable = made()
        start_digests = digests(trainable.engine)
        losses = []
        for step in range(4):
            losses.append(optimizer_step(trainable.engine, [batch], [1], config, world).loss)
            if step == 1:
                frozen = checkpoint.save_frozen(trainable.engine, home, trainable.frozen_own)
                path = checkpoint.save(trainable.engine, home, step=2, state={}, base={}, frozen_saved_in=frozen)
        end_digests = digests(trainable.engine)
        again = made()
        checkpoint.load(again.engine, path)
        repeated = [optimizer_step(again.engine, [batch], [1], config, world).loss for _ in range(2)]
        fresh = made(replace(config, train=replace(config.train, seed=9)))
        report = weights_of_run(fresh.model, str(home))
        out[dtype] = {
            "losses": losses,
            "repeated": repeated,
            "changed": sorted(n for n in start_digests if start_digests[n] != end_digests[n]),
            "resumed_equal": digests(again.engine) == end_digests,
            "partitioned": all(hasattr(p, "ds_id") for p in trainable.engine.module.parameters()),
            "new": sorted(report.new),
            "unused": sorted(report.unused),
        }
    (folder / f"rank{world.rank}.json").write_text(json.dumps(out))
    stop()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from eventlens_ds.runtime.local_ranks import spawn
    from tests.small_world import build_world

    folder = tmp_path_factory.mktemp("lora")
    build_world(folder / "built", images=4, val_images=1)
    assert spawn(2, [str(folder)], module="tests.model.test_lora") == 0
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    return ranks[0]


@pytest.mark.P10
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_zero3_run_changes_lora_and_nothing_else(trained: dict[str, Any], dtype: str) -> None:
    result = trained[dtype]
    assert result["partitioned"]
    assert len(result["changed"]) == 8 and all(lora.MARK in n for n in result["changed"])
    assert result["losses"][-1] < result["losses"][0]


@pytest.mark.P9
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_resumes_bit_identically_and_starts_another_stage(trained: dict[str, Any], dtype: str) -> None:
    result = trained[dtype]
    assert result["repeated"] == result["losses"][2:] and result["resumed_equal"]
    assert result["new"] == [] and result["unused"] == []


if __name__ == "__main__":
    leave(lambda: _job(Path(sys.argv[1])))
