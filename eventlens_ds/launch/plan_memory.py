"""Memory of one GPU under each ZeRO stage, in bytes, from shapes and the file of ds_configs that would be used.

In: `Shapes` of a model (plan_shapes.py), settings of zero_optimization, number of GPUs. Out: a `Memory` per stage.
What DeepSpeed 0.19 holds was read in runtime/engine.py, zero/stage_1_and_2.py, zero/stage3.py and bf16_optimizer.py;
P parameters of which T learn, W GPUs, b bytes of the model's dtype:
  0        P b, gradients T b, AdamW 8 T, and with bf16 master weights 4 T
  1        as 0, AdamW and master weights over W; with bf16 and W ranks an fp32 sum of gradients 4 T (BF16_Optimizer)
  2        as 1, gradients of the own share only, 4 T / W (a second copy from the second row of a step on), and one or
           two reduce buckets
  3        P b / W too, a copy of the bucket in the order of the ranks, and parameters gathered for use: at most
           stage3_max_live_parameters
Decision: the peak is the larger of two moments, backward (activations are there) and the optimizer step (they are not,
but fp32 copies of gradients are); adding up the maxima of both would refuse what fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eventlens_ds.launch.plan_shapes import Shapes

DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "allgather_bucket_size": 500_000_000,
    "overlap_comm": False,
    "contiguous_gradients": True,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
"""DeepSpeed's own values of what a file may leave out (zero/config.py)."""

ADAM = 8
"""Bytes per trained parameter of AdamW's two moments, in fp32."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by what they are for; `total` is the larger of the two moments."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    gathered: int
    activations: int
    step: int

    @property
    def states(self) -> int:
        """What stays between steps."""
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        backward = self.gradients + self.buffers + self.gathered + self.activations
        return self.states + max(backward, self.gradients + self.step)


def settings(zero: dict[str, Any]) -> dict[str, Any]:
    """zero_optimization of a file with DeepSpeed's defaults; overlap_comm is on by default in stage 3."""
    return {**DEFAULTS, "overlap_comm": zero.get("stage") == 3, **zero}


def memory(shapes: Shapes, zero: dict[str, Any], world: int, micro_steps: int, *, gloo: bool = False) -> Memory:
    """Memory of one of `world` GPUs whose optimizer step takes `micro_steps` rows. gloo: CPU ranks, whose
    reduce-scatter is an all-reduce of one more copy."""
    asked = settings(zero) | {"copies": 1 + gloo}
    stage = asked["stage"]
    made = (_stage_0, _stage_1, _stage_2, _stage_3)[stage]
    return made(shapes, asked, world, micro_steps)


def _bucket(asked: dict[str, Any], dtype_bytes: int) -> int:
    """Flat buffers that gradients wait in; DeepSpeed allocates them whole, however small the model is."""
    return int(asked["reduce_bucket_size"] * dtype_bytes * asked["contiguous_gradients"])


def _stage_0(shapes: Shapes, asked: dict[str, Any], world: int, micro_steps: int) -> Memory:
    b, trained = shapes.dtype_bytes, shapes.trained
    master = 0 if b == 4 else 4 * trained
    # Gradients are joined for the all-reduce, bucket by bucket, and with bf16 copied to fp32 for the step.
    joined = min(trained, DEFAULTS["reduce_bucket_size"]) * b if world > 1 else 0
    return Memory(
        parameters=shapes.total * b,
        gradients=trained * b,
        optimizer=ADAM * trained + master,
        buffers=0,
        gathered=0,
        activations=shapes.activations if micro_steps > 1 else max(0, shapes.activations - trained * b),
        step=max(joined, 0 if b == 4 else 4 * trained),
    )


def _stage_1(shapes: Shapes, asked: dict[str, Any], world: int, micro_steps: int) -> Memory:
    b, trained = shapes.dtype_bytes, shapes.trained
    share = -(-trained // world)
    if b == 2:
        return Memory(
            parameters=shapes.total * b,
            gradients=4 * trained,
            optimizer=(ADAM + 4) * share,
            buffers=0,
            gathered=0,
            activations=shapes.activations,
            step=0,
        )
    buckets = _bucket(asked, b) * (1 + bool(asked["overlap_comm"]))
    return Memory(
        parameters=shapes.total * b,
        gradients=trained * b,
        optimizer=(ADAM + 4) * share,
        buffers=buckets,
        gathered=0,
        activations=shapes.activations if micro_steps > 1 else max(0, shapes.activations - trained * b),
        step=buckets + 4 * share,
    )


def _stage_2(shapes: Shapes, asked: dict[str, Any], world: int, micro_steps: int) -> Memory:
    b = shapes.dtype_bytes
    share = -(-shapes.trained // world)
    buckets = _bucket(asked, b) * (1 + bool(asked["overlap_comm"]))
    return Memory(
        parameters=shapes.total * b,
        gradients=4 * share + (b * share if micro_steps > 1 else 0),
        optimizer=(ADAM + 4) * share,
        buffers=buckets,
        gathered=0,
        activations=shapes.activations,
        step=4 * share,
    )


def _stage_3(shapes: Shapes, asked: dict[str, Any], world: int, micro_steps: int) -> Memory:
    b = shapes.dtype_bytes
    share = -(-shapes.trained // world)
    sizes = [p.numel for p in shapes.parameters]
    persistent = sum(n for n in sizes if n <= asked["stage3_param_persistence_threshold"])
    # Parameters stay gathered until max_live is reached, unless their next use is farther than the reuse distance.
    reach = asked["stage3_max_live_parameters"] if asked["stage3_max_reuse_distance"] else 0
    needed = max(sizes) + asked["stage3_prefetch_bucket_size"]
    gathered = min(shapes.total - persistent, max(reach, needed))
    bucket = _bucket(asked, b)
    ordered = min(asked["reduce_bucket_size"], shapes.trained) * b * asked["copies"]
    return Memory(
        parameters=-(-shapes.total // world) * b + persistent * b,
        gradients=4 * share,
        optimizer=(ADAM + 4) * share,
        buffers=bucket + ordered,
        gathered=gathered * b,
        activations=shapes.activations_zero3,
        step=4 * share + bucket,
    )
