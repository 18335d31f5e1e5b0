"""The commit protocol as a model small enough to try everything: every order of steps, every crash, every lost write.

In: `Rules`, of which each switches one guard of the protocol off. Out: `violations`, the broken promises and one
history that leads to each. Neither torch nor a disk is needed.
Two ranks of job A save a checkpoint while job B may take the run over at any moment, and the machine may lose power at
any moment; then every write that was not synced is kept, torn or lost, and every name that was not synced may be gone.
Decision: states are plain tuples and the search is exhaustive with a memory of states; random schedules would miss the
one order in a thousand that this is about.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

NONE, VOLATILE, DURABLE = 0, 1, 2
FILES = ("f0", "f1", "manifest")


class Rules(NamedTuple):
    sync_files: bool = True
    sync_names: bool = True
    sync_manifest: bool = True
    barrier: bool = True
    check_lease: bool = True
    clean_before_resolve: bool = True
    clean_by_rename: bool = True
    heed_failures: bool = True


class State(NamedTuple):
    pc: tuple[int, int] = (0, 0)
    """Next step of each rank of job A; -1: it gave up."""
    data: tuple[int, ...] = (NONE,) * 3
    """Content of each file of FILES."""
    names: tuple[int, ...] = (NONE,) * 3
    """Its name in the folder."""
    place: str = "none"
    """Name of the folder: none, tmp, final, or gone (taken away by job B)."""
    place_synced: bool = False
    failed: bool = False
    """Rank 1 could not write its file (no space)."""
    reported: bool = False
    """Job A said that the checkpoint is saved."""
    b: int = 0
    """Steps job B has done: claim, clean (two of them when not by rename), resolve."""
    saw: bool | None = None
    """Whether job B found the checkpoint; None before it looked."""


def put(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at + 1 :])


def rank_step(s: State, rank: int, rules: Rules) -> Iterator[tuple[str, State]]:
    """What a rank of job A can do next."""
    at = s.pc[rank]
    on = s._replace(pc=(at + 1, s.pc[1]) if rank == 0 else (s.pc[0], at + 1))
    stop = s._replace(pc=(-1, s.pc[1]) if rank == 0 else (s.pc[0], -1))
    here = s.place == "tmp"
    steps = ["check", "mkdir", "write", "sync", "sync names"]
    steps += ["barrier", "check", "manifest", "sync manifest", "rename", "sync place", "report"] if rank == 0 else []
    if not 0 <= at < len(steps):
        return
    step, name = steps[at], f"rank {rank}: {steps[at]}"
    if step == "check":
        lost = rules.check_lease and s.b > 0 and rank == 0
        yield name, stop if lost else on
    elif step == "mkdir":
        if rank == 0 and s.place == "none":
            yield name, on._replace(place="tmp")
        elif rank == 1 and s.place != "none":
            yield name, on
    elif step == "write":
        yield name, on._replace(data=put(s.data, rank, VOLATILE), names=put(s.names, rank, VOLATILE)) if here else stop
        if rank == 1:
            yield f"{name} fails", on._replace(failed=True)
    elif step == "sync":
        synced = rules.sync_files and s.data[rank]
        yield name, on._replace(data=put(s.data, rank, DURABLE)) if synced else on
    elif step == "sync names":
        synced = rules.sync_names and s.names[rank]
        yield name, on._replace(names=put(s.names, rank, DURABLE)) if synced else on
    elif step == "barrier":
        if not rules.barrier or s.pc[1] in (5, -1):
            yield name, stop if rules.heed_failures and (s.failed or s.pc[1] == -1) else on
    elif step == "manifest":
        yield name, on._replace(data=put(s.data, 2, VOLATILE), names=put(s.names, 2, VOLATILE)) if here else stop
    elif step == "sync manifest":
        keep = rules.sync_manifest
        yield name, on._replace(data=put(s.data, 2, DURABLE), names=put(s.names, 2, DURABLE)) if keep else on
    elif step == "rename":
        yield name, on._replace(place="final", place_synced=False) if here else stop
    elif step == "sync place":
        yield name, on._replace(place_synced=True)
    elif step == "report":
        yield name, on._replace(reported=True)


def b_step(s: State, rules: Rules) -> Iterator[tuple[str, State]]:
    """What job B can do next: it claims the lease, removes what is unpublished, looks for checkpoints."""
    if s.b == 0:
        yield "B: claim", s._replace(b=1)
    elif s.b == 1 and not rules.clean_before_resolve:
        yield "B: resolve", s._replace(b=4, saw=s.place == "final")
    elif s.b == 1 and rules.clean_by_rename:
        yield "B: clean", s._replace(b=3, place="gone" if s.place == "tmp" else s.place)
    elif s.b == 1:
        found = s.place == "tmp"
        yield "B: empty the folder", s._replace(b=2, data=(NONE,) * 3, names=(NONE,) * 3) if found else s._replace(b=3)
    elif s.b == 2:
        yield "B: remove the folder", s._replace(b=3, place="gone" if s.place == "tmp" else s.place)
    elif s.b == 3:
        yield "B: resolve", s._replace(b=4, saw=s.place == "final")


def after_power_loss(s: State) -> Iterator[tuple[bool, bool]]:
    """(the folder has its final name, all of its files are whole) in every way a crash can leave the disk."""
    finals = {s.place == "final"} if s.place_synced or s.place != "final" else {True, False}
    per_file = []
    for content, name in zip(s.data, s.names):
        contents = {content == DURABLE} if content != VOLATILE else {True, False}
        named = {name == DURABLE} if name != VOLATILE else {True, False}
        per_file.append({a and b for a, b in product(contents, named)})
    for final in finals:
        for whole in product(*per_file):
            yield final, all(whole)


def broken(s: State) -> Iterator[str]:
    """Promises that do not hold in a state, or after a power loss in it."""
    for final, whole in after_power_loss(s):
        if final and not whole:
            yield "a final name on a folder that is not whole"
        if s.reported and not (final and whole):
            yield "a reported checkpoint is lost"
    if s.saw is False and s.place == "final":
        yield "a job that lost the run publishes"


def violations(rules: Rules) -> dict[str, list[str]]:
    """Broken promise -> the shortest history of steps found that breaks it; empty for a protocol that keeps them."""
    start = State()
    histories: dict[State, list[str]] = {start: []}
    todo, found = [start], {}
    for s in todo:  # grows while it is walked: breadth first
        for promise in broken(s):
            found.setdefault(promise, histories[s])
        for step, after in [*rank_step(s, 0, rules), *rank_step(s, 1, rules), *b_step(s, rules)]:
            if after not in histories:
                histories[after] = [*histories[s], step]
                todo.append(after)
    return found


def size(rules: Rules) -> int:
    """States that can be reached."""
    seen, todo = {State()}, [State()]
    for s in todo:
        for _, after in [*rank_step(s, 0, rules), *rank_step(s, 1, rules), *b_step(s, rules)]:
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return len(seen)
