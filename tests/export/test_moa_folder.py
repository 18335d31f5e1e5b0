"""The adapters of a run as a folder of PEFT's type MOA: export, loading by PEFT in a new process, and the way back.

In: a run of two ZeRO-3 ranks with LION's mixture on a tiny published language model, every parameter partitioned and no
LoRA. Out: its export with --peft. Decision: PEFT's half is loaded in a process of its own, and what it must equal comes
from the checkpoint and from the language model inside a RegionVLM.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import eventlens_ds.model  # noqa: F401 - registers the classes
from eventlens_ds.errors import DataError
from eventlens_ds.export import peft_folder
from eventlens_ds.model.peft_folder import load_adapters, own_name
from tests.export.test_peft_folder import held, train_lora

FILE = "adapter_model.safetensors"
TENSORS = 2 * (2 * 5 + 2)
"""Layers * (adapters * fields + gates)."""


class Exported(NamedTuple):
    run: Path
    out: Path
    language: Path


@pytest.fixture(scope="module")
def moa_run(world_folder: Path, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("moa")
    paths = [f"--model.{part}_path={bases / part}" for part in ("vision", "language")]
    stage = "--stage.train=[projector,regions,adapters,router]"
    run = train_lora(world_folder, root / "run", *paths, stage, "--model.adapters.router=mixture", rank=0)
    assert peft_folder.main(run, root / "out") == 0
    return Exported(run, root / "out", bases / "language")


_MOA_ELSEWHERE = """
import sys, torch
import eventlens_ds.model
from eventlens_ds.model.peft_moa import task_ids
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
ids = torch.arange(3, 19).expand(2, -1)
with torch.no_grad():
    logits = model(input_ids=ids, moa_task_ids=task_ids(["caption", "event"])).logits
named = {n: p.detach().contiguous() for n, p in model.named_parameters() if "moa_adapters" in n}
save_file({"logits": logits.contiguous(), **named}, sys.argv[3])
"""


def in_new_process(program: str, *arguments: Path) -> dict[str, torch.Tensor]:
    """The tensors that a program wrote to its last argument."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(arguments[-1])


def test_peft_loads_the_adapters_in_a_new_process(moa_run: Exported, tmp_path: Path) -> None:
    """Every tensor is the checkpoint's, and logits by task are those of the language model with adapters."""
    from eventlens_ds.model.adapters import Routing
    from eventlens_ds.model.peft_moa import task_ids

    found = in_new_process(_MOA_ELSEWHERE, moa_run.language, moa_run.out / "moa", tmp_path / "found")
    logits = found.pop("logits")
    trained = {n: t for n, t in held(moa_run.run).items() if n.startswith("adapters.")}
    assert len(found) == TENSORS and trained
    parts = AutoModel.from_pretrained(moa_run.out / "region_vlm", local_files_only=True)
    named = dict(parts.named_parameters())
    for name, tensor in found.items():
        own = own_name(name.replace(".default.", "."))
        assert own is not None and torch.equal(tensor, trained.get(own, named[own])), name
    with torch.no_grad():
        ids, rows = torch.arange(3, 19)[None], []
        for task in task_ids(["caption", "event"]).tolist():
            routing = Routing(parts.adapters, torch.full((16,), task))
            hidden = parts.language_model.model(input_ids=ids, use_cache=False, routing=routing).last_hidden_state
            rows.append(parts.language_model.lm_head(hidden)[0])
    torch.testing.assert_close(logits, torch.stack(rows), atol=1e-5, rtol=0)
    assert not torch.allclose(logits[0], logits[1], atol=1e-4), "the task must matter"


def test_adapters_saved_by_peft_go_back_into_a_region_vlm(moa_run: Exported, tmp_path: Path) -> None:
    from eventlens_ds.model.peft_moa import MoAConfig

    parts = AutoModel.from_pretrained(moa_run.out / "region_vlm", local_files_only=True)
    base = AutoModelForCausalLM.from_pretrained(moa_run.language)
    config = MoAConfig(bottleneck=64, router="mixture", task_type="CAUSAL_LM")
    made = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in (p for n, p in made.named_parameters() if "moa_adapters" in n):
            parameter.add_(torch.randn_like(parameter))
    made.save_pretrained(str(tmp_path / "theirs"))
    report = load_adapters(parts, tmp_path / "theirs")
    assert len(report.loaded) == TENSORS
    for name, tensor in load_file(tmp_path / "theirs" / FILE).items():
        assert torch.equal(parts.get_parameter(str(own_name(name))), tensor), name
    assert peft_folder.adapter_state(parts).keys() == load_file(tmp_path / "theirs" / FILE).keys()
    peft.LoraConfig().save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(DataError, match="holds LORA, not MOA"):
        load_adapters(parts, tmp_path / "lora")
    made.peft_config["default"].router = "task"
    made.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(DataError, match="have router task, the model's mixture"):
        load_adapters(parts, tmp_path / "theirs")


def test_every_parameter_is_in_one_file_or_in_the_base(moa_run: Exported) -> None:
    assert not (moa_run.out / FILE).exists(), "there is no LoRA"
    parts = AutoModel.from_pretrained(moa_run.out / "region_vlm", local_files_only=True)
    named = dict(parts.named_parameters())
    in_moa = {own_name(name) for name in load_file(moa_run.out / "moa" / FILE)}
    in_parts = set(load_file(moa_run.out / "region_vlm" / "model.safetensors"))
    assert in_moa == {n for n in named if n.startswith("adapters.")} and not in_moa & in_parts
    for name, tensor in held(moa_run.run).items():
        assert torch.equal(named[name], tensor), name
    card = (moa_run.out / "README.md").read_text()
    assert 'out/moa")' in card and "LoRA alone" not in card


def test_a_lost_tensor_is_an_error(moa_run: Exported, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(moa_run.out, tmp_path / "out")
    file = tmp_path / "out" / "moa" / FILE
    whole = load_file(file)
    save_file({n: t for n, t in whole.items() if not n.endswith("layers.1.moa_adapters.image_level_up")}, file)
    with pytest.raises(DataError, match=r"no tensor for adapters\.1\.image_level_up \(1 missing\)"):
        AutoModel.from_pretrained(tmp_path / "out" / "region_vlm", local_files_only=True)
