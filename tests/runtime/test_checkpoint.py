"""Real ZeRO runs on two gloo ranks: save, resume, damage, full disk, foreign and hostile checkpoints (P9, P11).

The file is its own job: `python -m test_checkpoint JOB DIR` runs on every rank and writes DIR/JOB-rankR.json, which
the tests read. Few processes do many things because starting one takes seconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import resource
import shutil
import sys
from pathlib import Path

import pytest

from eventlens_ds.errors import DataError
from eventlens_ds.runtime import commit
from eventlens_ds.runtime.distributed import gather_objects, rank_and_size, start, stop
from eventlens_ds.runtime.failures import leave
from eventlens_ds.runtime.local_ranks import spawn

STEPS, SAVED_AT = 6, 3


def build_engine(stage: int, seed: int, *, bf16: bool = False, width: int = 32, freeze: bool = True):
    """A small model with dropout, an integer buffer and a frozen layer that exists nowhere else."""
    import deepspeed
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Linear(8, 16)
            self.hidden = nn.Linear(16, width)
            self.drop = nn.Dropout(0.3)
            self.out = nn.Linear(width, 1)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.frozen.requires_grad_(not freeze)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.out(self.drop(torch.tanh(self.hidden(self.frozen(x))))).square().mean()

    torch.manual_seed(seed)
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    trained = [[model.hidden.weight, model.out.weight], [model.hidden.bias, model.out.bias]]
    groups = [{"params": trained[0], "weight_decay": 0.1}, {"params": trained[1]}]
    if not freeze:
        groups.append({"params": list(model.frozen.parameters())})
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.01), config=config)
    torch.manual_seed(1000 + seed + rank_and_size()[0])
    return engine


def step(engine, number: int) -> str:
    """One optimizer step on data that depend on step and rank only; the loss to the last bit."""
    import torch

    draw = torch.Generator().manual_seed(number * 10 + rank_and_size()[0])
    x = torch.randn(4, 8, generator=draw, dtype=torch.float32).to(next(iter(engine.module.buffers())).device)
    loss = engine(x.to(torch.bfloat16) if engine.bfloat16_enabled() else x)
    engine.backward(loss)
    engine.step()
    return loss.item().hex()


def full_parameters(engine) -> dict[str, str]:
    import deepspeed

    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            found[name] = hashlib.sha256(param.detach().float().numpy().tobytes()).hexdigest()
    return found


def error_of(action, *args) -> str:
    try:
        action(*args)
    except DataError as error:
        return str(error)
    return ""


class DiskFullHere:
    """Files of this process may not grow past `limit` bytes, as if its disk were full."""

    def __init__(self, rank: int, limit: int) -> None:
        self.mine, self.limit = rank == rank_and_size()[0], limit

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.mine:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *exc: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def job_train(folder: Path) -> dict:
    from eventlens_ds.runtime import checkpoint

    run, out = folder / "run", {}
    engine = build_engine(3, seed=1)
    frozen = checkpoint.save_frozen(engine, run, ["frozen.weight", "frozen.bias"])
    save = functools.partial(checkpoint.save, engine, run, base={}, frozen_saved_in=frozen, keep=2)
    out["losses"] = []
    for number in range(1, STEPS + 1):
        out["losses"].append(step(engine, number))
        if number == SAVED_AT:
            stale = run / "checkpoints" / ".tmp-step-2-dead"
            stale.mkdir(parents=True, exist_ok=True)
            out["saved"] = str(save(step=number, state={"cursor": [number, "a"]}, best=True))
            out["stale_gone"] = not stale.exists()
    out["parameters"] = full_parameters(engine)
    out["unsaved_frozen"] = ""
    try:
        checkpoint.save(engine, run, step=99, state={}, base={})
    except AssertionError as error:
        out["unsaved_frozen"] = str(error)
    engine.eval()
    for name, rank, limit in (("full_rank1", 1, 2000), ("full_rank0", 0, 100)):
        with DiskFullHere(rank, limit):
            out[name] = save(step=STEPS, state={}) is None
    rename = os.rename
    if rank_and_size()[0] == 0:
        os.rename = lambda *args: (_ for _ in ()).throw(OSError(5, "injected"))
    out["rename_fails"] = save(step=STEPS, state={}) is None
    os.rename = rename
    out["left"] = sorted(os.listdir(run / "checkpoints"))
    out["last"] = str(save(step=STEPS, state={"cursor": [STEPS, "b"]}))
    out["weights"] = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in checkpoint.weights(Path(out["last"]))
    }
    return out


def job_resume(folder: Path) -> dict:
    from eventlens_ds.runtime import checkpoint, rng

    out: dict = {}
    path = checkpoint.resolve(folder / "old")
    out["resolved"] = path.name
    engine = build_engine(3, seed=2)
    out["state"] = checkpoint.load(engine, path)
    out["losses"] = [step(engine, number) for number in range(SAVED_AT + 1, STEPS + 1)]
    out["parameters"] = full_parameters(engine)
    out["calls"] = int(engine.module.calls)

    without_rng = build_engine(3, seed=3)
    restore, rng.restore = rng.restore, lambda state: None
    checkpoint.load(without_rng, path)
    rng.restore = restore
    out["loss_without_rng"] = step(without_rng, SAVED_AT + 1)

    fresh = build_engine(3, seed=4)
    before = full_parameters(fresh)
    out["damaged"] = error_of(checkpoint.load, fresh, folder / "damaged" / "checkpoints" / path.name)
    out["hostile"] = error_of(checkpoint.load, fresh, folder / "hostile" / "checkpoints" / path.name)
    out["wider"] = error_of(checkpoint.load, build_engine(3, seed=5, width=48), path)
    out["unfrozen"] = error_of(checkpoint.load, build_engine(3, seed=5, freeze=False), path)
    out["stage"] = error_of(checkpoint.load, build_engine(2, seed=5), path)
    out["base"] = error_of(functools.partial(checkpoint.load, fresh, path, base={"model.safetensors": "ab"}))
    out["untouched"] = full_parameters(fresh) == before
    out["executed_by_us"] = any(gather_objects((folder / "executed").exists()))

    del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
    try:
        fresh.load_checkpoint(str(folder / "hostile" / "checkpoints" / path.name), tag="state")
    except Exception as error:  # whatever the payload leads to
        out["deepspeed_said"] = str(error)
    out["executed_by_deepspeed"] = (folder / "executed").exists()
    return out


def job_stages(folder: Path) -> dict:
    from eventlens_ds.runtime import checkpoint

    out: dict = {}
    for stage, bf16 in ((0, False), (0, True), (1, False), (2, False), (1, True), (2, True), (3, True)):
        run = folder / f"stage{stage}{bf16}"
        engine = build_engine(stage, seed=1, bf16=bf16)
        frozen = checkpoint.save_frozen(engine, run, ["frozen.weight", "frozen.bias"])
        step(engine, 1)
        path = checkpoint.save(engine, run, step=1, state={}, base={}, frozen_saved_in=frozen)
        parameters = full_parameters(engine)
        again = build_engine(stage, seed=2, bf16=bf16)
        checkpoint.load(again, path)
        same_loss = [step(engine, 2), step(engine, 3)]
        found = {
            name: hashlib.sha256(tensor.bfloat16().float().numpy().tobytes() if bf16 else tensor.numpy().tobytes())
            for name, tensor in checkpoint.weights(path)
        }
        checkpoint.load(again2 := build_engine(stage, seed=3, bf16=bf16), path)
        out[f"{stage} {bf16}"] = {
            "resumed": same_loss == [step(again2, 2), step(again2, 3)],
            "weights": all(found[name].hexdigest() == digest for name, digest in parameters.items()),
        }
    return out


def run_job(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int = 2) -> list[dict]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert spawn(ranks, [name, str(folder)], module="test_checkpoint") == 0
    return [json.loads((folder / f"{name}-rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """An uninterrupted run of STEPS steps, saved at SAVED_AT and at the end."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        return folder, run_job("train", folder, patch)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def resumed(trained):
    """Copies of the run (without its last checkpoint, damaged, hostile) and what loading them did."""
    import torch

    folder, _ = trained
    name = f"step-{SAVED_AT}"
    for copy in ("old", "damaged", "hostile"):
        shutil.copytree(folder / "run", folder / copy)
        shutil.rmtree(folder / copy / "checkpoints" / f"step-{STEPS}")
    damaged = folder / "damaged" / "checkpoints" / name / "state" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    hostile = folder / "hostile" / "checkpoints" / name
    manifest = commit.read_manifest(hostile)
    for file in sorted((hostile / "state").glob("*_model_states.pt")):
        shard = torch.load(file, weights_only=True)
        torch.save({**shard, "extra": Payload(folder / "executed")}, file)
        entry = manifest["files"][f"state/{file.name}"]
        entry["size"], entry["sha256"] = file.stat().st_size, commit.sha256_file(file)
    (hostile / commit.MANIFEST).write_bytes(commit.seal(manifest))
    assert commit.verify(hostile) == []  # whoever can write the payload can write the manifest as well
    with pytest.MonkeyPatch.context() as patch:
        return folder, run_job("resume", folder, patch)


@pytest.mark.P9
def test_resume_is_bit_identical_and_needs_the_generators(trained, resumed):
    for whole, later in zip(trained[1], resumed[1]):
        assert later["resolved"] == f"step-{SAVED_AT}"
        assert later["state"] == {"cursor": [SAVED_AT, "a"]}
        assert later["losses"] == whole["losses"][SAVED_AT:]
        assert later["parameters"] == whole["parameters"]
        assert later["calls"] == STEPS
        assert later["loss_without_rng"] != whole["losses"][SAVED_AT]


@pytest.mark.P9
def test_storage_failure_of_one_rank_is_everyones_none_and_training_goes_on(trained):
    folder, ranks = trained
    for out in ranks:
        assert out["full_rank1"] and out["full_rank0"] and out["rename_fails"]
        assert out["left"] == ["BEST", "LATEST", f"step-{SAVED_AT}"]
        assert Path(out["last"]).name == f"step-{STEPS}"
    assert commit.verify(Path(ranks[0]["last"])) == []
    seconds = commit.read_manifest(Path(ranks[0]["last"]))["seconds"]
    assert 0 <= seconds["hashing"] < seconds["writing"] < 60
    assert commit.pointer(folder / "run", commit.LATEST).name == f"step-{STEPS}"
    assert commit.pointer(folder / "run", commit.BEST).name == f"step-{SAVED_AT}"


@pytest.mark.P9
def test_stale_attempts_are_cleaned(trained):
    assert all(out["stale_gone"] for out in trained[1])


@pytest.mark.P9
def test_checkpoint_suffices(trained):
    """Consolidated tensors equal the live ones, frozen ones included; leaving those out is refused."""
    for out in trained[1]:
        assert {name: out["weights"][name] for name in out["parameters"]} == out["parameters"]
        assert set(out["weights"]) == {*out["parameters"], "calls"}
        assert "frozen.weight" in out["unsaved_frozen"]


@pytest.mark.P9
def test_damage_is_named_and_changes_nothing(resumed):
    for out in resumed[1]:
        assert "zero_pp_rank_1_mp_rank_00_optim_states.pt: content does not match its sha256" in out["damaged"]
        assert out["untouched"]


@pytest.mark.P9
def test_another_model_is_refused_by_name(resumed):
    for out in resumed[1]:
        assert "hidden.weight is [32, 16] there and [48, 16] here" in out["wider"]
        assert "frozen.weight was frozen there" in out["unfrozen"]
        assert "other base weights, model.safetensors is not the same file" in out["base"]
        assert "saved with zero_stage 3, this run has 2" in out["stage"]


@pytest.mark.P11
def test_pickle_in_a_checkpoint_is_refused_where_deepspeed_executes_it(resumed):
    for out in resumed[1]:
        assert "holds more than tensors and plain data" in out["hostile"]
        assert not out["executed_by_us"]
        assert out["executed_by_deepspeed"]


@pytest.mark.P11
def test_weights_refuses_a_pickle(resumed, tmp_path):
    from eventlens_ds.runtime import checkpoint

    path = resumed[0] / "hostile" / "checkpoints" / f"step-{SAVED_AT}"
    shutil.rmtree(resumed[0] / "executed", ignore_errors=True)
    with pytest.raises(DataError, match="more than tensors"):
        dict(checkpoint.weights(path))
    assert not (resumed[0] / "executed").exists()


@pytest.mark.P9
def test_falls_back_past_a_flipped_byte(trained, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(trained[0] / "run", run)
    file = run / "checkpoints" / f"step-{STEPS}" / "rng-rank1.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 0x10
    file.write_bytes(raw)
    assert commit.verify(file.parent) == ["rng-rank1.safetensors: content does not match its sha256"]
    assert commit.verify(file.parent, quick=True) == []
    assert commit.resolve(run).name == f"step-{SAVED_AT}"
    assert f"SKIPPED checkpoint {file.parent}: rng-rank1" in caplog.text


def job_reshard_save(folder: Path) -> dict:
    """Under each ZeRO stage two steps of two ranks, saved."""
    from eventlens_ds.runtime import checkpoint

    for stage in (1, 2, 3):
        run = folder / f"stage{stage}"
        engine = build_engine(stage, seed=1)
        frozen = checkpoint.save_frozen(engine, run, ["frozen.weight", "frozen.bias"])
        step(engine, 1), step(engine, 2)
        checkpoint.save(engine, run, step=2, state={}, base={}, frozen_saved_in=frozen)
    return {}


def job_reshard_load(folder: Path) -> dict:
    """Loaded by as many ranks as there are now, and saved again: tensors and moments by name, before and after."""
    from eventlens_ds.runtime import checkpoint

    out: dict = {}
    for stage in (1, 2, 3):
        run = folder / f"stage{stage}"
        found = checkpoint.resolve(run)
        engine = build_engine(stage, seed=7)
        checkpoint.load(engine, found)
        frozen = commit.read_manifest(found)["frozen"]["path"]
        saved = checkpoint.save(engine, run, step=3, state={}, base={}, frozen_saved_in=frozen, keep=9)
        out[str(stage)] = {
            "from": commit.read_manifest(found)["world_size"],
            "to": commit.read_manifest(saved)["world_size"],
            "names": len(checkpoint.digests(saved)),
            "same": checkpoint.digests(saved) == checkpoint.digests(found),
            "live": full_parameters(engine)["out.weight"] == checkpoint.digests(found)["out.weight"],
            "moves": step(engine, 3) != step(engine, 3),
        }
    return out


@pytest.mark.P9
def test_shards_are_cut_anew_for_other_numbers_of_ranks(tmp_path, monkeypatch):
    """2 -> 3 -> 1 ranks, so that pieces do not come out even: every tensor and moment keeps its bits."""
    run_job("reshard_save", tmp_path, monkeypatch)
    for ranks, before in ((3, 2), (1, 3)):
        for out in run_job("reshard_load", tmp_path, monkeypatch, ranks=ranks):
            for stage, row in out.items():
                assert (row["from"], row["to"]) == (before, ranks), stage
                assert row["same"] and row["live"] and row["moves"] and row["names"] == 7 + 4 * 3, (stage, row)
        for stage in (1, 2, 3):
            checkpoints = tmp_path / f"stage{stage}" / "checkpoints"
            if ranks == 3:
                shutil.rmtree(checkpoints / "step-2")


@pytest.mark.P9
def test_a_shard_that_is_not_laid_out_as_its_manifest_says_is_refused(trained, tmp_path):
    from eventlens_ds.runtime import checkpoint

    shutil.copytree(trained[0] / "run", tmp_path / "run")
    path = checkpoint.resolve(tmp_path / "run")
    manifest = commit.read_manifest(path)
    manifest["layout"][0] = manifest["layout"][0][:-1]
    (path / commit.MANIFEST).write_bytes(commit.seal(manifest))
    with pytest.raises(DataError, match="group 0 holds .* numbers a rank, its names"):
        checkpoint.digests(path)


@pytest.mark.P9
@pytest.mark.slow
def test_every_stage_and_dtype(tmp_path, monkeypatch):
    for out in run_job("stages", tmp_path, monkeypatch):
        assert all(all(row.values()) for row in out.values()), out


def test_generators_round_trip():
    import random

    import numpy as np
    import torch

    from eventlens_ds.runtime import rng

    random.gauss(0, 1), np.random.standard_normal()
    state = rng.capture()
    draw = (random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
    assert pickle.dumps(draw) != pickle.dumps((random.gauss(0, 1), random.random(), np.random.standard_normal(3), 0))
    rng.restore(state)
    again = (random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
    assert again == draw


def main(name: str, folder: Path) -> None:
    world = start(threads=1, timeout_minutes=1)
    result = globals()[f"job_{name}"](folder)
    (folder / f"{name}-rank{world.rank}.json").write_text(json.dumps(result))
    stop()


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1], Path(sys.argv[2])))
