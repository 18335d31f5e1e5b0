"""Measures the providers of one op on one problem: the test gate first, then time, memory, launches, repeatability.

In: a Problem (inputs, float64 result, bytes) and Providers. Out: rows for the CSV (see rows.py).
Decision: a provider that disagrees with the float64 result, forward or backward, gets a row that says so and no time;
so does one that is absent or fails. Nobody can be fast and wrong. `fwd` is the forward of training (it saves what
backward needs), `bwd` runs on a fresh forward each time, which is not timed.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from eventlens_ds.bench.kernels.clock import Cache, Clock, Work, quantile
from eventlens_ds.bench.kernels.counters import launches, peak_bytes, repeats_bitwise

logger = logging.getLogger(__name__)

MODES = ("fwd", "bwd", "fwd+bwd")

TOLERANCE = {
    torch.float32: (1e-5, 2e-4),
    torch.float16: (2e-3, 3e-2),
    torch.bfloat16: (1.5e-2, 1.5e-1),
}
"""Gate per dtype: (rms error, largest error) in units of the rms of the float64 result. A bfloat16 store alone costs
about 1.7e-3 rms, a wrong corner, border or expert anywhere about 1 in the largest error."""


@dataclass
class Problem:
    """One shape with its data. Expected values are float64 and in the layout of the public op.

    inputs     what a provider is given, by name; tensors of `leaves` require a gradient
    expected   float64 output; expected_grads: float64 gradients, in the order of Run.leaves
    min_bytes  mode -> bytes that any implementation must read or write
    held_bytes, io_bytes   mode -> bytes that exist before the call, and these with what the call returns
    """

    op: str
    case: str
    dtype: torch.dtype
    device: torch.device
    inputs: dict[str, Any]
    grad_output: torch.Tensor
    expected: torch.Tensor
    expected_grads: tuple[torch.Tensor, ...]
    min_bytes: dict[str, int]
    held_bytes: dict[str, int]
    io_bytes: dict[str, int]
    flops: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODES, 0))
    """mode -> operations that any implementation must do; 0 where only bytes count"""


@dataclass
class Run:
    """A provider made ready for one problem.

    forward      computes the output from `leaves`; output and gradients may have a layout of the provider's own
    restore      turns (output, gradients) into the layout of the public op, for the gate
    """

    forward: Callable[[], torch.Tensor]
    leaves: Sequence[torch.Tensor]
    grad_output: torch.Tensor
    restore: Callable[[torch.Tensor, Sequence[torch.Tensor]], tuple[torch.Tensor, Sequence[torch.Tensor]]] = (
        lambda output, grads: (output, grads)
    )


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    prepare   problem -> Run; what it does is not timed
    applies   whether it says anything about the problem; if not, there is no row (a float16 form of float32 features)
    obstacle  problem -> why the provider cannot take it ("" when it can): a missing package, an unsupported option
    scope     call, or kernel when `prepare` makes weights or layouts that a model would have to make each time
    ours      an implementation of this package; the others are baselines
    """

    name: str
    prepare: Callable[[Problem], Run]
    obstacle: Callable[[Problem], str] = lambda problem: ""
    applies: Callable[[Problem], bool] = lambda problem: True
    scope: str = "call"
    ours: bool = False


@dataclass
class Ready:
    """A provider that passed the gate, with its errors: mode -> (max, rms)."""

    provider: Provider
    run: Run
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def work(self, mode: str) -> Work:
        """What one run of a mode is, and what comes before it untimed."""
        run = self.run
        if mode == "fwd":
            return Work(lambda _: run.forward())
        if mode == "bwd":
            return Work(self._backward, prepare=run.forward)
        return Work(lambda _: self._backward(run.forward()))

    def _backward(self, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, list(self.run.leaves), self.run.grad_output)


def errors(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(largest, rms) difference in units of the rms of `expected`; infinite where one is NaN and the other is not."""
    difference = found.detach().to(torch.float64) - expected
    scale = float(expected.square().mean().sqrt()) if expected.numel() else 0.0
    largest = float(difference.abs().amax()) if difference.numel() else 0.0
    rms = float(difference.square().mean().sqrt()) if difference.numel() else 0.0
    if largest != largest:
        return float("inf"), float("inf")
    return (largest / scale, rms / scale) if scale else (largest, rms)


def gate(problem: Problem, provider: Provider) -> Ready | str:
    """The provider with its errors, or a status that says why it gets no time."""
    reason = provider.obstacle(problem)
    if reason:
        return f"absent: {reason}"
    try:
        run = provider.prepare(problem)
        output = run.forward()
        grads = torch.autograd.grad(output, list(run.leaves), run.grad_output)
        output, found = run.restore(output.detach(), grads)
        shapes = [tuple(t.shape) for t in (output, *found)]
        if shapes != [tuple(t.shape) for t in (problem.expected, *problem.expected_grads)]:
            return f"wrong: shapes {shapes}"
        forward = errors(output, problem.expected)
        pairs = [errors(grad, expected) for grad, expected in zip(found, problem.expected_grads, strict=True)]
    except Exception as error:  # a baseline may fail in any way; the row says how
        logger.debug("%s on %s failed", provider.name, problem.case, exc_info=True)
        release(problem.device)
        return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    backward = max(pairs)[0], max(rms for _, rms in pairs)
    worst = max(forward[0], backward[0]), max(forward[1], backward[1])
    rms_limit, max_limit = TOLERANCE[problem.dtype]
    if worst[1] > rms_limit or worst[0] > max_limit:
        side = "forward" if forward[1] > rms_limit or forward[0] > max_limit else "backward"
        return f"wrong: {side} differs from float64 by rms {worst[1]:.1e}, max {worst[0]:.1e}"
    return Ready(provider, run, {"fwd": forward, "bwd": backward, "fwd+bwd": worst})


def measure(
    problem: Problem,
    providers: Sequence[Provider],
    clock: Clock,
    *,
    modes: Sequence[str] = MODES,
    repeats: int = 100,
    budget: float = 10.0,
    bitwise: int = 20,
    flop_rate: float = float("inf"),
) -> list[dict[str, Any]]:
    """Rows of one problem. budget: seconds for all providers of one mode and cache state; flop_rate: see rows.py."""
    ready: dict[str, Ready] = {}
    rows: list[dict[str, Any]] = []
    for provider in (entry for entry in providers if entry.applies(problem)):
        found = gate(problem, provider)
        if isinstance(found, Ready):
            ready[provider.name] = found
        else:
            rows.append({**_labels(problem, provider), "mode": "all", "status": found})
    started = _launches(ready) if problem.device.type == "cuda" else {}
    for mode in modes:
        counted = {name: _counts(problem, entry, mode, bitwise) for name, entry in ready.items()}
        copy = _copy(problem.min_bytes[mode], problem.device)
        for cache in clock.caches:
            works = {"": copy, **{name: entry.work(mode) for name, entry in ready.items()}}
            taken = clock.interleaved(works, cache, repeats=repeats, budget=budget)
            copied = quantile(taken.pop(""), 0.5)
            for name, values in taken.items():
                timed = _timed(problem, mode, cache, values, copied, flop_rate)
                largest, rms = ready[name].errors[mode]
                rows.append(
                    {
                        **_labels(problem, ready[name].provider),
                        **timed,
                        **counted[name],
                        **started.get((name, mode), {}),
                        "max_error": f"{largest:.2e}",
                        "rms_error": f"{rms:.2e}",
                    }
                )
    return rows


def _labels(problem: Problem, provider: Provider) -> dict[str, Any]:
    return {
        "op": problem.op,
        "case": problem.case,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "provider": provider.name,
        "scope": provider.scope,
        "ours": "yes" if provider.ours else "no",
    }


def _timed(
    problem: Problem, mode: str, cache: Cache, values: list[float], copied: float, flop_rate: float
) -> dict[str, Any]:
    low, middle, high = (quantile(values, share) for share in (0.2, 0.5, 0.8))
    return {
        "mode": mode,
        "cache": cache,
        "status": "ok",
        "us_p20": f"{1e6 * low:.1f}",
        "us_p50": f"{1e6 * middle:.1f}",
        "us_p80": f"{1e6 * high:.1f}",
        "repeats": len(values),
        "copy_us": f"{1e6 * copied:.1f}",
        "copy_share": f"{copied / middle:.3f}",
        "roofline_share": f"{max(copied, problem.flops[mode] / flop_rate) / middle:.3f}",
        "gb_per_s": f"{problem.min_bytes[mode] / middle / 1e9:.1f}",
        "min_bytes": problem.min_bytes[mode],
        "held_bytes": problem.held_bytes[mode],
        "io_bytes": problem.io_bytes[mode],
    }


def _counts(problem: Problem, entry: Ready, mode: str, bitwise: int) -> dict[str, Any]:
    """Memory and repeatability of one provider, outside the timed rounds."""
    work = entry.work(mode)
    state = work.prepare()
    peak = peak_bytes(lambda: work.run(state), problem.device)
    repeats = repeats_bitwise(lambda: _tensors(_once(work)()), bitwise)
    return {"peak_bytes": peak, "bitwise": "yes" if repeats else "no"}


def _launches(ready: Mapping[str, Ready]) -> dict[tuple[str, str], dict[str, Any]]:
    """Launches and kernel time by provider and mode. Backward cannot run alone, so it is fwd+bwd less fwd."""
    calls = {f"{name}/{mode}": _once(r.work(mode)) for name, r in ready.items() for mode in ("fwd", "fwd+bwd")}
    found = launches(calls)
    columns = {}
    for name in ready:
        whole, part = found.get(f"{name}/fwd+bwd"), found.get(f"{name}/fwd")
        if whole is None or part is None:
            logger.warning("the profiler lost the launches of %s", name)
            continue
        for mode, (number, total) in zip(MODES, (part, (whole[0] - part[0], whole[1] - part[1]), whole)):
            columns[name, mode] = {"launches": number, "kernel_us": f"{total:.1f}"}
    return columns


def _once(work: Work) -> Callable[[], object]:
    return lambda: work.run(work.prepare())


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _copy(total: int, device: torch.device) -> Work:
    """A copy that reads total / 2 bytes and writes as many."""
    # Ones, because pages of zeros that nobody wrote are one cached page on Linux.
    source = torch.ones(max(1, total // 2), dtype=torch.int8, device=device)
    target = torch.ones_like(source)
    return Work(lambda _: target.copy_(source))


def release(device: torch.device) -> None:
    """Give unused memory back, so that one provider's failure is not the next one's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def matmul_rate(dtype: torch.dtype, clock: Clock) -> float:
    """FLOP/s of a large square matrix product in this process: median of 7 after one that is dropped."""
    size = 8192 if clock.device.type == "cuda" else 1024
    left = torch.randn(size, size, device=clock.device).to(dtype)
    right = torch.randn(size, size, device=clock.device).to(dtype)
    work = {"": Work(lambda _: left @ right)}
    taken = clock.interleaved(work, clock.caches[-1], repeats=7, budget=5.0)
    return 2 * size**3 / quantile(taken[""], 0.5)
