"""The commit protocol without torch: killed at every system call, every damaged byte, every broken pointer (P9)."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eventlens_ds import cli
from eventlens_ds.errors import DataError
from eventlens_ds.runtime import commit, hashing_file


def manifest_of(step: int, files: dict) -> dict:
    return {"format": commit.FORMAT, "step": step, "files": files, "frozen": None, "state": {"cursor": step, "lr": 0.1}}


def save(run: Path, step: int, *, keep: int = 2, best: bool = False) -> Path:
    """What checkpoint.save does on rank 0, with two small files in place of shards."""
    commit.clean_stale(run)
    temporary = run / commit.FOLDER / f".tmp-step-{step}-x"
    (temporary / "state").mkdir(parents=True)
    files = {}
    for name in ("state/model.pt", "rng-rank0.safetensors"):
        files[name] = {**commit.write_file(temporary / name, f"{name} {step}".encode() * 50), "rank": 0}
    commit.sync_dir(temporary / "state")
    path = commit.publish(temporary, manifest_of(step, files))
    for label in (commit.LATEST, commit.BEST) if best else (commit.LATEST,):
        commit.point(run, label, path)
    commit.retain(run, keep)
    return path


def flip(file: Path, position: int, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1 << bit
    file.write_bytes(raw)


CALLS = ("open", "write", "fsync", "close", "rename", "replace", "unlink", "rmdir", "mkdir")


def run_until_killed(
    action: Callable[[Callable[[int], None]], None], kill_at: int, torn: bool
) -> tuple[list[int], bool]:
    """Run `action` in a forked process that dies at its `kill_at`-th system call: (reported numbers, was killed)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # A killed process loses nothing the kernel has, so syncing would only make this test slow.
        really = {name: getattr(os, name) for name in CALLS} | {"fsync": lambda fd: None}
        count = 0

        def dying(name: str) -> Callable:
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == kill_at:
                    if torn and name == "write":
                        really["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
                    os._exit(9)
                return really[name](*args, **kwargs)

            return call

        try:
            for name in CALLS:
                setattr(os, name, dying(name))
            action(lambda number: really["write"](writing, bytes([number])))
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.close(writing)
    reported = list(os.read(reading, 4096))
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    return reported, code == 9


@pytest.mark.P9
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_call_a_verified_checkpoint_remains(tmp_path, torn):
    kill_at, killed = 0, True
    while killed:
        kill_at += 1
        run = tmp_path / str(kill_at)
        run.mkdir()

        def three_saves(done: Callable[[int], None], run: Path = run) -> None:
            for step in (1, 2, 3):
                save(run, step, keep=1, best=step == 1)
                done(step)

        reported, killed = run_until_killed(three_saves, kill_at, torn)
        path = commit.resolve(run)
        committed = max(reported, default=0)
        assert (path is None) if path is None else commit.verify(path) == []
        assert (0 if path is None else commit.read_manifest(path)["step"]) >= committed
        assert commit.read_manifest(save(run, 3))["step"] == 3
        assert not list((run / commit.FOLDER).glob(".tmp-step*"))
        shutil.rmtree(run)
    assert kill_at > 60


@pytest.mark.P9
def test_writing_straight_to_the_final_name_is_what_the_protocol_prevents(tmp_path, caplog):
    """Negative control: a torn folder under a committed name is the newest by name, and only verifying skips it."""
    good = save(tmp_path, 1)
    torn = tmp_path / commit.FOLDER / "step-2"
    shutil.copytree(good, torn)
    (torn / "state" / "model.pt").write_bytes(b"torn")
    assert commit.committed(tmp_path)[0] == torn
    assert commit.resolve(tmp_path) == good
    assert "SKIPPED checkpoint" in caplog.text and "NOT the newest" in caplog.text


@pytest.mark.P9
def test_every_byte_of_the_manifest_and_sampled_bits_of_files(tmp_path):
    path = save(tmp_path, 1)
    size = (path / commit.MANIFEST).stat().st_size
    draw = random.Random(0)
    for position in range(size):
        bit = draw.randrange(8)
        flip(path / commit.MANIFEST, position, bit)
        assert commit.verify(path), f"byte {position} of the manifest"
        flip(path / commit.MANIFEST, position, bit)
    for _ in range(1000):
        name = draw.choice(["state/model.pt", "rng-rank0.safetensors"])
        position, bit = draw.randrange((path / name).stat().st_size), draw.randrange(8)
        flip(path / name, position, bit)
        assert commit.verify(path) == [f"{name}: content does not match its sha256"]
        assert commit.verify(path, quick=True) == []  # negative control: sizes alone see nothing
        flip(path / name, position, bit)
    assert commit.verify(path) == []


@pytest.mark.P9
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: (path / "state" / "model.pt").unlink(), "state/model.pt: missing"),
        (lambda path: (path / "state" / "model.pt").write_bytes(b"x"), "state/model.pt: 1 bytes, the manifest says"),
        (lambda path: (path / commit.MANIFEST).unlink(), "No such file"),
        (lambda path: (path / commit.MANIFEST).write_text("[]"), "not a manifest"),
        (lambda path: (path / commit.MANIFEST).write_text("[" * 100_000), "not a manifest"),
        (lambda path: (path / "state" / "other_optim_states.pt").write_bytes(b""), "not in the manifest"),
        (lambda path: (path / "state").rename(path.parent / "away"), "missing"),
    ],
)
def test_problems_are_named(tmp_path, damage, problem):
    path = save(tmp_path, 1)
    damage(path)
    assert problem in " ".join(commit.verify(path))


@pytest.mark.P11
@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "state/../../outside"])
def test_names_that_lead_out_are_not_opened(tmp_path, name):
    path = save(tmp_path, 1)
    (path.parent / "outside").write_bytes(b"secret")
    manifest = commit.read_manifest(path)
    manifest["files"][name] = {"size": 6, "sha256": "0", "rank": 0}
    (path / commit.MANIFEST).write_bytes(commit.seal(manifest))
    assert f"{name}: the name leads out of the folder" in commit.verify(path)


@pytest.mark.P11
def test_a_linked_folder_is_no_checkpoint_of_this_run(tmp_path):
    other = save(tmp_path / "other", 9)
    save(tmp_path / "run", 1)
    (tmp_path / "run" / commit.FOLDER / "step-9").symlink_to(other)
    assert commit.resolve(tmp_path / "run").name == "step-1"


@pytest.mark.P9
@pytest.mark.parametrize(
    "content", [None, b"", b"garbage", b"step-77", b"../step-1", b"/etc", b"\xff\xfe", b"x" * 9000]
)
def test_pointers_are_never_trusted(tmp_path, content):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    latest = tmp_path / commit.FOLDER / commit.LATEST
    assert commit.pointer(tmp_path, commit.LATEST) == newest
    latest.unlink()
    if content is not None:
        latest.write_bytes(content)
    assert commit.pointer(tmp_path, commit.LATEST) is None
    assert commit.resolve(tmp_path) == newest


@pytest.mark.P9
def test_never_a_silent_fresh_start(tmp_path):
    assert commit.resolve(tmp_path / "new") is None
    (tmp_path / "run" / commit.FOLDER / ".tmp-step-1-dead").mkdir(parents=True)
    assert commit.resolve(tmp_path / "run") is None
    path = save(tmp_path / "run", 1)
    assert commit.resolve(path) == path
    flip(path / "state" / "model.pt", 3, 1)
    with pytest.raises(DataError, match=r"none of 1 checkpoints verifies \(step-1: state/model.pt"):
        commit.resolve(tmp_path / "run")
    with pytest.raises(DataError, match="does not verify"):
        commit.resolve(path)


@pytest.mark.P9
def test_order_is_by_number_and_a_repeated_step_gets_a_suffix(tmp_path):
    for step in (9, 10):
        path = save(tmp_path, step, keep=9)
    flip(path / "state" / "model.pt", 0, 0)
    assert commit.resolve(tmp_path).name == "step-9"
    assert save(tmp_path, 10, keep=9).name == "step-10-2"
    assert commit.resolve(tmp_path).name == "step-10-2"


@pytest.mark.P9
def test_retention(tmp_path):
    save(tmp_path, 1, best=True)
    for step in (2, 3, 4):
        save(tmp_path, step)
    assert [path.name for path in commit.committed(tmp_path)] == ["step-4", "step-3", "step-1"]
    (tmp_path / commit.FOLDER / "step-4" / "state" / "model.pt").unlink()
    commit.retain(tmp_path, 1)
    assert [path.name for path in commit.committed(tmp_path)] == ["step-4", "step-3", "step-1"]
    save(tmp_path, 5, keep=1)
    assert [path.name for path in commit.committed(tmp_path)] == ["step-5", "step-1"]


def test_atomic_write(tmp_path, monkeypatch):
    file = tmp_path / "outcome.json"
    commit.atomic_write(file, b"one")
    commit.atomic_write(file, b"two")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        commit.atomic_write(file, b"three")
    assert file.read_bytes() == b"two" and os.listdir(tmp_path) == ["outcome.json"]


def test_manifest_with_numeric_keys_and_odd_floats_reads_back(tmp_path):
    state = {"seen": {1: 1, 10: 2, 2: 3}, "best": float("nan"), "lr": 1e-7, "name": "\u00e9"}
    (tmp_path / commit.MANIFEST).write_bytes(commit.seal({**manifest_of(1, {}), "state": state}))
    assert json.dumps(commit.read_manifest(tmp_path)["state"]["seen"]) == '{"1": 1, "10": 2, "2": 3}'


def test_shares_cover_every_file_once(tmp_path):
    path = save(tmp_path, 1)
    manifest = commit.read_manifest(path)
    for rank, entry in enumerate(manifest["files"].values()):
        entry["rank"] = rank
    (path / commit.MANIFEST).write_bytes(commit.seal(manifest))
    for file in manifest["files"]:
        flip(path / file, 1, 1)
    shares = [commit.verify(path, share=(rank, 2)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [1, 1] and shares[0] != shares[1]


def test_large_writes_are_hashed_aside_and_whole(tmp_path: Path) -> None:
    """Pieces on both sides of the size from which a thread hashes, in their order."""
    pieces = [random.Random(size).randbytes(size) for size in (3, hashing_file.ASIDE + 1, 7, 2 * hashing_file.ASIDE, 0)]
    out = hashing_file.HashingFile(tmp_path / "a")
    for piece in pieces:
        out.write(bytearray(piece))
    out.close()
    whole = b"".join(pieces)
    assert (tmp_path / "a").read_bytes() == whole and out.size == len(whole) and out.error is None
    assert out.sha256 == hashlib.sha256(whole).hexdigest()
    again = hashing_file.HashingFile(tmp_path / "a")
    assert isinstance(again.error, FileExistsError), "no file is written over"


@pytest.mark.parametrize("size", [3, 2 << 20])
def test_small_writes_are_hashed_first_and_large_ones_meanwhile(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = hashing_file.HashingFile(tmp_path / "a")
    writing, write = threading.Event(), os.write
    meanwhile: list[bool] = []

    class Slow:
        def update(self, data: memoryview) -> None:
            meanwhile.append(writing.wait(0.2 if size == 3 else 30))
            time.sleep(0.2)

    def told(fd: int, data: memoryview) -> int:
        writing.set()
        return write(fd, data)

    monkeypatch.setattr(out, "_hash", Slow())
    monkeypatch.setattr(os, "write", told)
    begun = time.perf_counter()
    out.write(bytes(size))
    assert meanwhile == [size > 3] and time.perf_counter() - begun > 0.2, "write returns when all is hashed"
    assert size > 3 or out.held_up > 0.39, "what is hashed first counts whole"
    out.close()


@pytest.mark.P9
def test_verify_tells_what_a_checkpoint_holds_and_how_long_it_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path, 3)
    assert cli.main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"ok       {path}: 2 files, 0.0 MiB\n"  # an older checkpoint
    manifest = commit.read_manifest(path)
    shutil.rmtree(path)
    (tmp_path / "new" / "state").mkdir(parents=True)
    files = {name: {**commit.write_file(tmp_path / "new" / name, b"x"), "rank": 0} for name in manifest["files"]}
    (tmp_path / "new").rename(tmp_path / commit.FOLDER / ".tmp-step-4-x")
    seconds = {"writing": 1.5, "hashing": 0.1}
    made = {**manifest_of(4, files), "seconds": seconds}
    last = commit.publish(tmp_path / commit.FOLDER / ".tmp-step-4-x", made)
    assert cli.main(["verify", str(last)]) == 0
    assert "written in 1.5 s, 0.1 s of it hashing" in capsys.readouterr().out
    flip(last / "rng-rank0.safetensors", 0, 0)
    assert cli.main(["verify", str(last)]) == DataError.code
    assert "DAMAGED" in capsys.readouterr().out
