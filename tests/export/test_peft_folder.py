"""Export as a PEFT folder: what PEFT alone loads, what AutoModel loads, and that both are the merged model.

In: a run of two ZeRO-3 ranks with LoRA on a tiny published language model, every parameter partitioned. Out: its
export with --peft and without. Decision: PEFT's half is loaded in a process that never imports eventlens_ds, and what
it must equal comes from the merged export, which tests/export/test_folder.py compares with the run itself.
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
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

import eventlens_ds.model  # noqa: F401 - registers the classes
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.export import folder, peft_folder, predict
from eventlens_ds.model import lora
from eventlens_ds.model.peft_folder import own_name
from eventlens_ds.runtime import checkpoint
from eventlens_ds.runtime.failures import leave
from tests.export.conftest import TASKS, train
from tests.model import tiny_folders as tiny
from tests.small_world import small_run

RANK = 4


class Exported(NamedTuple):
    run: Path
    out: Path
    whole: Path
    language: Path


def train_lora(data: Path, run: Path, *settings: str, rank: int = RANK) -> Path:
    """Three steps of LoRA at a rate that moves it, on two ranks, all parameters partitioned."""
    zero = run.with_name("zero3.json")
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    command = [sys.executable, "-m", "eventlens_ds", "train", "--ranks", "2", f"--data.train=[{data}]"]
    command += [f"--io.run={run}", f"--train.zero={zero}", "--train.steps=3", "--train.rows_per_step=2"]
    command += ["--train.warmup=1", "--train.lr=0.05", "--train.threads=1", "--data.workers=0"]
    command += [
        "--io.tensorboard=false",
        TASKS,
        f"--model.lora.rank={rank}",
        "--model.preset=vicuna7b-clipL336",
        *settings,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return run


@pytest.fixture(scope="module")
def lora_run(world_folder: Path, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("lora")
    paths = [f"--model.{part}_path={bases / part}" for part in ("vision", "language")]
    run = train_lora(world_folder, root / "run", *paths, "--stage.train=[projector,regions,adapters,lora]")
    assert peft_folder.main(run, root / "out") == 0
    assert folder.main(run, root / "whole") == 0
    return Exported(run, root / "out", root / "whole", bases / "language")


def held(run: Path) -> dict[str, torch.Tensor]:
    """Tensors of the run's last checkpoint."""
    path = checkpoint.resolve(run)
    assert path is not None
    return dict(checkpoint.weights(path))


_ELSEWHERE = """
import sys, torch
from peft import PeftModel
from transformers import {kind}
from safetensors.torch import save_file

base = {kind}.from_pretrained(sys.argv[1])
ids = torch.arange(3, 19)[None]
with torch.no_grad():
    plain = base.eval()(input_ids=ids).logits.clone()
    model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
    adapted = model(input_ids=ids).logits
loras = len([name for name, _ in model.named_parameters() if ".lora_" in name])
assert "eventlens_ds" not in sys.modules
save_file({{"plain": plain, "adapted": adapted, "loras": torch.tensor(loras)}}, sys.argv[3])
"""


def loaded_elsewhere(base: Path, out: Path, to: Path, kind: str = "AutoModelForCausalLM") -> dict[str, torch.Tensor]:
    """Logits of the base with and without PEFT's half of an export, computed by a process without eventlens_ds."""
    command = [sys.executable, "-c", _ELSEWHERE.format(kind=kind), str(base), str(out), str(to)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=to.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(to)


def language_logits(whole: Path) -> torch.Tensor:
    """Of the merged export's language model, without adapters, which PEFT knows nothing of."""
    model = AutoModel.from_pretrained(whole, local_files_only=True).eval()
    with torch.no_grad():
        return model.language_model(input_ids=torch.arange(3, 19)[None], attention_mask=None).logits


def test_plain_peft_loads_it_in_a_new_process(lora_run: Exported, tmp_path: Path) -> None:
    found = loaded_elsewhere(lora_run.language, lora_run.out, tmp_path / "logits.safetensors")
    merged = language_logits(lora_run.whole)
    torch.testing.assert_close(found["adapted"], merged, atol=1e-5, rtol=0)
    assert not torch.allclose(found["plain"], merged, atol=1e-3), "LoRA must matter for the comparison to mean anything"


def test_one_changed_number_is_seen_by_the_comparison(lora_run: Exported, tmp_path: Path) -> None:
    tensors = load_file(lora_run.out / lora_file())
    name = next(n for n in tensors if ".lora_B." in n)
    tensors[name] = tensors[name] + 0.1
    save_file(tensors, tmp_path / lora_file(), metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_bytes((lora_run.out / "adapter_config.json").read_bytes())
    found = loaded_elsewhere(lora_run.language, tmp_path, tmp_path / "logits.safetensors")
    assert not torch.allclose(found["adapted"], language_logits(lora_run.whole), atol=1e-5, rtol=0)


def lora_file() -> str:
    return "adapter_model.safetensors"


def test_names_and_configuration_are_those_peft_writes(lora_run: Exported, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(lora_run.language)
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / lora_file()), load_file(lora_run.out / lora_file())
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    written = [json.loads((at / "adapter_config.json").read_text()) for at in (lora_run.out, tmp_path)]
    for one in written:
        one["target_modules"] = sorted(one["target_modules"])
    assert written[0] == written[1]


def a_batch(out: Path) -> Any:
    processor = AutoProcessor.from_pretrained(out, local_files_only=True)
    picture = torch.randint(0, 255, (50, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    return processor(picture, [[1, 2, 30, 40]], ["person"], question="What is [1] doing?", choices=["sits", "runs"])


def test_automodel_loads_all_of_it(lora_run: Exported) -> None:
    whole = AutoModel.from_pretrained(lora_run.whole, local_files_only=True).eval()
    parts = AutoModel.from_pretrained(lora_run.out / "region_vlm", local_files_only=True)
    batch = a_batch(lora_run.out / "region_vlm")
    with torch.no_grad():
        _, merged = whole(batch, with_logits=True)
        _, ours = parts(batch, with_logits=True)
        torch.testing.assert_close(ours, merged, atol=1e-5, rtol=0)
        for parameter in (p for n, p in parts.named_parameters() if ".lora_B." in n):
            parameter.zero_()
        _, without = parts(batch, with_logits=True)
    assert not torch.allclose(without, merged, atol=1e-3)


@pytest.mark.P9
def test_every_parameter_is_in_one_file_or_in_the_base(lora_run: Exported) -> None:
    parts = AutoModel.from_pretrained(lora_run.out / "region_vlm", local_files_only=True)
    in_lora = set(lora.peft_names(parts.language_model).values())
    in_parts = set(load_file(lora_run.out / "region_vlm" / "model.safetensors"))
    in_moa = {own_name(n) or n for n in load_file(lora_run.out / "moa" / lora_file())}
    named = dict(parts.named_parameters())
    ours = {f"language_model.{n}" for n in in_lora} | in_parts | in_moa
    assert in_moa == {n for n in named if n.startswith("adapters.")} and len(in_moa) == 40 and not in_moa & in_parts
    assert len(in_lora) == len(load_file(lora_run.out / lora_file())) == 8
    assert all(n.startswith(("vision_tower.", "language_model.")) for n in set(named) - ours)
    for name, tensor in held(lora_run.run).items():
        assert name in ours and torch.equal(named[name], tensor), name
    record = json.loads((lora_run.out / "export.json").read_text())
    assert record["peft"]["base"]["language_path"] == str(lora_run.language)
    assert record["peft"]["tensors"] == {"lora": 8, "adapters": 40, "other": len(in_parts)}
    digest = checkpoint.commit.sha256_file(lora_run.language / "model.safetensors")
    assert record["peft"]["base_sha256"]["model.language_path/model.safetensors"] == digest
    card = (lora_run.out / "README.md").read_text()
    assert f'AutoModelForCausalLM.from_pretrained("{lora_run.language}"), "out"' in card
    assert 'AutoModel.from_pretrained("out/region_vlm")' in card and "library_name: peft" in card


def test_a_prediction_needs_no_merged_export(lora_run: Exported) -> None:
    model, processor = predict.load(lora_run.out / "region_vlm", "cpu")
    assert any(lora.MARK in n for n, _ in model.named_parameters()) and not model.training
    assert processor.image_size == 48


def copied(exported: Exported, to: Path) -> Path:
    """The folder at another place; its sub-folder."""
    import shutil

    shutil.copytree(exported.out, to)
    return to / "region_vlm"


@pytest.mark.P9
def test_a_base_elsewhere_is_named_and_another_base_is_refused(lora_run: Exported, tmp_path: Path) -> None:
    parts = copied(lora_run, tmp_path / "out")
    config = json.loads((parts / "config.json").read_text())
    config["language_path"] = str(tmp_path / "gone")
    (parts / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"its base model\.language_path .*gone is not here; .*language_path=DIR"):
        AutoModel.from_pretrained(parts)
    AutoModel.from_pretrained(parts, language_path=str(lora_run.language))
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((lora_run.language / name).read_bytes())
    tensors = load_file(other / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"other base weights, model\.language_path/model\.safetensors"):
        AutoModel.from_pretrained(parts, language_path=str(other))
    with pytest.raises(UserError, match="device_map is not supported"):
        AutoModel.from_pretrained(parts, language_path=str(lora_run.language), device_map="auto")


@pytest.mark.P9
def test_a_missing_or_foreign_tensor_is_an_error(lora_run: Exported, tmp_path: Path) -> None:
    parts = copied(lora_run, tmp_path / "out")
    for file, wanted in ((tmp_path / "out" / lora_file(), "lora_"), (parts / "model.safetensors", "projector")):
        whole = load_file(file)
        lost = next(n for n in whole if wanted in n)
        save_file({n: t for n, t in whole.items() if n != lost}, file, metadata={"format": "pt"})
        with pytest.raises(DataError, match="no file has a tensor for"):
            AutoModel.from_pretrained(parts)
        save_file({**whole, "stray.weight": torch.ones(1)}, file, metadata={"format": "pt"})
        with pytest.raises(DataError, match=r"its tensor stray\.weight has no place"):
            AutoModel.from_pretrained(parts)
        save_file(whole, file, metadata={"format": "pt"})
    AutoModel.from_pretrained(parts)


def test_what_another_program_wrote_below_is_not_touched(lora_run: Exported, tmp_path: Path) -> None:
    parts = copied(lora_run, tmp_path / "out")
    (parts / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds region_vlm/notes\.txt, which no export wrote"):
        folder.main(lora_run.run, tmp_path / "out")
    (parts / "notes.txt").unlink()
    folder.main(lora_run.run, tmp_path / "out")
    assert folder._files(tmp_path / "out") == folder._files(lora_run.whole), "an earlier export is replaced whole"
    assert not parts.exists()


def test_runs_it_does_not_fit_are_refused(
    world_folder: Path, run_folder: Path, lora_run: Exported, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no published folder that they could be loaded onto"):
        peft_folder.main(run_folder, tmp_path / "out")
    path = checkpoint.resolve(lora_run.run)
    assert path is not None
    config = folder._config_of(path)
    scratch = folder._config_of(path).__class__(model=config.model.__class__(lora=config.model.lora))
    with pytest.raises(UserError, match="has no published folder"):
        peft_folder.refuse(scratch, path)
    settings = [f"--model.{part}_path={lora_run.language.parent / part}" for part in ("vision", "language")]
    settings += ["--model.preset=vicuna7b-clipL336", "--model.lora.rank=2", "--stage.train=[language,lora]"]
    run = train(world_folder, tmp_path / "both", *settings)
    with pytest.raises(UserError, match="trained the language model itself"):
        peft_folder.main(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_empty_tensors_are_not_written() -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    peft_folder.check_whole({name: torch.ones(RANK, 8)}, RANK)
    for partition in (torch.ones(0), torch.ones(16), torch.ones(RANK // 2, 8), torch.ones(RANK, 0)):
        with pytest.raises(DataError, match="not a matrix of rank 4"):
            peft_folder.check_whole({name: partition}, RANK)


def _partitioned_job(root: Path) -> None:
    """What a partitioned model says of its LoRA, by PEFT's names and by a plain state_dict."""
    from eventlens_ds.runtime.distributed import start, stop

    world = start(threads=1, timeout_minutes=1.0)
    model, _, _ = tiny.loaded({"model": {"lora": {"rank": RANK}, "attention": "sdpa"}, "shrink": True}, 3)
    plain = {n: list(t.shape) for n, t in model.language_model.state_dict().items() if lora.MARK in n}
    whole = {n: tiny.digest(t) for n, t in lora.peft_state(model.language_model).items()}
    (root / f"rank{world.rank}.json").write_text(json.dumps({"plain": plain, "whole": whole}))
    stop()


def test_a_partitioned_model_gives_whole_matrices(tmp_path: Path) -> None:
    from eventlens_ds.runtime.local_ranks import spawn

    assert spawn(2, [str(tmp_path)], module="tests.export.test_peft_folder") == 0
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    model, _, _ = tiny.loaded({"model": {"lora": {"rank": RANK}, "attention": "sdpa"}, "shrink": True}, 0)
    expected = {n: tiny.digest(t) for n, t in lora.peft_state(model.language_model).items()}
    assert ranks[0]["whole"] == ranks[1]["whole"] == expected and len(expected) == 8
    # The trap that peft_state avoids.
    assert set(map(tuple, ranks[0]["plain"].values())) == {(0,)}


@pytest.mark.slow
def test_lora_on_a_whole_llava(world_folder: Path, tmp_path: Path) -> None:
    made = small_run(world_folder)
    base = tmp_path / "llava"
    tiny.llava(len(made.tokenizer)).save_pretrained(base)
    made.tokenizer.hf.save_pretrained(base)
    run = train_lora(
        world_folder, tmp_path / "run", f"--model.init_from={base}", "--stage.train=[regions,adapters,lora]"
    )
    peft_folder.main(run, tmp_path / "out")
    folder.main(run, tmp_path / "whole")
    found = loaded_elsewhere(base, tmp_path / "out", tmp_path / "logits", kind="AutoModelForImageTextToText")
    merged = language_logits(tmp_path / "whole")
    torch.testing.assert_close(found["adapted"], merged, atol=1e-5, rtol=0)
    assert not torch.allclose(found["plain"], merged, atol=1e-3)
    # Two matrices in two layers of the language model; its vision tower has layers of the same names.
    assert int(found["loras"]) == 8
    parts = AutoModel.from_pretrained(tmp_path / "out" / "region_vlm", local_files_only=True)
    whole = AutoModel.from_pretrained(tmp_path / "whole", local_files_only=True).eval()
    batch = a_batch(tmp_path / "whole")
    with torch.no_grad():
        torch.testing.assert_close(parts(batch), whole(batch), atol=1e-5, rtol=0)
    assert "AutoModelForImageTextToText" in (tmp_path / "out" / "README.md").read_text()


if __name__ == "__main__":
    leave(lambda: _partitioned_job(Path(sys.argv[1])))
