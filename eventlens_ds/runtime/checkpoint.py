"""Checkpoints of a DeepSpeed engine: saved as a whole or not at all, verified before a byte of them is used.

In: an engine (ZeRO 0-3), the run folder, JSON-able training state. Out: checkpoints/step-N/ with manifest.json,
DeepSpeed's shards and every rank's generators; or weights as fp32 tensors without a process group.
Decision: DeepSpeed decides what is in a shard, we decide how it reaches the disk: for the time of a save or load its
checkpoint engine is ours, which hashes while it writes, keeps storage errors from breaking the collectives inside
save_checkpoint, and unpickles nothing but tensors, plain data and three named classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import safetensors.torch
import torch
from safetensors import safe_open

from eventlens_ds.errors import DataError, UserError
from eventlens_ds.runtime import commit, rng
from eventlens_ds.runtime.commit import atomic_write, pointer, resolve, verify
from eventlens_ds.runtime.distributed import broadcast_object, gather_objects, rank_and_size
from eventlens_ds.runtime.hashing_file import HashingFile
from eventlens_ds.runtime.lease import Lease
from eventlens_ds.runtime.reshard import Shards
from eventlens_ds.runtime.shard_files import TAG, Files, in_charge, weights_only

__all__ = ["atomic_write", "load", "pointer", "resolve", "save", "save_frozen", "verify", "weights"]

log = logging.getLogger(__name__)


def parameters(engine: Any) -> list[list[Any]]:
    """[name, shape, trained] of every parameter of the engine's module, full shapes also under ZeRO-3."""
    return [
        [name, list(getattr(param, "ds_shape", param.shape)), param.requires_grad]
        for name, param in engine.module.named_parameters()
    ]


def _layout(engine: Any) -> list[list[str]]:
    """Names in each flat partition. ZeRO shards carry no names, so another order would load wrong in silence."""
    if not engine.zero_optimization():
        return []
    return [list(group) for group in engine._get_zero_param_shapes()]


def _frozen_entry(run_dir: Path, frozen: str | None) -> dict[str, Any] | None:
    if frozen is None:
        return None
    try:
        size = (run_dir / frozen).stat().st_size
    except OSError as error:
        raise DataError(f"{run_dir / frozen}: the frozen tensors of this run are gone: {error.strerror}") from None
    return {"path": frozen, "size": size, "sha256": Path(frozen).stem.split("-")[1]}


def _assert_complete(engine: Any, run_dir: Path, base: dict[str, str], frozen: str | None) -> None:
    """Without published base weights every frozen tensor must be in the frozen file, or the run cannot be rebuilt."""
    if base:
        return
    kept: set[str] = set()
    if frozen is not None:
        with safe_open(str(run_dir / frozen), framework="pt") as file:
            kept = set(file.keys())
    lost = [name for name, _, trained in parameters(engine) if not trained and name not in kept]
    assert not lost, f"frozen tensors neither in base weights nor in the frozen file: {lost[:3]} of {len(lost)}"


def save_frozen(engine: Any, run_dir: Path, names: list[str]) -> str | None:
    """Write frozen tensors that differ from the base weights, once per run; a collective.

    names: parameters trained in an earlier stage, or initialised from scratch and frozen now. Returns the path below
    `run_dir` to hand to `save`, None for no names. DataError on every rank when it cannot be written.
    """
    if not names:
        return None
    params = dict(engine.module.named_parameters())
    lead = rank_and_size()[0] == 0
    tensors = {}
    for name in names:
        with deepspeed.zero.GatheredParameters([params[name]]):
            if lead:
                tensors[name] = params[name].detach().cpu().clone().contiguous()
    problem, final = "", ""
    if lead:
        temporary = run_dir / "weights" / f".tmp-{secrets.token_hex(4)}"
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(tensors, str(temporary))
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            final = f"weights/frozen-{commit.sha256_file(temporary)}.safetensors"
            os.replace(temporary, run_dir / final)
            commit.sync_dir(temporary.parent)
        except Exception as error:  # safetensors reports a full disk as its own exception type
            temporary.unlink(missing_ok=True)
            problem = str(error)
    problem, final = broadcast_object([problem, final])
    if problem:
        raise DataError(f"{run_dir / 'weights'}: frozen tensors cannot be written: {problem}")
    return final


def _open_attempt(run_dir: Path, step: int) -> tuple[Path, str]:
    """A fresh temporary folder, made by rank 0 and known to all; the second value is what went wrong."""
    temporary = run_dir / commit.FOLDER / f".tmp-step-{step}-{broadcast_object(secrets.token_hex(4))}"
    problem = ""
    if rank_and_size()[0] == 0:
        try:
            commit.clean_stale(run_dir)
            (temporary / TAG).mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    return temporary, broadcast_object(problem)


def _write_shards(engine: Any, temporary: Path) -> tuple[dict[str, Any], dict[str, float], list[str]]:
    """Every rank's files, written through to the disk: (all files by name, seconds of the slowest rank, problems by
    rank). A collective."""
    rank, begun = rank_and_size()[0], time.monotonic()
    with in_charge(engine, temporary) as files:
        engine.save_checkpoint(str(temporary), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    name = f"rng-rank{rank}.safetensors"
    file = HashingFile(temporary / name)
    file.write(safetensors.torch.save(rng.capture()))
    file.close()
    files.note(name, file)
    try:
        commit.sync_dir(temporary / TAG)
    except OSError as error:
        files.errors.append(str(error))
    took = {"writing": round(time.monotonic() - begun, 3), "hashing": round(files.held_up, 3)}
    written: dict[str, Any] = {}
    problems = []
    rows = gather_objects([files.written, files.errors, took])
    for other, (entries, errors, _) in enumerate(rows):
        written.update(entries)
        problems += [f"rank {other}: {error}" for error in errors]
    return written, {what: max(seconds[what] for *_, seconds in rows) for what in took}, problems


def _conclude(
    run_dir: Path, temporary: Path, manifest: dict[str, Any], problems: list[str], best: bool, lease: Lease | None
) -> str | None:
    """Rank 0's part of a save: publish and point, or discard and log; the committed name or None. LeaseError: the run
    is another job's by now, and so are its folders."""
    if not problems:
        try:
            if lease:
                lease.check()
            final = commit.publish(temporary, manifest)
            for label in (commit.LATEST, commit.BEST) if best else (commit.LATEST,):
                commit.point(run_dir, label, final)
            return final.name
        except OSError as error:
            problems = [f"rank 0: {error}"]
    if lease:
        lease.check()
    commit.discard(temporary)
    log.error("checkpoint of step %d NOT written, training goes on: %s", manifest["step"], "; ".join(problems))
    return None


def save(
    engine: Any,
    run_dir: Path,
    *,
    step: int,
    state: dict[str, Any],
    base: dict[str, str],
    frozen_saved_in: str | None = None,
    keep: int = 2,
    best: bool = False,
    identity: dict[str, Any] | None = None,
    lease: Lease | None = None,
) -> Path | None:
    """Commit checkpoints/step-N, or leave no trace of it: the path, or None on every rank when storage failed.

    state: JSON-able (cursor, config hash, best metric, counters). base: sha256 of the published weight files.
    frozen_saved_in: what `save_frozen` returned. Trained tensors and optimizer state are written each time, frozen
    ones never. keep: checkpoints to retain beside BEST. identity: JSON-able, what the run is to be continued with.
    lease: of rank 0; LeaseError on that rank when it is lost. A collective.
    """
    rank, size = rank_and_size()
    if engine.zero_nvme_offload_optimizer():
        raise UserError("offload_optimizer.device is nvme: its swap files cannot be committed, use cpu")
    manifest: dict[str, Any] = {
        "format": commit.FORMAT,
        "step": step,
        "state": json.loads(json.dumps(state)),
        "identity": identity,
        "base": base,
        "frozen": _frozen_entry(run_dir, frozen_saved_in),
        "world_size": size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "parameters": parameters(engine),
        "layout": _layout(engine),
    }
    _assert_complete(engine, run_dir, base, frozen_saved_in)
    if lease:
        lease.check()
    temporary, problem = _open_attempt(run_dir, step)
    problems = [f"rank 0: {problem}"] if problem else []
    if not problems:
        manifest["files"], manifest["seconds"], problems = _write_shards(engine, temporary)
    name = None
    if rank == 0:
        name = _conclude(run_dir, temporary, manifest, problems, best, lease)
    name = broadcast_object(name)
    if name is None:
        return None
    if rank == 0:
        commit.retain(run_dir, keep)
    return run_dir / commit.FOLDER / name


def _refuse_other_model(path: Path, manifest: dict[str, Any], engine: Any) -> None:
    """DataError naming the first thing in which this checkpoint and the engine differ."""
    saved = {name: (shape, trained) for name, shape, trained in manifest["parameters"]}
    ours = {name: (shape, trained) for name, shape, trained in parameters(engine)}
    for name, (shape, trained) in ours.items():
        if name not in saved:
            raise DataError(f"{path}: another model, it has no parameter {name}")
        if saved[name][0] != shape:
            raise DataError(f"{path}: another model, {name} is {saved[name][0]} there and {shape} here")
        if saved[name][1] != trained:
            was = "trained" if saved[name][1] else "frozen"
            raise DataError(f"{path}: another stage, {name} was {was} there; start a new run with --init-from")
    extra = [name for name in saved if name not in ours]
    if extra:
        raise DataError(f"{path}: another model, its parameter {extra[0]} does not exist here")
    here = int(engine.zero_optimization_stage())
    if manifest["zero_stage"] != here:
        raise DataError(f"{path}: saved with zero_stage {manifest['zero_stage']}, this run has {here}")
    if manifest["layout"] != _layout(engine):
        raise DataError(f"{path}: the optimizer's parameter groups are in another order than here")


def _load_frozen(engine: Any, file: Path) -> None:
    params = dict(engine.module.named_parameters())
    rank = rank_and_size()[0]
    with safe_open(str(file), framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            with deepspeed.zero.GatheredParameters([params[name]], modifier_rank=0), torch.no_grad():
                if rank == 0 or not hasattr(params[name], "ds_id"):
                    params[name].copy_(tensors.get_tensor(name))


def load(engine: Any, path: Path, *, base: dict[str, str] | None = None) -> dict[str, Any]:
    """Restore engine, optimizer, counters and generators; returns the saved `state`. A collective.

    Bytes that `resolve` has hashed are not hashed again. base: sha256 of the published
    weight files in use now, compared with those of the save. DataError before anything is changed: damaged files,
    another model, base or ZeRO stage; after it: a file changed while it was read. The frozen tensors of the run are
    restored too. The number of ranks may differ: the shards are cut anew (runtime/reshard.py), and generators stay as
    they are, since what is drawn in training is keyed by step and row.
    """
    before = commit.stamps(path)
    problems = commit.verify_together(path)
    if problems:
        raise DataError(f"{path}: {problems[0]}")
    manifest = commit.read_manifest(path)
    _refuse_other_model(path, manifest, engine)
    if base is not None and base != manifest["base"]:
        names = sorted(set(base) | set(manifest["base"]))
        changed = [name for name in names if base.get(name) != manifest["base"].get(name)]
        raise DataError(f"{path}: trained on other base weights, {', '.join(changed)} is not the same file")
    rank, size = rank_and_size()
    others = manifest if size != manifest["world_size"] else None
    with in_charge(engine, path, others), weights_only(path):
        # Not strict: frozen parameters are not in the shards; names and shapes were compared above.
        loaded, _ = engine.load_checkpoint(str(path), tag=TAG, load_module_strict=False)
    if loaded is None:
        raise DataError(f"{path}: DeepSpeed found nothing to load in it")
    if manifest["frozen"]:
        _load_frozen(engine, path.parent.parent / manifest["frozen"]["path"])
    if others is None:
        rng.restore(safetensors.torch.load_file(path / f"rng-rank{rank}.safetensors"))
    elif rank == 0:
        log.info("%s: cut anew from %d ranks to %d", path, manifest["world_size"], size)
    touched = next(filter(None, gather_objects(commit.changed(path, before))), "")
    if touched:
        raise DataError(f"{path}: {touched} changed while it was read")
    return manifest["state"]


def weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, fp32 tensor on CPU) of everything a checkpoint holds: trained and frozen tensors, persistent buffers.

    path: one checkpoint (a run's comes from `resolve`). Needs no process group, and any rank may call it alone.
    Under ZeRO 1-3 trained tensors are the fp32 masters. Integer buffers keep their type. DataError: damaged, or
    changed between its verification and the last tensor. Bytes that `resolve` has hashed are not hashed again.
    """
    before = commit.stamps(path)
    problems = verify(path)
    if problems:
        raise DataError(f"{path}: {problems[0]}")
    yield from _tensors(path, commit.read_manifest(path))
    changed = commit.changed(path, before)
    if changed:
        raise DataError(f"{path}: {changed} changed while it was read")


def _tensors(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    if manifest["frozen"]:
        with safe_open(str(path.parent.parent / manifest["frozen"]["path"]), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name).float()
    if any(name.endswith("_optim_states.pt") for name in manifest["files"]):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        quiet = io.StringIO()
        with weights_only(path), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            tensors = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=TAG, lazy_mode=True)
    else:
        with weights_only(path):
            tensors = Files(path).read(path / TAG / "mp_rank_00_model_states.pt", "cpu")["module"]
    for name, tensor in tensors.items():
        whole = tensor.contiguous().detach()
        yield name, whole.float() if whole.is_floating_point() else whole


def digests(path: Path) -> dict[str, str]:
    """sha256 of every trained tensor and of each of its moments, by "name fp32", "name exp_avg"; of buffers and frozen
    tensors by name. The same for every number of ranks. Needs no process group. DataError: damaged."""
    found = {name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest() for name, tensor in weights(path)}
    manifest = commit.read_manifest(path)
    if manifest["zero_stage"]:
        with weights_only(path):
            shards = Shards(path, manifest, lambda file: Files(path).read(file, "cpu", mmap=True))
            for name, key, tensor in shards.tensors():
                found[f"{name} {key}"] = hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
    return found
