"""A look at every node of an allocation before the ranks start; slurm/job.sh runs it as one task per node.

In: `--folder RUN` on the shared file system, `--tasks N` ranks per node, `--bad FILE`, SLURM_* variables; after them
the arguments of `eventlens train`, whose kernels each node compiles for its own caches (launch/warm_up.py). Out: exit
code 0, or 6 with one line per bad node, whose names the first node writes to FILE. Every node measures itself and
leaves a note in RUN/slurm; the first node answers connections; each then reads all notes, and the first one judges.
Then those that answered reduce in pairs (launch/pair_check.py).
Decision: nodes meet through files and plain sockets, both with time limits, since a collective over a bad node is the
very thing that hangs; speed is judged against the median of the allocation, because no table knows every machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from eventlens_ds.errors import UserError
from eventlens_ds.launch import pair_check
from eventlens_ds.runtime.distributed import first_host
from eventlens_ds.runtime.failures import leave
from eventlens_ds.train import door

SECONDS = 300
"""For everything; a node that needs longer is a bad one."""
MEMORY_GIB, DISK_GIB, SKEW_SECONDS, SLOWER = 1.0, 1.0, 30.0, 0.6
"""Least free memory and disk, largest clock skew, and the share of the median speed below which a node is bad."""
PAYLOAD = 4 << 20


class NodeError(UserError):
    """A node of the allocation is not fit to train (exit 6)."""

    code = 6


def look(folder: Path, tasks: int, recipe: Sequence[str] = ()) -> dict[str, Any]:
    """What this node finds out alone: numbers, and `problems` in words. recipe: arguments of `eventlens train` whose
    kernels are compiled for this node."""
    problems: list[str] = []
    memory = _available_memory()
    if memory < MEMORY_GIB:
        problems.append(f"{memory:.1f} GiB of memory are free")
    for place in (folder, Path(os.environ.get("EVENTLENS_LOCAL") or os.environ.get("TMPDIR") or "/tmp")):
        free = shutil.disk_usage(place).free / 2**30
        if free < DISK_GIB:
            problems.append(f"{free:.1f} GiB are free in {place}")
    on_gpu = os.environ.get("DS_ACCELERATOR") != "cpu"
    found: dict[str, Any] = {"memory_gib": round(memory, 1), "on_gpu": on_gpu, "matmul_tflops": []}
    try:
        found["matmul_tflops"] = _matmul(tasks, problems)
    except (ImportError, RuntimeError) as error:
        problems.append(f"torch: {str(error).splitlines()[0]}")
    try:
        found["warm_up"] = _warm_up(recipe, on_gpu) if recipe else "no recipe, nothing to warm up"
    except (ImportError, RuntimeError, UserError) as error:
        problems.append(f"warm-up: {str(error).splitlines()[0]}")
    return {**found, "problems": problems}


def _warm_up(recipe: Sequence[str], on_gpu: bool) -> str:
    from eventlens_ds.launch.warm_up import warm_up

    parser = door.Parser(add_help=False)
    door.add_arguments(parser)
    return warm_up(door.configure(*parser.parse_known_args(door.join_settings(recipe))), on_gpu)


def _available_memory() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return float("inf")


def _matmul(tasks: int, problems: list[str]) -> list[float]:
    """TFLOP/s of a matrix product on every GPU, or on the CPU; adds GPUs that are missing or in use to `problems`."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return [_time_matmul(torch, "cpu", 384)]
    count = torch.cuda.device_count()
    if count < tasks:
        problems.append(f"{count} GPUs are visible for {tasks} ranks")
    speeds = []
    for i in range(count):
        free, total = torch.cuda.mem_get_info(i)
        if free < 0.9 * total:
            problems.append(f"GPU {i}: {(total - free) / 2**30:.1f} GiB are in use by others")
        speeds.append(_time_matmul(torch, f"cuda:{i}", 8192))
    return speeds


def _time_matmul(torch: Any, device: str, size: int) -> float:
    a = torch.ones(size, size, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the GPU
        best = min(best, time.perf_counter() - begun)
    return round(2 * size**3 / best / 1e12, 4)


def send(peer: socket.socket) -> None:
    """On the first node: PAYLOAD bytes for whoever connects."""
    try:
        with peer:
            peer.sendall(bytes(PAYLOAD))
    except OSError:
        pass  # the reader gave up, and says so


def reach(host: str, port: int, seconds: float) -> tuple[float | None, str]:
    """(GB/s from `host`, "") or (None, what hinders)."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            begun = time.monotonic()
            with socket.create_connection((host, port), timeout=5) as peer:
                left = PAYLOAD
                while left and (block := peer.recv(1 << 16)):
                    left -= len(block)
            return round(PAYLOAD / (time.monotonic() - begun) / 1e9, 3), ""
        except socket.gaierror as error:
            why = f"cannot resolve {host}: {error.strerror}"
        except OSError as error:
            why = f"cannot reach {host}:{port}: {error.strerror or error}"
        if time.monotonic() > deadline:
            return None, why
        time.sleep(0.5)


def leave_note(folder: Path, node: str, note: dict[str, Any]) -> None:
    """Write this node's note; its clock is compared with that of the file server, which stamps the file."""
    path = folder / f"{node}.json"
    probe = folder / f".{node}.clock"
    now = time.time()
    probe.write_text("")
    note["clock_skew"] = round(now - probe.stat().st_mtime, 1)
    probe.unlink()
    partial = folder / f".{node}.tmp"
    partial.write_text(json.dumps(note))
    partial.replace(path)


def read_notes(folder: Path, nodes: int, deadline: float) -> dict[str, dict[str, Any]]:
    """Notes by node, as many as come before the deadline."""
    while True:
        paths = sorted(folder.glob("*.json"))
        if len(paths) >= nodes or time.monotonic() > deadline:
            return {path.stem: json.loads(path.read_text()) for path in paths}
        time.sleep(0.2)


def judge(notes: dict[str, dict[str, Any]], expected: Sequence[str]) -> dict[str, list[str]]:
    """Bad nodes and why; empty when all are fit."""
    bad: dict[str, list[str]] = {node: ["no answer"] for node in expected if node not in notes}
    # A CPU's speed is that of whatever else runs on it, and so is that of its sockets; both are shown and not judged.
    speeds = {node: [float(x) for x in note["matmul_tflops"]] * note["on_gpu"] for node, note in notes.items()}
    usual = median([x for found in speeds.values() for x in found] or [0.0])
    links = [note["gb_per_s"] for note in notes.values() if note.get("gb_per_s") and note["on_gpu"]]
    clock = median([note["clock_skew"] for note in notes.values()] or [0.0])
    for node, note in notes.items():
        why = list(note["problems"])
        slow = [i for i, x in enumerate(speeds[node]) if x < SLOWER * usual]
        why += [f"device {i} multiplies at {speeds[node][i]:g} TFLOP/s, the median is {usual:g}" for i in slow]
        if len(links) > 2 and note["on_gpu"] and (note["gb_per_s"] or median(links)) < SLOWER * median(links):
            why.append(f"reads {note['gb_per_s']:g} GB/s from the first node, the median is {median(links):g}")
        if abs(note["clock_skew"] - clock) > SKEW_SECONDS:
            why.append(f"its clock is {note['clock_skew'] - clock:+.0f} s off")
        if why:
            bad[node] = why
    return bad


def expand(nodelist: str) -> list[str]:
    """Hosts of a Slurm node list: "n[1-2],gpu07" -> n1, n2, gpu07."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        found = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if found is None:
            hosts.append(part)
            continue
        for span in found[2].split(","):
            first, _, last = span.partition("-")
            for number in range(int(first), int(last or first) + 1):
                hosts.append(f"{found[1]}{number:0{len(first)}d}{found[3]}")
    return hosts


def main(argv: Sequence[str]) -> int:
    parser = door.Parser(prog="python -m eventlens_ds.launch.node_check", description="Look at the nodes of a job.")
    parser.add_argument("--folder", type=Path, required=True, metavar="RUN")
    parser.add_argument("--bad", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tasks", type=int, default=1, metavar="N")
    args, recipe = parser.parse_known_args(door.join_settings(argv))
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(SECONDS)
    return _check(args, recipe)


def _too_late(*_: object) -> None:
    raise NodeError(f"{socket.gethostname()}: no end after {SECONDS} s")


def _check(args: argparse.Namespace, recipe: Sequence[str]) -> int:
    env = os.environ
    node, nodelist = env.get("SLURMD_NODENAME") or socket.gethostname(), env["SLURM_STEP_NODELIST"]
    nodes, first = expand(nodelist), first_host(nodelist)
    port = 10000 + (int(env["SLURM_JOB_ID"]) * 7 + 9973) % 20000
    lead = node == first
    gate = pair_check.Gate(port + 1, SECONDS) if lead else None
    listener = pair_check.Listener(port, send) if lead else None
    job, restart = env["SLURM_JOB_ID"], env.get("SLURM_RESTART_COUNT", "0")
    folder = args.folder / "slurm" / f"check-{job}.{restart}.{env.get('SLURM_STEP_ID', '0')}"
    folder.mkdir(parents=True, exist_ok=True)
    note = look(args.folder, args.tasks, recipe)
    note["gb_per_s"], why = reach(first, port, 10)
    note["problems"] += [why] if why else []
    leave_note(folder, node, note)
    notes = read_notes(folder, len(nodes), time.monotonic() + 60)
    missing = [other for other in nodes if other not in notes]
    if listener is None or gate is None:
        if missing:
            sys.stderr.write(f"eventlens: {node}: sees no note of {', '.join(missing)} in {folder}\n")
        with contextlib.suppress(OSError, ValueError):  # the first node says what it did not hear
            pair_check.take_part(first, port + 1, node, SECONDS)
        return 0
    bad = judge(notes, nodes)
    bad |= _pairs(gate, [other for other in nodes if other not in bad], node, port, bool(note["on_gpu"]))
    for other in sorted(bad):
        sys.stderr.write(f"eventlens: bad node {other}: {'; '.join(bad[other])}\n")
    args.bad.write_text("".join(f"{other}\n" for other in sorted(bad)))
    shutil.rmtree(folder, ignore_errors=True)
    if bad:
        raise NodeError(f"{len(bad)} of {len(nodes)} nodes are not fit: {', '.join(sorted(bad))}")
    speed = median(x for each in notes.values() for x in each["matmul_tflops"] or [0.0])
    print(f"eventlens: {len(nodes)} nodes are fit; median matrix product {speed:g} TFLOP/s a device")
    for said in sorted({str(each["warm_up"]) for each in notes.values()}):
        print(f"eventlens: {', '.join(n for n in nodes if notes[n]['warm_up'] == said)}: {said}")
    return 0


def _pairs(gate: pair_check.Gate, fit: Sequence[str], node: str, port: int, on_gpu: bool) -> dict[str, list[str]]:
    """All-reduce among the nodes that answered, on the first node; the bad ones and why. The others wait at the gate,
    also those that have no part in it."""
    gate.open(fit)
    if len(fit) < 2:
        return {}
    if node in fit:
        gate.found[node] = pair_check.measure(fit, node, port + 2)
    rounds = len(pair_check.rounds(fit))
    gate.wait(fit, rounds * pair_check.ROUND_SECONDS + 10 if node not in fit else 20)
    print(f"eventlens: all-reduce with a neighbour, GB/s: {pair_check.table(gate.found)}")
    return pair_check.judge(gate.found, on_gpu)


if __name__ == "__main__":
    leave(lambda: door.guarded(lambda: main(sys.argv[1:])))
