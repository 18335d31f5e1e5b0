"""All-reduce in pairs: every node meets two others, a slow or silent one is named, and nobody waits for it for long.

In: names of nodes, found speeds, two processes on this machine. Out: rounds, verdicts, seconds. Decision: the silent
partner is a process that never starts, the hanging one a server that accepts and says nothing.
"""

from __future__ import annotations

import socket
import threading
import time

import pytest

from eventlens_ds.launch import pair_check
from eventlens_ds.launch.pair_check import Pair
from eventlens_ds.runtime.distributed import free_port


@pytest.mark.parametrize("count", range(1, 10))
def test_a_ring_in_rounds(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    made = pair_check.rounds(nodes)
    for pairs in made:
        met = [node for pair in pairs for node in pair]
        assert len(met) == len(set(met))
    edges = [frozenset(pair) for pairs in made for pair in pairs]
    wanted = {frozenset((nodes[i], nodes[(i + 1) % count])) for i in range(count) if count > 1}
    assert set(edges) == wanted and len(edges) == len(wanted)
    assert len(made) == (0 if count == 1 else 1 if count == 2 else 2 + count % 2)


def ring(speeds: dict[str, float | None]) -> dict[str, list[Pair]]:
    """What nodes would tell: a pair is as fast as its slower node, and fails with a node without a speed."""
    found: dict[str, list[Pair]] = {node: [] for node in speeds}
    for pairs in pair_check.rounds(list(speeds)):
        for first, second in pairs:
            both = [speeds[first], speeds[second]]
            speed = None if None in both else min(x for x in both if x is not None)
            for node in (first, second):
                if speeds[node] is not None:
                    found[node].append(Pair(first, second, speed, "" if speed else "no answer in time"))
    return found


@pytest.mark.parametrize("count", [4, 5, 8])
def test_a_slow_node_and_a_silent_one_are_named_and_no_neighbour_is(count: int) -> None:
    even: dict[str, float | None] = {f"n{i}": 40.0 for i in range(count)}
    assert pair_check.judge(ring(even), True) == {}
    bad = pair_check.judge(ring({**even, "n1": 10.0}), True)
    assert bad == {"n1": ["reduces at 10 GB/s with its faster neighbour, the median is 40"]}
    assert pair_check.judge(ring({**even, "n1": 10.0}), False) == {}  # a CPU's speed is not judged
    bad = pair_check.judge(ring({**even, "n1": None}), False)
    assert list(bad) == ["n1"] and "failed: no answer in time" in bad["n1"][0]
    # A link between two nodes that work with others is as bad; which of them it is cannot be told.
    link = {
        node: [pair._replace(gb_per_s=None, why="refused") if set(pair[:2]) == {"n0", "n1"} else pair for pair in told]
        for node, told in ring(even).items()
    }
    assert pair_check.judge(link, False) == {
        "n0": ["an all-reduce with n1 failed: refused"],
        "n1": ["an all-reduce with n0 failed: refused"],
    }


def test_two_nodes_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names of this machine; what they find comes to the gate of the first."""
    monkeypatch.setattr(pair_check, "ROUND_SECONDS", 90.0)  # a busy machine takes long to import torch twice
    port, nodes = free_port(), ["127.0.0.1", "localhost"]
    gate = pair_check.Gate(port, 200)
    gate.open(nodes)
    other = threading.Thread(target=pair_check.take_part, args=("127.0.0.1", port, "localhost", 200))
    other.start()
    gate.found["127.0.0.1"] = pair_check.measure(nodes, "127.0.0.1", port + 1)
    gate.wait(nodes, 20)
    other.join()
    (mine,), (theirs,) = gate.found["127.0.0.1"], gate.found["localhost"]
    assert mine.gb_per_s and theirs.gb_per_s and mine.why == theirs.why == "", gate.found
    assert pair_check.judge(gate.found, True) == {} and "localhost" in pair_check.table(gate.found)


@pytest.mark.parametrize("silent", ["absent", "hangs"])
def test_a_partner_that_does_not_answer_costs_a_bounded_time(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_check, "ROUND_SECONDS", 5.0)
    port = free_port()
    # As the second node, with a first one that accepts and says nothing; as the first, with nobody coming.
    server = socket.create_server(("127.0.0.1", port)) if silent == "hangs" else None
    nodes = ["127.0.0.1", "localhost"]
    begun = time.monotonic()
    (pair,) = pair_check.measure(nodes, nodes[1] if server else nodes[0], port)
    assert time.monotonic() - begun < 5 + 5
    assert pair.gb_per_s is None and pair.why
    if server:
        server.close()
