"""The baseline of `bench train`: Hugging Face Trainer with DeepSpeed around the same RegionVLM.

In: the `Setting` of an arm. Out: what `arms.run` gives. What a careful user of the Trainer would write: one item per
sample, one right-padded sequence per target or candidate, its picture encoded once per sample, group_by_length over
known lengths, loader workers, torch's fused AdamW, causal attention without a mask (right padding needs none), the head
on supervised positions alone, and the loss divided by the counts of the whole step (`num_items_in_batch`).
Not available there, so not used: packing. The Trainer packs nothing itself; the padding-free collators of its
ecosystem concatenate text rows and know neither pictures nor regions nor candidates that share a prefix.
Decision: weights, encoding, kernels, objective and RegionVLM.embed are those of ours; only layout and loop differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from eventlens_ds.bench.arms import Meter, Setting
from eventlens_ds.config.deepspeed import deepspeed_dict
from eventlens_ds.config.run_config import ObjectiveConfig, RunConfig
from eventlens_ds.data import sources
from eventlens_ds.data.encode import pieces_length
from eventlens_ds.data.loader import RunData
from eventlens_ds.data.packing import Row
from eventlens_ds.data.prompts import render
from eventlens_ds.data.records import TASKS, Batch, EncodedGroup, Group
from eventlens_ds.errors import UserError
from eventlens_ds.model import objective
from eventlens_ds.model.adapters import Routing
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.runtime.distributed import World, all_reduce_sum

Line = tuple[int, int, int]
"""(table, group, line) of one sample."""

NOBODY = -1
"""An index without a sample: fills the last step up to whole micro-batches."""

ATTENTION = "sdpa"
"""Causal and without a mask: the fused kernel of torch on every device."""

_HOST = ("box_offsets", "parents", "bounds", "start_slots")
"""Fields that stay on the CPU, as in `Batch.to`; they travel as arrays, which the Trainer does not move."""


class SampleDataset(Dataset):
    """One sample at a time, encoded alone: its picture, its prefix, its continuations."""

    def __init__(self, data: RunData, lines: Sequence[Line]) -> None:
        self.data, self.lines = data, list(lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> EncodedGroup | None:
        if index == NOBODY:
            return None
        table, number, _ = self.lines[index]
        return self.data.encode(self.group(index), table, number)

    def group(self, index: int) -> Group:
        """The sample as a group of its own; its text and boxes are read, its picture is not."""
        table, _, line = self.lines[index]
        rows, shards = self.data.tables[table], self.data.shards[table]
        image = shards.image(int(rows["image"][line]))
        parts = sources.samples(shards.record(int(rows["record"][line])), image)
        return Group(TASKS[int(rows["task"][line])], (image,), (parts[int(rows["part"][line])],))

    def length(self, index: int) -> int:
        """Tokens of the longest sequence of a sample."""
        data = self.data
        (sample,) = (text := render(self.group(index), data.spec.style)).samples
        parts = (text.prefix, sample.stem)
        shared = sum(pieces_length(part, data.tokenizer, data.spec) for part in parts)
        leaves = (pieces_length(leaf, data.tokenizer, data.spec) for leaf in sample.leaves)
        return (data.tokenizer.bos is not None) + shared + max(leaves) + 1


def lines_of(data: RunData, steps: Sequence[Sequence[Row]]) -> list[Line]:
    """The samples of planned rows, in their order."""
    return [
        (table, group, line)
        for step in steps
        for row in step
        for table, group in row.groups
        for line in range(int(data.groups[table].first[group]), int(data.groups[table].last[group]))
    ]


class Collator:
    """Encoded samples -> one padded batch as the mapping that `PaddedModel.forward` takes."""

    def __init__(self, data: RunData) -> None:
        self.data = copy(data)
        self.data.config = replace(data.config, layout="flat")

    def __call__(self, items: Sequence[EncodedGroup | None]) -> dict[str, Any]:
        flat = self.data.collate([item for item in items if item is not None], seed=0)
        batch, sequences = pad(flat, self.data.tokenizer.pad)
        values: dict[str, Any] = dict(vars(batch))
        for name in _HOST:
            values[name] = values[name].numpy()
        return {**values, "sequences": sequences}


def pad(flat: Batch, pad_id: int) -> tuple[Batch, int]:
    """A row of chains (data.layout flat) as B right-padded sequences; returns it and B.

    All token arrays become [B * L] with L the longest chain, and `target_from` points into them.
    """
    if not flat.real_tokens:
        return flat, 1
    chains = flat.bounds.numpy().reshape(-1, 2, 2)
    assert bool((flat.parents[::2] < 0).all()), "not a row of chains"
    starts, lengths = chains[:, 0, 0], chains[:, 1, 1] - chains[:, 0, 0]
    count, width = len(lengths), int(lengths.max())
    moved = np.arange(flat.real_tokens) + np.repeat(np.arange(count) * width - starts, lengths)
    place = torch.from_numpy(moved)

    def spread(values: torch.Tensor, empty: int) -> torch.Tensor:
        return torch.full((count * width,), empty, dtype=values.dtype).index_copy_(0, place, values)

    changed = dict(vars(flat)) | {
        "input_ids": spread(flat.input_ids[0], pad_id)[None],
        "position_ids": spread(flat.position_ids[0], 0)[None],
        "task_ids": spread(flat.task_ids, int(flat.task_ids[0])),
        "image_slots": spread(flat.image_slots, -1),
        "region_slots": spread(flat.region_slots, -1),
        "soft_slots": spread(flat.soft_slots, 0),
        "start_slots": spread(flat.start_slots, 0),
        "target_from": place[flat.target_from],
    }
    return Batch(**changed), count


class PaddedModel(nn.Module):
    """A RegionVLM on padded sequences that returns its loss, as the Trainer wants it."""

    def __init__(self, model: RegionVLM, weights: ObjectiveConfig) -> None:
        super().__init__()
        if model.config.encoder_decoder:
            raise UserError("the Trainer's padded sequences are those of decoder-only models, not of T5")
        self.model, self.weights = model, weights

    def forward(self, num_items_in_batch: torch.Tensor | None = None, **inputs: Any) -> dict[str, torch.Tensor]:
        """inputs: of `Collator`. num_items_in_batch: denominators float64[3] of the step (None: of this batch)."""
        batch, sequences = batch_of(inputs)
        sums = objective.row_sums(self.token_logp(batch, sequences), batch, self.weights).sums
        denominators = objective.counts(batch) if num_items_in_batch is None else num_items_in_batch
        return {"loss": objective.step_loss(sums, denominators, self.weights)}

    def token_logp(self, batch: Batch, sequences: int) -> torch.Tensor:
        """Log-probabilities of the supervised tokens, float32[max(K, 1)], as RegionVLM.forward gives them."""
        language = self.model.language_model
        embeds = self.model.embed(batch)
        routing = {"routing": Routing(self.model.adapters, batch.task_ids)} if len(self.model.adapters) else {}
        hidden = language.model(
            inputs_embeds=embeds.view(sequences, -1, embeds.shape[-1]), use_cache=False, **routing
        ).last_hidden_state.flatten(0, 1)
        wanted = batch.target_from if batch.target_from.numel() else batch.target_from.new_zeros(1)
        targets = batch.target_ids if batch.target_ids.numel() else batch.target_ids.new_zeros(1)
        logp = language.lm_head(hidden[wanted]).float().log_softmax(-1)
        return logp.gather(1, targets[:, None])[:, 0]


def batch_of(inputs: Mapping[str, Any]) -> tuple[Batch, int]:
    """What `Collator` made, as a Batch and the number of its sequences."""
    values = {field.name: inputs[field.name] for field in fields(Batch)}
    for name in _HOST:
        values[name] = torch.from_numpy(values[name])
    return Batch(**values), inputs["sequences"]


class _Indices(Sampler):
    """Indices given once and for all."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class Schedule:
    """Which sample comes when: every phase grouped by length, the timed one with each of its samples exactly once."""

    def __init__(self, given: Setting, world: int, micro_batch: int) -> None:
        phases = given.phases
        pools = [lines_of(given.data, steps) for steps in given.by_phase]
        timed = len(pools[1])
        self.micro_batch = micro_batch
        self.accumulation = max(1, round(timed / (phases.timed * world * micro_batch)))
        per_step = self.accumulation * world * micro_batch
        self.phases = phases._replace(timed=-(-timed // per_step))
        self.dataset = SampleDataset(given.data, [line for pool in pools for line in pool])
        generator = torch.Generator().manual_seed(given.config.train.seed)
        self.indices: list[int] = []
        first = 0
        for pool, steps in zip(pools, self.phases):
            lengths = [self.dataset.length(first + i) for i in range(len(pool))]
            grouped = LengthGroupedSampler(self.accumulation * micro_batch, lengths=lengths, generator=generator)
            order = [first + i for i in grouped] if pool else []
            wanted = steps * per_step
            self.indices += (order + [NOBODY] * wanted)[:wanted]
            first += len(pool)


class _Trainer(Trainer):
    """The Trainer with a given order of samples, the step's denominators, and a meter."""

    def __init__(self, schedule: Schedule, **kwargs: Any) -> None:
        super().__init__(train_dataset=schedule.dataset, **kwargs)
        self.schedule = schedule
        self.meter: Meter | None = None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return _Indices(self.schedule.indices)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As they are: the loader has moved them, and the Trainer would round boxes and weights to bf16."""
        return inputs

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        assert self.meter is not None
        with self.meter.waiting():
            batches = [next(epoch_iterator) for _ in range(num_batches)]
        for inputs in batches:
            _count(self.meter, inputs)
        counts = torch.stack([objective.counts(batch_of(inputs)[0]) for inputs in batches]).sum(0)
        return batches, all_reduce_sum(counts.to(device))


class _StepEnd(TrainerCallback):
    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.step_done()


def _count(meter: Meter, inputs: Mapping[str, Any]) -> None:
    meter.samples(inputs["sample_ids"])
    meter.saw(
        tokens=inputs["real_tokens"],
        computed=inputs["input_ids"].numel(),
        supervised=inputs["target_ids"].numel(),
        images=inputs["pixel_values"].shape[0],
        regions=inputs["boxes"].shape[0],
        micro=1,
    )


def fitting_samples(given: Setting) -> int:
    """Samples whose sequences fill about one row of data.row_tokens."""
    lines = lines_of(given.data, given.by_phase[1])
    dataset = SampleDataset(given.data, lines[:: max(1, len(lines) // 64)])
    tokens = [dataset.length(i) * len(_leaves(dataset.group(i))) for i in range(len(dataset))]
    return max(1, round(given.config.data.row_tokens / (sum(tokens) / len(tokens))))


def _leaves(group: Group) -> Sequence[Any]:
    return group.samples[0].targets or group.samples[0].candidates


def run(given: Setting, world: World, micro_batch: int) -> dict[str, Any]:
    """Train the samples of the setting with the Trainer, `micro_batch` samples per micro-step. A collective."""
    from eventlens_ds.model.stages import apply_stage
    from eventlens_ds.runtime.build_model import new_model
    from eventlens_ds.train.run import tasks_of

    config = given.config
    schedule = Schedule(given, world.size, micro_batch)
    settings = deepspeed_dict(config, world.size)
    given.architecture.text_config._attn_implementation = ATTENTION
    # Before the arguments: they would make transformers partition every part of the model by itself.
    model = new_model(config, given.architecture, settings)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable()
    apply_stage(model, config.stage.train, tasks_of(given.data))
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Trainer(
            schedule,
            model=PaddedModel(model, config.objective),
            args=_arguments(config, schedule, settings, world, folder),
            data_collator=Collator(given.data),
        )
        trainer.meter = Meter(schedule.phases, world, model)
        trainer.add_callback(_StepEnd(trainer.meter))
        trainer.train()
    return {**trainer.meter.result(config), "micro_batch": micro_batch}


def _arguments(
    config: RunConfig, schedule: Schedule, settings: dict[str, Any], world: World, folder: str
) -> TrainingArguments:
    """The Trainer's settings, equal to ours where both have one, else the fastest."""
    train, data = config.train, config.data
    workers = data.workers
    per_step = schedule.micro_batch * schedule.accumulation
    return TrainingArguments(
        output_dir=folder,
        deepspeed=settings
        | {
            "train_micro_batch_size_per_gpu": schedule.micro_batch,
            "gradient_accumulation_steps": schedule.accumulation,
            "train_batch_size": per_step * world.size,
        },
        use_cpu=world.device == "cpu",
        bf16=train.dtype == "bf16",
        per_device_train_batch_size=schedule.micro_batch,
        gradient_accumulation_steps=schedule.accumulation,
        max_steps=schedule.phases.total,
        learning_rate=train.lr,
        lr_scheduler_type="constant",
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        weight_decay=train.weight_decay,
        max_grad_norm=train.clip,
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length",
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_prefetch_factor=data.prefetch if workers else None,
        dataloader_pin_memory=world.device != "cpu",
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        # Looks at every loss, which waits for the device.
        logging_nan_inf_filter=False,
        seed=train.seed,
    )
