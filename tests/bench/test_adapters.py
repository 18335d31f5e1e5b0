"""`bench adapters`: the arms are the same model on the same groups, a further pass is seen, and the CSV is whole.

In: the embedded world and the tiny recipe. Out: nothing. Decision: times are not checked here, since a test machine is
busy; what makes them comparable is.
"""

from __future__ import annotations

import csv
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eventlens_ds.bench import adapters, report
from eventlens_ds.data.records import TASKS
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.model.adapters import level_of

SMALL = (
    "--model.image_size=24", "--data.row_tokens=1024", "--data.tasks=[caption, reg]",
    "--model.adapters.tasks=[caption, reg]",
    "--stage.train=[projector, regions, adapters]", "--train.activation_checkpointing=true", "--data.workers=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def given(world_folder: Path) -> adapters.Setting:
    args = Namespace(config="tiny_event", data=world_folder, split="train", layers=2, vision_layers=2)
    return adapters.setting(args, SMALL)


def test_mixed_rows_hold_the_groups_of_the_pure_ones(given: adapters.Setting) -> None:
    rows = adapters.make_rows(given.data, 2)
    ids = {kind: sorted(i for row in made for i in row.sample_ids) for kind, made in rows.items()}
    assert ids["pure"] == ids["mixed"] and len(rows["pure"]) == len(rows["mixed"]) == 4
    levels = {k: [{level_of(TASKS[t]) for t in row.task_ids.tolist()} for row in made] for k, made in rows.items()}
    assert all(len(found) == 1 for found in levels["pure"]) and all(len(found) == 2 for found in levels["mixed"])


def test_rows_that_cannot_be_halved_are_refused(given: adapters.Setting) -> None:
    tight = replace(given.data.config, row_tokens=int(given.data.groups[0].lengths.max()) // 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(given.data, "config", tight)
        with pytest.raises(DataError, match="one .* group fills a row; raise data.row_tokens"):
            adapters.make_rows(given.data, 1)
    with pytest.raises(DataError, match="the data fills .* rows of .* groups, 999 are needed"):
        adapters.make_rows(given.data, 999)


def test_one_line_per_arm_from_one_model(given: adapters.Setting, tmp_path: Path) -> None:
    lines = adapters.measure(given, rows=1, repeats=2)
    assert [line["arm"] for line in lines] == list(adapters.ARMS)
    assert [line["against"] for line in lines] == ["", "none", "none", "mixture"]
    assert {line["forwards_per_row"] for line in lines} == {"1"} and lines[0]["layers"] == 2
    assert float(lines[0]["ratio_p50"]) == 1 and all(float(line["ms_p50"]) > 0 for line in lines)
    assert lines[0]["trained"] == "projector regions adapters"
    learned = [p for p in given.adapters["mixture"].parameters() if p.grad is not None]
    assert learned and all(p.grad is None for p in given.model.vision_tower.parameters())
    path = tmp_path / "adapters.csv"
    adapters.append(path, lines)
    adapters.append(path, lines)
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(adapters.ARMS)
    assert "tiny shape of width 128, 2 layers" in adapters.table(lines)
    path.write_text("other,columns\n")
    with pytest.raises(UserError, match="other columns"):
        adapters.append(path, lines)


def test_an_arm_that_computes_something_else_is_refused(
    given: adapters.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = given.adapters["task"][0].caption_up_bias
    with torch.no_grad():
        bias.fill_(1.0)
    try:
        with pytest.raises(DataError, match="arms differ by"):
            adapters.measure(given, rows=1, repeats=2)
    finally:
        with torch.no_grad():
            bias.zero_()


def test_a_further_pass_for_a_mixed_row_is_refused(given: adapters.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a model that runs its adapters once per level of the row."""
    from eventlens_ds.model.adapters import AdapterMixture

    def twice(self: Any, x: torch.Tensor, residual: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        levels = {level_of(TASKS[t]) for t in ids.tolist()}
        if len(levels) == 2 and not getattr(self, "inside", False):
            self.inside = True
            self(x, residual, ids)
            self.inside = False
        return residual

    monkeypatch.setattr(AdapterMixture, "forward", twice)
    with pytest.raises(DataError, match="runs a module 2 times, a pure row 1 times"):
        adapters.measure(given, rows=1, repeats=2)


def test_the_report_has_a_table_of_it(tmp_path: Path) -> None:
    assert "Not measured: `eventlens bench adapters" in report.adapters(tmp_path / "none.csv")
    facts = {name: "1" for name in adapters.COLUMNS} | {"device": "Some CPU", "commit": "abcdef0123", "changed": ""}
    adapters.append(tmp_path / "a.csv", [facts | {"arm": arm, "against": a[2]} for arm, a in adapters.ARMS.items()])
    text = report.adapters(tmp_path / "a.csv")
    assert text.count("Some CPU") == len(adapters.ARMS) and "abcdef0" in text and "of mixture" in text
