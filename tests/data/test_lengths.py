"""Lengths by arithmetic equal the tokens of what is encoded, on the embedded world and on real photographs (P4).

In: built folders, three ways of linking. Out: sample tables, group indices, their cache. Decision: equality is checked
on every group by encoding it, and by switching the check off once to see it fail.
"""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eventlens_ds.config.run_config import DataConfig, ModelConfig
from eventlens_ds.data import encode as encoding
from eventlens_ds.data import lengths
from eventlens_ds.data.lengths import group_index, sample_table
from eventlens_ds.data.prompts import Piece, PromptStyle
from eventlens_ds.data.records import TASKS
from eventlens_ds.data.shards import ShardSet
from eventlens_ds.errors import DataError
from tests.small_world import SmallRun, small_config, small_run


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real photographs with VCR and VisualCOMET annotations, built into shards."""
    from eventlens_ds.data import build
    from eventlens_ds.data.sources import combined

    shared = Path(os.environ.get("EVENTLENS_SHARED", Path(__file__).parents[3] / "shared"))
    if not (shared / "data" / "photos").is_dir():
        pytest.skip(f"no photographs in {shared}; set EVENTLENS_SHARED")
    out = tmp_path_factory.mktemp("photos") / "built"
    build.build(combined.open_source("vcr,visualcomet", shared / "data" / "photos"), out)
    return out


def check_all_groups(run: SmallRun) -> int:
    """Encode every group in a row of its own; RunData.batch compares with the plan, and so does this."""
    planned = run.data.groups[0].lengths
    for number, tokens in enumerate(planned.tolist()):
        assert run.batch([(0, number)]).real_tokens == tokens
    return len(planned)


@pytest.mark.P4
@pytest.mark.parametrize("linking", ["add", "insert", "none"])
def test_planned_equals_encoded_on_the_world(world_folder: Path, linking: str) -> None:
    config = replace(small_config(world_folder), model=ModelConfig(linking=linking))  # type: ignore[arg-type]
    assert check_all_groups(small_run(world_folder, config)) > 150


@pytest.mark.P4
def test_planned_equals_encoded_in_the_other_style(world_folder: Path) -> None:
    assert check_all_groups(small_run(world_folder, list_objects=False, event_context="subject")) > 150


@pytest.mark.P4
@pytest.mark.parametrize("linking", ["add", "insert"])
def test_planned_equals_encoded_on_photographs(photos: Path, linking: str) -> None:
    splits = [name for name in ("train", "val") if (photos / name).is_dir()]
    config = small_config(photos)
    config = replace(config, model=ModelConfig(linking=linking))  # type: ignore[arg-type]
    found = [check_all_groups(small_run(photos, config, split=split, row_tokens=1024)) for split in splits]
    assert splits and min(found) > 0


@pytest.mark.P4
def test_a_wording_that_the_arithmetic_does_not_know_is_refused(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: encoding says one word more than was counted."""
    render = encoding.render

    def longer(group, style):  # type: ignore[no-untyped-def]
        made = render(group, style)
        return made._replace(prefix=(*made.prefix, Piece(" more")))

    monkeypatch.setattr(encoding, "render", longer)
    with pytest.raises(ValueError, match=r"group of .*: \d+ tokens, planned \d+"):
        small.batch([(0, 0)])


def test_the_cache_gives_the_same_table_and_a_damaged_one_is_computed_again(
    small: SmallRun, world_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = ShardSet.open(world_folder, "train")
    first = sample_table(shards, "", small.spec, cache=tmp_path)
    (file,) = tmp_path.glob("*.npy")
    again = sample_table(shards, "", small.spec, cache=tmp_path)
    assert np.array_equal(first.columns, again.columns) and first.fingerprint == again.fingerprint
    file.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        logging.getLogger("eventlens_ds").propagate = True
        assert np.array_equal(sample_table(shards, "", small.spec, cache=tmp_path).columns, first.columns)
    assert "is damaged" in caplog.text and [f.name for f in tmp_path.glob("*.npy")] == [file.name]


def test_the_key_holds_everything_lengths_depend_on(
    small: SmallRun, world_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, spec = ShardSet.open(world_folder, "train"), small.spec
    vision = spec.vision._replace(tokens=spec.vision.tokens + 1)
    style = PromptStyle(list_objects=False)
    specs = [spec, replace(spec, linking="insert"), replace(spec, vision=vision), replace(spec, style=style)]
    keys = [lengths._fingerprint(shards, small.tokenizer, one) for one in specs]
    keys.append(lengths._fingerprint(ShardSet.open(world_folder, "val"), small.tokenizer, spec))
    monkeypatch.setattr(lengths, "PROMPT_VERSION", 999)
    keys.append(lengths._fingerprint(shards, small.tokenizer, spec))
    assert len(set(keys)) == len(keys)


def test_workers_change_nothing(small: SmallRun, world_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet.open(world_folder, "train")
    expected = sample_table(shards, "", small.spec).columns
    monkeypatch.setattr(lengths, "_CHUNK_IMAGES", 7)
    assert np.array_equal(sample_table(shards, "", small.spec, workers=2).columns, expected)


@pytest.mark.P4
def test_groups_are_closed_at_the_budget_and_never_mix(small: SmallRun) -> None:
    table = small.data.tables[0]
    tight = group_index(table, tasks=TASKS, max_tokens=200)
    wide = group_index(table, tasks=TASKS, max_tokens=100_000)
    assert len(tight) > len(wide) > 0
    for index, budget in ((tight, 200), (wide, 100_000)):
        assert index.first[0] == 0 and (index.first[1:] == index.last[:-1]).all() and index.last[-1] == len(table)
        for first, last, tokens in zip(index.first, index.last, index.lengths):
            assert len(set(table["image"][first:last])) == 1 == len(set(table["task"][first:last]))
            assert tokens <= budget or last - first == 1
            own = table["stem"][first:last].sum() + table["leaves"][first:last].sum()
            assert tokens == table["prefix"][first] + own


def test_limit_tasks_and_blind_questions(small: SmallRun) -> None:
    table = small.data.tables[0]
    few = group_index(table, tasks=("event",), max_tokens=512, max_image=3)
    lines = [line for first, last in zip(few.first, few.last) for line in range(first, last)]
    assert set(table["image"][lines]) == {0, 1, 2} and set(table["task"][lines]) == {TASKS.index("event")}
    columns = table.columns.copy()
    columns[lengths.COLUMNS.index("blind")] = table["task"] == TASKS.index("vcr_answer")
    blind = lengths.SampleTable(columns, "x")
    kept = group_index(blind, tasks=("vcr_answer",), max_tokens=512, with_blind=True)
    assert len(group_index(blind, tasks=("vcr_answer",), max_tokens=512)) == 0 < len(kept)


def test_data_config_defaults_fit_the_prompt_style() -> None:
    assert PromptStyle(DataConfig().list_objects, DataConfig().event_context) == PromptStyle()


def test_workers_end_by_signals_whatever_handler_the_rank_has(
    world_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool ended by SIGTERM once waited for ever: the rank's handler, inherited, had swallowed it."""
    plain = lengths._image_lengths

    def checked(*given: Any) -> Any:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        return plain(*given)

    shards = ShardSet.open(world_folder, "train")
    spec = small_run(world_folder).spec
    monkeypatch.setattr(lengths, "_CHUNK_IMAGES", 8)
    alone = lengths.sample_table(shards, "", spec)
    monkeypatch.setattr(lengths, "_image_lengths", checked)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert np.array_equal(lengths.sample_table(shards, "", spec, workers=2).columns, alone.columns)
        monkeypatch.setattr(lengths, "_end_on_sigterm", int)
        with pytest.raises(AssertionError):
            lengths.sample_table(shards, "", spec, workers=2)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_killed_worker_is_one_line(world_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "_CHUNK_IMAGES", 8)
    monkeypatch.setattr(lengths, "_image_lengths", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    spec = small_run(world_folder).spec
    with pytest.raises(DataError, match="a worker that counts tokens was killed"):
        lengths.sample_table(ShardSet.open(world_folder, "train"), "", spec, workers=2)
