"""All-reduce speed of the nodes of an allocation, in pairs: who is slow, and no node waits for one that hangs.

In: nodes that answered, in order; what each does is told by the first node over a socket (`Gate`). Out: GB/s of every
pair, or what hindered it; `judge` names nodes. The pairs are the edges of a ring, in two rounds (three for an odd
number of nodes), so each node meets two others: a slow one is slow with both, its neighbours are not.
Decision: pairs and not one collective over all, which is as slow as its slowest node and so names none. A round ends
at a fixed time after the start for everybody, and a process that is still in it then is ended from outside Python;
one process per node and its first GPU, which is the network of the node and not the links between its GPUs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import median
from typing import NamedTuple

ROUND_SECONDS = 30.0
"""For each round, the first with the start of the process."""
SLOWER = 0.6
"""Share of the median below which a node is bad."""
CPU_BYTES, GPU_BYTES, REPEATS = 4 << 20, 256 << 20, 3


class Pair(NamedTuple):
    """One all-reduce of two nodes: GB/s of this node, or None and why."""

    first: str
    second: str
    gb_per_s: float | None
    why: str


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The edges of a ring, in rounds in which no node comes twice; two nodes have one edge, one has none."""
    count = len(nodes)
    edges = [(nodes[i], nodes[i + 1]) for i in range(count - 1)]
    made = [edges[0::2], edges[1::2]]
    if count > 2:
        made.append([])
        made[2 if count % 2 else 1].append((nodes[-1], nodes[0]))
    return [pairs for pairs in made if pairs]


class Listener:
    """Hands every connection to `port` to `answer`, in a thread of its own."""

    def __init__(self, port: int, answer: Callable[[socket.socket], None]) -> None:
        self._socket, self._answer = socket.create_server(("", port), family=socket.AF_INET, backlog=1024), answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(peer,), daemon=True).start()

    def close(self) -> None:
        self._socket.close()


class Gate:
    """On the first node: holds the others back until it knows who answered, then takes what they found."""

    def __init__(self, port: int, seconds: float) -> None:
        self._known, self._nodes, self._seconds = threading.Event(), [""], seconds
        self.found: dict[str, list[Pair]] = {}
        self._listener = Listener(port, self._meet)

    def _meet(self, peer: socket.socket) -> None:
        try:
            with peer, peer.makefile("rw") as talk:
                peer.settimeout(self._seconds)
                self._known.wait(self._seconds)
                talk.write(json.dumps(self._nodes) + "\n")
                talk.flush()
                node, pairs = json.loads(talk.readline())
                self.found[node] = [Pair(*pair) for pair in pairs]
        except (OSError, ValueError):
            pass  # its neighbours will say how it fared

    def open(self, nodes: Sequence[str]) -> None:
        self._nodes = list(nodes)
        self._known.set()

    def wait(self, nodes: Sequence[str], seconds: float) -> None:
        """Until all of `nodes` have told what they found, or the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not set(nodes) <= self.found.keys():
            time.sleep(0.1)


def take_part(host: str, port: int, node: str, seconds: float) -> None:
    """On the other nodes: wait at the gate of `host`, measure what this node has to, tell it. OSError, ValueError:
    the gate has gone."""
    with socket.create_connection((host, port), timeout=seconds) as peer, peer.makefile("rw") as talk:
        nodes = json.loads(talk.readline())
        talk.write(json.dumps([node, measure(nodes, node, port + 1)]) + "\n")
        talk.flush()


def measure(nodes: Sequence[str], node: str, port: int) -> list[Pair]:
    """This node's pairs; `port` and the next ones are free on every node. Returns within rounds * ROUND_SECONDS and a
    few seconds; [] for a node that has no pair."""
    begun = time.monotonic()
    mine = [(number, pair) for number, pairs in enumerate(rounds(nodes)) for pair in pairs if node in pair]
    found: list[Pair] = []
    while len(found) < len(mine):
        spent = time.monotonic() - begun
        last = ROUND_SECONDS * (mine[-1][0] + 1) - spent
        todo = [[*pair, pair.index(node), port + i, ROUND_SECONDS * (i + 1) - spent] for i, pair in mine[len(found) :]]
        command = [sys.executable, "-m", "eventlens_ds.launch.pair_check", json.dumps(todo)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(5.0, last + 5))
            lines = done.stdout.splitlines()
        except subprocess.TimeoutExpired as error:
            lines = (error.stdout or b"").decode().splitlines()
        found += [Pair(*json.loads(line)) for line in lines]
        if len(found) < len(mine):  # the process was ended in this round
            found.append(Pair(*mine[len(found)][1], None, "no answer in time"))
    return found


def judge(found: dict[str, list[Pair]], on_gpu: bool) -> dict[str, list[str]]:
    """Bad nodes and why: those that explain the pairs that failed, and on GPUs a node whose best pair is slow.

    Of the two nodes of a failed pair that one is named which fails more often; both, where that tells nothing.
    """
    pairs = {frozenset(pair[:2]): pair for told in found.values() for pair in told if pair.gb_per_s is None}
    failed = [{node: _other(pair, node) + pair.why for node in pair[:2]} for pair in pairs.values()]
    bad: dict[str, list[str]] = {}
    while failed:
        times = {node: sum(node in pair for pair in failed) for pair in failed for node in pair}
        worst = {node for node, count in times.items() if count == max(times.values())}
        for node in worst:
            bad[node] = [next(pair[node] for pair in failed if node in pair)]
        failed = [pair for pair in failed if worst.isdisjoint(pair)]
    best = _best(found)
    usual = median(best.values()) if best else 0.0
    for node, speed in best.items() if on_gpu else ():
        if node not in bad and speed < SLOWER * usual:
            bad[node] = [f"reduces at {speed:g} GB/s with its faster neighbour, the median is {usual:g}"]
    return bad


def _other(pair: Pair, node: str) -> str:
    return f"an all-reduce with {pair.second if node == pair.first else pair.first} failed: "


def _best(found: dict[str, list[Pair]]) -> dict[str, float]:
    """GB/s of each node with its faster neighbour."""
    best: dict[str, float] = {}
    for pair in (pair for told in found.values() for pair in told if pair.gb_per_s is not None):
        for node in pair[:2]:
            best[node] = max(best.get(node, 0.0), pair.gb_per_s or 0.0)
    return best


def table(found: dict[str, list[Pair]]) -> str:
    """GB/s of each node with its faster neighbour, in words."""
    return ", ".join(f"{node} {speed:g}" for node, speed in sorted(_best(found).items())) or "none"


def _reduce(first: str, port: int, rank: int, seconds: float, on_gpu: bool) -> float:
    """GB/s of the best of some all-reduces of two ranks."""
    import torch
    import torch.distributed as dist

    where = f"tcp://{first}:{port}"
    limit = timedelta(seconds=seconds)
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=where, rank=rank, world_size=2, timeout=limit)
    try:
        size = GPU_BYTES if on_gpu else CPU_BYTES
        tensor = torch.zeros(size // 4, device="cuda:0" if on_gpu else "cpu")
        best = float("inf")
        for _ in range(REPEATS + 1):  # the first one opens connections
            begun = time.perf_counter()
            dist.all_reduce(tensor)
            float(tensor[0])  # waits for the GPU
            best = min(best, time.perf_counter() - begun)
        return round(size / best / 1e9, 3)
    finally:
        dist.destroy_process_group()


def main(argv: Sequence[str]) -> int:
    """The process that measures; argv: JSON [[first node, second node, our rank, port, seconds]]. A line a pair."""
    import faulthandler

    begun = time.monotonic()
    on_gpu = os.environ.get("DS_ACCELERATOR") != "cpu"
    # Those of a launcher would be taken for this group's.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    for first, second, rank, port, until in json.loads(argv[0]):
        left = until - (time.monotonic() - begun)
        speed, why = None, "no time left"
        if left > 0:
            # From a thread that needs no interpreter: a collective that hangs may hold it.
            faulthandler.dump_traceback_later(left, exit=True)
            try:
                speed, why = _reduce(first, port, rank, max(1.0, left - 1), on_gpu), ""
            except (RuntimeError, ValueError, OSError) as error:
                why = str(error).splitlines()[0][:200]
            faulthandler.cancel_dump_traceback_later()
        sys.stdout.write(json.dumps([first, second, speed, why]) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    from eventlens_ds.runtime.failures import leave

    leave(lambda: main(sys.argv[1:]))
