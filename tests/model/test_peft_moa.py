"""MoA as a PEFT type: replacement of decoder layers, routing by an argument, folders, saving under ZeRO-3 (two ranks).

In: tiny Llama and Qwen2 models of transformers. Out: logits and gradients, compared with the same adapters called by
hand and with pure batches; every tensor of a folder after loading in a process of its own. Decision: the ranks' job is
this file's program, and loading is a program that imports only what a user's would.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import eventlens_ds.model  # noqa: F401 - PEFT learns the type
from eventlens_ds.data.records import TASKS
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.model import peft_moa
from eventlens_ds.model.peft_moa import MoAConfig, MoALayer, task_ids
from eventlens_ds.runtime.failures import leave

FILE = "adapter_model.safetensors"
ROUTERS = ("task", "mixture", "topk")
MIXED = ("caption", "event", "caption", "vcr_answer")


def base_of(kind: str = "llama") -> Any:
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return model(config(vocab_size=40, num_key_value_heads=1, **sizes))


def wake(model: Any) -> Any:
    """Values where adapters start as the identity, from the names alone."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moa_adapters" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def made(router: str = "task", kind: str = "llama", **settings: Any) -> Any:
    """A PeftModel whose adapters have values."""
    config = MoAConfig(router=router, bottleneck=4, task_type="CAUSAL_LM", **settings)
    return wake(get_peft_model(base_of(kind), config))


def rows() -> torch.Tensor:
    return torch.randint(0, 40, (len(MIXED), 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_layers_are_replaced_and_the_start_changes_nothing(kind: str) -> None:
    ids, base = rows(), base_of(kind)
    before = base(input_ids=ids).logits
    model = get_peft_model(base, MoAConfig(bottleneck=4, task_type="CAUSAL_LM"))
    assert all(type(layer) is MoALayer and "forward" not in vars(layer) for layer in base.model.layers)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".moa_adapters.default." in n
    }
    assert torch.equal(model(input_ids=ids, moa_task_ids=task_ids(MIXED)).logits, before)
    wake(model)
    assert not torch.allclose(model(input_ids=ids, moa_task_ids=task_ids(MIXED)).logits, before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.unload()(input_ids=ids).logits, before)


@pytest.mark.parametrize("source", ["normed", "residual"])
def test_a_layer_is_its_formula(source: str) -> None:
    model = made("mixture", source=source)
    layer, ids = model.base_model.model.model.layers[0], task_ids(["caption", "event"])
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.base_layer.post_attention_layernorm.register_forward_hook(lambda m, a, out: seen.update(x=a[0], u=out)),
        layer.base_layer.mlp.register_forward_hook(lambda m, a, out: seen.update(ffn=out)),
        layer.register_forward_hook(lambda m, a, out: seen.update(y=out)),
    ]
    model(input_ids=rows()[:2], moa_task_ids=ids)
    for hook in hooks:
        hook.remove()
    read = seen["u"] if source == "normed" else seen["x"]
    adapters = layer.moa_adapters["default"]
    expected = adapters(read, seen["x"] + seen["ffn"], ids[:, None].expand(2, 9).reshape(-1))
    assert torch.equal(seen["y"], expected) and not torch.allclose(seen["y"], seen["x"] + seen["ffn"], atol=1e-3)


def grads(model: Any, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.P7
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mixed_batch_equals_the_pure_ones(router: str, checkpointing: bool) -> None:
    """Row by row, and in gradients when every forward is open before the first is recomputed."""
    model, ids = made(router).train(), rows()
    if checkpointing:
        checkpointed(model)
    passes: list[int] = []
    model.base_model.model.model.layers[0].base_layer.mlp.register_forward_hook(lambda *_: passes.append(1))
    mixed = model(input_ids=ids, moa_task_ids=task_ids(MIXED)).logits
    pure = [model(input_ids=ids[i : i + 1], moa_task_ids=task_ids([task])).logits for i, task in enumerate(MIXED)]
    assert torch.allclose(mixed, torch.cat(pure), atol=1e-5)
    apart, together = grads(model, [one.sin().sum() for one in pure]), grads(model, [mixed.sin().sum()])
    assert len(passes) == 5 * (2 if checkpointing else 1), "every forward is computed again"
    assert apart.keys() == together.keys() and any("moa_adapters" in name for name in apart)
    assert all(torch.allclose(apart[n], together[n], rtol=1e-4, atol=1e-4) for n in apart)


@pytest.mark.P7
def test_tasks_kept_on_an_attribute_would_give_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: recomputation would find the tasks of the last forward."""
    kept: dict[str, Any] = {}
    usual, found = peft_moa._per_token, []
    for of_layer in (usual, lambda ids, adapters, hidden: usual(kept["tasks"], adapters, hidden)):
        monkeypatch.setattr(peft_moa, "_per_token", of_layer)
        model, losses = checkpointed(made("task")), []
        for task in ("caption", "event"):
            kept["tasks"] = task_ids([task] * len(MIXED))
            losses.append(model(input_ids=rows(), moa_task_ids=kept["tasks"]).logits.sin().sum())
        found.append(grads(model, losses))
    caption = "base_model.model.model.layers.0.moa_adapters.default.caption_up"
    assert found[0][caption].any() and not torch.allclose(found[0][caption], found[1][caption], atol=1e-3)


def checkpointed(model: Any) -> Any:
    model.train().enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.P7
def test_a_task_per_token_and_rows_without_one() -> None:
    model, ids = made("task"), rows()[:2]
    by_row = model(input_ids=ids, moa_task_ids=task_ids(["caption", "event"])).logits
    by_token = task_ids(["caption", "event"])[:, None].expand(2, 9)
    assert torch.equal(model(input_ids=ids, moa_task_ids=by_token).logits, by_row)
    none = model(input_ids=ids, moa_task_ids=torch.tensor([-1, -1])).logits
    with model.disable_adapter():
        assert torch.equal(none, model(input_ids=ids).logits)


def test_generation_takes_a_task_per_prompt() -> None:
    model, ids = made("mixture").eval(), rows()[:2]
    told: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ones = [
        model.generate(input_ids=ids[i : i + 1], moa_task_ids=task_ids([task]), num_beams=2, **told)
        for i, task in enumerate(("caption", "event"))
    ]
    both = model.generate(input_ids=ids, moa_task_ids=task_ids(["caption", "event"]), num_beams=2, **told)
    assert torch.equal(both, torch.cat(ones))
    assert not model.base_model.model._forward_pre_hooks
    other = model.generate(input_ids=ids, moa_task_ids=task_ids(["event", "event"]), num_beams=2, **told)
    assert torch.equal(other[1], both[1]) and not torch.equal(other[0], both[0])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "which task. pass moa_task_ids, one id a row"),
        ({"task_ids": torch.zeros(4, dtype=torch.int64)}, "pass moa_task_ids"),
        ({"adapter_names": ["default"] * 4}, "adapter_names does not route"),
        ({"moa_task_ids": torch.tensor([0, 1, 2])}, r"\[3\] for 4 rows of 9 tokens"),
        ({"moa_task_ids": torch.tensor([0, 1, 2, 99])}, f"0 to 99; tasks are 0 to {len(TASKS) - 1}"),
    ],
)
def test_a_forward_that_does_not_say_its_tasks_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made().eval()(input_ids=rows(), **given)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"router": "soft"}, "router 'soft'; known: task, mixture, topk"),
        ({"tasks": ["captions"]}, "unknown task captions"),
        ({"bottleneck": 0}, "bottleneck 0"),
        ({"router": "topk", "top_k": 9}, "top_k 9 of 4 experts"),
        ({"target_modules": r".*\.mlp"}, "model.layers.0.mlp .LlamaMLP. is no pre-norm decoder layer"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        get_peft_model(base_of(), MoAConfig(**settings))


def test_a_peft_that_does_not_take_the_type_says_so_on_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import enum

    class Closed(enum.StrEnum):
        MOA = "MOA"

    with pytest.raises(ValueError, match="another package has added MOA"):
        peft_moa._extend(Closed, "MOA")
    monkeypatch.setattr(peft_moa, "_problem", "not registered")
    monkeypatch.setattr(peft_moa, "PeftType", Closed)
    assert peft_moa.register() == "ValueError: another package has added MOA"
    with pytest.raises(UserError, match=rf"^MoAConfig: peft {peft.__version__} has no type MOA: .*added MOA$"):
        MoAConfig()


_WITHOUT = """
import sys
import peft.tuners.tuners_utils as other
del other.BaseTunerLayer
import eventlens_ds.model
try:
    from eventlens_ds.model.peft_moa import MoAConfig
except ImportError as error:
    print(str(error).splitlines()[0])
"""


def test_the_package_imports_with_a_peft_that_lacks_what_it_needs() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cannot import name 'BaseTunerLayer'" in done.stdout


_LOAD = """
import sys
import torch
import eventlens_ds.model
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

for folder in sys.argv[2:]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), folder)
    own = {n.replace(".default.", "."): p.detach().contiguous() for n, p in model.named_parameters() if "moa_" in n}
    save_file(own, folder + ".found")
"""


def loaded_elsewhere(base: Path, *folders: Path) -> list[dict[str, torch.Tensor]]:
    """The adapters that a new process loads from each folder, by their names in the file."""
    command = [sys.executable, "-c", _LOAD, str(base), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [load_file(f"{folder}.found") for folder in folders]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 20
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def own_tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name.replace(".default.", "."): tensor for name, tensor in peft_moa.state(model).items()}


def _job(folder: Path) -> None:
    """Partition, train a step on tasks that differ by rank, save by both ways."""
    import deepspeed

    from eventlens_ds.model.weights import gathered
    from eventlens_ds.runtime.distributed import start, stop

    world = start(threads=1, timeout_minutes=1.0)
    model = made("mixture").train()
    trained = [p for p in model.parameters() if p.requires_grad]
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    ids, tasks = rows()[:2], task_ids(["event", "vcr_answer"] if world.rank == 0 else ["caption", "caption"])
    for _ in range(2):
        engine.backward(engine(input_ids=ids, moa_task_ids=tasks, labels=ids).loss)
        engine.step()
    module = engine.module
    shapes = {n: list(p.shape) for n, p in module.named_parameters() if "moa_" in n}
    digests = {}
    for name, parameter in module.named_parameters():
        if "moa_" in name:
            with gathered([parameter], modifier_rank=None):
                digests[name.replace(".default.", ".")] = parameter.detach().flatten().tolist()
    peft_moa.save_gathered(module, folder / "whole")
    refused = ""
    if world.rank == 0:
        module.save_pretrained(str(folder / "naive"))
        # As above, and what was gathered does not read back: the file is damaged on the way.
        usual = peft_moa.load_file
        peft_moa.load_file = lambda at: {name: t + 1 for name, t in usual(at).items()}
    try:
        peft_moa.save_gathered(module, folder / "damaged")
    except DataError as error:
        refused = str(error)
    (folder / f"rank{world.rank}.json").write_text(
        json.dumps({"shapes": shapes, "values": digests, "refused": refused})
    )
    stop()


class Saved(NamedTuple):
    folder: Path
    ranks: list[dict[str, Any]]
    one_process: Any
    """The model saved without ZeRO."""
    loaded: list[dict[str, torch.Tensor]]
    """What a new process loads of the folders `plain` and `whole`."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    from eventlens_ds.runtime.local_ranks import spawn

    folder = tmp_path_factory.mktemp("moa")
    base_of().save_pretrained(folder / "base")
    assert spawn(2, [str(folder)], module="tests.model.test_peft_moa") == 0
    plain = made("topk", experts=3)
    plain.save_pretrained(folder / "plain")
    loaded = loaded_elsewhere(folder / "base", folder / "plain", folder / "whole")
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return Saved(folder, ranks, plain.eval(), loaded)


@pytest.mark.P9
def test_a_folder_loads_bit_equal_in_a_new_process(saved: Saved) -> None:
    assert_same(saved.loaded[0], own_tensors(saved.one_process))
    again = PeftModel.from_pretrained(base_of(), str(saved.folder / "plain"))
    assert torch.equal(again(input_ids=rows()).logits, saved.one_process(input_ids=rows()).logits)


@pytest.mark.P9
def test_a_partitioned_model_is_saved_whole(saved: Saved) -> None:
    first, second = saved.ranks
    assert all(shape == [0] for shape in first["shapes"].values()), "every tensor is partitioned"
    assert first["values"] == second["values"]
    found, start = saved.loaded[1], own_tensors(made("mixture"))
    assert_same(found, {n: torch.tensor(first["values"][n]).view(t.shape) for n, t in start.items()})
    assert all(not torch.equal(found[n], start[n]) for n in start), "it was trained"


@pytest.mark.P9
def test_the_naive_save_writes_empty_tensors_and_a_damaged_one_is_seen(saved: Saved) -> None:
    """Negative controls of the gathered save and of its reading back."""
    naive = load_file(saved.folder / "naive" / FILE)
    assert naive and all(tensor.numel() == 0 for tensor in naive.values())
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base_of(), str(saved.folder / "naive"))
    assert "does not read back as what was written" in saved.ranks[0]["refused"] and not saved.ranks[1]["refused"]


if __name__ == "__main__":
    leave(lambda: _job(Path(sys.argv[1])))
