"""Step lines, the run log over kills and resumes, console columns, FLOPs and peaks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eventlens_ds.errors import UserError
from eventlens_ds.train import metrics as m

STEP = m.StepMetrics(
    step=1,
    loss=2.5,
    task_loss={"event": 2.0, "vcr_answer": 1.25},
    grad_norm=0.5,
    lr=1e-3,
    tokens_per_s=1234.5,
    supervised_tokens=321,
    regions_used=7,
    regions_unused=2,
    step_time=0.25,
    data_wait=0.005,
    mfu=None,
    memory=3 * 2**30,
    sample_hash="00ff",
)
KEYS = (
    "step loss task_loss grad_norm lr tokens_per_s supervised_tokens regions_used regions_unused step_time data_wait "
    "mfu memory sample_hash routing load_balance refused"
)


def at(step: int, **changes: float) -> m.StepMetrics:
    return replace(STEP, step=step, **changes)


def test_line_has_every_key_and_null_mfu() -> None:
    line = json.loads(STEP.to_json())
    assert list(line) == KEYS.split()
    assert line["mfu"] is None and line["task_loss"] == {"event": 2.0, "vcr_answer": 1.25}


def test_numbers_json_lacks_are_named() -> None:
    text = replace(STEP, loss=float("nan"), task_loss={"event": float("inf")}).to_json()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["loss"], line["task_loss"], line["nonfinite"]) == (None, {"event": None}, ["loss", "task_loss.event"])


@pytest.mark.P3
def test_sample_hash_ignores_order_and_sees_every_id() -> None:
    assert m.sample_hash(["b", "a"]) == m.sample_hash(["a", "b"])
    assert len({m.sample_hash(ids) for ids in (["a", "b"], ["a"], ["a", "b", "b"], ["ab"], ["a,b"], [])}) == 6


def test_resume_leaves_one_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with m.RunLog(path, first_step=1) as run:
        for step in range(1, 8):
            run.append(at(step))
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')
    with m.RunLog(path, first_step=5) as run:
        assert run.removed == 4
        for step in range(5, 10):
            run.append(at(step, loss=9.0))
    lines = m.read_log(path)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["loss"] for line in lines] == [2.5] * 4 + [9.0] * 5
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_without_the_cut_a_step_has_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "cut_log", lambda path, first_step: 0)
    for _ in range(2):
        with m.RunLog(tmp_path / "log.jsonl", first_step=1) as run:
            run.append(at(1))
    assert [line["step"] for line in m.read_log(tmp_path / "log.jsonl")] == [1, 1]


def test_cut_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    with m.RunLog(path, first_step=1) as run:
        run.append(at(1))
        run.append(at(2))
    before = path.read_bytes()

    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        m.RunLog(path, first_step=2)
    assert path.read_bytes() == before


def test_a_last_line_without_its_newline_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(at(1).to_json())
    with m.RunLog(path, first_step=2) as run:
        run.append(at(2))
    assert [line["step"] for line in m.read_log(path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(at(1).to_json() + "\n\x00\x00\n" + at(2).to_json() + "\n")
    m.RunLog(path, first_step=3).close()
    assert "log.jsonl:2: not a step line, removed" in caplog.text
    assert [line["step"] for line in m.read_log(path)] == [1, 2]


def test_a_killed_process_keeps_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    code = "\n".join(
        [
            "import os, signal, sys",
            "from eventlens_ds.train.metrics import RunLog, StepMetrics",
            "log = RunLog(sys.argv[1], first_step=1)",
            "for i in range(1, 4): log.append(StepMetrics(i, 1., {}, 1., 1., 1., 1, 1, 0, 1., 0., None, 1, ''))",
            "os.kill(os.getpid(), signal.SIGKILL)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    assert [line["step"] for line in m.read_log(path)] == [1, 2, 3]


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    code = "\n".join(
        [
            "import resource, signal, sys",
            "from eventlens_ds.train.metrics import RunLog, StepMetrics",
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))",
            "log = RunLog(sys.argv[1], first_step=1)",
            "log.append(StepMetrics(1, 1., {}, 1., 1., 1., 1, 1, 0, 1., 0., None, 1, ''))",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "log.jsonl")], check=False, capture_output=True, text=True
    )
    assert "UserError" in done.stderr
    assert "log.jsonl: cannot be written: File too large" in done.stderr.strip().splitlines()[-1]


def test_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be opened"):
        m.RunLog(tmp_path / "file" / "log.jsonl", first_step=1)


def test_console_columns_stay_fixed() -> None:
    table = m.ConsoleTable(("event", "vcr_answer"))
    wild = replace(STEP, loss=123456.789, grad_norm=1e-9, tokens_per_s=1.5e12, mfu=0.4321, task_loss={"event": 1.0})
    lines = [line for step in range(45) for line in table.render(replace(wild if step % 2 else STEP, step=step))]
    headers = [i for i, line in enumerate(lines) if "tok/s" in line]
    assert headers == [0, 21, 42]
    assert len({len(line) for line in lines}) == 1
    title = lines[0].split()
    assert title == [
        "step",
        "loss",
        "event",
        "vcr_answer",
        "grad",
        "lr",
        "tok/s",
        "sup",
        "s/step",
        "wait",
        "mfu",
        "GiB",
    ]
    assert all(len(line.split()) == len(title) for line in lines)
    row = dict(zip(title, lines[2].split(), strict=True))
    assert (
        row["vcr_answer"] == "-" and row["mfu"] == "43.2%" and row["loss"] == "1.23e+05" and row["grad"] == "1.00e-09"
    )
    assert dict(zip(title, lines[1].split(), strict=True))["wait"] == "2.0%"


def test_log_lines_go_through_logging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), m.RunLog(tmp_path / "log.jsonl", first_step=1, tasks=("event",)) as run:
        run.append(STEP)
    assert [r.name for r in caplog.records] == ["eventlens_ds.train.metrics"] * 2


def test_flops_of_a_layer_counted_by_hand() -> None:
    # One 8 x 8 linear layer on 10 tokens: 2 * 64 * 10 multiply-adds forward, the same for each of two gradients.
    assert m.part_flops(10, 64) == 3 * 2 * 64 * 10
    assert m.part_flops(10, 64, trained=0.0) == 2 * 2 * 64 * 10
    assert m.part_flops(10, 64, backward=False) == 2 * 64 * 10
    # Scores and values: 2 * width each per attended pair.
    causal = 10 * 11 // 2
    assert m.part_flops(10, 0, layers=3, width=8, attended=causal) == 3 * (3 * 4 * 8 * causal)


def test_flops_agree_with_torch_counter() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    layer = torch.nn.Linear(16, 16, bias=False)
    x = torch.randn(5, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == m.part_flops(5, 256)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A3000 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GB200", None),
        ("", None),
    ],
)
def test_peaks_by_name(name: str, tflops: float | None) -> None:
    peak, reason = m.peak_flops(name)
    assert peak == (None if tflops is None else tflops * 1e12)
    assert bool(reason) == (peak is None)


def test_mfu_or_its_reason() -> None:
    assert m.mfu(312e12, 1.0, 2, "NVIDIA A100-SXM4-80GB") == (0.5, "")
    assert m.mfu(1.0, 1.0, 1, None) == (None, "not defined on a CPU")
    assert m.mfu(1.0, 1.0, 1, "NVIDIA A100-SXM4-80GB", "fp32") == (None, "no peak is tabulated for fp32")
    assert m.mfu(1.0, 1.0, 1, "Some GPU") == (None, "no peak is tabulated for Some GPU")
    assert m.mfu(1.0, 0.0, 1, "NVIDIA H200")[0] is None


def test_memory_is_in_bytes() -> None:
    assert 10 * 2**20 < m.memory_bytes() < 2**40
