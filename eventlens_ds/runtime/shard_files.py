"""The files of one checkpoint as DeepSpeed's engine writes and reads them, through an engine of ours.

In: what DeepSpeed hands to its checkpoint engine. Out: files written through to the disk with size and sha256 noted,
and errors kept for later; content read without unpickling more than tensors, plain data and three named classes.
Decision: a storage error while saving is kept, not raised, because the other ranks are in collectives meanwhile.
"""

from __future__ import annotations

import contextlib
import copyreg
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from eventlens_ds.errors import DataError
from eventlens_ds.runtime import heartbeat
from eventlens_ds.runtime.distributed import rank_and_size
from eventlens_ds.runtime.hashing_file import HashingFile
from eventlens_ds.runtime.reshard import Shards

TAG = "state"
"""Sub-folder of DeepSpeed's own files."""


def allowed() -> list[Any]:
    """The only classes DeepSpeed's files need beside tensors and plain data.

    Its optimizer shards hold them: the first two in every stage, fragment_address in stages 1 and 2.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, fragment_address]


def _pickle_stage_by_value() -> None:
    """Enums are written as Class(value), as newer Pythons do. Some, 3.11.2 of Debian 12 among them, write
    getattr(Class, name), and getattr is nothing that a checkpoint may call."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    def by_value(stage: Any) -> tuple[Any, tuple[Any]]:
        return ZeroStageEnum, (stage.value,)

    copyreg.pickle(ZeroStageEnum, by_value)


@contextlib.contextmanager
def weights_only(path: Path) -> Iterator[None]:
    """torch.load refuses everything but tensors, plain data and `allowed`, whatever its caller passes (P11)."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(allowed()):
            yield
    except pickle.UnpicklingError as error:
        cause = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise DataError(f"{path}: refused, it holds more than tensors and plain data: {cause}") from None
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


class Files(CheckpointEngine):
    """Stands in for DeepSpeed's checkpoint engine: writes below `root`, keeps {name: size, sha256} and errors."""

    def __init__(self, root: Path, others: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.root = root
        self.others = others
        """Manifest of a checkpoint of another number of ranks, whose shards are cut anew; None for as many."""
        self.written: dict[str, dict[str, Any]] = {}
        self.errors: list[str] = []
        self.held_up = 0.0

    def create(self, info: CheckpointCommitInfo) -> None:
        """DeepSpeed announces a checkpoint; nothing to prepare."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.errors.append(str(error))

    def save(self, state_dict: Any, path: str) -> None:
        heartbeat.mark(heartbeat.SAVE)
        _pickle_stage_by_value()
        file = HashingFile(Path(path))
        torch.save(state_dict, cast(IO[bytes], file))
        file.close()
        self.note(str(Path(path).relative_to(self.root)), file)

    def note(self, name: str, file: HashingFile) -> None:
        self.written[name] = {"size": file.size, "sha256": file.sha256, "rank": rank_and_size()[0]}
        self.held_up += file.held_up
        if file.error is not None:
            self.errors.append(str(file.error))

    def load(self, path: str, map_location: Any = None) -> Any:
        if self.others is not None:
            return self._load_of_others(Path(path))
        return self.read(Path(path), map_location)

    def _load_of_others(self, path: Path) -> Any:
        """What this rank would find in `path`, had the checkpoint been saved by as many ranks as there are now."""
        assert self.others is not None
        rank, size = rank_and_size()
        if path.name.endswith("_optim_states.pt"):
            return Shards(self.root, self.others, lambda file: self.read(file, "cpu", mmap=True)).shard(rank, size)
        return {**self.read(Path(self.existing(str(path))), "cpu"), "dp_world_size": size}

    def existing(self, path: str) -> str:
        """The file to read for `path`, which DeepSpeed asks to exist: that of another rank where this one has none.
        What is not partitioned is the same on every rank; buffers are those of that rank before the cut."""
        rank = rank_and_size()[0]
        old = rank % self.others["world_size"] if self.others else rank
        return str(Path(path).with_name(Path(path).name.replace(f"pp_rank_{rank}_", f"pp_rank_{old}_")))

    def read(self, path: Path, map_location: Any = None, mmap: bool = False) -> Any:
        """Content of one file; DataError when it cannot be read."""
        try:
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        except (RuntimeError, EOFError, OSError) as error:
            raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def in_charge(engine: Any, root: Path, others: dict[str, Any] | None = None) -> Iterator[Files]:
    """Let the engine read and write through `Files`, and keep it from copying a script beside the shards.

    others: manifest of the checkpoint to load when it is of another number of ranks.
    """
    files, before = Files(root, others), engine.checkpoint_engine
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda path: None
    engine._get_all_ckpt_names = lambda folder, tag: [files.existing(engine._get_ckpt_name(folder, tag))]
    try:
        yield files
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script, engine._get_all_ckpt_names
