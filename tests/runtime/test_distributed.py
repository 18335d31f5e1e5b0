"""Launcher variables, agreement between real ranks, and the local launcher's behaviour when ranks die.

The file is its own job: `python -m test_distributed JOB DIR` is what `spawn` starts here.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eventlens_ds.errors import DataError, UserError
from eventlens_ds.runtime import distributed, local_ranks
from eventlens_ds.runtime.failures import leave

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-007,9],login", "gpu003"),
        ("r[1-2]n[07,9]-ib,x", "r1n07-ib"),
        ("a-b[4]", "a-b4"),
    ],
)
def test_first_host(nodelist, host):
    assert distributed.first_host(nodelist) == host


def test_first_host_of_nothing():
    with pytest.raises(UserError, match="names no host"):
        distributed.first_host(" ")


def test_torchrun_and_deepspeed_name_the_local_size_differently():
    assert distributed.rendezvous({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"})["LOCAL_WORLD_SIZE"] == "4"
    assert distributed.rendezvous({**TORCHRUN, "LOCAL_SIZE": "2"})["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize("name", sorted(TORCHRUN))
def test_a_missing_launcher_variable_is_named(name):
    env = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(UserError, match=f"{name} is not set"):
        distributed.rendezvous(env)


def test_a_broken_launcher_variable_is_named():
    with pytest.raises(UserError, match="LOCAL_RANK is not a number: 'x'"):
        distributed.rendezvous({**TORCHRUN, "LOCAL_RANK": "x"})


def test_a_port_that_is_none_is_named():
    with pytest.raises(UserError, match="MASTER_PORT is not a port: 99999"):
        distributed.rendezvous({**TORCHRUN, "MASTER_PORT": "99999"})


def test_srun_step():
    env = distributed.rendezvous(SRUN)
    assert [env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["5", "8", "1", "4"]
    assert env["MASTER_ADDR"] == "gpu07"
    ports = {
        int(distributed.rendezvous({**SRUN, "SLURM_JOB_ID": str(job)})["MASTER_PORT"])
        for job in range(10**6, 10**6 + 99)
    }
    assert len(ports) == 99 and min(ports) >= 10000 and max(ports) < 32768
    assert distributed.rendezvous({**SRUN, "MASTER_PORT": "9"})["MASTER_PORT"] == "9"


def test_the_batch_script_itself_is_not_a_rank():
    """Negative control of the step's mark: sbatch sets SLURM_PROCID and SLURM_NTASKS=8 in the script as well."""
    script = {name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP_")}
    assert distributed.rendezvous(script)["WORLD_SIZE"] == "1"


def test_outside_a_group_everything_is_local():
    assert distributed.all_agree(True) and not distributed.all_agree(False)
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    assert distributed.rank_and_size() == (0, 1)
    distributed.agree("config", {"a": 1})


def job_agree(folder: Path) -> dict:
    import torch

    world = distributed.start(threads=1, timeout_minutes=1)
    import deepspeed.comm as dist

    out = {"threads": torch.get_num_threads(), "world": [world.rank, world.size, world.device, world.accelerator]}
    out["again"] = distributed.start(threads=1, timeout_minutes=1) is world
    out["sum"] = distributed.all_reduce_sum(torch.tensor([1.0 + world.rank])).tolist()
    out["flags"] = [distributed.all_agree(True), distributed.all_agree(world.rank == 0)]
    out["objects"] = distributed.gather_objects({"rank": world.rank, "pad": "x" * world.rank * 100})
    out["first"] = distributed.broadcast_object(f"from {world.rank}")
    gathered = torch.empty(4)
    dist.all_gather_into_tensor(gathered, torch.ones(2))
    dist.reduce_scatter_tensor(torch.empty(2), gathered)
    distributed.agree("configuration", {"b": 1, "a": [2]})
    try:
        distributed.agree("configuration", {"seed": world.rank})
    except DataError as error:
        out["differs"] = str(error)
    out["weights_only"] = os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
    out["built"] = [name for name in sys.modules if "shm_comm" in name]
    distributed.stop()
    return out


def spawn_job(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int = 2) -> int:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return local_ranks.spawn(ranks, [name, str(folder)], module="test_distributed")


@pytest.mark.P11
def test_two_ranks_agree(tmp_path, monkeypatch, capfd):
    assert spawn_job("agree", tmp_path, monkeypatch) == 0
    outs = [json.loads((tmp_path / f"agree-{rank}.json").read_text()) for rank in (0, 1)]
    for rank, out in enumerate(outs):
        assert out["world"] == [rank, 2, "cpu", "cpu"]
        assert out["threads"] == 1 and out["again"] and out["sum"] == [3.0] and out["flags"] == [True, False]
        assert [row["rank"] for row in out["objects"]] == [0, 1] and len(out["objects"][1]["pad"]) == 100
        assert out["first"] == "from 0"
        assert out["differs"] == "configuration is not the same on all ranks: rank(s) 1 differ from rank 0"
        assert out["weights_only"] == "1" and not out["built"]
    assert "FutureWarning" not in capfd.readouterr().err


def test_port_in_use_is_named(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind((distributed.LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
        env |= {"MASTER_ADDR": distributed.LOOPBACK, "MASTER_PORT": str(port)}
        code = "from eventlens_ds.runtime.distributed import start; start(1, 1)"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert f"UserError: port {port} is in use on 127.0.0.1: set MASTER_PORT" in done.stderr


def test_an_address_that_does_not_resolve_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "_RESOLVE_WAITS", (0.0,))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "no-such-node.invalid")
    with pytest.raises(UserError, match=r"^MASTER_ADDR no-such-node\.invalid cannot be resolved: "):
        distributed.start(1, 60.0)


def test_an_address_may_resolve_at_the_second_attempt(monkeypatch):
    asked = []

    def resolve(host, port):
        asked.append(host)
        if len(asked) == 1:
            raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(distributed, "_RESOLVE_WAITS", (0.0,))
    monkeypatch.setattr(distributed.socket, "getaddrinfo", resolve)
    distributed._check_address("gpu003")
    assert asked == ["gpu003", "gpu003"]


def job_die(folder: Path) -> dict:
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        wait_for(folder / "pid-0")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return {}


def job_exit(folder: Path) -> dict:
    sys.exit({"0": 0, "1": 3}[os.environ["RANK"]])


def job_wait(folder: Path) -> dict:
    rank = os.environ["RANK"]

    def noted(number: int, frame: object) -> None:
        (folder / f"signal-{rank}-{number}").touch()
        if number == signal.SIGTERM:
            sys.exit(75)

    signal.signal(signal.SIGUSR1, noted)
    signal.signal(signal.SIGTERM, noted)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def wait_for(*files: Path) -> None:
    end = time.monotonic() + 30
    while not all(file.exists() and (file.stat().st_size or "pid" not in file.name) for file in files):
        assert time.monotonic() < end, f"{files} did not appear"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_first_failure_is_the_exit_code_and_the_siblings_go(tmp_path, monkeypatch):
    assert spawn_job("exit", tmp_path, monkeypatch) == 3
    started = time.monotonic()
    assert spawn_job("die", tmp_path, monkeypatch) == 128 + signal.SIGKILL
    assert time.monotonic() - started < 30
    assert not alive(int((tmp_path / "pid-0").read_text()))


LAUNCH = """
import sys
from eventlens_ds.runtime.local_ranks import spawn
sys.exit(spawn(2, sys.argv[1:], "test_distributed"))
"""


def launcher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    process = subprocess.Popen([sys.executable, "-c", LAUNCH, "wait", str(folder)])
    wait_for(folder / "pid-0", folder / "pid-1")
    return process


def test_signals_reach_the_ranks(tmp_path, monkeypatch):
    process = launcher(tmp_path, monkeypatch)
    process.send_signal(signal.SIGUSR1)
    wait_for(*(tmp_path / f"signal-{rank}-{int(signal.SIGUSR1)}" for rank in (0, 1)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == local_ranks.PREEMPTED
    assert all((tmp_path / f"signal-{rank}-{int(signal.SIGTERM)}").exists() for rank in (0, 1))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux only")
def test_ranks_die_with_the_launcher(tmp_path, monkeypatch):
    process = launcher(tmp_path, monkeypatch)
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    process.kill()
    process.wait(timeout=10)
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, "ranks outlived their launcher"
        time.sleep(0.02)


def test_no_ranks():
    with pytest.raises(UserError, match="--ranks must be at least 1, not 0"):
        local_ranks.spawn(0, [])


def test_leaving_the_group_leaves_no_rendezvous_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command started later from the same process would otherwise inherit our rank and our port."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    distributed.start(threads=1, timeout_minutes=1)
    assert all(name in os.environ for name in names)
    distributed.stop()
    assert not any(name in os.environ for name in names)


def main(name: str, folder: Path) -> None:
    out = globals()[f"job_{name}"](folder)
    Path(folder, f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1], Path(sys.argv[2])))
