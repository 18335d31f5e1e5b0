"""eventlens: start-up time, one-line errors with exit codes, and the data commands run for real on a small world."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eventlens_ds import cli, cli_data
from eventlens_ds.errors import UserError

ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def call(*argv: str, module: str = "eventlens_ds") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = cli.main(argv)
    captured = capsys.readouterr()
    assert captured.err.startswith("eventlens: error: ") and captured.err.count("\n") == 1, captured.err
    return code, captured.err


def seconds(*argv: str) -> float:
    """The best of three, because the machine may be busy."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *argv], check=True, capture_output=True, env=ENV)
        times.append(time.perf_counter() - start)
    return min(times)


def test_import_is_light() -> None:
    program = (
        "import sys, eventlens_ds, eventlens_ds.cli; print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    bare = seconds("-c", "pass")
    assert seconds("-c", "import eventlens_ds") - bare <= 0.2


@pytest.mark.parametrize(
    "command", ["", "data", "data build", "train", "eval", "export", "predict", "plan", "bench", "doctor"]
)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--help"])
    assert stopped.value.code == 0 and f"usage: eventlens {command}".rstrip() in capsys.readouterr().out


def test_help_takes_less_than_two_seconds() -> None:
    assert seconds("-m", "eventlens_ds", "train", "--help") < 2


def test_version() -> None:
    from eventlens_ds import __version__

    assert call("--version").stdout == f"eventlens {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("trian", ["no such command", "nearest: train"]),
        ("data neighbours classes.jsonl", ["--images"]),
        ("plan", ["--config RECIPE is missing"]),
        ("plan --config tiny_event --gpu h1000", ["--gpu h1000", "h100"]),
        ("plan --config tiny_event --nodes 0", ["--nodes 0"]),
        ("plan --config lion_stage3", ["lion-flant5xl", "decoder-only"]),
        ("plan --config tiny_event --nodse 2", ["unknown option --nodse", "nearest: --nodes"]),
        ("data biuld", ["nearest: build"]),
        ("data build", ["--source"]),
        ("data build --source world --out x --limmit 3", ["unknown option --limmit", "nearest: --limit"]),
        ("data build --source vcr --out x", ["--root is missing"]),
        ("data build --source vcrr --root . --out x", ["vcrr", "known: vcr"]),
        ("data build --source world --out x --part 0/2", ["--part"]),
        ("data info absent", ["absent"]),
        ("train --rnaks 2", ["unknown option --rnaks", "nearest: --ranks"]),
        ("train --ranks 0", ["--ranks 0"]),
        ("train --train.stepz 3", ["--train.stepz", "nearest: train.steps"]),
        ("train --config absent", ["absent", "nearest"]),
        ("train --config tiny_event", ["data.train is empty", "eventlens data build"]),
        ("train --config tiny_event --data.train=absent", ["data.train: absent: no such folder"]),
        ("train --train.lr auto", ["--train.lr", '"auto" is not allowed']),
        ("verify absent", ["absent"]),
        ("bench absent", ["no such benchmark"]),
        ("predict model image", ["either --question TEXT or --events"]),
        ("predict model image --question why --boxes 1,2,3", ["1,2,3", "X1,Y1,X2,Y2"]),
        ("predict model image --question why --boxes 9,2,3,4", ["x1 < x2"]),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(argv: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, line = error_of(capsys, *argv.split())
    assert code == 2
    for word in words:
        assert word in line


def test_errors_of_our_own_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the one-line rule: only UserErrors are turned into a line."""
    monkeypatch.setattr(cli, "_doctor", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", interrupt)
    assert cli.main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> int:
        with open("/dev/full", "w") as file:
            file.write("x")
        return 0

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(cli, "_doctor", full)
    code, line = error_of(capsys, "doctor")
    assert code == 2 and "No space left" in line


def test_settings_are_joined_before_positionals_can_take_them() -> None:
    from eventlens_ds.train.door import join_settings

    given = ["--train.lr", "-1", "RUN", "--a.b=c", "d", "--root", "x.y", "--a.b"]
    assert join_settings(given) == ["--train.lr=-1", "RUN", "--a.b=c", "d", "--root", "x.y", "--a.b"]


def test_print_config_is_a_recipe(tmp_path: Path) -> None:
    from eventlens_ds.config import load

    done = call("train", "--config", "tiny_vcr", "--print-config", "--train.lr", "1e-4", "--init-from", "runs/a")
    path = tmp_path / "again.yaml"
    path.write_text(done.stdout)
    assert load.load(str(path)) == load.load("tiny_vcr", ["--train.lr=1e-4", "--io.init_from=runs/a"])


def test_rank_door_ignores_local_rank() -> None:
    done = call("--local_rank=1", "--print-config", "--train.steps=3", module="eventlens_ds.train")
    assert done.returncode == 0 and "steps: 3" in done.stdout
    refused = call("--local_rnk=1", "--print-config", module="eventlens_ds.train")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(("text", "part"), [("0/4", (0, 4)), ("3/4", (3, 4))])
def test_part(text: str, part: tuple[int, int]) -> None:
    assert cli_data.parse_part(text) == part


@pytest.mark.parametrize("text", ["4/4", "1", "-1/4", "a/b", "0/0", "1/"])
def test_part_refused(text: str) -> None:
    with pytest.raises(UserError, match="K/N"):
        cli_data.parse_part(text)


def test_boxes() -> None:
    assert cli.parse_box("person:1,2,3.5,4") == ("person", (1.0, 2.0, 3.5, 4.0))
    assert cli.parse_box("1,2,3,4")[0] == "object"


def test_a_world_is_built_continued_indexed_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "world"
    build = [
        "data",
        "build",
        "--source",
        "world",
        "--seed",
        "7",
        "--limit",
        "5",
        "--image-size",
        "64",
        "--out",
        str(out),
    ]
    assert cli.main(build) == 0
    captured = capsys.readouterr()
    made = json.loads(captured.out)
    assert made["splits"]["train"]["images"] == 5
    assert set(made["splits"]["train"]["kinds"]) == {"vcr", "event", "caption", "expression", "vqa", "vsr", "pope"}
    assert "img/s" in captured.err and "ETA" in captured.err and "\r" not in captured.err

    assert cli.main(build) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fingerprint"] == made["fingerprint"] and "(6 kept" in captured.err

    assert cli.main(["data", "index", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == made["fingerprint"]
    assert cli.main(["data", "info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["val"]["images"] == 1

    other = ["8" if token == "7" else token for token in build]
    code, line = error_of(capsys, *other)
    assert code == 2 and "'seed': 7" in line


def test_lint_of_a_world_and_of_a_broken_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, raw = tmp_path / "w", tmp_path / "raw"
    build = ["data", "build", "--source", "world", "--limit", "3", "--image-size", "64", "--out", str(out)]
    assert cli.main([*build, "--root", str(raw)]) == 0
    assert cli.main(["data", "lint", "--source", "vcr", "--root", str(raw)]) == 0
    rows = raw / "vcr" / "train.jsonl"
    rows.write_text("{broken\n" + rows.read_text())
    capsys.readouterr()
    assert cli.main(["data", "lint", "--source", "vcr", "--root", str(raw)]) == 3
    captured = capsys.readouterr()
    assert f"{rows}:1" in captured.out and "1 errors" in captured.err


def test_lint_of_rows_goes_on_after_a_broken_one(
    shared: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    shutil.copytree(shared / "data" / "photos", root)
    command = ["data", "lint", "--source", "captions,rec,vqa,vsr,tags", "--root", str(root), "--no-images"]
    assert cli.main(command) == 0
    path = root / "regions" / "vsr.jsonl"
    path.write_text("{broken\n" + path.read_text().replace('"label": 1', '"label": 7', 1))
    capsys.readouterr()
    assert cli.main(command) == 3
    captured = capsys.readouterr()
    assert f"{path}:1" in captured.out and f"{path}:2: 'label' wants 1" in captured.out
