"""Damaged and hostile data: every unused sample is listed and no other, nothing is executed, and no bomb goes off.

In: an embedded world with faults of every kind put into its shards, a corpus of evil files, a shard cut at every byte.
Out: what one epoch of the loader skips, against what was injected; audit events; resident memory.
Decision: the oracle is the clean copy, which tells the samples that stand on an image or in a record.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from eventlens_ds.data.loader import PlannedRows, RowDataset
from eventlens_ds.data.manifest import index
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.data.tar_index import index_shard
from eventlens_ds.data.tar_scan import scan_tar
from eventlens_ds.errors import DataError
from tests.small_world import build_world, small_config, small_run

TASKS = small_config(Path("x")).model.adapters.tasks


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images in three shards; no lengths have been counted."""
    return build_world(tmp_path_factory.mktemp("hostile") / "world", images=40, val_images=2)


def epoch(folder: Path) -> tuple[list[str], dict[str, str]]:
    """(ids of all samples of one epoch that were used, id -> reason of those that were not)."""
    run = small_run(folder, small_config(folder), error_budget=1.0)
    plan = run.data.plan(seed=0, rows_per_step=1)
    rows = PlannedRows(plan, rank=0, world=1, first_step=0, last_step=plan.num_rows(0), seed=0)
    used, skipped = [], dict(run.data.unread())
    for batch in (RowDataset(run.data, rows)[number] for number in range(len(rows))):
        skipped |= dict(batch.skipped)
        used += [name for name in batch.sample_ids if name not in skipped]
    return used, skipped


def samples_of(folder: Path) -> tuple[dict[int, set[str]], dict[int, set[str]], dict[int, str]]:
    """Of the tasks of the run: ids by image, ids by record, and the member name of each record."""
    from eventlens_ds.data.lengths import read_image_samples

    shards = ShardSet.open(folder, "train")
    images: dict[int, set[str]] = {}
    records: dict[int, set[str]] = {}
    for image in range(shards.num_images):
        for record, _, sample in read_image_samples(shards, image)[1]:
            blind = bool(sample.candidates) and sample.label is None
            if sample.task in TASKS and not blind:
                images.setdefault(image, set()).add(sample.id)
                records.setdefault(record, set()).add(sample.id)
    return images, records, {record: shards.record_name(record) for record in range(shards.num_records)}


def damage(folder: Path, shards: ShardSet, part: str, number: int, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of one member in place."""
    image = number if part != "record" else shards.image_of(number)
    shard = int(shards.index.arrays["image_shard"][image])
    offset, size, _ = shards._place(part, number)
    path = folder / "train" / shards.index.shards[shard][0]
    with path.open("r+b") as file:
        file.seek(offset)
        payload = change(file.read(size))
        assert len(payload) == size
        file.seek(offset)
        file.write(payload)


def flip(payload: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(payload))
    return payload[:at] + bytes([payload[at] ^ 1 << draw.randrange(8)]) + payload[at + 1 :]


def inject(folder: Path) -> tuple[set[str], set[str]]:
    """Faults of every kind: (samples that cannot be used, of images; members of records that cannot be read)."""
    draw, shards = random.Random(1), ShardSet.open(folder, "train")
    images, _, names = samples_of(folder)
    for image in (1, 7):
        damage(folder, shards, "image", image, lambda payload: flip(payload, draw))
    damage(
        folder,
        shards,
        "image",
        9,
        lambda payload: payload[: len(payload) // 2] + bytes(len(payload) - len(payload) // 2),
    )
    damage(folder, shards, "image", 12, lambda payload: b"<html>".ljust(len(payload), b" "))
    lost = set().union(*(images[image] for image in (1, 7, 9, 12)))
    unread = set()
    for record in (shards.records_of(3)[0], shards.records_of(14)[0]):
        damage(folder, shards, "record", record, lambda payload: flip(payload, draw))
        unread.add(names[record])
    damage(folder, shards, "record", shards.records_of(5)[0], lambda payload: payload[:-4] + b"\xff\xfe\xff}")
    unread.add(names[shards.records_of(5)[0]])
    damage(folder, shards, "meta", 11, lambda payload: flip(payload, draw))
    unread |= {names[record] for record in shards.records_of(11)}
    # A header is not read: the index knows where the members lie.
    path = folder / "train" / shards.index.shards[0][0]
    with path.open("r+b") as file:
        file.seek(int(shards.index.arrays["image_offset"][0]) - 500)
        file.write(b"\xff\xff")
    # The last shard ends inside its last record.
    last = shards.num_records - 1
    os.truncate(folder / "train" / shards.index.shards[-1][0], int(shards.index.arrays["record_offset"][last]) + 3)
    unread.add(names[last])
    return lost, unread


@pytest.mark.P3
@pytest.mark.parametrize("counted", [False, True])
def test_what_is_skipped_is_what_was_injected(clean: Path, tmp_path: Path, counted: bool) -> None:
    """Precision and recall 1, whether the damage was there when lengths were counted or came later."""
    folder = tmp_path / "world"
    shutil.copytree(clean, folder, ignore=shutil.ignore_patterns("lengths"))
    every = set(epoch(clean)[0])
    if counted:
        epoch(folder)
    _, records, names = samples_of(folder)
    lost, unread = inject(folder)
    used, skipped = epoch(folder)
    of_member = {names[record]: ids for record, ids in records.items()}
    listed = {name for name in skipped if "#" in name or name.partition("/")[0] not in names.values()}
    members = {name.partition("/")[0] for name in skipped} - {name.partition("/")[0] for name in listed}
    assert listed == lost - set().union(*(of_member.get(name, set()) for name in unread))
    assert members & of_member.keys() == unread & of_member.keys() and members <= unread
    gone = lost | set().union(*(of_member.get(name, set()) for name in unread))
    assert len(used) == len(set(used)) and set(used) == every - gone
    assert all("crc32" in why or "truncated" in why for why in skipped.values()), skipped


def test_a_repair_is_seen_and_too_much_damage_ends_the_start(clean: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(clean, folder, ignore=shutil.ignore_patterns("lengths"))
    whole = {path.name: path.read_bytes() for path in (folder / "train").glob("*.tar")}
    inject(folder)
    with pytest.raises(DataError, match="records cannot be read, more than data.error_budget 0.001; the first: train/"):
        small_run(folder, small_config(folder), error_budget=0.001)
    for name, content in whole.items():
        (folder / "train" / name).write_bytes(content)
    used, skipped = epoch(folder)
    assert skipped == {} and sorted(used) == sorted(epoch(clean)[0])


@pytest.mark.P3
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_shard_cut_at_any_byte_is_never_taken_for_a_whole_one(clean: Path, stride: int) -> None:
    """Every byte up to the end-of-archive blocks; the tail after them holds nothing."""
    shards = ShardSet.open(clean, "train")
    content = (clean / "train" / shards.index.shards[0][0]).read_bytes()
    # The members of the first image and an end, so that every byte can be tried.
    end = int(shards.index.arrays["image_offset"][1]) - 512
    whole = content[:end] + bytes(1024)
    members = list(scan_tar(io.BytesIO(whole), "whole"))
    assert len(members) == 2 + len(shards.records_of(0))
    for cut in range(0, end + 512, stride):
        with pytest.raises(DataError):
            list(scan_tar(io.BytesIO(whole[:cut]), "cut"))


EVIL = """
import json, os, sys
from pathlib import Path
events = []
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect")
def hook(event, args):
    if event in FORBIDDEN and armed:
        events.append([event, str(args)[:200]])
armed = False
sys.addaudithook(hook)
from eventlens_ds.data.loader import RunData
from eventlens_ds.data.manifest import index
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.data.tar_index import index_shard
from eventlens_ds.data.tar_scan import scan_tar
from eventlens_ds.data.transforms import decode_image
from eventlens_ds.runtime import checkpoint, commit
from eventlens_ds.errors import UserError
import numpy, torch
from PIL import Image
Image.init()
folder, refused = Path(sys.argv[1]), {}
armed = True
for path in sorted(folder.iterdir()):
    try:
        if path.suffix == ".tar":
            table = index_shard(path)
            assert not table.images
            refused[path.name] = f"indexed {len(table.images)} images, ignored {table.ignored}"
        elif path.suffix == ".npy":
            numpy.load(path, allow_pickle=False)
        elif path.is_dir():
            list(checkpoint.weights(path))
        else:
            decode_image(path.read_bytes())
    except (UserError, ValueError) as error:
        refused[path.name] = str(error)[:200]
armed = False
import resource
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"events": events, "refused": refused, "peak": peak}))
"""


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def plant(folder: Path, marker: Path) -> None:
    """One file of every kind that has executed code, or filled memory, in some reader."""
    import pickle
    import struct

    import numpy as np

    folder.mkdir()
    evil = pickle.dumps(Payload(marker))

    def tar(name: str, *members: tuple[str, bytes], **fields: object) -> None:
        with tarfile.open(folder / name, "w") as out:
            for member, payload in members:
                info = tarfile.TarInfo(member)
                info.size = len(payload)
                for field, value in fields.items():
                    setattr(info, field, value)
                out.addfile(info, io.BytesIO(payload))

    for suffix in ("pyd", "pkl", "pickle", "pth", "pt"):
        tar(f"pickle_{suffix}.tar", (f"a-0.{suffix}", evil))
    tar("pipe.tar", ("pipe:touch x", b"x"))
    tar("json.tar", ("a-0.meta.json", b"[" * 100_000), ("a-0.jpg", b"\xff\xd8\xff"))
    tar("sparse.tar", ("a-0.jpg", b""), type=tarfile.GNUTYPE_SPARSE)
    tar("pax.tar", ("a-0.jpg", b"x"), pax_headers={"GNU.sparse.realsize": "99999999999"})
    import gzip

    (folder / "gz.tar").write_bytes(gzip.compress(bytes(50 << 20)))
    with open(folder / "giant.tar", "wb") as file:
        info = tarfile.TarInfo("a-0.meta.json")
        info.size = 300 << 20
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(512 + info.size + 1024)
    np.save(folder / "object.npy", np.array([Payload(marker)], dtype=object), allow_pickle=True)
    large = Image.new("1", (13_000, 13_000))
    large.save(folder / "pixels.png")
    frames = [Image.new("P", (400, 400), n) for n in range(200)]
    frames[0].save(folder / "frames.gif", save_all=True, append_images=frames[1:])
    (folder / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch x) run\n")
    (folder / "page.jpg").write_bytes(b"<html><script>x</script></html>")
    (folder / "bomb.fits").write_bytes(b"SIMPLE  =                    T".ljust(2880))
    text = zlib.compress(bytes(200 << 20))
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    raw = png.getvalue()
    chunk = b"zTXt" + b"x\0\0" + text
    (folder / "text.png").write_bytes(
        raw[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + raw[33:]
    )


@pytest.mark.P11
def test_the_evil_corpus_executes_nothing_and_no_bomb_goes_off(tmp_path: Path) -> None:
    """Base memory is that of the same program over an empty folder."""
    corpus, marker, empty = tmp_path / "corpus", tmp_path / "executed", tmp_path / "empty"
    plant(corpus, marker)
    empty.mkdir()

    def read(folder: Path) -> dict:
        command = [sys.executable, "-c", EVIL, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    base, found = read(empty), read(corpus)
    assert found["events"] == [] and not marker.exists() and not (tmp_path / "x").exists()
    assert found["peak"] <= base["peak"] + (256 << 20), f"{(found['peak'] - base['peak']) >> 20} MB above the base"
    harmless = {"frames.gif"}  # its first frame is decoded, and no other
    assert {path.name for path in corpus.iterdir()} - found["refused"].keys() <= harmless | {"text.png"}


@pytest.mark.P11
def test_the_oracle_sees_an_execution(tmp_path: Path) -> None:
    """Negative control: the same audit hook over a reader that unpickles."""
    (tmp_path / "corpus").mkdir()
    import pickle

    (tmp_path / "corpus" / "a.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    program = EVIL.replace("decode_image(path.read_bytes())", "__import__('pickle').loads(path.read_bytes())")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "corpus")], capture_output=True, text=True, timeout=120
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert [event for event, _ in found["events"]] == ["pickle.find_class"] and (tmp_path / "executed").exists()


def test_memory_limit_holds_while_indexing(tmp_path: Path) -> None:
    """Under an address-space limit the giant member is refused by its size, before anything is allocated."""
    with open(tmp_path / "giant.tar", "wb") as file:
        info = tarfile.TarInfo("a-0.meta.json")
        info.size = 400 << 20
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(512 + info.size + 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError):
        index_shard(tmp_path / "giant.tar")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_index_refuses_a_record_that_is_no_json(clean: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(clean, folder)
    shards = ShardSet.open(folder, "train")
    damage(folder, shards, "record", 0, lambda payload: b"\xff" * len(payload))
    with pytest.raises(DataError, match="not valid JSON"):
        index(folder)
