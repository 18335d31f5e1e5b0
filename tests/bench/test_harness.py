"""The benchmark harness: the gate, the order of rounds, memory, repeatability, rows.

In: a toy op whose answer is known. Out: nothing. Decision: every figure that a row holds is checked on work whose
true value is known, and a provider that is wrong, absent or broken must come out without a time.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eventlens_ds.bench.kernels import rows
from eventlens_ds.bench.kernels.clock import Clock, Work, quantile
from eventlens_ds.bench.kernels.command import best_baseline, render
from eventlens_ds.bench.kernels.counters import peak_bytes, repeats_bitwise, split_by_mark
from eventlens_ds.bench.kernels.harness import MODES, Problem, Provider, Ready, Run, errors, gate, measure
from eventlens_ds.errors import DataError

CPU = torch.device("cpu")


def square(values: int = 64) -> Problem:
    """y = x * x, with x the only leaf."""
    x = torch.linspace(-1, 2, values).requires_grad_()
    grad = torch.linspace(1, 3, values)
    wide = x.detach().double()
    sizes = dict.fromkeys(MODES, 4 * values)
    return Problem(
        op="toy",
        case="square",
        dtype=torch.float32,
        device=CPU,
        inputs={"x": x},
        grad_output=grad,
        expected=wide**2,
        expected_grads=(2 * wide * grad.double(),),
        min_bytes=sizes,
        held_bytes=sizes,
        io_bytes=sizes,
    )


def provider(name: str, body, **more) -> Provider:
    def prepare(problem: Problem) -> Run:
        x = problem.inputs["x"]
        return Run(lambda: body(x), [x], problem.grad_output)

    return Provider(name, prepare, **more)


def crooked_backward(x: torch.Tensor) -> torch.Tensor:
    """The right value with a gradient of 1."""
    return x + (x * x - x).detach()


def broken(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel\nsecond line")


def test_a_right_provider_passes_with_its_errors():
    found = gate(square(), provider("right", lambda x: x * x))
    assert isinstance(found, Ready) and set(found.errors) == set(MODES)
    assert 0 <= found.errors["fwd"][1] <= found.errors["fwd"][0] < 1e-6


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda x: x * x + 1e-3, "wrong: forward"),
        (crooked_backward, "wrong: backward"),
        (lambda x: x * x * torch.where(torch.arange(len(x)) == 7, torch.nan, 1.0), "wrong: forward"),
        (lambda x: (x * x)[:-1], "failed"),
        (broken, "failed: RuntimeError: no kernel"),
    ],
)
def test_a_wrong_provider_gets_a_reason_and_no_time(body, words):
    measured = measure(
        square(),
        [provider("right", lambda x: x * x), provider("other", body)],
        Clock(CPU),
        repeats=3,
        bitwise=1,
    )
    other = [row for row in measured if row["provider"] == "other"]
    assert len(other) == 1 and words in other[0]["status"] and "us_p50" not in other[0]
    assert [row["mode"] for row in measured if row["provider"] == "right"] == list(MODES)
    assert "other: " + other[0]["status"] in render(measured)


def test_absent_and_inapplicable_providers():
    entries = [
        provider("absent", lambda x: x, obstacle=lambda problem: "not installed"),
        provider("senseless", lambda x: x, applies=lambda problem: False),
    ]
    (row,) = measure(square(), entries, Clock(CPU), repeats=3)
    assert row["provider"] == "absent" and row["status"] == "absent: not installed"


def test_errors_are_in_units_of_the_rms():
    expected = torch.full((4,), 2.0, dtype=torch.float64)
    largest, rms = errors(torch.tensor([2.0, 2.0, 2.0, 2.4]), expected)
    assert largest == pytest.approx(0.2) and rms == pytest.approx(0.1)
    assert errors(torch.empty(0), torch.empty(0, dtype=torch.float64)) == (0.0, 0.0)


def test_rounds_are_interleaved_and_no_work_always_follows_the_same_one():
    order: list[str] = []
    works = {name: Work(lambda _, name=name: order.append(name)) for name in "abcd"}
    taken = Clock(CPU).interleaved(works, "not controlled", repeats=50, budget=60)
    rounds = ["".join(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert len(rounds) == 51 and all(sorted(one) == list("abcd") for one in rounds)
    for name in "abcd":
        assert {before for before, after in zip(order, order[1:]) if after == name} >= set("abcd") - {name}
    assert {name: len(values) for name, values in taken.items()} == dict.fromkeys("abcd", 50)


def test_work_over_budget_is_run_three_times_only():
    taken = Clock(CPU).interleaved({"a": Work(lambda _: torch.randn(10**6))}, "not controlled", repeats=100, budget=0)
    assert len(taken["a"]) == 3


def test_long_work_sits_out_rounds_that_are_spread_evenly():
    order: list[str] = []
    works = {name: Work(lambda _, name=name: order.append(name)) for name in "ab"}
    works["slow"] = Work(lambda _: (order.append("slow"), time.sleep(0.05)))
    taken = Clock(CPU).interleaved(works, "not controlled", repeats=60, budget=3 * 0.25)
    assert len(taken["a"]) == len(taken["b"]) == 60 and 3 <= len(taken["slow"]) <= 5
    places = [i for i, name in enumerate(order[3:]) if name == "slow"]
    apart = [b - a for a, b in zip(places, places[1:])]
    assert min(apart) > 0.5 * len(order) / len(places)


def test_only_the_run_is_timed():
    slow = Work(lambda made: made, prepare=lambda: sum(torch.randn(10**6).sum() for _ in range(20)))
    assert Clock(CPU).seconds(slow, "not controlled") < 1e-3


def test_quantile():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5 and quantile([7.0], 0.8) == 7.0
    assert quantile([0.0, 10.0], 0.2) == 2.0


def test_peak_memory():
    a = torch.randn(256, 256)
    assert peak_bytes(lambda: a + 1, CPU) == pytest.approx(a.nbytes, abs=64)
    # Three at the peak: the first product goes once the clone of the second is made.
    assert peak_bytes(lambda: (a * 2) + (a * 2).clone(), CPU) == pytest.approx(3 * a.nbytes, abs=64)


def test_peak_memory_sees_buffers_inside_an_operator():
    """The eigenvalues take 1 KiB; the copy of the matrix that LAPACK destroys is never a tensor of Python's."""
    a = torch.randn(256, 256)
    assert peak_bytes(lambda: torch.linalg.eigvalsh(a), CPU) > a.nbytes


def test_launches_are_split_by_the_call_they_belong_to():
    """Made-up events, as the profiler of a GPU run gives them: two marked calls, their annotations, three kernels."""
    cuda, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, kind, start: float, end: float):
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, device_type=kind, time_range=span)

    events = [
        event("bench call: a/fwd", host, 0, 100),
        event("bench call: a/fwd", cuda, 10, 60),
        event("bench call: b/fwd", host, 100, 200),
        event("aten::mm", host, 5, 8),
        event("kernel one", cuda, 20, 30),
        event("Memset", cuda, 40, 45),
        event("kernel two", cuda, 120, 127),
        event("kernel of nobody", cuda, 300, 301),
    ]
    assert split_by_mark(events) == {"a/fwd": (2, 15), "b/fwd": (1, 7)}


def test_bitwise_repeats():
    assert repeats_bitwise(lambda: [torch.ones(3)], 3)
    assert not repeats_bitwise(lambda: [torch.randn(3)], 3)


def test_best_baseline_is_the_fastest_that_is_not_ours_in_the_same_scope():
    made = [
        {"provider": p, "ours": o, "scope": s, "us_p50": t, "status": "ok"}
        for p, o, s, t in (
            ("mine", "yes", "call", "1"),
            ("slow", "no", "call", "9"),
            ("fast", "no", "call", "10"),
            ("bare", "no", "kernel", "2"),
        )
    ]
    best = best_baseline(made, "call")
    assert best is not None and best["provider"] == "slow"
    assert best_baseline(made[:1], "call") is None


def test_rows_are_appended_read_back_and_the_newest_counts(tmp_path: Path):
    path = tmp_path / "results" / "toy.csv"
    where = rows.environment(CPU)
    assert where["device"] and where["torch"] == torch.__version__ and where["date"].count("-") == 2
    measured = measure(square(), [provider("right", lambda x: x * x)], Clock(CPU), repeats=3, bitwise=1)
    for _ in range(2):
        rows.append(path, [{**row, **where} for row in measured])
    found = rows.read(path)
    assert len(found) == 3 and len(path.read_text().splitlines()) == 7
    assert all(row["status"] == "ok" and row["bitwise"] == "yes" and float(row["us_p50"]) > 0 for row in found)
    assert rows.read(tmp_path / "absent.csv") == []


def test_a_file_with_other_columns_is_refused(tmp_path: Path):
    path = tmp_path / "toy.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(["op", "speed"])
    with pytest.raises(DataError, match="columns"):
        rows.append(path, [])
