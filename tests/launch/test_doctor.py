"""doctor: probes that find planted faults, and a report that survives a probe which breaks."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventlens_ds.launch import doctor


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
