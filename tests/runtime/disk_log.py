"""A log of what a program does to a folder, and the folder as a power loss could leave it after any part of the log.

In: `recorded(root)` around the program, in one process. Out: operations; `Disk` replays any number of them and is
written to a real folder in one of three ways: everything kept, everything unsynced lost, unsynced files torn in half.
Decision: the strictest reading of POSIX: a file's bytes are durable after its own fsync, and its name after an fsync
of the folder it is in; a rename is two names.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEPT, LOST, TORN = "kept", "lost", "torn"
_PATCHED = ("open", "write", "fsync", "close", "rename", "replace", "unlink", "rmdir", "mkdir")


@contextlib.contextmanager
def recorded(root: Path) -> Iterator[list[tuple[Any, ...]]]:
    """Operations below `root` while the body runs; the body may append ("reported", n) of its own."""
    really = {name: getattr(os, name) for name in _PATCHED}
    log: list[tuple[Any, ...]] = []
    paths: dict[int, str] = {}

    def inside(path: Any, dir_fd: int | None = None) -> str | None:
        full = os.path.join(paths.get(dir_fd, "/") if dir_fd is not None else "", os.fspath(path))
        name = os.path.relpath(full, root) if os.path.isabs(full) else full
        return None if name.startswith("..") else name

    def open_(path: Any, flags: int, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> int:
        fd = really["open"](path, flags, *args, dir_fd=dir_fd, **kwargs)
        name = inside(path, dir_fd) if isinstance(path, (str, os.PathLike)) else None
        if name is not None:
            paths[fd] = os.path.join(root, name)
            if flags & os.O_CREAT:
                log.append(("create", name))
        return fd

    def close(fd: int) -> None:
        paths.pop(fd, None)
        really["close"](fd)

    def write(fd: int, data: Any) -> int:
        count = really["write"](fd, data)
        if fd in paths:
            log.append(("write", inside(paths[fd]), bytes(data)[:count]))
        return count

    def fsync(fd: int) -> None:
        if fd in paths:
            log.append(("fsync", inside(paths[fd])))

    def two(name: str) -> Any:
        def call(source: Any, target: Any, **kwargs: Any) -> None:
            really[name](source, target, **kwargs)
            log.append(("rename", inside(source), inside(target)))

        return call

    def one(name: str) -> Any:
        def call(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> None:
            where = inside(path, dir_fd)
            really[name](path, *args, dir_fd=dir_fd, **kwargs)
            log.append(("remove" if name != "mkdir" else "mkdir", where))

        return call

    made = {"open": open_, "close": close, "write": write, "fsync": fsync}
    made |= {name: two(name) for name in ("rename", "replace")} | {n: one(n) for n in ("unlink", "rmdir", "mkdir")}
    try:
        for name, function in made.items():
            setattr(os, name, function)
        yield log
    finally:
        for name, function in really.items():
            setattr(os, name, function)


class _Node:
    """A file (bytes) or a folder (names), as the programs see it and as it is on the disk."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder
        self.now: Any = {} if folder else b""
        self.synced: Any = {} if folder else b""


class Disk:
    """The folder after some operations."""

    def __init__(self) -> None:
        self.root = _Node(True)

    def _at(self, name: str) -> _Node:
        node = self.root
        for part in Path(name).parts:
            node = node.now[part]
        return node

    def do(self, operation: tuple[Any, ...]) -> None:
        what, *names = operation
        if what == "reported":
            return
        parent, last = self._at(str(Path(names[0]).parent)), Path(names[0]).name
        if what in ("create", "mkdir"):
            parent.now.setdefault(last, _Node(what == "mkdir"))
        elif what == "write":
            parent.now[last].now += names[1]
        elif what == "fsync":
            node = self._at(names[0])
            node.synced = dict(node.now) if node.folder else node.now
        elif what == "rename":
            self._at(str(Path(names[1]).parent)).now[Path(names[1]).name] = parent.now.pop(last)
        elif what == "remove":
            del parent.now[last]

    def write(self, folder: Path, how: str) -> None:
        """Put the folder on a real disk."""
        self._write(self.root, folder, how)

    def _write(self, node: _Node, path: Path, how: str) -> None:
        if not node.folder:
            torn = node.synced + node.now[len(node.synced) :][: (len(node.now) - len(node.synced)) // 2]
            path.write_bytes({KEPT: node.now, LOST: node.synced, TORN: torn}[how])
            return
        path.mkdir(exist_ok=True)
        for name, child in (node.synced if how == LOST else node.now).items():
            self._write(child, path / name, how)
