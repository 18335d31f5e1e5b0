"""Process groups: find out who we are, join the other ranks, agree with them.

In: the environment of torchrun, of the deepspeed launcher, of srun, or none of them. Out: a `World` and a few typed
collectives.
Decision: whatever travels between ranks as an object is JSON over byte tensors, so no rank unpickles anything; what
DeepSpeed does unasked at start-up (guess an accelerator, compile an op without timeout) is switched off before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from eventlens_ds.errors import DataError, UserError

if TYPE_CHECKING:
    import torch

LOOPBACK = "127.0.0.1"

_PORT_FIRST, _PORT_COUNT = 10000, 20000
"""Ports derived from a job id stay below Linux's ephemeral range (32768 and up), where any client may sit."""

_RESOLVE_WAITS = (1.0, 3.0)
"""Seconds between attempts: name services of a cluster fail for a moment when a job starts on all its nodes."""


@dataclass(frozen=True)
class World:
    """This process among the others; `device` is a torch device string, `accelerator` is "cpu" or "cuda"."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: str
    accelerator: str


_world: World | None = None
_before: dict[str, str | None] = {}
"""The launcher's variables as they were before `start` completed them."""


def _number(env: dict[str, str], name: str) -> int:
    try:
        return int(env[name])
    except KeyError:
        raise UserError(f"{name} is not set, although the other variables of a launcher are") from None
    except ValueError:
        raise UserError(f"{name} is not a number: {env[name]!r}") from None


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: "gpu[003-007,9],login" -> "gpu003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist.strip())
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST names no host: {nodelist!r}")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group(0))


def _tasks_here(env: dict[str, str], size: int) -> int:
    """Tasks on this node from SLURM_STEP_TASKS_PER_NODE, e.g. "4(x2),3" and SLURM_NODEID."""
    spec = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in spec.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return size
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else size


def rendezvous(env: dict[str, str]) -> dict[str, str]:
    """The six variables torch and DeepSpeed read, from whichever launcher started this process.

    torchrun and deepspeed set them themselves (the local size under different names); a Slurm step is recognised by
    SLURM_STEP_NODELIST, which the batch script itself does not have; otherwise the process is alone.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        size = _number(env, "WORLD_SIZE")
        local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or str(size)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        found = {name: str(_number(env, name)) for name in names}
        if not 0 < int(found["MASTER_PORT"]) < 65536:
            raise UserError(f"MASTER_PORT is not a port: {found['MASTER_PORT']}")
        if not env.get("MASTER_ADDR"):
            raise UserError("MASTER_ADDR is not set, although RANK is")
        return {**found, "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": env["MASTER_ADDR"]}
    if "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        size = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")
        port = _PORT_FIRST + (_number(env, "SLURM_JOB_ID") * 7 + int(env.get("SLURM_STEP_ID", "0"))) % _PORT_COUNT
        return {
            "RANK": str(_number(env, "SLURM_PROCID")),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(_number(env, "SLURM_LOCALID")),
            "LOCAL_WORLD_SIZE": str(_tasks_here(env, size)),
            "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": env.get("MASTER_PORT") or str(port),
        }
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(free_port()),
    }


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _check_address(host: str) -> None:
    """UserError when the name of the rendezvous resolves to nothing; torch would ask again until its timeout."""
    for wait in (*_RESOLVE_WAITS, None):
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if wait is None:
                raise UserError(f"MASTER_ADDR {host} cannot be resolved: {error.strerror}") from error
        time.sleep(wait)


def _prepare(accelerator: str) -> None:
    """Settings that must be in place before DeepSpeed is imported or a process group exists."""
    if accelerator == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    # torch 2.13 warns at every collective DeepSpeed makes (hundreds of lines a run) about names it still needs.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    import deepspeed.ops

    # Compiles for a minute at first use, and its spinning all-reduce ignores the group's timeout.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _pick_device(local_rank: int, local_size: int) -> tuple[str, str]:
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return "cpu", "cpu"
    if local_size > torch.cuda.device_count():
        raise UserError(f"{local_size} ranks on this machine, but only {torch.cuda.device_count()} GPUs are visible")
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}", "cuda"


def _share_of_cores(rank: int, local_rank: int) -> int:
    """Cores this process may use, divided by the ranks of this machine that may use the same ones.

    Launchers that bind cores (srun --cpus-per-task, numactl) have divided them already.
    """
    mine = os.sched_getaffinity(0)
    rows = gather_objects([rank - local_rank, sorted(mine)])
    sharing = sum(node == rank - local_rank and not mine.isdisjoint(cores) for node, cores in rows)
    return max(1, len(mine) // sharing)


def start(threads: int, timeout_minutes: float) -> World:
    """Join the process group of this run (gloo on CPU, nccl on GPU) and return our place in it.

    `threads`: CPU threads of this rank; 0 takes this rank's share of the cores.
    `timeout_minutes`: how long a collective may take. UserError: a launcher's variables are incomplete, the address of
    the rendezvous does not resolve or its port is taken, or there are more ranks than GPUs.
    A second call returns the same World.
    """
    global _world
    if _world is not None:
        return _world
    env = rendezvous(dict(os.environ))
    _before.update({name: os.environ.get(name) for name in env})
    os.environ.update(env)
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    local_rank, local_size = int(env["LOCAL_RANK"]), int(env["LOCAL_WORLD_SIZE"])
    import torch

    device, accelerator = _pick_device(local_rank, local_size)
    _check_address(env["MASTER_ADDR"])
    _prepare(accelerator)
    import deepspeed

    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if accelerator == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=timeout_minutes),
        )
    except torch.distributed.DistNetworkError as error:
        where = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(f"port {env['MASTER_PORT']} is in use on {env['MASTER_ADDR']}: set MASTER_PORT") from error
        raise UserError(f"rank {rank} cannot reach the rendezvous at {where}: {str(error).splitlines()[0]}") from error
    torch.set_num_threads(threads or _share_of_cores(rank, local_rank))
    _world = World(rank, size, local_rank, local_size, device, accelerator)
    return _world


def stop() -> None:
    """Leave the process group; nothing happens when there is none."""
    global _world
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Through DeepSpeed where it is loaded: it keeps groups of its own, which the next `start` must not find.
        comm = sys.modules.get("deepspeed.comm.comm")
        (torch.distributed if comm is None or comm.cdb is None else comm).destroy_process_group()
    _world = None
    # Left in place, a process started from here would take our rank and our port for its own.
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()


def in_group() -> bool:
    """True inside a process group of more than one rank."""
    torch = sys.modules.get("torch")
    if torch is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1


def rank_and_size() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside a process group."""
    if not in_group():
        return 0, 1
    import torch

    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _wire_device(group: Any = None) -> str:
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.distributed.get_backend(group) == "nccl" else "cpu"


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; the tensor lies on the device of the process group."""
    if in_group():
        import torch

        torch.distributed.all_reduce(tensor)
    return tensor


def all_agree(flag: bool) -> bool:
    """True when every rank passed True. A collective: all ranks must call it."""
    if not in_group():
        return flag
    import torch

    vote = torch.tensor([int(flag)], device=_wire_device())
    torch.distributed.all_reduce(vote, op=torch.distributed.ReduceOp.MIN)
    return bool(vote.item())


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """The JSON-able values of all ranks in rank order, on every rank. A collective, over `group` or all ranks."""
    if not in_group():
        return [json.loads(json.dumps(value))]
    import torch

    device = _wire_device(group)
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    count = torch.tensor([payload.numel()], device=device)
    counts = [torch.zeros_like(count) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(counts, count, group=group)
    padded = torch.zeros(int(max(counts)), dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded, group=group)
    return [json.loads(bytes(part[: int(n)].cpu().numpy())) for part, n in zip(parts, counts)]


def broadcast_object(value: Any) -> Any:
    """Rank 0's JSON-able value on every rank; the other ranks' arguments are ignored. A collective."""
    return gather_objects(value if rank_and_size()[0] == 0 else None)[0]


def agree(name: str, value: Any) -> None:
    """DataError on every rank, listing the ranks that differ from rank 0, unless all passed the same JSON value."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    digests = gather_objects(digest)
    differ = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
    if differ:
        raise DataError(f"{name} is not the same on all ranks: rank(s) {', '.join(differ)} differ from rank 0")
