"""One training run from configuration to outcome.json.

In: a RunConfig, on every rank. Out: the run folder of design section 5 and an exit code (0 done, 75 preempted).
The stages:
  1. describe   architecture, tokenizer, data, plan: arithmetic, before the process group starts
  2. dry run    print configuration, DeepSpeed dict, stage table, plan, and leave
  3. build      process group, model, engine; resume from the newest checkpoint that verifies
  4. train      train/loop.py
outcome.json frames 1, 3 and 4 (train/outcome.py). Decision: what is slow and needs no peers (lengths, plan) comes
before the process group, and what goes wrong there is raised once all ranks are in it, so a broken data set is one
line, whichever ranks meet it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from eventlens_ds.config import load as config_load
from eventlens_ds.config.deepspeed import deepspeed_dict
from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.data.encode import EncodeSpec
from eventlens_ds.data.loader import RunData
from eventlens_ds.data.plan import Plan
from eventlens_ds.data.prompts import PROMPT_VERSION
from eventlens_ds.data.records import TASKS
from eventlens_ds.data.tag_counts import require_tags
from eventlens_ds.data.tokenizer import PieceTokenizer
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.runtime import commit

log = logging.getLogger(__name__)

PANELS = 4
"""Pictures of questions that an evaluation during training adds to TensorBoard."""


def main(config: RunConfig, dry_run: bool = False) -> int:
    """Train, or with `dry_run` print what would run. Returns the exit code."""
    if dry_run:
        from eventlens_ds.runtime.build_model import describe

        sys.stdout.write(dry_text(config, describe(config, dry=True)[0]))
        return 0
    from eventlens_ds.runtime import heartbeat
    from eventlens_ds.runtime.failures import before_the_group, process_group
    from eventlens_ds.train.outcome import Attempt

    run_dir = Path(config.io.run)
    with Attempt(run_dir, config.io.lease_seconds, config.train.stop_signals) as attempt:
        prepared: _Prepared | None = None
        problem: Exception | None = attempt.problem
        with _watchdog(config, attempt) as dog:
            try:
                with before_the_group():
                    heartbeat.mark(heartbeat.START)
                    prepared = _prepare(config) if problem is None else None
            except (UserError, OSError) as error:
                problem = error
            with process_group(config.train.threads, config.train.timeout_minutes, problem) as world:
                assert prepared is not None
                try:
                    return _run(config, prepared, world, attempt)
                except RuntimeError as error:
                    raise dog.translate(error) from error


def _watchdog(config: RunConfig, attempt: Any) -> Any:
    """The watchdog of this rank; none in a folder that is another job's."""
    from eventlens_ds.runtime import heartbeat
    from eventlens_ds.runtime.distributed import rendezvous
    from eventlens_ds.runtime.watchdog import Watchdog

    place = rendezvous(dict(os.environ))
    session = heartbeat.session({**os.environ, **place})
    rank, size = int(place["RANK"]), int(place["WORLD_SIZE"])
    seconds = 0.0 if attempt.problem else config.train.watchdog_seconds
    return Watchdog(Path(config.io.run), session, rank, size, seconds, attempt.fail)


class _Prepared(NamedTuple):
    """What every rank knows before it meets the others."""

    architecture: Any
    data: RunData
    plan: Plan


def _prepare(config: RunConfig) -> _Prepared:
    from eventlens_ds.runtime.build_model import describe

    architecture, tokenizer, spec = describe(config)
    data = training_data(config, tokenizer, spec)
    train = config.train
    plan = data.plan(seed=train.seed, rows_per_step=train.rows_per_step, cache_dir=Path(config.data.train[0]) / "plans")
    return _Prepared(architecture, data, plan)


def training_data(config: RunConfig, tokenizer: PieceTokenizer, spec: EncodeSpec) -> RunData:
    from eventlens_ds.runtime.build_model import tokenizer_path

    made = RunData(
        config.data.train,
        config.data.split,
        config=config.data,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path(config),
        spec=spec,
        tasks=config.data.tasks,
        limit=config.data.limit,
        seed=config.train.seed,
    )
    if spec.style.tag_tokens >= 0:
        require_tags(config.data.train, made.shards, tokenizer, spec.style.tag_tokens)
    return made


def tasks_of(data: RunData) -> list[str]:
    """Tasks the planned groups hold, in the order of their ids."""
    present = {int(t) for groups in data.groups for t in set(groups.task.tolist())}
    return [TASKS[t] for t in sorted(present)]


def _run(config: RunConfig, prepared: _Prepared, world: Any, attempt: Any) -> int:
    from eventlens_ds.runtime import checkpoint, rng
    from eventlens_ds.runtime.distributed import agree, all_agree, broadcast_object
    from eventlens_ds.runtime.local_ranks import PREEMPTED
    from eventlens_ds.train.engine import build
    from eventlens_ds.train.flops import StepFlops
    from eventlens_ds.train.loop import train
    from eventlens_ds.train.outcome import FINISHED
    from eventlens_ds.train.preempt import StopFlag
    from eventlens_ds.train.state import TrainState

    architecture, data, plan = prepared
    run_dir = Path(config.io.run)
    attempt.number = broadcast_object(attempt.number)
    agree("the configuration", config_load.dump(config))
    agree("the plan", plan.fingerprint)
    lead = world.rank == 0
    if lead and attempt.lease is not None:
        # Before checkpoints are looked for: what another job was about to publish cannot be published any more.
        commit.clean_stale(run_dir)
    found = checkpoint.resolve(run_dir)
    if found is not None and config.io.resume == "never":
        raise UserError(f"io.run {run_dir}: holds checkpoints and io.resume is never; name another folder")
    rng.seed(config.train.seed)
    trainable = build(config, architecture, world, tasks_of(data))
    state = TrainState(plan=plan.fingerprint, config=config_load.hash(config))
    trainable.identity = _identity(config, data, plan)
    if found is not None:
        _resume(config, found, trainable, state)
    if not all_agree(not attempt.stop.noted):
        return _stopped_early(attempt, world, state.step)
    if lead:
        _open_run(config, run_dir, plan, data, trainable)
    flops = StepFlops(trainable.model, architecture)
    writers = _writers(config, run_dir, state, prepared, flops, attempt) if lead else None
    with StopFlag(config.train.stop_signals, attempt.stop.noted) as stop:
        evaluate = _Evaluation(config, trainable, data, world, writers, stop)
        ended = train(trainable, data, plan, config, world, state, stop, writers, evaluate)
    code = 0 if ended == FINISHED else PREEMPTED
    if writers is not None:
        writers.close()
        attempt.end(ended, code, state.step, "signal" if code else "")
    return code


def _stopped_early(attempt: Any, world: Any, step: int) -> int:
    """A stop signal came before the first step: nothing is lost, and the run wants to be continued."""
    from eventlens_ds.runtime.local_ranks import PREEMPTED
    from eventlens_ds.train.outcome import PREEMPTED as STATE

    if world.rank == 0:
        attempt.end(STATE, PREEMPTED, step, "signal before the first step")
    return PREEMPTED


def _identity(config: RunConfig, data: RunData, plan: Plan) -> dict[str, Any]:
    from eventlens_ds.train.identity import identity

    shards = [shards.fingerprint for shards in data.shards]
    return identity(config, shards, plan.fingerprint, data.tokenizer.fingerprint, PROMPT_VERSION)


def _resume(config: RunConfig, found: Path, trainable: Any, state: Any) -> None:
    """Continue from a checkpoint that verifies. DataError: it was made with something else than this run has."""
    from eventlens_ds.runtime import checkpoint
    from eventlens_ds.train.identity import refuse_changes

    saved = commit.read_manifest(found)
    if saved.get("identity"):
        refuse_changes(saved["identity"], trainable.identity, config.io.accept, str(found))
    elif saved["state"]["plan"] != state.plan and "data" not in config.io.accept:
        was, now = saved["state"]["plan"][:12], state.plan[:12]
        raise DataError(f"{found}: made with other data or settings (plan {was}, now {now})")
    base = None if "base" in config.io.accept else trainable.base
    state.restore(checkpoint.load(trainable.engine, found, base=base))
    log.info("resumed from %s at step %d", found, state.step)


def _open_run(config: RunConfig, run_dir: Path, plan: Plan, data: RunData, trainable: Any) -> None:
    from eventlens_ds.model.stages import stage_table
    from eventlens_ds.ops import dispatch
    from eventlens_ds.runtime import capsule
    from eventlens_ds.runtime.commit import atomic_write

    run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(run_dir / "config.yaml", config_load.dump(config).encode())
    capsule.write(
        run_dir,
        data={folder: shards.fingerprint for folder, shards in zip(data.folders, data.shards)},
        ops=dispatch.decisions(),
        plan=plan.fingerprint,
        refused=len(plan.refused),
        tokenizer=data.tokenizer.fingerprint,
        prompts=PROMPT_VERSION,
    )
    for line in stage_table(trainable.stage).splitlines():
        log.info("%s", line)
    for table, group, reason in plan.refused[:5]:
        log.warning("%s: group %d is never used: %s", data.folders[table], group, reason)


def _writers(config: RunConfig, run_dir: Path, state: Any, prepared: _Prepared, flops: Any, attempt: Any) -> Any:
    from eventlens_ds.ops import dispatch
    from eventlens_ds.runtime import capsule
    from eventlens_ds.train.loop import Writers
    from eventlens_ds.train.metrics import RunLog
    from eventlens_ds.train.skipped import SkippedLog
    from eventlens_ds.train.tensorboard import Board

    first = state.step + 1
    _, data, plan = prepared
    run_log = RunLog(run_dir / "log.jsonl", first_step=first, tasks=tasks_of(data))
    board = Board(run_dir / "tensorboard", first_step=first) if config.io.tensorboard else None
    skipped = SkippedLog(run_dir)
    if not state.step:
        skipped.add(None, data.unread())
        skipped.add(None, ((name, why) for table, group, why in plan.refused for name in data.names(table, group)))

    def first_step() -> None:
        attempt.first_step()
        # Which backend an op takes is decided when it first runs.
        capsule.update(run_dir, ops=dispatch.decisions())

    return Writers(run_log, board, flops, skipped, first_step, attempt.lease)


def images_with(questions: int, data: RunData) -> int:
    """How many of the first images hold about `questions` questions. Whole images, so that both halves of a question
    are among them."""
    counts = {task: 0 for groups in data.groups for task in set(groups.task.tolist())}
    for groups in data.groups:
        for task in counts:
            counts[task] += int((groups.last - groups.first)[groups.task == task].sum())
    per_image = max(counts.values()) / sum(shards.num_images for shards in data.shards)
    return max(1, round(questions / per_image))


class _Interrupted(Exception):
    """An evaluation gives way to a planned stop."""


class _Evaluation:
    """Evaluation during training on a fixed subset; tells whether it was the best so far."""

    def __init__(self, config: RunConfig, trainable: Any, data: RunData, world: Any, writers: Any, stop: Any) -> None:
        self.config, self.trainable, self.world, self.writers = config, trainable, world, writers
        self.stop = stop
        self.data: RunData | None = None
        if config.train.eval_every:
            from eventlens_ds.eval.score import eval_data

            folder = config.data.eval or config.data.train[0]
            args = (config, data.tokenizer, data.spec, folder, config.data.eval_split)
            self.data = eval_data(*args, limit=images_with(config.eval.samples, eval_data(*args)))

    def _forward(self, batch: Any, calls: int) -> Any:
        """A forward of all ranks, unless one of them was asked to stop."""
        from eventlens_ds.runtime import heartbeat
        from eventlens_ds.runtime.distributed import all_agree

        heartbeat.mark(heartbeat.EVAL)
        if not all_agree(not self.stop.raised):
            raise _Interrupted
        return self.trainable.engine(batch=batch, vision_calls=calls)

    def __call__(self, state: Any) -> bool:
        from eventlens_ds.eval import vcr
        from eventlens_ds.eval.panels import question_panels
        from eventlens_ds.eval.score import score_choices

        assert self.data is not None
        engine = self.trainable.engine
        engine.eval()
        try:
            rows = score_choices(
                self._forward,
                self.data,
                rank=self.world.rank,
                world=self.world.size,
                device=self.world.device,
                vision_chunk=self.config.train.vision_chunk,
            )
        except _Interrupted:
            return False
        finally:
            engine.train()
        if not rows:
            raise DataError(f"{self.config.data.eval or self.config.data.train[0]}: no questions to evaluate on")
        scores = vcr.score(rows, resamples=100)
        if scores["q2a"] is None or scores["qa2r"] is None:
            raise DataError(f"data.eval_split {self.config.data.eval_split}: its questions have no labels")
        mean = (scores["q2a"] + scores["qa2r"]) / 2
        if self.writers:
            log.info(
                "step %d: q2a %.3f qa2r %.3f on %d questions", state.step, scores["q2a"], scores["qa2r"], scores["n"]
            )
            if self.writers.board:
                self.writers.board.evaluation(state.step, scores)
                for name, panel in question_panels(self.data, rows, PANELS):
                    self.writers.board.panel(state.step, name, panel)
        if state.best_score is not None and mean <= state.best_score:
            return False
        state.best_score, state.best_step = mean, state.step
        return True


def dry_text(config: RunConfig, architecture: Any) -> str:
    """What `--dry-run` prints; builds the model on the meta device, so it costs no memory."""
    import torch

    from eventlens_ds.model import lora
    from eventlens_ds.model.region_vlm import RegionVLM
    from eventlens_ds.model.stages import apply_stage, stage_table

    with torch.device("meta"):
        model = RegionVLM(architecture)
        if config.model.lora.rank:
            lora.inject(model.language_model, config.model.lora, config.train.seed)
    tasks = config.data.tasks or architecture.tasks
    stage = stage_table(apply_stage(model, config.stage.train, tasks))
    settings = json.dumps(deepspeed_dict(config, 1), indent=1)
    return (
        f"# configuration\n{config_load.dump(config)}\n# DeepSpeed (world size 1)\n{settings}\n\n"
        f"# stage: tasks {', '.join(tasks)}\n{stage}\n"
    )
