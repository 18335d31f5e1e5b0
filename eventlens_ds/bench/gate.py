"""The gate of `bench train`: every arm's loss on the same planned samples, before any speed is measured.

In: the arms, and the planned steps they will be timed on. Out: per arm the loss, the log-likelihood of every sample and
the supervised tokens, from the data path and the forward that the arm is timed with; `check` refuses arms that differ.
Decision: the model is drawn from the seed, its adapters are given values (they start as the identity, so no arm could
get them wrong), and losses are compared in fp32 to 1e-5. In a run in bf16 they are compared a second time with the
attention and kernels that bf16 takes, to what its 8 bits allow. `shapes` runs the same forwards, and a backward, on
tensors without values: a model of any size in no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from eventlens_ds.bench import arms, hf_trainer
from eventlens_ds.bench.arms import BASELINE, Job, Setting
from eventlens_ds.bench.parts import flops_by_part
from eventlens_ds.data.records import Batch
from eventlens_ds.errors import DataError
from eventlens_ds.model import lora, objective
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.model.stages import apply_stage
from eventlens_ds.train.metrics import sample_hash
from eventlens_ds.train.run import tasks_of

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest difference of two losses, relative to the loss."""

OF_A_SAMPLE = 10.0
"""The log-likelihood of a single sample may differ by this many times the tolerance: errors do not average out in it.
Without this check a fault in one sample of many thousands would be lost in the mean."""


@dataclass(frozen=True)
class Seen:
    """What an arm made of the samples: loss of one optimizer step over all of them."""

    arm: str
    dtype: str
    loss: float
    supervised: int
    samples: int
    ids: str
    logp: dict[str, float]
    """Sample id -> log-likelihood of all its continuations together."""


def losses(job: Job, device: str) -> list[dict[str, Any]]:
    """`Seen` of every arm of the job as dicts, on its timed steps, in one process."""
    found: list[dict[str, Any]] = []
    for dtype in dict.fromkeys(("fp32", arms.setting(job, job.arms[0]).config.train.dtype)):
        model: RegionVLM | None = None
        for arm in job.arms:
            given = arms.setting(job, arm, f"--train.dtype={dtype}")
            model = model or build(given, device)
            found.append(asdict(seen_by(model, given, arm, job.micro_batch, device)))
        del model
    return found


def build(given: Setting, device: str) -> RegionVLM:
    """The model of a setting with values in its adapters, without an engine."""
    from eventlens_ds.config.deepspeed import deepspeed_dict
    from eventlens_ds.runtime.build_model import new_model

    # The sums of a convolution depend on the number of pictures once they are rounded to TF32.
    torch.backends.cudnn.allow_tf32 = False
    model = new_model(given.config, given.architecture, deepspeed_dict(given.config, 1, "zero0")).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.adapters.named_parameters():
            if name.endswith(("_up", "_bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(device)


@torch.no_grad()
def seen_by(model: RegionVLM, given: Setting, arm: str, micro_batch: int, device: str) -> Seen:
    """Loss over all timed samples as `arm` lays them out: sums of all its micro-steps over their joint counts."""
    model.choose_kernels(given.config.model.kernels)
    model.config.text_config._attn_implementation = given.architecture.text_config._attn_implementation
    timed = replace(given, steps=given.by_phase[1], phases=given.phases._replace(warmup=0, clocked=0))
    sums = torch.zeros(3, dtype=torch.float64)
    counts = torch.zeros(3, dtype=torch.float64)
    ids: list[str] = []
    logp: dict[str, float] = {}
    supervised = 0
    for batch, token_logp in (_padded if arm == BASELINE else _rows)(model, timed, arm, micro_batch, device):
        sums += objective.row_sums(token_logp, batch, given.config.objective).sums.double().cpu()
        counts += objective.counts(batch).cpu()
        ids += batch.sample_ids
        _add_up(logp, token_logp, batch)
        supervised += batch.target_ids.numel()
    loss = float(objective.step_loss(sums, counts, given.config.objective))
    return Seen(arm, given.config.train.dtype, loss, supervised, len(ids), sample_hash(ids), logp)


def _add_up(logp: dict[str, float], token_logp: torch.Tensor, batch: Batch) -> None:
    """Add the log-probabilities of a batch to those of its samples."""
    of_sample = batch.leaf_sample[batch.target_leaf]
    sums = torch.zeros(max(1, len(batch.sample_ids)), dtype=torch.float64, device=token_logp.device)
    sums.index_add_(0, of_sample, token_logp[: of_sample.numel()].double())
    for name, value in zip(batch.sample_ids, sums.tolist()):
        logp[name] = logp.get(name, 0.0) + value


def _rows(model: RegionVLM, given: Setting, arm: str, _micro_batch: int, device: Any) -> Any:
    for step in arms.arm_rows(given, arm):
        for row in step:
            batch = _moved(given.data.batch(row.groups, 0), device)
            yield batch, model(batch)


def _padded(model: RegionVLM, given: Setting, _arm: str, micro_batch: int, device: Any) -> Any:
    schedule = hf_trainer.Schedule(given, 1, micro_batch)
    collate = hf_trainer.Collator(given.data)
    padded = hf_trainer.PaddedModel(model, given.config.objective)
    model.config.text_config._attn_implementation = hf_trainer.ATTENTION
    for first in range(0, len(schedule.indices), micro_batch):
        inputs = collate([schedule.dataset[i] for i in schedule.indices[first : first + micro_batch]])
        batch, sequences = hf_trainer.batch_of(inputs)
        batch = _moved(batch, device)
        yield batch, padded.token_logp(batch, sequences)


def _moved(batch: Batch, to: Any) -> Batch:
    """The batch on a device; in a FakeTensorMode without its pixels, which leaves nothing but shapes behind them."""
    return batch.to(to) if isinstance(to, str) else replace(batch, pixel_values=to.from_tensor(batch.pixel_values))


def check(found: Sequence[dict[str, Any]]) -> float:
    """Largest relative difference of an fp32 loss from that of the first arm.

    Raises DataError when an arm saw other samples, other supervised tokens, or makes another loss of them.
    """
    worst = 0.0
    for dtype, tolerance in TOLERANCE.items():
        rows = [Seen(**row) for row in found if row["dtype"] == dtype]
        for row in rows[1:]:
            first = rows[0]
            if (row.ids, row.samples) != (first.ids, first.samples):
                raise DataError(
                    f"bench train: {row.arm} trains on other samples than {first.arm} ({row.samples} of hash "
                    f"{row.ids}, {first.samples} of hash {first.ids}); no speed is measured"
                )
            if row.supervised != first.supervised:
                raise DataError(
                    f"bench train: {row.arm} has {row.supervised} supervised tokens, {first.arm} {first.supervised}; "
                    "no speed is measured"
                )
            _check_samples(first, row, OF_A_SAMPLE * tolerance)
            difference = abs(row.loss - first.loss) / abs(first.loss)
            # Written so that a NaN is refused.
            if not difference <= tolerance:
                raise DataError(
                    f"bench train: on the same samples in {dtype} {row.arm} has loss {row.loss:.8g}, {first.arm} "
                    f"{first.loss:.8g}: more than {tolerance} apart; no speed is measured"
                )
            worst = max(worst, difference) if dtype == "fp32" else worst
    return worst


def _check_samples(first: Seen, other: Seen, tolerance: float) -> None:
    for name, value in first.logp.items():
        if not abs(other.logp[name] - value) <= tolerance * max(1.0, abs(value)):
            raise DataError(
                f"bench train: in {first.dtype} sample {name} has log-likelihood {other.logp[name]:.8g} with "
                f"{other.arm}, {value:.8g} with {first.arm}; no speed is measured"
            )


def shapes(job: Job) -> list[dict[str, Any]]:
    """Forward and backward of the first micro-step of every arm on tensors without values.

    Per arm, of that micro-step: samples, tokens of the language model without padding and with it (`computed`),
    supervised tokens, images, regions, and the FLOPs of each part. Kernels are the reference: the others are checked
    against its shapes by their own tests.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    found = []
    for arm in job.arms:
        given = arms.setting(job, arm)
        config = given.config
        with fake:
            model = RegionVLM(given.architecture)
            if config.model.lora.rank:
                lora.inject(model.language_model, config.model.lora, config.train.seed)
        if config.train.activation_checkpointing:
            model.gradient_checkpointing_enable()
        apply_stage(model.train(), config.stage.train, tasks_of(given.data))
        model.choose_kernels("reference")
        forwards = (_padded if arm == BASELINE else _rows)(model, given, arm, job.micro_batch, fake)
        batch, token_logp = next(forwards)
        sums = objective.row_sums(token_logp, batch, config.objective).sums
        objective.step_loss(sums, objective.counts(batch), config.objective).backward()
        seen = {
            "images": batch.pixel_values.shape[0],
            "regions": batch.boxes.shape[0],
            "tokens": batch.real_tokens,
            "supervised": batch.target_ids.numel(),
        }
        counts = {"arm": arm, "samples": len(batch.sample_ids), "computed": batch.input_ids.numel(), **seen}
        found.append({**counts, "flops": flops_by_part(model, seen)})
    return found
