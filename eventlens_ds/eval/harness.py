"""`eventlens eval`: a run scored on any built folder, as prediction rows and the numbers they give.

In: a run folder or checkpoint, a folder of `eventlens data build`, a split. Out: OUT/predictions/<condition>.jsonl,
OUT/metrics (eval/report.py), OUT/skipped.jsonl with every sample that was not scored and why. The stages:
  1. request      what was asked is checked before anything is loaded (eval/request.py)
  2. model        architecture and weights of the run, without an optimizer
  3. conditions   vcr under each control, then events, then every task under each control; ranks share the rows
  4. report       rank 0 writes rows and metrics
Decision: every rank holds a replica of the model, because without optimizer and gradients it needs an eighth of what
training needed and no collective in the forward; `zero3` partitions a model that does not fit. Both run equally many
forwards on every rank, and neither changes a number.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from eventlens_ds.errors import DataError, UserError
from eventlens_ds.eval.request import Request, check
from eventlens_ds.runtime import commit

log = logging.getLogger(__name__)

WRITTEN = "evaluation.json"
"""Lists the files of an evaluation, so that the next one into the same folder replaces them and nothing else."""


@dataclass
class Condition:
    """One prediction file: its rows, the samples without one, notes for the metrics."""

    name: str
    rows: list[dict[str, Any]]
    skipped: list[tuple[str, str]]
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


def main(run: Path, data: Path, *, out: Path | None = None, java: bool | None = None, **asked: Any) -> int:
    """Evaluate and write; logs the table on rank 0 and returns the exit code. A collective.

    asked: as `request.check` takes it. java: see events.score_generations. Raises UserError or DataError with one line.
    """
    request = check(run, data, **asked)
    from eventlens_ds.runtime.failures import process_group

    prepared, problem = None, None
    try:
        prepared = _prepare(request)
    except (UserError, OSError) as error:
        problem = error
    train = request.config.train
    with process_group(train.threads, train.timeout_minutes, problem) as world:
        assert prepared is not None
        _evaluate(request, prepared, world, out, java)
    return 0


class _Prepared(NamedTuple):
    """What every rank knows before it meets the others."""

    architecture: Any
    tokenizer: Any
    sets: dict[str, Any]


def _prepare(request: Request) -> _Prepared:
    from eventlens_ds.runtime.build_model import describe

    architecture, tokenizer, spec = describe(request.config)
    _refuse_other_tokenizer(request, tokenizer)
    _warn_without_adapter(architecture, request.tasks)
    return _Prepared(architecture, tokenizer, _data_sets(request, tokenizer, spec))


def _evaluate(request: Request, prepared: _Prepared, world: Any, out: Path | None, java: bool | None) -> None:
    from eventlens_ds.runtime import distributed

    architecture, tokenizer, sets = prepared
    distributed.agree("the evaluation", [repr(request), [s.fingerprint for d in sets.values() for s in d.shards]])
    path = _checkpoint(request)
    forward = _forward(request, architecture, path, world)
    conditions = _conditions(request, sets, forward, world)
    if world.rank == 0:
        _add_floors(request, conditions, sets)
        shards = next(iter(sets.values())).shards[0]
        target = out or request.run_dir / "eval" / f"{shards.fingerprint[:8]}-{request.split}"
        facts = _facts(request, path, shards.fingerprint, world, tokenizer)
        _write(target, request, conditions, facts, java)


def _refuse_other_tokenizer(request: Request, tokenizer: Any) -> None:
    """DataError when the run was trained with another vocabulary; a warning when prompts have been reworded since."""
    from eventlens_ds.data.prompts import PROMPT_VERSION

    try:
        capsule = json.loads((request.run_dir / "capsule.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        log.warning("%s: no readable capsule.json: tokenizer and prompts cannot be compared", request.run_dir)
        return
    trained = capsule.get("tokenizer")
    if trained is not None and trained != tokenizer.fingerprint:
        where = request.config.model.tokenizer_path or request.config.model.language_path or "the embedded tokenizer"
        raise DataError(f"{request.run}: trained with tokenizer {trained}, but {where} is {tokenizer.fingerprint} now")
    if capsule.get("prompts", PROMPT_VERSION) != PROMPT_VERSION:
        log.warning("trained with prompt version %s, evaluated with %s", capsule["prompts"], PROMPT_VERSION)


def _warn_without_adapter(architecture: Any, tasks: tuple[str, ...]) -> None:
    adapters = architecture.adapters
    if not adapters["bottleneck"] or adapters["router"] != "task":
        return
    if strange := [task for task in tasks if task not in architecture.tasks]:
        log.warning("the run has no adapter for %s: answered by the language model alone", ", ".join(strange))


def _data_sets(request: Request, tokenizer: Any, spec: Any) -> dict[str, Any]:
    """RunData by "choice", "event" and task, as far as they are asked for. A split without questions is fine when
    something else is wanted too; DataError when it lacks what was asked for."""
    from eventlens_ds.data.records import CHOICE_TASKS, TASKS
    from eventlens_ds.eval import lcl_rows
    from eventlens_ds.eval.score import eval_data

    sets: dict[str, Any] = {}
    if "lcl" in request.tasks:
        given = (request.config, tokenizer, spec, str(request.data), request.split)
        sets["lcl"] = lcl_rows.Split(*given, limit=request.limit)
        if not request.controls and not request.generate and not request.answered:
            return sets
    every = eval_data(request.config, tokenizer, spec, str(request.data), request.split, tasks=TASKS)
    present = {TASKS[t] for t in set(every.tables[0]["task"].tolist())}
    for name, tasks, wanted in (
        ("choice", CHOICE_TASKS, bool(request.controls)),
        ("event", frozenset({"event"}), request.generate > 0),
        *((task, frozenset({task}), True) for task in request.answered),
    ):
        if not wanted:
            continue
        if name == "choice" and not tasks & present and (request.generate or request.tasks):
            rest = ", ".join([*(["events"] if request.generate else []), *request.tasks])
            log.info("%s/%s: holds no VCR question, only %s is evaluated", request.data, request.split, rest)
            continue
        sets[name] = eval_data(
            request.config, tokenizer, spec, str(request.data), request.split, tasks=tasks, limit=request.limit
        )
    if request.leaderboard is not None:
        _refuse_labelled(request, sets.get("choice"))
    return sets


def _refuse_labelled(request: Request, data: Any) -> None:
    where = f"--leaderboard: {request.data}/{request.split}"
    if data is None:
        raise DataError(f"{where} holds no question")
    from eventlens_ds.data.records import CHOICE_TASKS, TASKS

    table = data.tables[0]
    questions = [TASKS[t] in CHOICE_TASKS for t in table["task"].tolist()]
    labelled = int(sum(q and not blind for q, blind in zip(questions, table["blind"].tolist())))
    if labelled:
        raise DataError(
            f"{where} has {labelled} labelled samples: the file wants rationales conditioned on every answer, "
            "which only a blind split has"
        )


def _checkpoint(request: Request) -> Path:
    """The verified checkpoint to load. A collective."""
    from eventlens_ds.runtime import checkpoint

    wanted: Path | None = request.run if request.checkpoint == "latest" else Path(request.checkpoint)
    if request.checkpoint == "best":
        wanted = commit.pointer(request.run_dir, commit.BEST)
        if wanted is None:
            raise DataError(f"{request.run}: names no best checkpoint (train.eval_every was 0?)")
    assert wanted is not None
    path = checkpoint.resolve(wanted)
    if path is None:
        raise DataError(f"{wanted}: holds no checkpoint")
    return path


def _forward(request: Request, architecture: Any, path: Path, world: Any) -> Callable[..., Any]:
    """forward(batch, vision_calls, **options) of the trained model."""
    from eventlens_ds.config.deepspeed import deepspeed_dict
    from eventlens_ds.runtime.build_model import trained_model

    settings = deepspeed_dict(request.config, world.size, zero="zero3" if request.zero3 else "zero0")
    model = trained_model(request.config, architecture, path, settings)
    model.eval()
    if not request.zero3:
        model.to(world.device)
        return lambda batch, calls, **options: model(batch, calls, **options)
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=settings, dist_init_required=False)
    engine.eval()
    return lambda batch, calls, **options: engine(batch=batch, vision_calls=calls, **options)


def _conditions(request: Request, sets: dict[str, Any], forward: Any, world: Any) -> list[Condition]:
    """Every condition scored, the same on all ranks. A collective."""
    from eventlens_ds.eval.score import Ranks, score_split

    train = request.config.train
    ranks = Ranks(world.rank, world.size, world.device, train.vision_chunk, request.config.data.workers)
    made: list[Condition] = []
    for control in request.controls if "choice" in sets else ():
        started = time.monotonic()
        scored = score_split(forward, sets["choice"], ranks, control)
        name = "vcr" if control == "none" else f"vcr-{control}"
        made.append(Condition(name, *scored, time.monotonic() - started, {"control": control}))
        log.info("%s: %d rows in %.1f s", name, len(scored.rows), made[-1].seconds)
    if "event" in sets:
        made.append(_events(request, sets["event"], forward, ranks))
    for task in request.answered:
        made += _language(request, task, sets[task], forward, ranks)
    for name in request.episodes:
        made.append(_episodes(request, sets["lcl"], name, forward, ranks))
    return made


def _episodes(request: Request, split: Any, name: str, forward: Any, ranks: Any) -> Condition:
    from eventlens_ds.eval import episode_conditions, lcl_rows

    started = time.monotonic()
    wanted = episode_conditions.condition(name)
    scored = lcl_rows.condition_rows(forward, split, request.shots, wanted, ranks, request.answers)
    seconds = time.monotonic() - started
    log.info("lcl %s: %d rows in %.1f s", name, len(scored.rows), seconds)
    notes = {"shots": list(request.shots), "condition": name, "trained_with": request.config.data.control}
    return Condition("lcl" if name == "none" else f"lcl-{name}", *scored, seconds, notes)


def _language(request: Request, task: str, data: Any, forward: Any, ranks: Any) -> list[Condition]:
    """One condition per control."""
    from eventlens_ds.eval import language_rows

    found, without = language_rows.questions(data, task)
    decoding = request.decoding.of(task)
    made = []
    for control in request.language_controls:
        started = time.monotonic()
        rows, skipped = language_rows.answer_rows(forward, data, found, ranks, decoding, control)
        name = task if control == "none" else f"{task}-{control}"
        notes: dict[str, Any] = {"control": control, "decoding": decoding._asdict()}
        if control == "permute_regions":
            notes["not_permuted"] = sum(not row["permuted"] for row in rows)
        made.append(Condition(name, rows, [*without, *skipped], time.monotonic() - started, notes))
        log.info("%s: %d answers in %.1f s", name, len(rows), made[-1].seconds)
    return made


def _add_floors(request: Request, conditions: list[Condition], sets: dict[str, Any]) -> None:
    """The most frequent training text to the rows of caption and reg, so that the rows suffice for their floor."""
    from eventlens_ds.eval import language_rows

    config = request.config.data
    for task in (task for task in request.answered if task in language_rows.DESCRIBED):
        floor, reason = language_rows.training_floor(config.train, config.split, task, sets[task].spec.style)
        for condition in (c for c in conditions if c.name.split("-")[0] == task):
            condition.notes["floor"] = reason
            for row in condition.rows if floor is not None else ():
                row["floor"] = floor


def _events(request: Request, data: Any, forward: Any, ranks: Any) -> Condition:
    from eventlens_ds.eval import event_rows, events

    started = time.monotonic()
    found = event_rows.first_events(data, request.generate)
    generated = event_rows.generation_rows(forward, data, found, ranks, seed=request.config.train.seed)
    ranked = event_rows.ranking_rows(forward, data, found, ranks, seed=request.config.train.seed)
    notes: dict[str, Any] = {
        "events": len(found),
        "decoding": {
            "samples": event_rows.GENERATIONS, "top_p": event_rows.TOP_P, "max_new_tokens": event_rows.NEW_TOKENS
        },
    }  # fmt: skip
    if ranks.rank == 0:
        config = request.config.data
        known, notes["novel"] = event_rows.known_texts(config.train, config.split, data.spec.style)
        for row in generated.rows if known is not None else ():
            row["novel"] = events.mark_novel(row["generations"], known or frozenset())
    seconds = time.monotonic() - started
    log.info("events: %d generated, %d ranked in %.1f s", len(generated.rows), len(ranked.rows), seconds)
    return Condition("events", generated.rows + ranked.rows, generated.skipped + ranked.skipped, seconds, notes)


def _facts(request: Request, path: Path, fingerprint: str, world: Any, tokenizer: Any) -> dict[str, Any]:
    """What the numbers depend on (P13)."""
    from eventlens_ds.runtime import capsule

    return {
        "run": str(request.run_dir),
        "checkpoint": path.name,
        "checkpoint_sha256": commit.sha256_file(path / commit.MANIFEST),
        "data": str(request.data),
        "data_fingerprint": fingerprint,
        "split": request.split,
        "limit_images": request.limit,
        "tokenizer": tokenizer.fingerprint,
        "dtype": request.config.train.dtype,
        "layout": request.config.data.layout,
        "ranks": world.size,
        "zero3": request.zero3,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([*request.command(), "--ranks", str(world.size)]),
        "versions": capsule.versions(),
        "code": capsule.code(),
        "hardware": capsule.hardware(),
    }


def _write(out: Path, request: Request, conditions: list[Condition], facts: dict[str, Any], java: bool | None) -> None:
    from eventlens_ds.eval import lcl_plot, report, vcr

    _replace_earlier(out, [c.name for c in conditions])
    for condition in conditions:
        _write_lines(out / "predictions" / f"{condition.name}.jsonl", condition.rows)
    lines = [{"condition": c.name, "id": i, "reason": why} for c in conditions for i, why in c.skipped]
    _write_lines(out / "skipped.jsonl", lines)
    if lines:
        log.warning("%d samples were not scored, e.g. %s: %s", len(lines), lines[0]["id"], lines[0]["reason"])
    each = {c.name: {"seconds": round(c.seconds, 1), "skipped": len(c.skipped), **c.notes} for c in conditions}
    metrics = report.write_report(out, conditions={**facts, "conditions": each}, java=java)
    log.info("%s", report.table(metrics).rstrip())
    log.info("written to %s", out)
    if request.episodes:
        lcl_plot.plot(metrics, out / "metrics" / "lcl.png")
    if request.leaderboard is not None:
        rows = next(c.rows for c in conditions if c.name == "vcr")
        number = vcr.leaderboard_csv(rows, request.leaderboard, temperature=request.config.objective.temperature)
        log.info("%s: %d questions", request.leaderboard, number)


def _replace_earlier(out: Path, names: list[str]) -> None:
    """Remove what an earlier evaluation wrote here. UserError when rows of other origin are there: the report would
    mix them with ours."""
    listed = out / WRITTEN
    try:
        earlier = set(json.loads(listed.read_text(encoding="utf-8"))) if listed.exists() else set()
    except ValueError:
        earlier = set()
    foreign = sorted(p.name for p in (out / "predictions").glob("*.jsonl") if p.stem not in earlier)
    if foreign:
        raise UserError(f"{out / 'predictions'}: holds {foreign[0]} of another origin; name another --out")
    for name in earlier - set(names):
        for path in (out / "predictions" / f"{name}.jsonl", out / "metrics" / f"{name}.json"):
            with suppress(FileNotFoundError):
                path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    commit.atomic_write(listed, json.dumps(names).encode() + b"\n")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    commit.atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
