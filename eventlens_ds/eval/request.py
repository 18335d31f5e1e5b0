"""What `eventlens eval` was asked for, checked before anything is loaded.

In: the arguments of the command. Out: a `Request`. Decision: all that can be refused without a model or a process
group is refused here, so that the command asks before it starts ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from eventlens_ds.config import load as config_load
from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.data.controls import CONTROLS, Control
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.eval import episode_conditions
from eventlens_ds.runtime import commit

FORMS = ("latest", "best")

NEW_TOKENS = {"caption": 40, "rec": 40, "reg": 40, "vqa": 16, "vsr": 8, "pope": 8, "lcl": 24}
"""The tasks that are answered in words (lcl: by likelihood, in words on request), and the tokens an answer may have by
default. A box needs 29 when every digit and mark is a token."""


class Decoding(NamedTuple):
    """How answers are generated. beams 1 is greedy; max_new_tokens 0 is NEW_TOKENS of the task; the penalties are
    those of beam search (eval/beams.py)."""

    beams: int = 1
    max_new_tokens: int = 0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0

    def of(self, task: str) -> Decoding:
        """With the number of tokens that a task may have."""
        return self._replace(max_new_tokens=self.max_new_tokens or NEW_TOKENS[task])

    def refuse(self) -> None:
        """Raises UserError, naming the option, when no generation can be like this."""
        if self.beams < 1:
            raise UserError(f"--beams {self.beams}: must be at least 1")
        if self.max_new_tokens < 0:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: must not be negative")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"--repetition-penalty {self.repetition_penalty}: must be above 0")
        if self.repetition_penalty != 1.0 and self.beams == 1:
            raise UserError(f"--repetition-penalty {self.repetition_penalty}: is part of beam search; name --beams")


@dataclass(frozen=True)
class Request:
    """What was asked for; `run_dir` is the run folder of a run or of a checkpoint, `config` its configuration.

    controls: those of the VCR questions, none when they are not scored; language_controls: those of `tasks`.
    """

    run: Path
    run_dir: Path
    config: RunConfig
    data: Path
    split: str
    limit: int
    controls: tuple[Control, ...]
    generate: int
    tasks: tuple[str, ...]
    decoding: Decoding
    checkpoint: str
    zero3: bool
    leaderboard: Path | None
    shots: tuple[int, ...] = ()
    episodes: tuple[str, ...] = ()
    answers: int = 0
    """Of task lcl: shots per class, conditions (eval/episode_conditions.py), queries answered in words too."""
    visual_input: str = ""
    """The view of an image when it is not that of the run, see `_with_view`."""

    @property
    def answered(self) -> tuple[str, ...]:
        """The tasks that are answered in words."""
        return tuple(task for task in self.tasks if task != "lcl")

    @property
    def language_controls(self) -> tuple[Control, ...]:
        return self.controls or ("none",)

    def command(self) -> list[str]:
        """The options that ask for this again, without the number of ranks."""
        made = ["eventlens", "eval", str(self.run), "--data", str(self.data), "--split", self.split]
        made += ["--controls", ",".join(self.controls), "--events", str(self.generate), "--limit", str(self.limit)]
        if "lcl" in self.tasks:
            made += ["--shots", ",".join(map(str, self.shots)), "--episodes", ",".join(self.episodes)]
            made += ["--answers", str(self.answers)]
        if self.tasks:
            made += ["--tasks", ",".join(self.tasks), "--beams", str(self.decoding.beams)]
            made += ["--max-new-tokens", str(self.decoding.max_new_tokens)]
            made += ["--repetition-penalty", str(self.decoding.repetition_penalty)]
        if self.visual_input:
            made += ["--visual-input", self.visual_input]
        return [*made, "--checkpoint", self.checkpoint, *(["--zero3"] if self.zero3 else [])]


def check(
    run: Path,
    data: Path,
    split: str = "val",
    *,
    limit: int = 0,
    controls: Sequence[str] | None = None,
    generate: int = 0,
    tasks: Sequence[str] = (),
    beams: int = 1,
    max_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    checkpoint: str = "latest",
    zero3: bool = False,
    leaderboard: Path | None = None,
    shots: Sequence[int] = (),
    episodes: Sequence[str] = (),
    answers: int = 0,
    visual_input: str = "",
) -> Request:
    """The request, or UserError / DataError naming what cannot be: a run without configuration or checkpoint, an
    unknown control or task, a folder or split that does not exist. Loads no model.

    limit: images (0: all). controls: see data/controls.py; None is none, or no VCR at all when tasks are named.
    generate: events to complete and to rank candidates for (0: none). tasks, beams, max_new_tokens,
    repetition_penalty: see `Decoding`. checkpoint: latest (newest that verifies), best, or a path. zero3:
    partition the model. leaderboard: file for the predictions on a blind split. shots, episodes, answers: of task lcl,
    see `Request`; empty: 0, 1, 2, 4, 8 shots and the condition none. visual_input: view of an image by a run that has
    both Q-Former and aggregator; empty: the one it was trained with.
    """
    episodes = _check_episodes(tasks, shots, episodes, answers)
    if controls is None:
        controls = () if tasks else ("none",)
    decoding = Decoding(beams, max_new_tokens, repetition_penalty=repetition_penalty)
    run_dir = _run_folder(run, checkpoint)
    _refuse_unknown(controls, generate, tasks, limit)
    decoding.refuse()
    if leaderboard is not None and "none" not in controls:
        raise UserError("--leaderboard needs the control none, which is what the model predicts")
    ShardSet.open(data, split)
    return Request(
        run=run,
        run_dir=run_dir,
        config=_with_view(config_load.load(str(run_dir / "config.yaml")), visual_input),
        data=data,
        split=split,
        limit=limit,
        controls=cast(tuple[Control, ...], tuple(dict.fromkeys(controls))),
        generate=generate,
        tasks=tuple(dict.fromkeys(tasks)),
        decoding=decoding,
        checkpoint=checkpoint,
        zero3=zero3,
        leaderboard=leaderboard,
        shots=tuple(sorted(set(shots or episode_conditions.SHOTS))) if "lcl" in tasks else (),
        episodes=tuple(dict.fromkeys(episodes)),
        answers=answers,
        visual_input=visual_input,
    )


def _with_view(config: RunConfig, visual_input: str) -> RunConfig:
    """The configuration with another view of an image; UserError when the run has no weights for it. A run that holds
    Q-Former and aggregator and trained through one of them may be asked through the other, or through both."""
    if not visual_input:
        return config
    held = {"projector": config.model.visual_input == "projector", "qformer": config.model.qformer.queries > 0}
    held["aggregator"] = bool(config.model.aggregator.layers)
    held["all"] = held["qformer"] and held["aggregator"]
    if not held.get(visual_input, False):
        known = ", ".join(view for view, there in held.items() if there)
        raise UserError(f"--visual-input {visual_input}: this run has {known}")
    # Any: a dataclass does not narrow a string that was just compared with its values.
    view: Any = visual_input
    return replace(config, model=replace(config.model, visual_input=view))


def _refuse_unknown(controls: Sequence[str], generate: int, tasks: Sequence[str], limit: int) -> None:
    if not controls and not generate and not tasks:
        raise UserError("nothing to evaluate: name --controls, --events or --tasks")
    for value, name in ((limit, "--limit"), (generate, "--events")):
        if value < 0:
            raise UserError(f"{name} {value}: must not be negative")
    for option, named, known in (("--controls", controls, CONTROLS), ("--tasks", tasks, tuple(NEW_TOKENS))):
        for each in named:
            if each not in known:
                raise UserError(f"{option} {each}: unknown; there are: {', '.join(known)}")


def _check_episodes(
    tasks: Sequence[str], shots: Sequence[int], episodes: Sequence[str], answers: int
) -> tuple[str, ...]:
    """Conditions of task lcl. Raises UserError for options that nothing reads, and for values that cannot be."""
    for option, value in (("--shots", shots), ("--episodes", episodes), ("--answers", answers)):
        if value and "lcl" not in tasks:
            raise UserError(f"{option}: read only with --tasks lcl")
    if answers < 0 or any(count < 0 for count in shots):
        raise UserError(f"--shots {','.join(map(str, shots))} --answers {answers}: must not be negative")
    return tuple(episode_conditions.condition(name).name for name in episodes or ("none",)) if "lcl" in tasks else ()


def _run_folder(run: Path, checkpoint: str) -> Path:
    """The run folder of a run or checkpoint. Raises UserError or DataError when there is none, or no checkpoint."""
    single = (run / commit.MANIFEST).exists() or run.parent.name == commit.FOLDER
    run_dir = run.parent.parent if single else run
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run}: no run folder and no checkpoint of one: {run_dir / 'config.yaml'} does not exist")
    if single and checkpoint not in ("latest", str(run)):
        raise UserError(f"--checkpoint {checkpoint}: {run} is a checkpoint already")
    if checkpoint in FORMS and not single and not commit.committed(run_dir):
        raise DataError(f"{run}: holds no checkpoint")
    if checkpoint not in FORMS and not (Path(checkpoint) / commit.MANIFEST).is_file():
        raise UserError(f"--checkpoint {checkpoint}: neither {', '.join(FORMS)} nor the folder of a checkpoint")
    return run_dir
