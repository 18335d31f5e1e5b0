"""doctor: probes that find planted faults, and a report that survives a probe which breaks."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventlens_ds.launch import doctor, doctor_cluster


def test_report_of_this_machine() -> None:
    report, code = doctor.main(as_json=True)
    found = {item["name"]: item for item in json.loads(report)}
    wanted = {"python", "torch", "deepspeed", "machine", "triton cache", "torchvision", "java", "slurm"}
    assert wanted | {"ops moa on cpu", "ops roi_align on cpu"} <= set(found)
    assert "reference" in found["ops moa on cpu"]["detail"] and "triton" in found["ops moa on cpu"]["detail"]
    assert code == (2 if any(item["state"] == "missing" for item in found.values()) else 0)
    for item in found.values():
        assert item["state"] in ("ok", "info", "warn", "missing") and item["detail"]
        assert item["fix"] or item["state"] in ("ok", "info", "warn")


def test_stale_lock_is_found_and_a_fresh_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, minutes in (("old", doctor.STALE_MINUTES + 50), ("new", 0)):
        lock = tmp_path / "py311_cpu" / name / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - 60 * minutes,) * 2)
    assert [lock.parent.name for lock, _ in doctor.stale_locks(tmp_path)] == ["old"]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found = [item for item in doctor._caches() if item.name == "stale lock"]
    assert len(found) == 1 and found[0].state == "warn" and found[0].fix == f"rm {tmp_path / 'py311_cpu/old/lock'}"


def test_filesystem_is_that_of_the_longest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("disk / ext4 rw 0 0\nserver /home nfs4 rw 0 0\nlocal /home/scratch xfs rw 0 0\n")
    for path, kind in {"/tmp/x": "ext4", "/home/me": "nfs4", "/home/scratch/x": "xfs", "/homes/x": "ext4"}.items():
        assert doctor.filesystem(Path(path), str(mounts)) == kind
    assert doctor.filesystem(Path("/x"), str(tmp_path / "absent")) == "unknown"


def test_missing_requirement_has_an_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["absent-package>=3", "torch>=99", "numpy>=1", "other; extra == 'dev'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: wanted)
    missing, old, fine = doctor._requirements()
    assert (missing.state, missing.fix) == ("missing", "pip install 'absent-package>=3'")
    assert (old.state, old.fix) == ("warn", "pip install 'torch>=99'")
    assert fine.state == "ok"


def test_a_probe_that_breaks_is_one_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def _java() -> Iterator[doctor.Finding]:
        raise OSError("broken pipe")
        yield

    monkeypatch.setattr(doctor, "_java", _java)
    found = [item for item in doctor.examine() if item.name == "java"]
    assert found == [doctor.Finding("java", "warn", "OSError: broken pipe")]


def test_program_that_hangs_or_fails_counts_as_absent() -> None:
    assert doctor._run("sleep", "5", seconds=0.1) is None
    assert doctor._run("false") is None
    assert doctor._run("no-such-program-here") is None
    assert doctor._run("echo", "x") == "x"


def test_slurm_that_answers_and_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"scontrol": "slurm 22.05.8", "sinfo": "main|4|gpu:8|infinite\ncpu|2|(null)|1-00:00:00"}
    monkeypatch.setattr(doctor_cluster.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor_cluster, "run", lambda *words, seconds: answers.get(words[0]))
    found = {item.name: item for item in doctor_cluster._slurm()}
    assert found["partition main"].detail == "4 nodes, gpu:8, time limit infinite" and "slurm gpus" not in found
    answers["sinfo"] = "cpu|2|(null)|1-00:00:00"
    assert {item.name: item for item in doctor_cluster._slurm()}["slurm gpus"].state == "warn"
    del answers["sinfo"]
    silent = {item.name: item for item in doctor_cluster._slurm()}["slurm"]
    assert silent.state == "warn" and "does not answer" in silent.detail and "scontrol ping" in silent.fix


def test_essentials_of_deepspeed_and_the_attention_in_use() -> None:
    found = {item.name: item for item in (*doctor_cluster._deepspeed(), *doctor_cluster._attention())}
    assert (
        found["deepspeed accelerator"].detail == "cpu, gloo"
        and "the default path needs none" in found["deepspeed ops"].detail
    )
    assert found["attention on cpu"].detail == "auto takes blocks in fp32, blocks in bf16"


def test_size_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(3 << 20))
    assert doctor.size_of(tmp_path) == "3 MiB" and doctor.size_of(tmp_path / "absent") == "0 MiB"
    assert doctor.size_of(tmp_path, most=0).startswith("more than")
