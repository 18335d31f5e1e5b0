"""The report: tables only from rows, plots only from rows, everything else listed as not measured.

In: rows as the benchmarks write them, with made-up times. Out: nothing. Decision: the made-up rows include a wrong
provider that would be the fastest, so that a report which trusted it would show.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from eventlens_ds.bench import report
from eventlens_ds.bench.kernels import rows
from eventlens_ds.bench.loader import COLUMNS as LOADER
from eventlens_ds.bench.train import COLUMNS as TRAIN
from eventlens_ds.errors import UserError

WHERE = {
    "device_type": "cpu",
    "device": "Some CPU",
    "threads": "2",
    "torch": "2.13.0",
    "cuda": "",
    "commit": "abcdef0123",
    "modified": "no",
    "date": "2026-01-02",
}


def row(provider: str, us: float, case: str, **more: object) -> dict[str, object]:
    made = {
        "op": "moa", "case": case, "dtype": "float32", "mode": "fwd+bwd", "cache": "not controlled",
        "provider": provider, "scope": "call", "ours": "yes" if provider.startswith("ours") else "no", "status": "ok",
        "us_p20": us - 1, "us_p50": us, "us_p80": us + 1, "copy_us": 10, "copy_share": 10 / us,
        "roofline_share": 20 / us, "gb_per_s": 1.5, "rms_error": "1.0e-07", "peak_bytes": 200, "held_bytes": 100,
        "io_bytes": 150, "bitwise": "yes", **WHERE, **more,
    }  # fmt: skip
    return made


def moa_rows() -> list[dict[str, object]]:
    made = []
    for case, dense, sparse in (("E4-r64", 80, 90), ("E8-r64", 150, 100), ("E16-r64", 300, 110)):
        name = f"T2048-D512-{case}-k2"
        made += [
            row("ours as dispatched", dense, name),
            row("ours dense reference", dense, name),
            row("ours sparse reference", sparse, name),
            row("mm eager", 120, name),
            row("bmm", 500, name),
            row("grouped_mm", 1, name, status="wrong: forward differs", us_p50=""),
        ]
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "BENCHMARKS.md").write_text("# Benchmarks\n\nwritten by hand\n")
    (tmp_path / "KERNELS.md").write_text("# Kernels\n")
    return tmp_path


def run(folder: Path) -> str:
    pages = ["--file", str(folder / "BENCHMARKS.md"), "--contract", str(folder / "KERNELS.md")]
    assert report.main(["--results", str(folder), "--plots", str(folder / "plots"), *pages]) == 0
    return (folder / "BENCHMARKS.md").read_text()


def test_without_rows_everything_is_not_measured(folder: Path):
    text = run(folder)
    assert "written by hand" in text and not (folder / "plots").exists()
    for op, module in report.MATRIX.items():
        assert f"Not measured ({op}):" in text and f"cpu: all {len(module.CPU)} cases" in text
    assert "cuda: all" in text and "| us" not in text


def test_tables_and_plots_come_from_rows(folder: Path):
    rows.append(folder / "moa.csv", moa_rows())
    text = run(folder)
    assert "Some CPU, 2 threads, torch 2.13.0, commit abcdef0, 2026-01-02" in text
    first, second, _ = (line for line in text.splitlines() if line.startswith("| T2048-D512"))
    # 120 / 80, never against the wrong provider's 1 us; (100 + 200) / 150 of memory.
    assert "| mm eager 120 | 1.50 |" in first and "as dispatched" in first and first.endswith("| 2.00 |")
    assert "| mm eager 120 | 0.80 |" in second and "ours sparse reference 100" in second
    assert "- grouped_mm: wrong: forward differs (every case)" in text
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "moa-some-cpu-copy.png", "moa-some-cpu-crossover.png", "moa-some-cpu-speed.png"
    ]  # fmt: skip
    assert "](plots/moa-some-cpu-crossover.png)" in text


def test_losses_are_written_into_the_contract(folder: Path):
    rows.append(folder / "moa.csv", moa_rows())
    run(folder)
    text = (folder / "KERNELS.md").read_text()
    # Ours wins once, 80 against 120; it loses at 150 and 300.
    assert (
        "2026-01-02: in 2 of 3 comparisons. T2048-D512-E8-r64-k2 float32 fwd+bwd (0.80 of the speed of mm eager)"
        in text
    )
    assert "- cuda: not measured" in text and text.count("- cpu: not measured") == 1, (
        "cpu is missing for roi_align alone"
    )


def test_a_case_with_a_mode_missing_is_not_measured(folder: Path):
    modes = [{**entry, "mode": mode} for mode in ("fwd", "bwd") for entry in moa_rows() if "E8" in str(entry["case"])]
    rows.append(folder / "moa.csv", moa_rows() + modes)
    (line,) = (line for line in run(folder).splitlines() if line.startswith("- cpu: T"))
    assert "T2048-D512-E4-r64-k2 float32" in line and "T2048-D512-E8-r64-k2" not in line


def test_a_second_run_changes_nothing_outside_the_markers(folder: Path):
    rows.append(folder / "moa.csv", moa_rows())
    page = folder / "BENCHMARKS.md"
    first = run(folder)
    page.write_text(first + "\nmore by hand\n")
    assert run(folder) == first + "\nmore by hand\n"
    page.write_text(first.replace("1.50", "9.99"))
    assert run(folder) == first


def test_a_missing_end_marker_or_file_is_an_error(folder: Path):
    page = folder / "BENCHMARKS.md"
    page.write_text(run(folder).replace("<!-- end of moa -->", ""))
    with pytest.raises(UserError, match="end of moa"):
        run(folder)
    page.unlink()
    with pytest.raises(UserError, match="no such file"):
        run(folder)


def test_the_score_table_is_made_from_its_csv(folder: Path):
    shutil.copy(rows.RESULTS / "score.csv", folder)
    text = run(folder)
    assert "| tree | 324 | 15,987 | 525.8 (508.7 - 534.6) | x86_64, 2 threads" in text


def write(path: Path, columns: tuple[str, ...], lines: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)


def test_loader_rates_are_the_newest_of_each_setting(tmp_path: Path) -> None:
    assert report.loader(tmp_path / "loader.csv").startswith("Not measured: `eventlens bench loader")
    line = dict.fromkeys(LOADER, "1") | {"data": "photos", "side": 336, "ratio_p50": "0.500"}
    newer = {**line, "ratio_p50": "0.875", "date": "2026-02-03"}
    write(tmp_path / "loader.csv", LOADER, [line, {**line, "workers": "2"}, newer])
    table = report.loader(tmp_path / "loader.csv").splitlines()
    assert len(table) == 4 and "| 0.875 (" in table[2] and "2026-02-03" in table[2] and "| 0.500 (" in table[3]


def test_training_rates_are_held_against_the_baseline_of_their_own_run(tmp_path: Path) -> None:
    assert report.train(tmp_path / "train.csv").startswith("Not measured: `eventlens bench train")
    line = dict.fromkeys(TRAIN, "1") | {"arm": "hf_trainer", "supervised_per_s_p50": "100", "mfu": "", "share_roi": ""}
    ours = {**line, "arm": "ours", "supervised_per_s_p50": "250"}
    elsewhere = {**ours, "device": "another", "supervised_per_s_p50": "900"}
    write(tmp_path / "train.csv", TRAIN, [line, ours, elsewhere])
    table = report.train(tmp_path / "train.csv").splitlines()
    assert table[2].startswith("| hf_trainer | 100 (") and "| 1.00 |" in table[2]
    assert table[3].startswith("| ours | 250 (") and "| 2.50 |" in table[3] and "100, n/a, 100" in table[3]
    assert "| ours | 900 (1 - 1) |  |" in table[4]
