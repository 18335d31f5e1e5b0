"""What one call takes besides time: peak memory on any device, kernel launches and kernel time on CUDA.

In: a function of no arguments. Out: bytes above what was allocated before the call; launches and microseconds.
Decision: on a CPU the peak is read from the events that PyTorch's allocator reports to the profiler, in order of
time. That counts buffers inside operators, compiled code and extensions, which hooks on tensors do not see; it does
not count what a library takes behind the allocator's back (workspaces of BLAS and oneDNN), and a buffer from before the
call that is freed during it does not lower the peak.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Read once, at the first profile: torch 2.13 writes two lines to stderr for each.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "bench call: "


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes allocated during `call` above those at its start, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    del kept
    results = recorded.profiler.kineto_results if recorded.profiler else None
    assert results is not None, "the profiler kept no events"
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = peak = 0
    for _, change in events:
        held += change
        peak = max(peak, held)
    return peak


def launches(calls: Mapping[str, Callable[[], object]]) -> dict[str, tuple[int, float]]:
    """(kernels, copies and fills started on the GPU, their summed microseconds) of one call of each on CUDA.

    The sum is what a CUDA graph of the same call could not go below: it holds no gaps between launches. All calls share
    one profile, because starting one takes longer than most of them; each is finished before the next begins.
    """
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for name, call in calls.items():
            with record_function(_MARK + name):
                call()
                torch.cuda.synchronize()
    return split_by_mark(list(recorded.events() or ()))


def split_by_mark(events: Sequence[Any]) -> dict[str, tuple[int, float]]:
    """Counts and microseconds of the GPU's events that started within each marked span of the host."""
    cuda = torch.autograd.DeviceType.CUDA
    spans = {
        e.name.removeprefix(_MARK): e.time_range for e in events if e.name.startswith(_MARK) and e.device_type != cuda
    }
    found = dict.fromkeys(spans, (0, 0.0))
    for event in events:
        # A marked span also shows as an annotation on the GPU's own track.
        if event.device_type != cuda or event.name.startswith(_MARK):
            continue
        for name, span in spans.items():
            if span.start <= event.time_range.start < span.end:
                number, total = found[name]
                found[name] = number + 1, total + event.time_range.elapsed_us()
    return found


def repeats_bitwise(call: Callable[[], list[torch.Tensor]], times: int) -> bool:
    """Whether `times` further calls give the bits of the first one."""
    first = call()
    return all(all(torch.equal(a, b) for a, b in zip(first, call(), strict=True)) for _ in range(times))
