"""Committed folders: write files so that they survive, name them in a manifest, find the newest one that is whole.

In: a run folder with checkpoints/step-N/ (manifest.json + files), LATEST and BEST. Out: lists of problems, or the
path of a checkpoint that verifies. Needs neither torch nor DeepSpeed.
Decision: a checkpoint exists when its folder has its final name; pointers are hints for people and never trusted.
The manifest is hashed over its exact bytes, so a flipped bit in the data cursor is found like one in a weight.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError
from eventlens_ds.runtime.distributed import broadcast_object, gather_objects, in_group, rank_and_size
from eventlens_ds.runtime.hashing_file import HashingFile

log = logging.getLogger(__name__)

FORMAT = "eventlens-checkpoint-1"
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
LATEST = "LATEST"
BEST = "BEST"

_NAME = re.compile(r"step-(\d{1,12})(?:-(\d{1,6}))?")
_BLOCK = 1 << 22
_DOOMED = ".tmp-old-"
"""Beginning of the name of a folder that is being emptied."""


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file through to the disk; returns {"size", "sha256"}. OSError when it cannot be done."""
    out = HashingFile(path)
    out.write(data)
    out.close()
    if out.error is not None:
        raise out.error
    return {"size": out.size, "sha256": out.sha256}


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, data: bytes) -> None:
    """Replace a file so that a reader or a crash sees the old bytes or the new ones. OSError; no leftovers."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def stamp(path: Path) -> list[int]:
    """What changes whenever a file does: inode, size, times of last change of content and of inode (ns)."""
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


class _Hashes:
    """sha256 of the files this process or its group has read, each valid as long as the file's stamp is.

    A clock tick of a file system can hide a second write, so a file changed less than `SETTLED` before it is read is
    hashed again whenever it is asked for.
    """

    SETTLED = 2.0

    def __init__(self) -> None:
        self._known: dict[str, tuple[list[int], str]] = {}

    def sha256(self, path: Path) -> str:
        key, before, started = str(path.resolve()), stamp(path), time.time()
        stamped, digest = self._known.get(key, ([], ""))
        if stamped == before:
            return digest
        digest = sha256_file(path)
        if stamp(path) == before and max(before[2:]) / 1e9 < started - self.SETTLED:
            self._known[key] = (before, digest)
        return digest

    def of(self, folder: Path) -> dict[str, tuple[list[int], str]]:
        """What is known of the files below a folder."""
        root = f"{folder.resolve()}{os.sep}"
        return {name: entry for name, entry in self._known.items() if name.startswith(root)}

    def learn(self, entries: dict[str, Any]) -> None:
        """Take over what another rank has hashed; a file that looks different from here is hashed here."""
        self._known.update((name, (list(stamped), digest)) for name, (stamped, digest) in entries.items())


hashes = _Hashes()


def _text(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n"


def seal(manifest: dict[str, Any]) -> bytes:
    """The bytes of manifest.json: canonical JSON with its own sha256 under "seal"."""
    plain = json.loads(json.dumps(manifest))
    return _text({**plain, "seal": hashlib.sha256(_text(plain)).hexdigest()})


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; DataError when it is missing, damaged or of another format."""
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
        manifest = json.loads(raw)
        found = manifest.pop("seal")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DataError(f"{file}: not a manifest") from None
    if found != hashlib.sha256(_text(manifest)).hexdigest() or raw != _text({**manifest, "seal": found}):
        raise DataError(f"{file}: content does not match its own sha256")
    if manifest.get("format") != FORMAT:
        raise DataError(f"{file}: format is {manifest.get('format')!r}, this program reads {FORMAT!r}")
    return manifest


def _inside(root: Path, name: str) -> Path | None:
    """`root/name` when the name cannot lead out of `root`, else None."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        return None
    return root / name


def _check_file(root: Path, name: str, entry: dict[str, Any], quick: bool) -> str | None:
    file = _inside(root, name)
    if file is None:
        return f"{name}: the name leads out of the folder"
    if file.is_symlink() or not file.is_file():
        return f"{name}: missing"
    if not file.resolve().is_relative_to(root.resolve()):
        return f"{name}: a link leads out of the folder"
    size = file.stat().st_size
    if size != entry["size"]:
        return f"{name}: {size} bytes, the manifest says {entry['size']}"
    if quick:
        return None
    try:
        if hashes.sha256(file) != entry["sha256"]:
            return f"{name}: content does not match its sha256"
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    return None


def verify(path: Path, *, quick: bool = False, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Problems of one checkpoint folder, each naming a file; empty when it is whole. A file that was hashed before and
    has not been touched since is not read again.

    quick: sizes only, no hashing. share: (k, n) checks the k-th of n shares of the files, those that rank k wrote.
    """
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return [str(error)]
    mine, of = share
    problems = []
    for name, entry in manifest["files"].items():
        if entry["rank"] % of == mine:
            problems.append(_check_file(path, name, entry, quick))
    frozen = manifest["frozen"]
    if frozen and mine == 0:
        problems.append(_check_file(path.parent.parent, frozen["path"], frozen, quick))
    listed = set(manifest["files"]) | {MANIFEST}
    for file in sorted(path.rglob("*")):
        # Loaders find shards by glob, so a file nobody vouches for could be read with the others.
        name = str(file.relative_to(path))
        if mine == 0 and not file.is_dir() and not file.name.startswith(".") and name not in listed:
            problems.append(f"{name}: not in the manifest")
    return [problem for problem in problems if problem]


def verify_together(path: Path) -> list[str]:
    """`verify` shared out over the ranks of the process group; every rank gets all problems, and what the others
    hashed. A collective."""
    if not in_group():
        return verify(path)
    own = verify(path, share=rank_and_size())
    # The run folder, because the frozen tensors lie beside the checkpoints.
    parts = gather_objects([own, hashes.of(path.parent.parent)])
    for _, entries in parts:
        hashes.learn(entries)
    return [problem for problems, _ in parts for problem in problems]


def stamps(path: Path) -> dict[str, list[int]]:
    """Stamp of every file that belongs to a checkpoint."""
    frozen = read_manifest(path)["frozen"]
    files = [*path.rglob("*"), *([path.parent.parent / frozen["path"]] if frozen else [])]
    return {str(file): stamp(file) for file in files if file.is_file()}


def changed(path: Path, before: dict[str, list[int]]) -> str:
    """Name of a file of a checkpoint whose stamp is not that of `before`; empty when there is none."""
    now = stamps(path)
    return min((name for name in {*before, *now} if before.get(name) != now.get(name)), default="")


def committed(run_dir: Path) -> list[Path]:
    """Folders with a committed name, newest first; nothing in them has been checked."""
    found = []
    folder = run_dir / FOLDER
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(entry.name)
        if match and entry.is_dir() and not entry.is_symlink():
            found.append((int(match.group(1)), int(match.group(2) or 0), entry))
    return [entry for _, _, entry in sorted(found, reverse=True)]


def pointer(run_dir: Path, name: str) -> Path | None:
    """The committed folder LATEST or BEST names, or None when it is missing, garbage or names no such folder."""
    try:
        target = (run_dir / FOLDER / name).read_bytes()[:64].decode().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return next((path for path in committed(run_dir) if path.name == target), None)


def resolve(path: Path) -> Path | None:
    """The newest checkpoint of a run that verifies, or the given checkpoint itself; None when a run has none (yet).

    Every rank of a process group must call it; each hashes its share and all get the same answer. Skipped folders
    are logged. DataError: there are checkpoints and none verifies.
    """
    lead = rank_and_size()[0] == 0
    single = path.parent.name == FOLDER or (path / MANIFEST).exists()
    single, names = broadcast_object([single, [path.name] if single else [entry.name for entry in committed(path)]])
    folder = path.parent if single else path / FOLDER
    first_problem = ""
    for name in names:
        problems = verify_together(folder / name)
        if not problems:
            if lead and first_problem:
                log.error("continuing from %s, which is NOT the newest checkpoint", folder / name)
            return folder / name
        first_problem = first_problem or f"{name}: {problems[0]}"
        if lead:
            log.error("SKIPPED checkpoint %s: %s", folder / name, "; ".join(problems))
    if names:
        what = "does not verify" if single else f"none of {len(names)} checkpoints verifies"
        raise DataError(f"{path}: {what} ({first_problem})")
    return None


def publish(temporary: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest into a finished temporary folder and give it its final name. OSError: nothing published.

    A step that is saved again (after a fall-back past a damaged folder) gets the next free suffix, step-N-2, so that
    no committed folder is ever moved out of the way first.
    """
    write_file(temporary / MANIFEST, seal(manifest))
    sync_dir(temporary)
    folder = temporary.parent
    final, attempt = folder / f"step-{manifest['step']}", 1
    while final.exists():
        attempt += 1
        final = folder / f"step-{manifest['step']}-{attempt}"
    os.rename(temporary, final)
    sync_dir(folder)
    # The first checkpoint of a run made the folder itself, whose name is not durable either.
    sync_dir(folder.parent)
    return final


def point(run_dir: Path, name: str, target: Path) -> None:
    """Let LATEST or BEST name a committed folder. A failure is logged: the checkpoint itself is safe by then."""
    try:
        atomic_write(run_dir / FOLDER / name, f"{target.name}\n".encode())
    except OSError as error:
        log.error("%s could not be moved to %s: %s", name, target.name, error)


def discard(path: Path) -> None:
    """Remove a folder so that a kill half way leaves nothing that looks committed, and that a job which is about to
    rename it finds it gone or is first: it is taken away by one rename, then emptied."""
    doomed = path
    if not path.name.startswith(_DOOMED):
        doomed = path.with_name(f"{_DOOMED}{path.name.lstrip('.')}-{secrets.token_hex(4)}")
        try:
            os.rename(path, doomed)
        except OSError as error:
            log.error("%s could not be taken away: %s", path, error)
            if not path.name.startswith("."):
                return
            doomed = path
    shutil.rmtree(doomed, ignore_errors=True)


def clean_stale(run_dir: Path) -> None:
    """Remove the .tmp-* folders of attempts that died, or that lost the run to the caller, who holds it."""
    for entry in (run_dir / FOLDER).glob(".tmp-*"):
        log.warning("removing %s, left by an attempt that did not finish", entry)
        discard(entry)


def retain(run_dir: Path, keep: int) -> None:
    """Remove all but BEST and the newest `keep` (at least one) checkpoints that verify.

    Sizes only: the newest was hashed as it was written, and reading every older one at each save would cost more
    than training. Folders that do not verify count for nothing and go once a newer good one exists.
    """
    best, good = pointer(run_dir, BEST), 0
    for path in committed(run_dir):
        problems = verify(path, quick=True)
        good += not problems
        if path != best and (good > max(1, keep) or (problems and good)):
            discard(path)
