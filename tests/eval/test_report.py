"""Reports: files and table from predictions alone, and a changed row or number is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.errors import DataError
from eventlens_ds.eval import report, vcr


def _vcr_rows(hits: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(10):
        for task in (vcr.ANSWER, vcr.RATIONALE):
            scores = [-1.0 if k == (2 if i < hits else 1) else -3.0 for k in range(4)]
            rows.append({"id": f"{i}/{task}", "task": task, "annot_id": f"val-{i}", "image": f"{i}.jpg", "label": 2})
            rows[-1] |= {"scores": scores, "flags": {"which_person": i == 0, "held_out": False}}
    return rows


def _event_rows() -> list[dict[str, Any]]:
    base = {"image": "0.jpg", "event": "1 runs", "relation": "after"}
    generated = {"id": "g", "references": ["win the race", "rest"], "generations": ["win the race", "fall"]}
    ranked = {"id": "r", "candidates_gold": ["rest"], "candidates_other": ["eat"], "scores": [-1.0, -2.0]}
    return [base | generated, base | ranked]


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "predictions").mkdir()
    for name, rows in (("vcr", _vcr_rows(7)), ("vcr_blind", _vcr_rows(2)), ("events", _event_rows())):
        lines = "".join(json.dumps(r) + "\n" for r in rows)
        (tmp_path / "predictions" / f"{name}.jsonl").write_text(lines)
    return tmp_path


def test_report_is_recomputable(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    written = report.write_report(folder, conditions={"commit": "abc"}, java=False)
    assert written == report.recompute(folder, java=False)
    stored = json.loads((folder / "metrics" / "vcr.json").read_text())
    assert (stored["vcr"]["q2a"], stored["vcr"]["q2ar"], stored["conditions"]) == (0.7, 0.7, {"commit": "abc"})
    assert json.loads((folder / "metrics" / "vcr_blind.json").read_text())["vcr"]["q2a"] == 0.2
    assert json.loads((folder / "metrics" / "events.json").read_text())["event_ranking"]["acc50"] == 1.0
    assert report.differences(folder, java=False) == []
    assert not list((folder / "metrics").glob("*.partial"))


def test_changed_prediction_or_number_is_noticed(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    report.write_report(folder, java=False)
    file = folder / "predictions" / "vcr.jsonl"
    file.write_text(file.read_text().replace('"label": 2', '"label": 1', 1))
    lines = report.differences(folder, java=False)
    assert "vcr.vcr.q2a: stored 0.7, its rows give 0.6" in lines
    file.unlink()
    assert "vcr: no file in predictions/" in report.differences(folder, java=False)
    stored = folder / "metrics" / "vcr_blind.json"
    stored.write_text(stored.read_text().replace("0.2,", "0.9,", 1))
    assert any(line.startswith("vcr_blind.vcr.q2") for line in report.differences(folder, java=False))


def test_a_number_that_cannot_be_recomputed_says_so(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    report.write_report(folder, java=False)
    path = folder / "metrics" / "events.json"
    stored = json.loads(path.read_text())
    stored["event_generation"]["meteor"] = 0.3
    path.write_text(json.dumps(stored))
    assert report.differences(folder, java=False) == ["events.event_generation.meteor: stored 0.3, not recomputed here"]


def test_table_is_plain_text_with_intervals_and_notes(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "predictions" / "empty.jsonl").write_text("")
    with open(folder / "predictions" / "vcr.jsonl", "a") as file:
        file.write(json.dumps(_vcr_rows(10)[0] | {"annot_id": "val-99", "label": None}) + "\n")
    report.write_report(folder, java=False)
    text = (folder / "metrics" / "table.txt").read_text()
    lines = text.splitlines()
    assert lines[0].split() == ["condition", "metric", "value", "95%", "interval", "n"]
    row = next(line for line in lines if line.startswith("vcr ") and "q2a " in line).split()
    assert row[:3] == ["vcr", "q2a", "0.7000"] and row[-1] == "10" and float(row[3]) < 0.7 < float(row[5])
    assert "1 questions without rationale row, e.g. val-99" in text
    assert "1 rows without a label: no accuracy" in text
    assert "meteor: java was switched off" in text and "tokenizer: python" in text
    assert "1 rows with fewer than 50 candidates" in text
    assert any(line.split() == ["empty", "no", "rows"] for line in lines)
    assert text.isascii() and not any(line.endswith(" ") for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}\n{"id": \n', r"vcr\.jsonl:2: not a JSON line"),
        ("[1]\n", r"vcr\.jsonl:1: expected an object, got list"),
        ('{"id": "x", "task": "cption"}\n', r"vcr\.jsonl:1: row x: neither"),
        ('{"id": "x", "task": "caption"}\n', r"vcr\.jsonl: x: key image is missing"),
        ('{"id": "x", "task": "vcr_answer"}\n', r"vcr\.jsonl: x: key annot_id is missing"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    folder = _folder(tmp_path)
    (folder / "predictions" / "vcr.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        report.recompute(folder, java=False)


def test_folder_without_predictions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"predictions: no prediction file"):
        report.recompute(tmp_path)
