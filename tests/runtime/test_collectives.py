"""Two gloo ranks, one of which takes another path through the model: the recorder names the module (P5).

The file is its own job, as checkpoint_jobs.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from eventlens_ds.runtime.collectives import CollectiveMismatch, Recorder
from eventlens_ds.runtime.distributed import start, stop
from eventlens_ds.runtime.failures import leave
from eventlens_ds.runtime.local_ranks import spawn


def build_engine(stage: int):
    import deepspeed
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.Linear(8, 8)
            self.probe = nn.Identity()
            self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x: torch.Tensor, skip: str = "", twice: str = "") -> torch.Tensor:
            for name, module in self.named_children():
                if name != skip:
                    x = module(x)
                if name == twice:
                    x = module(x)
            return x.square().mean()

    torch.manual_seed(0)
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine, number: int, **path: str) -> str:
    import torch

    loss = engine(torch.randn(4, 8, generator=torch.Generator().manual_seed(number)), **path)
    engine.backward(loss)
    engine.step()
    return loss.item().hex()


def mismatch_of(action) -> str:
    try:
        action()
    except CollectiveMismatch as error:
        return str(error)
    return ""


def job_record(rank: int) -> dict:
    from deepspeed import comm

    out: dict = {}
    plain = [step(engine := build_engine(3), 0), *(step(engine, number) for number in (1, 2))]
    engine = build_engine(3)
    methods = dict(vars(comm.comm.cdb))
    with Recorder(engine.module) as recorder:
        out["same_losses"] = plain == [step(engine, 0), step(engine, 1), step(engine, 2)]
        out["events"] = [list(event) for event in recorder.events]
        recorder.check()
    out["uninstalled"] = dict(vars(comm.comm.cdb)) == methods and not engine.module.vision._forward_hooks_always_called
    out["silent_when_off"] = bool(step(engine, 3))

    data_parallel = build_engine(0)
    extra = {"twice": "probe"} if rank == 1 else {}
    step(data_parallel, 0, **extra)  # negative control: nothing notices
    with Recorder(data_parallel.module) as recorder:
        step(data_parallel, 1, **extra)
        out["skewed_call"] = mismatch_of(recorder.check)
    with Recorder(engine.module, strict=True) as recorder:
        step(engine, 4)
        recorder.check()
        out["skewed_gather"] = mismatch_of(lambda: step(engine, 5, skip="vision" if rank == 1 else ""))
    return out


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv("DS_ACCELERATOR", "cpu")
        assert spawn(2, [str(folder)], module="test_collectives") == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.P5
def test_recording_changes_nothing_and_comes_off(outs):
    for out in outs:
        assert out["same_losses"] and out["uninstalled"] and out["silent_when_off"]


@pytest.mark.P5
def test_parameters_are_gathered_in_their_module_forward_and_backward(outs):
    for out in outs:
        gathers = {module for what, module, _ in out["events"] if what.startswith("all_gather")}
        assert {"vision", "head.0", "head.2"} <= gathers, gathers
        reductions = {module for what, module, _ in out["events"] if what.startswith("reduce_scatter")}
        assert reductions and all("backward" in module for module in reductions), reductions


@pytest.mark.P5
def test_a_call_only_one_rank_made_is_named(outs):
    for out in outs:
        assert "rank 1 did a call of probe" in out["skewed_call"], out["skewed_call"]


@pytest.mark.P5
def test_strict_turns_a_hang_into_the_same_error(outs):
    for out in outs:
        assert "rank 0 did a call of vision, rank 1 did a call of probe" in out["skewed_gather"], out["skewed_gather"]


def test_alone_it_records_and_agrees():
    from torch import nn, ones

    model = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    with Recorder(model) as recorder:
        model(ones(1, 2)).sum().backward()
        assert [event[1] for event in recorder.events] == ["Sequential", "0", "1"]
        assert recorder.module == "0 (backward)"
        recorder.check()
    assert not model._forward_pre_hooks and not model[0]._forward_hooks


def main(folder: Path) -> None:
    world = start(threads=1, timeout_minutes=1)
    Path(folder, f"{world.rank}.json").write_text(json.dumps(job_record(world.rank)))
    stop()


if __name__ == "__main__":
    leave(lambda: main(Path(sys.argv[1])))
