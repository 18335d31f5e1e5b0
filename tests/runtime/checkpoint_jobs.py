"""Programs of the tests of checkpoints: real ZeRO engines, saved and loaded, one process per rank.

In: `python -m checkpoint_jobs JOB DIR` on every rank. Out: DIR/JOB-rankR.json, which the tests read. Decision: few
processes do many things, because starting one takes seconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
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


def run_job(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int = 2) -> list[dict]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert spawn(ranks, [name, str(folder)], module="checkpoint_jobs") == 0
    return [json.loads((folder / f"{name}-rank{rank}.json").read_text()) for rank in range(ranks)]


def main(name: str, folder: Path) -> None:
    world = start(threads=1, timeout_minutes=1)
    result = globals()[f"job_{name}"](folder)
    (folder / f"{name}-rank{world.rank}.json").write_text(json.dumps(result))
    stop()


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1], Path(sys.argv[2])))
