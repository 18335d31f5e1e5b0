"""load: precedence, one-line refusals with file:line, and a dump that reads back equal."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from eventlens_ds.config import checks
from eventlens_ds.config import load as configuration
from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.errors import UserError


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def refusal(recipe: str | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        configuration.load(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_recipe_override_in_this_order(tmp_path: Path) -> None:
    recipe = write(tmp_path, "train:\n  lr: 1e-3\n  steps: 7\n")
    config = configuration.load(recipe, ["--train.steps=9"])
    assert (config.train.lr, config.train.steps, config.train.rows_per_step) == (1e-3, 9, 8)
    assert configuration.load(None, []) == RunConfig()


@pytest.mark.parametrize(
    "overrides",
    [["--train.lr=1e-3"], ["--train.lr", "1e-3"], ["--train.lr=1", "--train.lr=.001"]],
    ids=["equals", "space", "last"],
)
def test_override_forms(overrides: list[str]) -> None:
    assert configuration.load(None, overrides).train.lr == 1e-3


def test_values_of_lists_mappings_and_negative_numbers() -> None:
    overrides = [
        "--data.train=[a, b]",
        "--data.weights",
        "1,2",
        "--model.roi.levels",
        "-2",
        "--stage.lr_scale.vision=0.1",
    ]
    config = configuration.load(None, [*overrides, "--stage.lr_scale.language=1", "--io.run=2026"])
    assert config.data.train == ("a", "b") and config.data.weights == (1.0, 2.0)
    assert config.model.roi.levels == (-2,) and config.stage.lr_scale == {"vision": 0.1, "language": 1}
    assert config.io.run == "2026"


def test_override_of_one_scale_keeps_the_others_of_the_recipe(tmp_path: Path) -> None:
    recipe = write(tmp_path, "stage:\n  lr_scale: {vision: 0.1, language: 0.2}\n")
    config = configuration.load(recipe, ["--stage.lr_scale.vision=0.5"])
    assert config.stage.lr_scale == {"vision": 0.5, "language": 0.2}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("train:\n  lr: 1e-3\n  stepz: 3\n", 3, ["unknown key train.stepz", "nearest: train.steps"]),
        ("trian:\n  lr: 1e-3\n", 1, ["unknown key trian"]),
        ("lr: 1e-3\n", 1, ["unknown key lr", "nearest: train.lr"]),
        ("train:\n  lr: 1\n\n  lr: 2\n", 4, ["train.lr is given twice", "first on line 2"]),
        ("train:\n  lr: 1\ndata:\n  limit: 1\ntrain:\n  lr: 2\n", 5, ["train is given twice", "line 1"]),
        ("stage:\n  lr_scale:\n    vision: 1\n    vision: 2\n", 4, ["stage.lr_scale.vision is given twice"]),
        ("train:\n  steps: many\n", 2, ["train.steps", '"many"', "an integer"]),
        ("train:\n  steps: 3.5\n", 2, ["train.steps", "3.5", "an integer"]),
        ("train:\n  steps: true\n", 2, ["train.steps", "true", "an integer"]),
        ("train:\n  lr:\n", 2, ["train.lr", "empty", "a number"]),
        ("train:\n  lr: auto\n", 2, ["train.lr", '"auto" is not allowed', "model.attention"]),
        ("train:\n  lr: .inf\n", 2, ["train.lr", "finite"]),
        ("train:\n  dtype: fp16\n", 2, ["train.dtype", '"fp16"', "fp32, bf16"]),
        ("train:\n  zero: 3\n", 2, ["train.zero", "3", "a text"]),
        ("train: 3\n", 1, ["train is a section"]),
        ("- train\n", 1, ["mapping of sections"]),
        ("train:\n  lr: [1\n", 3, ["not YAML"]),
        ("train:\n  steps: 0\n", 2, ["train.steps", "at least 1"]),
        ("data:\n  train: [a, b]\n  weights: [1]\n", 3, ["data.weights", "1 weights for 2 folders"]),
    ],
)
def test_recipe_refusals_name_file_and_line(tmp_path: Path, text: str, line: int, words: list[str]) -> None:
    recipe = write(tmp_path, text)
    message = refusal(recipe)
    assert message.startswith(f"{recipe}:{line}: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--train.stepz=3"], ["--train.stepz", "nearest: train.steps"]),
        (["--lr=3"], ["--lr", "nearest: train.lr"]),
        (["--train=3"], ["--train", "section", "train.steps"]),
        (["--train.lr"], ["--train.lr", "value is missing"]),
        (["--train.lr", "--train.steps=3"], ["--train.lr", "value is missing"]),
        (["train.lr=3"], ["train.lr=3", "not a setting"]),
        (["--train.lr=fast"], ["--train.lr", '"fast"', "a number"]),
        (["--train.betas=0.9"], ["--train.betas", "2 numbers"]),
        (["--stage.lr_scale.vision=x"], ["--stage.lr_scale.vision", '"x"']),
        (["--train.zero=auto"], ["--train.zero", '"auto"']),
        (["--io.tensorboard=maybe"], ["--io.tensorboard", "true or false"]),
    ],
)
def test_override_refusals_name_the_flag(overrides: list[str], words: list[str]) -> None:
    message = refusal(None, *overrides)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("--data.row_tokens=0", "data.row_tokens", "at least 1"),
        ("--data.group_tokens=2048", "data.group_tokens", "more than data.row_tokens = 1024"),
        ("--data.tasks=vcr", "data.tasks", "unknown task vcr"),
        ("--data.train=a,a", "data.train", "twice"),
        ("--stage.train=adapter", "stage.train", "unknown part adapter"),
        ("--stage.train=[]", "stage.train", "empty"),
        ("--stage.train=vision,lora", "stage.train", "model.lora.rank is 0"),
        ("--stage.lr_scale.lora=1", "stage.lr_scale", "frozen"),
        ("--train.betas=1,0.9", "train.betas", "below 1"),
        ("--train.min_lr=2", "train.min_lr", "between 0 and 1"),
        ("--objective.temperature=0", "objective.temperature", "above 0"),
        ("--model.roi.sampling_ratio=0", "model.roi.sampling_ratio", "-1 for adaptive"),
        ("--model.dropout=1", "model.dropout", "below 1"),
        ("--data.weights=1", "data.weights", "1 weights for 0 folders"),
    ],
)
def test_cross_field_checks(override: str, key: str, words: str) -> None:
    message = refusal(None, override)
    assert key in message and words in message


def test_weights_of_zero_that_would_teach_nothing() -> None:
    assert "nothing would be learned" in refusal(None, "--objective.lm=0", "--objective.choice=0")
    assert "vcr_answer" in refusal(None, "--data.tasks=vcr_answer", "--objective.choice=0")
    assert "event" in refusal(None, "--data.tasks=event", "--objective.lm=0")
    configuration.load(None, ["--data.tasks=vcr_answer", "--objective.lm=0"])


def test_every_number_has_a_range() -> None:
    """A new int or float setting must be given a range: this fails until checks.py looks at it."""
    numbers = {key for key, kind in configuration.leaves().items() if kind in (int, float)}
    ranged = {*checks._AT_LEAST, *checks._ABOVE_ZERO, *checks._SHARES, *checks._BELOW_ONE, "model.roi.sampling_ratio"}
    assert numbers == ranged


def test_names_agree_with_the_records() -> None:
    records = pytest.importorskip("eventlens_ds.data.records")
    assert checks.TASKS == records.TASKS and set(checks.CHOICE_TASKS) == records.CHOICE_TASKS


def test_data_is_required_only_when_asked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.train is empty.*eventlens data build"):
        checks.require_data(configuration.load(None))
    with pytest.raises(UserError, match="absent: no such folder"):
        checks.require_data(configuration.load(None, [f"--data.train={tmp_path},absent"]))
    checks.require_data(configuration.load(None, [f"--data.train={tmp_path}"]))


@pytest.mark.parametrize(
    "run", ["runs/a", "1e-3", "no", "null", "a: b", "'x'", "x\ny", "1_0", "0x1", "2026-01-01", "caf\u00e9"]
)
def test_dump_reads_back_equal(tmp_path: Path, run: str) -> None:
    overrides = ["--train.lr=1e-05", "--data.train=[x, y]", "--stage.lr_scale.vision=0.1", f"--io.run={run}"]
    config = configuration.load(None, overrides)
    again = configuration.load(write(tmp_path, configuration.dump(config)))
    assert again == config and configuration.hash(again) == configuration.hash(config)


def test_plain_yaml_would_not_read_back_equal(tmp_path: Path) -> None:
    """Negative control: with PyYAML's own writer the text 1e-3 comes back as a number and is refused."""
    config = configuration.load(None, ["--io.run=1e-3"])
    text = yaml.safe_dump({"io": {"run": config.io.run}})
    assert "io.run" in refusal(write(tmp_path, text))


def test_hash_sees_every_setting() -> None:
    first = configuration.hash(RunConfig())
    assert len(first) == 12
    assert first != configuration.hash(
        dataclasses.replace(RunConfig(), train=dataclasses.replace(RunConfig().train, seed=1))
    )


def test_plain_yaml_takes_the_last_of_two_keys() -> None:
    """Negative control of the duplicate check: the loader below ours accepts the file in silence."""
    assert yaml.safe_load("train:\n  lr: 1\n  lr: 2\n") == {"train": {"lr": 2}}


def test_unknown_recipe_names_the_nearest() -> None:
    assert "nearest: vcr_finetune" in refusal("vcr_finetun")
    assert "nearest" in refusal("absent/folder.yaml")


def test_recipe_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in refusal(str(path))
