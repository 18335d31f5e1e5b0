"""`make lcl-demo`: the files it reads, the bounds it prints, and a run of a few steps.

In: metrics written by hand; a world of a few classes. Out: the summary. Decision: the whole launcher runs on a few
classes in a slow test; what the recipes reach is measured by the full run and stands in LOG.md.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eventlens_ds.config.load import load
from eventlens_ds.launch import lcl_demo


def write(folder: Path, stem: str, accuracy: float, interval: tuple[float, float], n: int = 1200, **more) -> None:
    """One metrics file as far as the summary reads it."""
    block = {"n": n, "accuracy": accuracy, "interval": list(interval), "pairs": 50, **more}
    path = folder / "metrics" / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"lcl": {"n": n, "shots": {shots: block for shots in lcl_demo.SHOTS}}}))


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    good = tmp_path / "eval" / "lcl"
    write(good, "lcl", 0.7, (0.48, 0.8))
    write(good, "lcl-blank_demos", 0.5, (0.47, 0.53))
    write(good, "lcl-shuffle_labels", 0.54, (0.5, 0.58))
    write(good, "lcl-released_splice", 0.5, (0.5, 0.5))
    for name in ("correct_0", "place_first", "place_middle", "place_last"):
        write(tmp_path / "eval" / "ablations", f"lcl-{name}", 0.3, (0.2, 0.4))
    write(tmp_path / "eval" / "isekai", "lcl", 0.7, (0.6, 0.8), answered=40, released=0.5, released_any_case=0.6)
    write(tmp_path / "eval" / "released", "lcl-released_splice", 0.51, (0.49, 0.53))
    return tmp_path


def test_the_summary_has_the_agreed_keys(evaluated: Path) -> None:
    summary = lcl_demo.summarise(evaluated, {"a": 1.5, "b": 2.0}, 2, True)
    assert summary["n"] == 1200 and summary["seconds"] == 3.5
    for key in ("accuracy", "blanked", "shuffled", "released_splice"):
        assert list(summary[key]) == ["0", "1", "2", "4", "8"]
    assert summary["trained_with_released_splice"]["4"] == 0.51
    assert summary["ablations"]["correct_0"] == 0.3
    assert all(summary["bounds"].values()) and "MISSED" not in "".join(lcl_demo.table(summary))


@pytest.mark.parametrize(
    ("stem", "accuracy", "interval", "n", "bound"),
    [
        ("lcl", 0.7, (0.48, 0.8), 999, "queries >= 1000"),
        ("lcl", 0.64, (0.48, 0.8), 1200, "4 shots >= 0.65"),
        ("lcl", 0.7, (0.51, 0.8), 1200, "0 shots at chance"),
        ("lcl-blank_demos", 0.56, (0.53, 0.6), 1200, "blanked 0.50 within its interval"),
        ("lcl-shuffle_labels", 0.56, (0.5, 0.6), 1200, "shuffled <= 0.55"),
    ],
)
def test_a_missed_bound_is_said(evaluated: Path, stem, accuracy, interval, n, bound) -> None:
    write(evaluated / "eval" / "lcl", stem, accuracy, interval, n)
    summary = lcl_demo.summarise(evaluated, {}, 2, True)
    assert [name for name, met in summary["bounds"].items() if not met] == [bound]
    assert f"MISSED  {bound}" in lcl_demo.table(summary)


def test_the_stages_are_one_model() -> None:
    captions, easy, mix = load("tiny_lcl_0"), load("tiny_lcl_1"), load("tiny_lcl")
    # How weights start matters to the first stage alone.
    assert replace(captions.model, qk_correlation=0.0) == easy.model == mix.model
    assert set(mix.data.tasks) == {"lcl", "caption"} and mix.data.episodes.share == 0.5


@pytest.mark.slow
def test_the_whole_launcher(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    small = ["--out", str(out), "--classes", "24", "--test-classes", "4", "--steps", "0.01"]
    assert lcl_demo.main(small) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n"] == 48 and set(summary["bounds"]) == set(lcl_demo.bounds(summary))
    assert (out / "accuracy.png").stat().st_size > 5000
    assert lcl_demo.main(small) == 0, "a second call has nothing to do"
    assert lcl_demo.main([*small, "--seed", "1"]) == 2
