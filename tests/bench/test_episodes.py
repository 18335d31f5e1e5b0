"""`eventlens bench episodes`: three arms over the same episodes, timed only when their losses agree.

In: creatures. Out: CSV lines. Decision: the numbers themselves are measured by hand; here the arms must hold the same
episodes, and an arm that computes something else must be refused.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from eventlens_ds.bench import episodes
from eventlens_ds.errors import DataError, UserError

SETTINGS = ["--train.rows_per_step=1", "--data.workers=0", "--data.row_tokens=1024", "--data.episodes.shots=3"]


def test_three_arms_over_the_same_episodes(creatures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "episodes.csv"
    asked = [str(creatures), "--steps", "1", "--repeats", "2", "--out", str(out), *SETTINGS]
    assert episodes.main(asked) == 0
    lines = list(csv.DictReader(out.open()))
    assert [line["arm"] for line in lines] == list(episodes.ARMS)
    assert len({(line["episodes"], line["images"], line["tokens"]) for line in lines}) == 1
    assert [int(line["padded_tokens"]) > 0 for line in lines] == [False, True, False]
    assert all(float(line["ms_per_episode_p50"]) > 0 and line["date"] for line in lines)
    assert "ms an episode, 1.00 of packed" in capsys.readouterr().out


def test_arms_that_differ_are_not_timed(creatures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eventlens_ds.data.controls import apply_control

    usual = episodes._padded
    monkeypatch.setattr(episodes, "_padded", lambda *given: apply_control(usual(*given), "released_splice"))
    with pytest.raises(DataError, match="the arms differ by .* in their loss; no time is reported"):
        episodes.measure(creatures, "tiny_lcl", SETTINGS, 1, 2, 1)


def test_refusals() -> None:
    with pytest.raises(UserError, match="--steps 0 --repeats 5: at least 1 and 2"):
        episodes.main(["DIR", "--steps", "0"])
