"""Real processes killed by the kernel's tracer at a system call of a save (P9); what is left, and how the run goes on.

In: a run of one rank that saves after every step, under `strace --inject`. Out: after each kill a checkpoint that
verifies, not older than the last one the run had reported, and the same command ends the run with the same bits.
Decision: calls are counted in a run that is only traced; then some of all its renames, fsyncs and folder changes are
drawn, whatever they belong to: a checkpoint, a pointer, outcome.json, the lease.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eventlens_ds.runtime import commit
from tests.train.test_outcome import environment
from tests.train.test_resume import losses, settings

CALLS = ("rename", "fsync", "mkdir", "unlink,unlinkat")
KILLS = 10
STEPS = 4


def traced(run: Path, world: Path, *strace: str) -> subprocess.CompletedProcess[str]:
    more = [
        "--train.save_every=1",
        f"--train.steps={STEPS}",
        "--data.workers=0",
        "--train.keep=2",
        "--train.zero=zero0",
    ]
    command = [sys.executable, "-m", "eventlens_ds.train", *settings(world, run, *more)]
    wrapped = ["strace", "-f", "-qq", "-o", f"{run}.strace", *strace, *command] if strace else command
    return subprocess.run(wrapped, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.P9
@pytest.mark.slow
def test_killed_at_a_call_of_the_kernel_the_run_goes_on_with_the_same_bits(world_folder: Path, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    straight = tmp_path / "straight"
    done = traced(straight, world_folder, "-e", f"trace={','.join(CALLS)}")
    assert done.returncode == 0, done.stderr
    text = Path(f"{straight}.strace").read_text()
    counts = {call: sum(len(re.findall(rf"^\d+ +{name}\(", text, re.M)) for name in call.split(",")) for call in CALLS}
    places = [(call, number) for call, count in counts.items() for number in range(1, count + 1)]
    assert len(places) > 40, counts
    killed = 0
    for call, number in random.Random(0).sample(places, KILLS):
        run = tmp_path / f"{call.partition(',')[0]}-{number}"
        done = traced(run, world_folder, "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}")
        reported = [int(step) for step in re.findall(r"saved .*/step-(\d+) in", done.stdout)]
        killed += done.returncode != 0
        found = commit.resolve(run) if commit.committed(run) else None
        assert found is None or commit.verify(found) == []
        assert (0 if found is None else commit.read_manifest(found)["step"]) >= max(reported, default=0)
        again = traced(run, world_folder)
        assert again.returncode == 0, (call, number, again.stderr)
        assert losses(run) == losses(straight), (call, number)
    assert killed >= KILLS - 2, "most injections must have struck"


@pytest.mark.P9
@pytest.mark.slow
def test_an_input_output_error_in_a_save_is_survived(world_folder: Path, tmp_path: Path) -> None:
    """EIO at one fsync of a checkpoint: that save is given up and logged, the next one is good."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    straight = tmp_path / "straight"
    traced(straight, world_folder, "-y", "-e", "trace=fsync")
    lines = re.findall(r"^\d+ +fsync\((.*)$", Path(f"{straight}.strace").read_text(), re.M)
    number = next(n for n, line in enumerate(lines, 1) if ".tmp-step-2" in line and ".pt" in line)
    run = tmp_path / "run"
    done = traced(run, world_folder, "-e", "trace=fsync", "-e", f"inject=fsync:error=EIO:when={number}")
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 2 NOT written, training goes on" in done.stdout and "Input/output error" in done.stdout
    assert losses(run) == losses(straight)
    assert [path.name for path in commit.committed(run)] == ["step-4", "step-3"]
