"""Tags that are made wrong on purpose, and tags that the control blank hides: lengths stay, evaluation is left alone.

In: images with tags in shards of their own. Out: rows of `RunData`. Decision: the embedded tokenizer and real rows, so
that a length that changed would be refused by the plan's own check.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eventlens_ds.config.load import load
from eventlens_ds.config.run_config import ModelConfig
from eventlens_ds.data import build
from eventlens_ds.data.controls import apply_control
from eventlens_ds.data.encode import rendered_group
from eventlens_ds.data.prompts import text_of
from eventlens_ds.data.records import Batch
from eventlens_ds.data.sources.combined import open_source
from eventlens_ds.data.tag_counts import count_tags
from eventlens_ds.errors import UserError
from eventlens_ds.eval.score import eval_data
from tests.data.conftest import paint, write_rows
from tests.small_world import SmallRun, small_config, small_run

TAGS = [f"dog {digit}" for digit in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tags")
    names = [f"{i}.jpg" for i in range(10)]
    write_rows(root / "regions" / "captions.jsonl", [{"img_path": n, "caption": "a dog in the park"} for n in names])
    rows = [{"img_path": n, "tags": [TAGS[i], TAGS[(i + 1) % 10], TAGS[(i + 2) % 10]]} for i, n in enumerate(names)]
    write_rows(root / "regions" / "tags.jsonl", rows)
    build.build(open_source("captions,tags", paint(root, *names)), root / "built")
    return root / "built"


def run_with(folder: Path, noise: float, **data: Any) -> SmallRun:
    config = replace(small_config(folder), model=ModelConfig(soft_prompt=True))
    return small_run(folder, config, tag_noise=noise, tasks=("caption",), **data)


def ids(run: SmallRun, seed: int = 0) -> list[list[int]]:
    return [run.batch([(0, g)], seed).input_ids[0].tolist() for g in range(len(run.data.groups[0]))]


@pytest.mark.P3
@pytest.mark.P4
@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_noise_changes_tags_and_no_length(folder: Path, layout: str) -> None:
    clean, noisy = run_with(folder, 0.0, layout=layout), run_with(folder, 0.7, layout=layout)
    before, after = ids(clean), ids(noisy)
    assert before != after and [len(x) for x in before] == [len(x) for x in after]
    assert ids(noisy) == after and ids(noisy, seed=1) != after and ids(clean, seed=1) == before
    for group in range(len(before)):
        batch = clean.batch([(0, group)])
        moved = torch.tensor(before[group]) != torch.tensor(after[group])
        assert batch.tag_slots is not None and not (moved & ~batch.tag_slots).any()


def test_the_share_and_where_other_tags_come_from(folder: Path) -> None:
    run = run_with(folder, 0.5)
    noise = run.data.tag_noise
    assert noise is not None
    kept = drawn = 0
    for seed in range(100):
        for group in range(len(run.data.groups[0])):
            (image,) = run.data.group(0, group).images
            tags = noise.noisy(image, seed)
            assert len(tags) == len(set(tags)) == 3 and set(tags) <= set(TAGS)
            own = [a == b for a, b in zip(tags, image.tags) if len(noise.pool[noise._lengths(b)]) > 3]
            kept, drawn = kept + sum(own), drawn + len(own)
    assert drawn > 500 and abs(kept / drawn - 0.5) < 0.05


def test_an_evaluation_sees_the_tags_as_they_are(folder: Path) -> None:
    run = run_with(folder, 1.0)
    shown = eval_data(run.config, run.tokenizer, run.spec, str(folder), "train", tasks=["caption"])
    assert shown.tag_noise is None
    clean = run_with(folder, 0.0)
    assert shown.batch([(0, 0)], 0).input_ids.tolist() == clean.batch([(0, 0)]).input_ids.tolist()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--data.tag_noise=0.2"], "tags are listed only with model.soft_prompt"),
        (["--data.tag_noise=1.5", "--model.soft_prompt=true"], "must be between 0 and 1"),
        (["--data.tag_noise=0.2", "--model.soft_prompt=true", "--data.tag_tokens=0"], "no tag is listed"),
        (["--data.tag_noise=0.2", "--model.soft_prompt=true", "--data.control=blank"], "blank hides every tag"),
    ],
)
def test_noise_that_could_not_act_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"data.tag_noise.*{said}"):
        load("tiny_lion_3", settings)


def test_tags_are_counted_and_a_run_without_any_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from eventlens_ds.train.run import training_data

    run = run_with(folder, 0.0, tag_tokens=2)
    words = [run.data.shards[0].image(i).tags for i in range(10)]
    counts = count_tags(run.data.shards[0], run.tokenizer, 2)
    shown = sum(int(p.tag >= 0) for g in range(10) for p in _prefix(run, g))
    assert counts == (10, 10, 10, sum(map(len, words)), sum(map(len, words)) - shown)
    with caplog.at_level("INFO"):
        training_data(run.config, run.tokenizer, run.spec)
    assert "10 of 10 images looked at have tags; 10 lists are longer than data.tag_tokens 2" in caplog.text
    build.build(open_source("captions", folder.parent), folder.parent / "untagged")
    bare = replace(run.config, data=replace(run.config.data, train=(str(folder.parent / "untagged"),)))
    with pytest.raises(UserError, match="model.soft_prompt: none of the 10 images looked at in .* has tags"):
        training_data(bare, run.tokenizer, run.spec)


def _prefix(run: SmallRun, group: int) -> Any:
    return rendered_group(run.data.group(0, group), run.tokenizer, run.spec).prefix


def tag_text(run: SmallRun, batch: Batch) -> str:
    assert batch.tag_slots is not None
    return run.tokenizer.hf.decode(batch.input_ids[0, batch.tag_slots])


@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_blank_hides_the_tags_and_nothing_else_of_the_text(folder: Path, layout: str) -> None:
    run = run_with(folder, 0.0, layout=layout)
    batch = run.batch([(0, 0), (0, 1)])
    assert "dog" in tag_text(run, batch)
    blank = apply_control(batch, "blank")
    assert batch.tag_slots is not None and blank.input_ids.shape == batch.input_ids.shape
    assert len(set(blank.input_ids[0, batch.tag_slots].tolist())) == 1
    assert torch.equal(blank.input_ids[0, ~batch.tag_slots], batch.input_ids[0, ~batch.tag_slots])
    other = apply_control(run.batch([(0, 0), (0, 1)]), "permute_regions")
    assert torch.equal(other.input_ids, batch.input_ids)
    shown = text_of(rendered_group(run.data.group(0, 0), run.tokenizer, run.spec).prefix)
    assert "following tags: [dog 0, dog 1, dog 2]" in shown


def test_a_row_that_does_not_say_where_its_tags_are_is_refused(folder: Path) -> None:
    """Negative control: without the marks blank would show the tags."""
    batch = run_with(folder, 0.0).batch([(0, 0)])
    with pytest.raises(ValueError, match="blank cannot hide them"):
        apply_control(replace(batch, tag_slots=None), "blank")
