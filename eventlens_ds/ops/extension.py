"""The compiled extension of csrc/: its operators, found and loaded once, and asked what it can do.

In: nothing. Out: `obstacle(device type)`, empty when the extension has kernels for it, and the schemas and fake kernels
of torch.ops.eventlens_csrc.*, which exist whether it is built or not.
Decision: schemas are defined here in Python and C++ only implements them, so the package imports, traces and tests
without the extension. A library that was built from other sources than those beside it is refused by its build record,
which is read from the file: its operators would be called with arguments that they do not expect.
"""

from __future__ import annotations

import functools
import logging
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eventlens_ds.errors import ArgumentError
from eventlens_ds.ops import build

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
"""Where the library lies."""
SOURCES = Path(__file__).parents[2] / "csrc"
"""The sources of a checkout; an installed wheel has none."""
REBUILD = "run: python setup.py build_ext --inplace"

SCHEMAS = {
    "roi_align_plan": "(Tensor boxes, SymInt height, SymInt width, SymInt bins_y, SymInt bins_x, float spatial_scale, "
    "int sampling_ratio, bool aligned, bool mean) -> (Tensor wy, Tensor wx, Tensor window)",
    "roi_align_forward": "(Tensor[] levels, Tensor wy, Tensor wx, Tensor window, Tensor offsets, SymInt height, "
    "SymInt width, SymInt prefix) -> Tensor",
    "roi_align_backward": "(Tensor grad, Tensor wy, Tensor wx, Tensor window, Tensor offsets, SymInt height, "
    "SymInt width, SymInt prefix, SymInt batch, SymInt num_levels) -> Tensor",
    "moa_route": "(Tensor logits, SymInt k, bool renormalise) -> (Tensor weights, Tensor experts)",
    "moa_sort_by_expert": "(Tensor experts, SymInt num_experts) -> (Tensor order, Tensor offsets)",
    "moa_gather": "(Tensor x, Tensor order, SymInt k) -> Tensor",
    "moa_combine": "(Tensor y, Tensor order, Tensor weights) -> Tensor",
}

_library = torch.library.Library("eventlens_csrc", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)


@dataclass(frozen=True)
class Loaded:
    """What came of loading the library: its record, or why it is not used."""

    obstacle: str
    record: dict[str, str] = field(default_factory=dict)


def obstacle(device_type: str) -> str:
    """What keeps the extension from running on a device type; "" when nothing does."""
    loaded = _load()
    if loaded.obstacle or device_type == "cpu":
        return loaded.obstacle
    if device_type != "cuda":
        return f"csrc/ has no kernels for {device_type}"
    if not loaded.record["cuda"]:
        return f"the extension has no CUDA part: {loaded.record['no_cuda']}"
    return "" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"


def record() -> dict[str, str]:
    """What the loaded library was built from (see build.read_record); empty when there is none."""
    return dict(_load().record)


def require(device: torch.device) -> None:
    """Raises ArgumentError unless the extension has kernels for the device."""
    why = obstacle(device.type)
    if why:
        raise ArgumentError(f"csrc cannot run on {device.type}: {why}")


@functools.cache
def _load() -> Loaded:
    library = FOLDER / build.LIBRARY
    if not library.is_file():
        return Loaded(_missing())
    try:
        about = build.read_record(library)
    except build.BuildError as error:
        return Loaded(f"{error}; {REBUILD}")
    sources = build.fingerprint(SOURCES)
    if sources and about["sources"] != sources:
        return Loaded(f"{library.name} was built from other sources ({about['sources']}, now {sources}); {REBUILD}")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return Loaded(f"{library.name} (built beside torch {about['torch']}) does not load: {error}; {REBUILD}")
    logger.debug("loaded %s: %s", library, about)
    return Loaded("", about)


def _missing() -> str:
    """Why there is no library, as the build left it on record."""
    note = FOLDER / build.OBSTACLE
    reason = note.read_text().strip() if note.is_file() else ""
    return f"the extension of csrc/ is not built ({reason or sysconfig.get_platform()}); {REBUILD}"


@torch.library.register_fake("eventlens_csrc::roi_align_plan", lib=_library)
def _fake_plan(boxes, height, width, bins_y, bins_x, spatial_scale, sampling_ratio, aligned, mean):
    count = boxes.shape[0]
    wy = boxes.new_empty(count, 1 if mean else bins_y, height)
    wx = boxes.new_empty(count, 1 if mean else bins_x, width)
    return wy, wx, boxes.new_empty(count, 4, dtype=torch.int32)


@torch.library.register_fake("eventlens_csrc::roi_align_forward", lib=_library)
def _fake_forward(levels, wy, wx, window, offsets, height, width, prefix):
    return levels[0].new_empty(wy.shape[0], wy.shape[1], wx.shape[1], levels[0].shape[2])


@torch.library.register_fake("eventlens_csrc::roi_align_backward", lib=_library)
def _fake_backward(grad, wy, wx, window, offsets, height, width, prefix, batch, num_levels):
    return grad.new_empty(batch, prefix + height * width, grad.shape[3])


@torch.library.register_fake("eventlens_csrc::moa_route", lib=_library)
def _fake_route(logits, k, renormalise):
    return logits.new_empty(logits.shape[0], k), logits.new_empty(logits.shape[0], k, dtype=torch.int32)


@torch.library.register_fake("eventlens_csrc::moa_sort_by_expert", lib=_library)
def _fake_sort(experts, num_experts):
    return experts.new_empty(experts.numel()), experts.new_empty(num_experts + 1)


@torch.library.register_fake("eventlens_csrc::moa_gather", lib=_library)
def _fake_gather(x, order, k):
    return x.new_empty(order.shape[0], x.shape[1])


@torch.library.register_fake("eventlens_csrc::moa_combine", lib=_library)
def _fake_combine(y, order, weights):
    return y.new_empty(weights.shape[0], y.shape[1])
