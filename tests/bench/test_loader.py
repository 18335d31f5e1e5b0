"""`eventlens bench loader`: both arms load the same pictures, the file has its columns, other pictures give no rate.

In: the small world. Out: assertions on lines and counts, none on speed, which only a quiet machine can tell.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from eventlens_ds.bench import loader
from eventlens_ds.config.load import load
from eventlens_ds.errors import DataError, UserError


def prepared(world_folder: Path, files: Path) -> loader.Work:
    files.mkdir()
    return loader.prepare(load("tiny_vcr", [f"--data.train=[{world_folder}]"]), 30, files)


def test_a_line_per_number_of_workers(world_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loader.csv"
    small = [str(world_folder), "--images", "20", "--repeats", "2", "--out", str(out)]
    assert loader.main([*small, "--workers", "0,2"]) == 0
    assert loader.main([*small, "--workers", "1", "--data.layout=flat"]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["workers"] for row in rows] == ["0", "2", "1"] and set(rows[0]) == set(loader.COLUMNS)
    for row in rows:
        assert float(row["ratio_p25"]) <= float(row["ratio_p50"]) <= float(row["ratio_p75"])
        assert int(row["images"]) >= 20 and float(row["difference"]) <= loader.TOLERANCE and row["side"] == "96"
    assert capsys.readouterr().out.count("ours / plain") == 3


def test_the_plain_loop_reads_the_images_of_the_rows_in_their_order(world_folder: Path, tmp_path: Path) -> None:
    work = prepared(world_folder, tmp_path / "files")
    keys = [key for members, seed in work.rows for key in work.data.batch(members, seed).image_keys]
    names = {key: image for image in range(40) for key in [work.data.shards[0].image(image).key]}
    assert [file.name for file in work.files] == [f"0-{names[key]}" for key in keys]
    assert len(set(work.files)) < len(work.files), "an image of two groups is loaded twice by both arms"
    assert work.files[0].read_bytes() == work.data.shards[0].image_bytes(names[keys[0]])
    assert loader.plain(work.files[0], 96).shape == (96, 96, 3)
    assert loader.run_ours(work, 0)[1] == loader.run_ours(work, 2)[1] > 0


def test_other_pictures_give_no_rate(world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = prepared(world_folder, tmp_path / "files")
    assert loader.compare(work) <= loader.TOLERANCE
    usual = loader.plain
    monkeypatch.setattr(loader, "plain", lambda file, side: np.ascontiguousarray(usual(file, side)[:, ::-1]))
    with pytest.raises(DataError, match="pictures differ from the plain ones by"):
        loader.compare(work)


def test_a_broken_image_in_the_plain_loop_is_an_error(world_folder: Path, tmp_path: Path) -> None:
    work = prepared(world_folder, tmp_path / "files")
    work.files[3].write_bytes(b"not a picture")
    with pytest.raises(DataError, match="plain loop failed"):
        loader.run_plain(work, 2)


@pytest.mark.parametrize("wrong", [["--workers", "a"], ["--repeats", "1"], ["--images", "0"], ["--workers", "-1"]])
def test_wrong_arguments_are_one_line(world_folder: Path, wrong: list[str]) -> None:
    with pytest.raises(UserError, match="--"):
        loader.main([str(world_folder), *wrong])
