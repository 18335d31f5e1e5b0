"""What a RunConfig must satisfy beyond the types of its fields: ranges, and fields that have to agree.

In: a RunConfig. Out: (dotted key, complaint) pairs; config/load.py adds where the value was written and raises the
first. `require_data` is apart, because a dry run of a recipe needs no data.
Decision: the names of tasks and parts are repeated here, since config imports nothing above it; a test compares them
with data/records.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eventlens_ds.config.run_config import AdapterConfig, DataConfig, EpisodeConfig, ObjectiveConfig, RunConfig
from eventlens_ds.errors import UserError

TASKS = ("caption", "event", "vcr_answer", "vcr_rationale", "rec", "reg", "vqa", "vsr", "pope", "lcl")
CHOICE_TASKS = ("vcr_answer", "vcr_rationale")
PARTS = (
    "vision", "projector", "regions", "adapters", "image_adapter", "region_adapter", "router", "language", "lora",
    "aggregator", "qformer", "soft_prompt",
)  # fmt: skip

STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
"""Signals a scheduler may send to ask for a stop; SIGINT stays what Ctrl-C is."""

_AT_LEAST: dict[str, float] = {
    "model.image_size": 0,
    "model.visual_pool": 0,
    "model.visual_positions": 0,
    "model.word_spread": 0,
    "model.roi.output_size": 1,
    "model.adapters.bottleneck": 0,
    "model.adapters.experts": 1,
    "model.adapters.top_k": 1,
    "model.lora.rank": 0,
    "model.aggregator.heads": 0,
    "model.aggregator.intermediate": 1,
    "model.qformer.queries": 0,
    "model.qformer.width": 1,
    "model.qformer.heads": 1,
    "model.qformer.layers": 1,
    "model.qformer.intermediate": 1,
    "model.qformer.instruction_tokens": 0,
    "data.tag_tokens": 0,
    "data.limit": 0,
    "data.episodes.shots": 1,
    "data.episodes.min_shots": 1,
    "data.episodes.fixed_epochs": 0,
    "data.episodes.per_epoch": 0,
    "data.episodes.neighbours": 1,
    "data.row_tokens": 1,
    "data.group_tokens": 0,
    "data.workers": 0,
    "data.prefetch": 1,
    "objective.lm": 0,
    "objective.choice": 0,
    "objective.choice_lm": 0,
    "objective.load_balance": 0,
    "train.steps": 1,
    "train.rows_per_step": 1,
    "train.weight_decay": 0,
    "train.warmup": 0,
    "train.clip": 0,
    "train.vision_chunk": 1,
    "train.save_every": 0,
    "train.keep": 1,
    "train.eval_every": 0,
    "train.log_every": 1,
    "train.seed": 0,
    "train.threads": 0,
    "train.watchdog_seconds": 0,
    "train.spike_sigma": 0,
    "train.skip_limit": 1,
    "eval.samples": 1,
    "eval.row_tokens": 0,
}
_ABOVE_ZERO = ("train.lr", "train.timeout_minutes", "io.lease_seconds", "objective.temperature", "model.lora.alpha")
_SHARES = ("data.error_budget", "train.min_lr", "data.tag_noise", "data.episodes.share", "data.episodes.hard")
_BELOW_ONE = ("model.dropout", "model.adapters.dropout", "model.lora.dropout", "model.qk_correlation")


def problems(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, complaint) of every setting that cannot be meant."""
    yield from _ranges(config)
    yield from _data(config)
    yield from _objective(config)
    yield from _stage(config)
    if config.model.roi.sampling_ratio != -1 and config.model.roi.sampling_ratio < 1:
        yield "model.roi.sampling_ratio", f"{config.model.roi.sampling_ratio}: at least 1, or -1 for adaptive"
    yield from _branches(config)
    yield from _question(config)
    yield from _router(config)
    yield from _episodes(config)
    if not config.io.run:
        yield "io.run", "empty: name a folder"
    for name in config.train.stop_signals:
        if name not in STOP_SIGNALS:
            yield "train.stop_signals", f"unknown signal {name}; known: {', '.join(STOP_SIGNALS)}"


def _branches(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Visual branches that are asked for must exist."""
    model = config.model
    if model.visual_input in ("aggregator", "all") and not model.aggregator.layers:
        yield "model.visual_input", f"{model.visual_input}: model.aggregator.layers is empty, so there is no aggregator"
    if model.visual_positions and model.visual_input == "qformer":
        yield "model.visual_positions", f"{model.visual_positions}: queries of the Q-Former lie on no grid; set it to 0"
    if model.visual_input in ("qformer", "all") and not model.qformer.queries:
        yield "model.visual_input", f"{model.visual_input}: model.qformer.queries is 0, so there is no Q-Former"
    if model.roi.source == "aggregator" and not model.aggregator.layers:
        yield "model.roi.source", "aggregator: model.aggregator.layers is empty, so there is none"
    if model.roi.source == "aggregator" and model.roi.levels:
        yield "model.roi.levels", f"{list(model.roi.levels)}: levels of the tower, but model.roi.source is aggregator"
    if config.data.tag_tokens != DataConfig().tag_tokens and not model.soft_prompt:
        yield "data.tag_tokens", f"{config.data.tag_tokens}: tags are listed only with model.soft_prompt"
    if config.data.tag_noise and not model.soft_prompt:
        yield "data.tag_noise", f"{config.data.tag_noise}: tags are listed only with model.soft_prompt"
    if config.data.tag_noise and not config.data.tag_tokens:
        yield "data.tag_noise", f"{config.data.tag_noise}: data.tag_tokens is 0, so no tag is listed"
    if config.data.tag_noise and config.data.control == "blank":
        yield "data.tag_noise", f"{config.data.tag_noise}: data.control blank hides every tag"
    if any(layer < 0 for layer in model.aggregator.layers):
        yield "model.aggregator.layers", f"{list(model.aggregator.layers)}: blocks are counted from 0"
    if model.qformer.width % model.qformer.heads:
        yield "model.qformer.width", f"{model.qformer.width} is not a multiple of {model.qformer.heads} heads"


def _question(config: RunConfig) -> Iterator[tuple[str, str]]:
    """A tokenizer for questions needs somebody who reads them."""
    qformer, key = config.model.qformer, "model.qformer.tokenizer_path"
    if not qformer.tokenizer_path:
        return
    if not qformer.queries:
        yield key, f"{qformer.tokenizer_path}: model.qformer.queries is 0, so there is no Q-Former"
    elif qformer.instruction_tokens < 3:
        yield (
            key,
            f"{qformer.tokenizer_path}: model.qformer.instruction_tokens is {qformer.instruction_tokens}, below 3",
        )


def _episodes(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings of episodes that no episode would read."""
    episodes, usual = config.data.episodes, EpisodeConfig()
    if config.data.tasks and "lcl" not in config.data.tasks:
        for name, value in vars(episodes).items():
            # The words of an episode are those that evaluation shows, too.
            if name != "form" and value != getattr(usual, name):
                yield f"data.episodes.{name}", f"{value}: data.tasks does not name lcl, so there are no episodes"
    if episodes.min_shots > episodes.shots and episodes.strategy != "2-way":
        yield "data.episodes.min_shots", f"{episodes.min_shots} is more than data.episodes.shots = {episodes.shots}"
    if episodes.fixed_epochs and episodes.strategy == "2-way":
        yield "data.episodes.fixed_epochs", f"{episodes.fixed_epochs}: strategy 2-way has fixed shots in every epoch"
    if episodes.share and episodes.per_epoch:
        yield "data.episodes.per_epoch", f"{episodes.per_epoch}: data.episodes.share decides how many an epoch has"
    if episodes.share == 1:
        yield "data.episodes.share", "1: nothing else would be drawn; name lcl alone in data.tasks instead"
    if episodes.queries and episodes.form == "short":
        yield "data.episodes.queries", f"{episodes.queries}: data.episodes.form short has no question"
    if episodes.label_form != usual.label_form and episodes.random_labels == "none":
        yield "data.episodes.label_form", f"{episodes.label_form}: data.episodes.random_labels is none"


def _router(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings of a router that the chosen one would not read, or that would leave it nothing to learn from."""
    adapters, usual = config.model.adapters, AdapterConfig()
    if adapters.router != "task" and adapters.tasks != usual.tasks:
        yield "model.adapters.tasks", "tasks have adapters of their own only under model.adapters.router task"
    if adapters.router != "topk":
        for name in ("experts", "top_k", "renormalise"):
            if (value := getattr(adapters, name)) != getattr(usual, name):
                yield f"model.adapters.{name}", f"{value}: read only under model.adapters.router topk"
        if config.objective.load_balance not in (0, ObjectiveConfig().load_balance):
            yield "objective.load_balance", f"{config.objective.load_balance}: only model.adapters.router topk has one"
        return
    if adapters.top_k > adapters.experts:
        yield "model.adapters.top_k", f"{adapters.top_k} of model.adapters.experts = {adapters.experts}"
    if not adapters.bottleneck:
        yield "model.adapters.router", "topk, but model.adapters.bottleneck is 0, so there are no adapters"
    if adapters.renormalise and adapters.top_k == 1 and "router" in config.stage.train:
        yield "model.adapters.renormalise", "with top_k 1 every gate is 1, so the router learns nothing from the loss"
    if config.objective.load_balance and adapters.top_k == adapters.experts:
        yield "objective.load_balance", "every token takes every adapter (top_k = experts): set it to 0"
    if config.objective.load_balance and "router" not in config.stage.train:
        yield "objective.load_balance", "the router is frozen in this stage: add router to stage.train, or set it to 0"


def require_data(config: RunConfig) -> None:
    """Raises UserError unless data.train names folders that exist."""
    if not config.data.train:
        raise UserError("data.train is empty: add --data.train=DIR, a folder made by `eventlens data build --out DIR`")
    folders = [("data.train", folder) for folder in config.data.train]
    if config.data.eval:
        folders.append(("data.eval", config.data.eval))
    for key, folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{key}: {folder}: no such folder")


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _ranges(config: RunConfig) -> Iterator[tuple[str, str]]:
    for key, least in _AT_LEAST.items():
        if _value(config, key) < least:
            yield key, f"{_value(config, key)}: must be at least {least:g}"
    for key in _ABOVE_ZERO:
        if _value(config, key) <= 0:
            yield key, f"{_value(config, key)}: must be above 0"
    for key in _SHARES:
        if not 0 <= _value(config, key) <= 1:
            yield key, f"{_value(config, key)}: must be between 0 and 1"
    for key in _BELOW_ONE:
        if not 0 <= _value(config, key) < 1:
            yield key, f"{_value(config, key)}: must be at least 0 and below 1"
    if not all(0 <= beta < 1 for beta in config.train.betas):
        yield "train.betas", f"{list(config.train.betas)}: each must be at least 0 and below 1"


def _data(config: RunConfig) -> Iterator[tuple[str, str]]:
    data = config.data
    if data.weights and len(data.weights) != len(data.train):
        yield "data.weights", f"{len(data.weights)} weights for {len(data.train)} folders in data.train"
    if any(weight <= 0 for weight in data.weights):
        yield "data.weights", f"{list(data.weights)}: each must be above 0; leave the folder out instead"
    if len(set(data.train)) != len(data.train):
        yield "data.train", f"{list(data.train)}: a folder is named twice; use data.weights"
    yield from _names("data.tasks", data.tasks, TASKS, "task")
    yield from _names("model.adapters.tasks", config.model.adapters.tasks, TASKS, "task")
    if data.group_tokens > data.row_tokens:
        yield "data.group_tokens", f"{data.group_tokens} is more than data.row_tokens = {data.row_tokens}"


def _objective(config: RunConfig) -> Iterator[tuple[str, str]]:
    objective = config.objective
    if objective.lm == objective.choice == objective.choice_lm == 0:
        yield "objective.lm", "0, as are objective.choice and objective.choice_lm: nothing would be learned"
    choice = [task for task in config.data.tasks if task in CHOICE_TASKS]
    spoken = [task for task in config.data.tasks if task in TASKS and task not in CHOICE_TASKS]
    if choice and objective.choice == objective.choice_lm == 0:
        yield "objective.choice", f"0, as is objective.choice_lm, but data.tasks names {', '.join(choice)}"
    if spoken and objective.lm == 0:
        yield "objective.lm", f"0, but data.tasks names {', '.join(spoken)}"


def _stage(config: RunConfig) -> Iterator[tuple[str, str]]:
    stage = config.stage
    if not stage.train:
        yield "stage.train", f"empty: name the parts that learn, of {', '.join(PARTS)}"
    yield from _names("stage.train", stage.train, PARTS, "part")
    yield from _names("stage.lr_scale", tuple(stage.lr_scale), PARTS, "part")
    for part, scale in stage.lr_scale.items():
        if part not in stage.train:
            yield "stage.lr_scale", f"{part} has a learning rate but is not in stage.train, so it is frozen"
        if scale <= 0:
            yield "stage.lr_scale", f"{part}: {scale} must be above 0; to freeze a part leave it out of stage.train"
    if "lora" in stage.train and config.model.lora.rank == 0:
        yield "stage.train", "lora learns, but model.lora.rank is 0, so there is none"


def _names(key: str, given: tuple[str, ...], known: tuple[str, ...], what: str) -> Iterator[tuple[str, str]]:
    for name in given:
        if name not in known:
            yield key, f"unknown {what} {name}; known: {', '.join(known)}"
        elif given.count(name) > 1:
            yield key, f"{what} {name} is named twice"
