"""What a user can get wrong: one clear line in the job's log, and the documented exit code.

In: the scripts, submitted with something missing. Out: state and exit code of the job, its log. Decision: the whole way
is run (sbatch, spool copy of the script, log file), because the usual failure is a line that nobody gets to see.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import SLURM, Cluster, environment

PLACE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")


def fails(cluster: Cluster, code: int, *submit: str, cwd: Path | None = None, **env: str) -> str:
    """The line of the error, the only one."""
    number = cluster.submit(*submit, cwd=cwd, **env)
    job = cluster.ended(number, 60)
    log = cluster.log(number, cwd)
    assert (job.state, job.code, job.restarts) == ("FAILED", code, 0), log
    (line,) = [line for line in log.splitlines() if "error" in line]
    assert line.startswith("eventlens: error: ")
    return line


def test_the_bare_command_in_a_fresh_checkout(cluster: Cluster) -> None:
    """Defaults ask for eight GPUs, which the nodes have; what is missing is data."""
    line = fails(cluster, 2, str(SLURM / "pretrain.sh"))
    assert "data.train is empty" in line and "eventlens data build" in line


def test_from_another_folder_by_a_relative_path(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "repository").symlink_to(SLURM.parent)
    line = fails(cluster, 2, "repository/slurm/finetune.sh", cwd=tmp_path)
    assert "data.train is empty" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny_evnt"], "nearest: tiny_event"),
        (["tiny_event", "--train.stepz=3"], "nearest: train.steps"),
        (["tiny_event", "--train.lr=fast"], '--train.lr: "fast" is not a number'),
        (["tiny_event", "--data.train=/absent"], "data.train: /absent: no such folder"),
        (["tiny_event", "--data.train=/", "--io.run=/proc/run"], "io.run /proc/run: cannot be written"),
    ],
)
def test_bad_arguments(cluster: Cluster, words: list[str], said: str) -> None:
    assert said in fails(cluster, 2, *PLACE, str(SLURM / "pretrain.sh"), *words)


def test_full_scratch(cluster: Cluster) -> None:
    run = f"--io.run={cluster.folder}/full/run"
    line = fails(cluster, 2, *PLACE, str(SLURM / "pretrain.sh"), "tiny_event", "--data.train=/", run)
    assert "No space left" in line


def test_missing_site_file(cluster: Cluster, tmp_path: Path) -> None:
    shutil.copytree(SLURM, tmp_path / "slurm")
    (tmp_path / "slurm" / "site.sh").unlink()
    line = fails(cluster, 2, str(tmp_path / "slurm" / "pretrain.sh"))
    assert f"{tmp_path}/slurm/site.sh: no such file" in line


def test_scripts_that_were_taken_out_of_their_folder(cluster: Cluster, tmp_path: Path) -> None:
    shutil.copy(SLURM / "pretrain.sh", tmp_path)
    assert "job.sh: no such file" in fails(cluster, 2, str(tmp_path / "pretrain.sh"), cwd=tmp_path)


def test_python_without_the_package(cluster: Cluster, tmp_path: Path) -> None:
    shutil.copytree(SLURM, tmp_path / "slurm")
    script = str(tmp_path / "slurm" / "pretrain.sh")
    assert "no such program" in fails(cluster, 2, script, EVENTLENS_PYTHON="/absent/python")
    assert "has no eventlens_ds" in fails(cluster, 2, script, EVENTLENS_PYTHON="/usr/bin/python3", PYTHONPATH="")


def test_eval_without_a_run_and_shards_without_out(cluster: Cluster) -> None:
    assert "RUN is missing" in fails(cluster, 2, str(SLURM / "eval.sh"))
    assert "/absent: no such folder" in fails(cluster, 2, str(SLURM / "eval.sh"), "/absent", "--data", "/")
    assert "--out DIR is missing" in fails(cluster, 2, "--array=0", "--output=%x-%j.log", str(SLURM / "shards.sh"))


def test_site_file_of_another_place(cluster: Cluster, tmp_path: Path) -> None:
    """EVENTLENS_SITE; its values reach the ranks' environment, and the environment of the caller wins."""
    site = tmp_path / "ours.sh"
    site.write_text('. "$here/site.sh"\n: "${EVENTLENS_DATA:=/absent/data}"\nEVENTLENS_DATA=/absent/data\n')
    line = fails(cluster, 2, str(SLURM / "pretrain.sh"), "tiny_event", EVENTLENS_SITE=str(site))
    assert "data.train: /absent/data: no such folder" in line


def print_of(cluster: Cluster, *words: str, **env: str) -> str:
    return cluster.run("bash", *words, env=env)


def test_print_shows_the_submission_and_submits_nothing(cluster: Cluster, tmp_path: Path) -> None:
    names = {"ACCOUNT": "vision", "PARTITION": "a100", "NODES": "4", "GPUS_PER_NODE": "8", "TIME": "12:00:00"}
    env = {f"EVENTLENS_{name}": value for name, value in names.items()}
    before = cluster.run("squeue", "--noheader", "--states=all")
    said = print_of(cluster, str(SLURM / "pretrain.sh"), "--print", "tiny_event", f"--data.train={tmp_path}", **env)
    command = said.splitlines()[0]
    for word in ("--account=vision", "--partition=a100", "--nodes=4", "--gpus-per-node=8"):
        assert f" {word} " in command
    assert "--signal=B:USR1@300" in command and "EVENTLENS_PARTITION=a100" in said and "#SBATCH --requeue" in said
    assert cluster.run("squeue", "--noheader", "--states=all") == before and not (cluster.folder / "logs").exists()


def test_self_submission_refuses_before_the_queue(cluster: Cluster) -> None:
    command = [str(SLURM.parent / "tests" / "slurm" / "cluster.sh"), "exec", str(cluster.folder)]
    done = subprocess.run(
        [*command, "bash", str(SLURM / "pretrain.sh"), "tiny_evnt"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        cwd=cluster.folder,
    )
    assert done.returncode == 2 and "nearest: tiny_event" in done.stderr and done.stderr.count("\n") == 1


def test_self_submission_makes_the_folder_of_logs(cluster: Cluster, toy: str, tmp_path: Path) -> None:
    logs = tmp_path / "deep" / "logs"
    said = print_of(
        cluster, str(SLURM / "pretrain.sh"), "tiny_event", f"--data.train={tmp_path}", f"--io.run={tmp_path}/run",
        "--train.steps=1", EVENTLENS_PYTHON=toy, EVENTLENS_LOGS=str(logs), EVENTLENS_GPUS_PER_NODE="1",
    )  # fmt: skip
    number = said.split()[2].rstrip(";")
    assert cluster.ended(number).code == 0 and "finished" in (logs / f"pretrain-{number}.log").read_text()


def test_ranks_share_the_cpus_of_a_node(cluster: Cluster, toy: str, tmp_path: Path) -> None:
    """Slurm knows of one task a node when it allocates, so two ranks may ask for more than there is."""
    given = ("tiny_event", f"--data.train={tmp_path}", f"--io.run={tmp_path}/run", "--train.steps=1")
    place = ("--nodes=1", "--gpus-per-node=2", "--cpus-per-task=64")
    number = cluster.submit(*place, str(SLURM / "pretrain.sh"), *given, EVENTLENS_PYTHON=toy)
    assert cluster.ended(number).code == 0, cluster.log(number)
    log = cluster.log(number)
    assert "2 ranks on 1 nodes" in log and "64 CPUs a node are 32 a rank, not 64 (--cpus-per-task)" in log


def test_a_sweep_needs_a_line_per_task_with_its_own_run(cluster: Cluster, toy: str, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(f"--train.lr=1e-3 --io.run={tmp_path}/a\n--train.lr=2e-3 --io.run={tmp_path}/b\n--train.lr=3e-3\n")
    given = ("tiny_event", f"--data.train={tmp_path}", "--train.steps=1")
    number = cluster.submit(
        "--array=0-2", *PLACE, "--output=s-%A_%a.log", str(SLURM / "pretrain.sh"), *given,
        EVENTLENS_PYTHON=toy, EVENTLENS_SWEEP=str(sweep),
    )  # fmt: skip
    for task, code in (("0", 0), ("1", 0), ("2", 2)):
        assert cluster.ended(f"{number}_{task}").code == code
    assert (tmp_path / "a" / "outcome.json").exists() and (tmp_path / "b" / "outcome.json").exists()
    assert "sweep.txt:3: no --io.run" in (cluster.folder / f"s-{number}_2.log").read_text()


def test_doctor_finds_the_cluster(cluster: Cluster) -> None:
    said = cluster.run(sys.executable, "-c", "from eventlens_ds.launch.doctor_cluster import _slurm; print(*_slurm())")
    assert "partition main" in said and "2 nodes, gpu:8" in said and re.search(r"slurm\S* 2\d", said)
