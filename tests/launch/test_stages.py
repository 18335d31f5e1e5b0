"""The stages of `make demo` and its kin end with the launcher that started them.

In: a launcher whose stage would run for minutes. Out: what is left after the launcher was killed. Decision: SIGKILL,
which no handler of the launcher could answer, so only the arrangement with the kernel counts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHER = """
import sys
from pathlib import Path
from eventlens_ds.launch import demo
if sys.argv[2] == "loose":
    demo.before_exec = lambda *_: None
out = Path(sys.argv[1])
demo.Stages(out, 1).run("draw", *"data build --source world --limit 50000 --out".split(), str(out / "world"))
"""


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(seconds: float, there: object) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if there():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False


def running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize(("how", "survives"), [("tied", False), ("loose", True)])
def test_a_stage_ends_with_its_launcher(how: str, survives: bool, tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path), how], stdout=subprocess.DEVNULL)
    try:
        assert until(60, lambda: children(launcher.pid) and (tmp_path / "world-raw").exists())
        (stage,) = children(launcher.pid)
        launcher.kill()
        launcher.wait()
        gone = until(3 if survives else 20, lambda: not running(stage))
        if survives:
            os.kill(stage, signal.SIGKILL)
        assert gone != survives
    finally:
        launcher.kill()
