"""Real ZeRO runs on two gloo ranks: save, resume, damage, full disk, foreign and hostile checkpoints (P9, P11).

In: what the programs of checkpoint_jobs.py leave. Out: the same bits after a resume, and one clear line for everything
that must not be loaded. Decision: the runs are made once for all tests.
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest

from eventlens_ds.errors import DataError
from eventlens_ds.runtime import commit
from tests.runtime.checkpoint_jobs import SAVED_AT, STEPS, run_job


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
