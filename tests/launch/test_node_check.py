"""The look at nodes: each fault that is planted in a note is named with its node, and no fit node is.

In: notes of nodes; sockets on this machine. Out: verdicts. Decision: verdicts are tested on notes, the measuring itself
on this machine and, over several nodes, by tests/slurm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.launch import node_check, pair_check
from eventlens_ds.runtime.distributed import free_port


def note(**changes: Any) -> dict[str, Any]:
    return {
        "problems": [],
        "on_gpu": True,
        "matmul_tflops": [500.0, 510.0],
        "clock_skew": 0.0,
        "gb_per_s": 1.0,
        **changes,
    }


FAULTS = [
    ({"problems": ["GPU 3: 20.0 GiB are in use by others"]}, "in use by others"),
    ({"matmul_tflops": [500.0, 200.0]}, "device 1 multiplies at 200 TFLOP/s, the median is 500"),
    ({"clock_skew": -45.0}, "-45 s off"),
    ({"gb_per_s": 0.1}, "0.1 GB/s"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_a_bad_node_is_named_with_its_reason(fault: dict[str, Any], said: str) -> None:
    notes = {f"n{i}": note() for i in range(1, 4)} | {"n4": note(**fault)}
    bad = node_check.judge(notes, ["n1", "n2", "n3", "n4"])
    assert list(bad) == ["n4"] and said in bad["n4"][0]


def test_fit_nodes_and_a_silent_one() -> None:
    notes = {f"n{i}": note(matmul_tflops=[480.0 + i]) for i in range(4)}
    assert node_check.judge(notes, list(notes)) == {}
    assert node_check.judge(notes, [*notes, "n9"]) == {"n9": ["no answer"]}
    shared = {"n1": note(on_gpu=False), "n2": note(on_gpu=False, matmul_tflops=[1.0])}
    assert node_check.judge(shared, list(shared)) == {}
    busy = {f"n{i}": note(on_gpu=False, gb_per_s=speed) for i, speed in enumerate((0.5, 0.5, 0.07))}
    assert node_check.judge(busy, list(busy)) == {}


def test_hosts_of_a_node_list() -> None:
    assert node_check.expand("n[1-2],gpu07,x[009-011,3]-ib") == [
        "n1", "n2", "gpu07", "x009-ib", "x010-ib", "x011-ib", "x3-ib",
    ]  # fmt: skip


def test_reach() -> None:
    port = free_port()
    listener = pair_check.Listener(port, node_check.send)
    try:
        speed, why = node_check.reach("127.0.0.1", port, 5)
        assert why == "" and speed is not None and speed > 0
    finally:
        listener.close()
    speed, why = node_check.reach("127.0.0.1", free_port(), 0)
    assert speed is None and "cannot reach 127.0.0.1" in why
    assert "cannot resolve" in node_check.reach("no-such-host.invalid", port, 0)[1]


def test_this_machine_leaves_a_note(tmp_path: Path) -> None:
    found = node_check.look(tmp_path, 1)
    assert found["matmul_tflops"] and min(found["matmul_tflops"]) > 0 and found["memory_gib"] > 0
    node_check.leave_note(tmp_path, "n1", found)
    notes = node_check.read_notes(tmp_path, 1, 0)
    assert list(notes) == ["n1"] and abs(notes["n1"]["clock_skew"]) < 5
    assert [path.name for path in tmp_path.iterdir()] == ["n1.json"]
