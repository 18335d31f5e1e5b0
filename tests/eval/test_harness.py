"""`eventlens eval` on a two-step run: files, ranks, refusals, and what replaces what.

In: the run and world of the session. Out: assertions on rows, metrics and messages. Decision: ranks are real
processes started by the command itself; everything else runs in this one.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.data import build
from eventlens_ds.data.prompts import PromptStyle
from eventlens_ds.data.sources import combined
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.eval import harness, language_rows, report, vcr
from eventlens_ds.runtime import checkpoint, commit
from tests.data.conftest import paint_vcr
from tests.eval.language_world import TASKS, build_language

REPOSITORY = Path(__file__).parents[2]
TOLERANCE = 1e-5


def rows_of(out: Path, name: str = "vcr") -> list[dict[str, Any]]:
    return report.read_rows(out / "predictions" / f"{name}.jsonl")


def same_rows(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    """Equal in everything, scores to TOLERANCE."""
    assert [row["id"] for row in first] == [row["id"] for row in second]
    for a, b in zip(first, second):
        if {**a, "scores": 0} != {**b, "scores": 0}:
            return False
        if any(abs(x - y) > TOLERANCE for x, y in zip(a.get("scores", []), b.get("scores", []), strict=True)):
            return False
    return True


@pytest.fixture(scope="module")
def evaluated(run_folder: Path, world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images with two controls and two events, on one rank."""
    out = tmp_path_factory.mktemp("eval") / "out"
    asked: dict[str, Any] = {"limit": 3, "controls": ("none", "blank"), "generate": 2, "java": False}
    assert harness.main(run_folder, world_folder, out=out, **asked) == 0
    return out


def test_every_number_comes_from_rows(evaluated: Path) -> None:
    assert {p.stem for p in (evaluated / "predictions").iterdir()} == {"vcr", "vcr-blank", "events"}
    assert report.differences(evaluated, java=False) == []
    stored = json.loads((evaluated / "metrics" / "vcr.json").read_text())
    stored["vcr"]["q2a"] = 1.5
    wrong = evaluated.parent / "wrong"
    shutil.copytree(evaluated, wrong)
    (wrong / "metrics" / "vcr.json").write_text(json.dumps(stored))
    assert report.differences(wrong, java=False) != []


def test_conditions_name_what_was_evaluated(evaluated: Path, run_folder: Path, world_folder: Path) -> None:
    facts = json.loads((evaluated / "metrics" / "events.json").read_text())["conditions"]
    assert facts["checkpoint"] == "step-2" and facts["split"] == "val" and facts["ranks"] == 1
    assert facts["run"] == str(run_folder) and facts["data"] == str(world_folder)
    assert facts["versions"]["torch"] and facts["conditions"]["vcr-blank"]["control"] == "blank"
    assert (evaluated / "skipped.jsonl").read_text() == ""


def test_event_rows_carry_texts_and_fifty_candidates(evaluated: Path) -> None:
    rows = rows_of(evaluated, "events")
    generated = [row for row in rows if "generations" in row]
    ranked = [row for row in rows if "candidates_gold" in row]
    assert len(generated) == len(ranked) == 2
    assert all(len(row["generations"]) == len(row["novel"]) == 5 for row in generated)
    assert all(len(row["candidates_gold"]) + len(row["candidates_other"]) == 50 for row in ranked)
    assert [row["references"] for row in generated] == [row["candidates_gold"] for row in ranked]


def two_ranks(run: Path, data: Path, out: Path, *options: str) -> None:
    """The command as a user types it, with the model partitioned over two processes."""
    asked = ["--data", str(data), "--out", str(out), "--ranks", "2", "--zero3", *options]
    command = [sys.executable, "-m", "eventlens_ds", "eval", str(run), *asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.P5
def test_two_ranks_of_a_partitioned_model_give_the_rows_of_one(
    evaluated: Path, run_folder: Path, world_folder: Path, tmp_path: Path
) -> None:
    two_ranks(run_folder, world_folder, tmp_path, "--limit", "3")
    assert same_rows(rows_of(tmp_path), rows_of(evaluated))
    # The comparison is able to fail: without its pixels the model scores otherwise.
    assert not same_rows(rows_of(tmp_path), rows_of(evaluated, "vcr-blank"))
    facts = json.loads((tmp_path / "metrics" / "vcr.json").read_text())["conditions"]
    assert facts["ranks"] == 2 and facts["zero3"] is True


@pytest.mark.slow
@pytest.mark.P5
def test_two_ranks_generate_and_rank_what_one_does(
    evaluated: Path, run_folder: Path, world_folder: Path, tmp_path: Path
) -> None:
    two_ranks(run_folder, world_folder, tmp_path, "--limit", "3", "--controls", "", "--events", "2")
    assert same_rows(rows_of(tmp_path, "events"), rows_of(evaluated, "events"))


def test_a_checkpoint_is_as_good_as_its_run(run_folder: Path, world_folder: Path, tmp_path: Path) -> None:
    step = run_folder / "checkpoints" / "step-2"
    for run, out in ((run_folder, tmp_path / "a"), (step, tmp_path / "b")):
        assert harness.main(run, world_folder, out=out, limit=1) == 0
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


def settled(run: Path) -> None:
    """Wait until no file of a run is so young that its time stamp could hide a second write."""
    newest = max(path.stat().st_ctime for path in run.rglob("*"))
    time.sleep(max(0.0, newest + commit.hashes.SETTLED + 0.1 - time.time()))


@pytest.mark.P9
def test_the_bytes_of_a_checkpoint_are_hashed_once(
    run_folder: Path, world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled(run_folder)
    read: list[str] = []
    usual = commit.sha256_file
    monkeypatch.setattr(commit, "sha256_file", lambda path: read.append(path.name) or usual(path))
    monkeypatch.setattr(commit, "hashes", commit._Hashes())
    assert harness.main(run_folder, world_folder, out=tmp_path / "out", limit=1) == 0
    manifest = commit.read_manifest(run_folder / "checkpoints" / "step-2")
    files = [*manifest["files"], manifest["frozen"]["path"]]
    assert sorted(read) == sorted([*(Path(name).name for name in files), commit.MANIFEST])

    read.clear()
    monkeypatch.setattr(commit._Hashes, "sha256", lambda self, path: commit.sha256_file(path))
    assert harness.main(run_folder, world_folder, out=tmp_path / "again", limit=1) == 0
    assert len(read) == 2 * len(files) + 1, "negative control: without the memory every file is read twice"


@pytest.mark.P9
@pytest.mark.parametrize("when", ["after it was verified", "while it is read"])
def test_what_is_loaded_is_what_was_verified(
    run_folder: Path, world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A file changed between its hash and its last tensor, by the same number of bytes and with its old mtime."""
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    file = next((run / "checkpoints").rglob("mp_rank_00_model_states.pt"))
    settled(run)

    def change() -> None:
        before = file.stat()
        with open(file, "r+b") as out:
            out.seek(before.st_size // 2)
            out.write(b"\x55" * 8)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    if when == "after it was verified":
        usual = harness._checkpoint
        monkeypatch.setattr(harness, "_checkpoint", lambda request: (usual(request), change())[0])
        message = "content does not match its sha256"
    else:
        tensors = checkpoint._tensors
        monkeypatch.setattr(checkpoint, "_tensors", lambda *args: _then(tensors(*args), change))
        message = "mp_rank_00_model_states.pt changed while it was read"
    with pytest.raises(DataError, match=message):
        harness.main(run, world_folder, out=tmp_path / "out", limit=1)
    assert not (tmp_path / "out").exists()


def _then(items: Iterator[Any], act: Callable[[], None]) -> Iterator[Any]:
    yield from items
    act()


def test_an_error_of_all_ranks_is_one_line(run_folder: Path, world_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    capsule = json.loads((run / "capsule.json").read_text())
    (run / "capsule.json").write_text(json.dumps({**capsule, "tokenizer": "another"}))
    command = [sys.executable, "-m", "eventlens_ds", "eval", str(run), "--data", str(world_folder), "--ranks", "2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 3 and len(errors) == 1 and "trained with tokenizer another" in errors[0], done.stderr


def test_default_folder_and_replacement(run_folder: Path, world_folder: Path) -> None:
    harness.main(run_folder, world_folder, limit=1, controls=("none", "permute_regions"))
    (out,) = (run_folder / "eval").iterdir()
    assert out.name.endswith("-val") and (out / "predictions" / "vcr-permute_regions.jsonl").exists()
    harness.main(run_folder, world_folder, limit=1)
    assert [p.name for p in (out / "predictions").iterdir()] == ["vcr.jsonl"]
    assert report.differences(out) == []
    (out / "predictions" / "theirs.jsonl").write_text("")
    with pytest.raises(UserError, match=r"theirs\.jsonl of another origin"):
        harness.main(run_folder, world_folder, limit=1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"controls": ("upside_down",)}, "--controls upside_down: unknown; there are: none, blank, permute_regions"),
        ({"controls": ()}, "nothing to evaluate: name --controls, --events or --tasks"),
        ({"tasks": ("capton",)}, "--tasks capton: unknown; there are: caption, rec, reg, vqa, vsr, pope"),
        ({"tasks": ("rec",), "beams": 0}, "--beams 0: must be at least 1"),
        ({"tasks": ("rec",), "max_new_tokens": -1}, "--max-new-tokens -1"),
        ({"tasks": ("rec",), "beams": 2, "repetition_penalty": 0.0}, r"--repetition-penalty 0\.0: must be above 0"),
        ({"tasks": ("rec",), "repetition_penalty": 1.5}, r"--repetition-penalty 1\.5: is part of beam search"),
        ({"tasks": ("rec",), "leaderboard": Path("x.csv")}, "--leaderboard needs the control none"),
        ({"limit": -1}, "--limit -1"),
        ({"split": "test"}, "no split 'test'"),
        ({"checkpoint": "newest"}, "--checkpoint newest: neither latest, best nor"),
        ({"leaderboard": Path("x.csv"), "controls": ("blank",)}, "--leaderboard needs the control none"),
    ],
)
def test_impossible_requests(run_folder: Path, world_folder: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        harness.check(run_folder, world_folder, **asked)


def test_runs_that_cannot_be_evaluated(run_folder: Path, world_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run folder and no checkpoint of one: .*config\.yaml does not exist"):
        harness.check(tmp_path, world_folder)
    shutil.copy(run_folder / "config.yaml", tmp_path)
    with pytest.raises(DataError, match="holds no checkpoint"):
        harness.check(tmp_path, world_folder)
    with pytest.raises(DataError, match="names no best checkpoint"):
        harness.main(run_folder, world_folder, checkpoint="best")


@pytest.mark.parametrize(
    ("key", "other", "message"),
    [
        ("bottleneck: 64", "bottleneck: 32", r"step-2: tensor adapters.* is .*64"),
        ("linking: add", "linking: none", r"another model, its tensor regions\."),
        ("bottleneck: 64", "bottleneck: 0", r"another model, its tensor adapters\."),
    ],
)
def test_another_model_is_refused(
    run_folder: Path, world_folder: Path, tmp_path: Path, key: str, other: str, message: str
) -> None:
    changed = tmp_path / "run"
    shutil.copytree(run_folder, changed, ignore=shutil.ignore_patterns("eval"))
    text = (changed / "config.yaml").read_text()
    assert key in text
    (changed / "config.yaml").write_text(text.replace(key, other))
    with pytest.raises(DataError, match=message):
        harness.main(changed, world_folder, limit=1)


def test_another_tokenizer_is_refused(run_folder: Path, world_folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "run"
    shutil.copytree(run_folder, changed, ignore=shutil.ignore_patterns("eval"))
    capsule = json.loads((changed / "capsule.json").read_text())
    capsule["tokenizer"] = "0" * 16
    (changed / "capsule.json").write_text(json.dumps(capsule))
    with pytest.raises(DataError, match="trained with tokenizer 0000000000000000, but the embedded tokenizer is"):
        harness.main(changed, world_folder, limit=1)


def test_data_without_questions(run_folder: Path, world_folder: Path, tmp_path: Path) -> None:
    raw = world_folder.with_name(world_folder.name + "-raw")
    build.build(combined.open_source("visualcomet", raw), tmp_path / "events", splits=["val"], limit=4)
    with pytest.raises(DataError, match="holds no sample of the tasks vcr_answer, vcr_rationale"):
        harness.main(run_folder, tmp_path / "events")
    assert harness.main(run_folder, tmp_path / "events", out=tmp_path / "out", generate=1, java=False) == 0
    assert [p.name for p in (tmp_path / "out" / "predictions").iterdir()] == ["events.jsonl"]


def test_controls_default_to_none_and_with_tasks_to_no_vcr(run_folder: Path, world_folder: Path) -> None:
    asked = [harness.check(run_folder, world_folder, **more) for more in _CONTROLS]
    assert [(r.controls, r.language_controls) for r in asked] == [
        (("none",), ("none",)),
        ((), ("none",)),
        ((), ("none",)),
        (("blank",), ("blank",)),
    ]


_CONTROLS: tuple[dict[str, Any], ...] = (
    {},
    {"tasks": ("caption",)},
    {"tasks": ("caption",), "controls": ()},
    {"tasks": ("caption",), "controls": ("blank",)},
)


@pytest.fixture(scope="module")
def language(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """(data, OUT) of an evaluation of all tasks that are answered in words, also without pixels."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("language")
        built = build_language(folder, patch)
        asked: dict[str, Any] = {"tasks": TASKS, "controls": ("none", "blank"), "max_new_tokens": 3, "java": False}
        assert harness.main(run_folder, built, out=folder / "out", **asked) == 0
        yield built, folder / "out"


def test_tasks_are_conditions_of_their_own(language: tuple[Path, Path]) -> None:
    _, out = language
    names = {f"{task}{control}" for task in TASKS for control in ("", "-blank")}
    assert {p.stem for p in (out / "predictions").iterdir()} == names
    assert report.differences(out, java=False) == [] and (out / "skipped.jsonl").read_text() == ""
    assert [len(rows_of(out, task)) for task in TASKS] == [6, 6, 6, 7, 6, 6]
    facts = json.loads((out / "metrics" / "rec-blank.json").read_text())["conditions"]
    note = facts["conditions"]["rec-blank"]
    assert note["control"] == "blank" and (note["decoding"]["beams"], note["decoding"]["max_new_tokens"]) == (1, 3)
    assert "--tasks caption,rec,reg,vqa,vsr,pope --beams 1" in facts["command"]
    table = (out / "metrics" / "table.txt").read_text().splitlines()
    shown = {line.split()[0] for line in table[1:]}
    assert shown == names, "every condition is in the table"
    # A number that its rows do not give is noticed here too.
    rows = rows_of(out, "vsr")
    changed = "".join(json.dumps(row | {"answer": "yes" if row["label"] else "no"}) + "\n" for row in rows)
    wrong = out.parent / "wrong"
    shutil.copytree(out, wrong)
    (wrong / "predictions" / "vsr.jsonl").write_text(changed)
    assert any(line.startswith("vsr.vsr.accuracy") for line in report.differences(wrong, java=False))


def test_the_caption_floor_is_from_the_training_data_of_the_run(
    language: tuple[Path, Path], world_folder: Path
) -> None:
    """The run was trained on the world, whose captions and expressions are known."""
    _, out = language
    stored = [json.loads((out / "metrics" / f"{task}.json").read_text()) for task in ("caption", "reg")]
    for task, metrics in zip(("caption", "reg"), stored):
        text, reason = language_rows.training_floor([str(world_folder)], "train", task, PromptStyle())
        assert metrics[task]["floor"]["caption"] == text and metrics[task]["floor"]["from"] == "train" and not reason
    none = language_rows.training_floor([str(world_folder)], "train", "poem", PromptStyle())
    assert none == (None, "training texts: the training data hold no poem")


def test_a_folder_without_a_task_or_questions_says_so(
    language: tuple[Path, Path], run_folder: Path, world_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    captions = tmp_path / "captions"
    raw = world_folder.with_name(world_folder.name + "-raw")
    build.build(combined.open_source("captions", raw), captions, shard_images=16)
    with pytest.raises(DataError, match="holds no sample of the tasks rec"):
        harness.main(run_folder, captions, tasks=("rec",))
    with pytest.raises(DataError, match="holds no sample of the tasks vcr_answer, vcr_rationale"):
        harness.main(run_folder, language[0])
    asked: dict[str, Any] = {"tasks": ("vsr",), "limit": 1, "max_new_tokens": 1, "out": tmp_path / "out"}
    for controls, said in ((None, False), (("none",), True)):
        caplog.clear()
        with caplog.at_level("INFO", logger="eventlens_ds"):
            assert harness.main(run_folder, language[0], controls=controls, **asked) == 0
        assert ("holds no VCR question, only vsr is evaluated" in caplog.text) == said
        assert "the run has no adapter for vsr" in caplog.text
        assert [p.name for p in (tmp_path / "out" / "predictions").iterdir()] == ["vsr.jsonl"]


@pytest.mark.slow
@pytest.mark.P5
def test_two_ranks_search_what_one_does(
    run_folder: Path, world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions with beams, from ranks whose rows end after different numbers of tokens."""
    rows: list[list[str]] = []
    usual = language_rows.search_row

    def watched(*given: Any, **more: Any) -> list[str]:
        rows.append(usual(*given, **more))
        return rows[-1]

    monkeypatch.setattr(language_rows, "search_row", watched)
    asked: dict[str, Any] = {"tasks": ("caption",), "beams": 2, "max_new_tokens": 32, "repetition_penalty": 1.5}
    harness.main(run_folder, world_folder, out=tmp_path / "one", java=False, **asked)
    assert len({max(len(text.split()) for text in row) for row in rows}) == len(rows) == 2
    options = ["--tasks", "caption", "--beams", "2", "--max-new-tokens", "32", "--repetition-penalty", "1.5"]
    two_ranks(run_folder, world_folder, tmp_path / "two", *options)
    assert rows_of(tmp_path / "one", "caption") == rows_of(tmp_path / "two", "caption")


def test_leaderboard_file_of_a_blind_split(run_folder: Path, world_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labelled samples: the file wants rationales conditioned on every answer"):
        harness.main(run_folder, world_folder, leaderboard=tmp_path / "x.csv")
    root = paint_vcr(tmp_path / "source", images=2, questions=1, splits=("test",))
    lines = [json.loads(line) for line in (root / "vcr" / "test.jsonl").read_text().splitlines()]
    blind = [{k: v for k, v in row.items() if not k.endswith("_label")} for row in lines]
    (root / "vcr" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in blind))
    build.build(combined.open_source("vcr", root), tmp_path / "built")
    file = tmp_path / "board.csv"
    assert harness.main(run_folder, tmp_path / "built", split="test", out=tmp_path / "out", leaderboard=file) == 0
    with file.open() as text:
        header, *body = csv.reader(text)
    assert tuple(header) == vcr.COLUMNS and len(body) == 2
    assert all(abs(sum(map(float, line[1:5])) - 1) < 1e-6 for line in body)
