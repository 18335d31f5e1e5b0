"""The capsule: complete, publishable, and honest about code that is not in git."""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
from pathlib import Path

from eventlens_ds.runtime import capsule


def test_written_as_returned(tmp_path):
    content = capsule.write(tmp_path, data={"world": "abc"}, ops={"roi_align": "reference"}, mixture={"a": 0.5})
    assert json.loads((tmp_path / "capsule.json").read_text()) == content
    assert content["data"] == {"world": "abc"} and content["ops"]["roi_align"] == "reference"
    assert content["mixture"] == {"a": 0.5}
    assert content["versions"]["torch"] and content["versions"]["deepspeed"]
    assert content["hardware"]["cores"] >= 1 and content["hardware"]["memory"] > 0


def test_names_no_host_and_no_credential(monkeypatch, tmp_path):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("TORCH_API_TOKEN", "s3cret")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[1-2]")
    capsule.write(tmp_path, data={}, ops={})
    text = (tmp_path / "capsule.json").read_text()
    assert '"NCCL_DEBUG": "INFO"' in text
    for private in ("s3cret", "gpu[1-2]", f'"{socket.gethostname()}"', f'"{getpass.getuser()}"'):
        assert private not in text


def repository(folder: Path) -> Path:
    """A checkout with a copy of the module's layout, so the real one need not be clean."""
    package = folder / "eventlens_ds" / "runtime"
    package.mkdir(parents=True)
    (folder / "eventlens_ds" / "__init__.py").write_text("")
    (package / "capsule.py").write_text("")
    return package / "capsule.py"


def git(folder: Path, *args: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *args], check=True, capture_output=True)


def test_commit_and_diff(tmp_path, monkeypatch):
    monkeypatch.setattr(capsule, "__file__", str(repository(tmp_path)))
    nothing = {"commit": None, "diff_sha256": None}
    assert capsule.code() == nothing
    git(tmp_path, "init", "-q")
    assert capsule.code() == nothing  # in somebody's checkout, but not part of it
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    clean = capsule.code()
    assert len(clean["commit"]) == 40 and clean["diff_sha256"] is None
    (tmp_path / "eventlens_ds" / "__init__.py").write_text("changed = 1\n")
    dirty = capsule.code()
    assert dirty["commit"] == clean["commit"] and len(dirty["diff_sha256"]) == 64


def test_update_replaces_one_entry(tmp_path):
    before = capsule.write(tmp_path, data={"a": "1"}, ops={})
    capsule.update(tmp_path, ops={"roi_align on cpu": "reference"})
    after = json.loads((tmp_path / "capsule.json").read_text())
    assert after.pop("ops") == {"roi_align on cpu": "reference"}
    assert after == {name: value for name, value in before.items() if name != "ops"}
