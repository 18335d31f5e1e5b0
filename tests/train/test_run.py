"""Every shipped recipe can be looked at without a GPU; how much is scored during training.

In: the recipes of the package, the small run. Decision: the text that `--dry-run` prints is made in this process, on
the meta device, so the largest recipe costs no memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import eventlens_ds.config
from eventlens_ds.config.load import load
from eventlens_ds.errors import UserError
from eventlens_ds.eval.score import eval_data
from eventlens_ds.runtime.build_model import describe
from eventlens_ds.train.run import dry_text, images_with
from tests.small_world import SmallRun

RECIPES = sorted(path.stem for path in (Path(eventlens_ds.config.__file__).parent / "recipes").glob("*.yaml"))


def stage(recipe: str, *settings: str) -> dict[str, int]:
    """Trained parameters by part, read from what the dry run prints."""
    config = load(recipe, settings)
    text = dry_text(config, describe(config, dry=True)[0]).split("# stage:")[1]
    return {m[1]: int(m[2].replace(",", "")) for m in re.finditer(r"^(\w+) +([\d,]+) +[\d,]+", text, re.MULTILINE)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_exactly_the_parts_it_names(recipe: str) -> None:
    trained = stage(recipe)
    assert {part for part, count in trained.items() if count and part != "all"} == set(load(recipe, []).stage.train)


def test_the_subset_of_training_has_the_questions_it_was_asked_for(small: SmallRun) -> None:
    """Events and captions of the folder do not count, and the two halves of a question count once."""
    data = eval_data(small.config, small.tokenizer, small.spec, small.config.data.train[0], "val")
    questions = sum(int((groups.last - groups.first).sum()) for groups in data.groups) // 2
    images = data.shards[0].num_images
    assert questions == 4 * images
    assert [images_with(n, data) for n in (1, 8, questions)] == [1, 2, images]


def test_a_part_that_is_switched_off_is_refused() -> None:
    with pytest.raises(UserError, match="lora learns, but model.lora.rank is 0"):
        stage("vcr_finetune_1gpu", "--model.lora.rank=0")
