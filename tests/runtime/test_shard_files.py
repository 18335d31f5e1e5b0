"""Files of a checkpoint are free of what only some Pythons write into a pickle.

In: a ZeRO stage as DeepSpeed keeps it, an enum. Out: bytes that load under the allow-list. Decision: the pickling of
enums by Python 3.11.0 - 3.11.3 (getattr(Class, name)) is put in place by hand, so the test is the same on every Python.
"""

from __future__ import annotations

import copyreg
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from eventlens_ds.errors import DataError
from eventlens_ds.runtime.shard_files import Files, weights_only


def by_name(stage: ZeroStageEnum, protocol: int) -> tuple[Any, ...]:
    return getattr, (type(stage), stage.name)


def saved(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", by_name)
    files, path = Files(root), root / "shard.pt"
    files.save({"zero_stage": ZeroStageEnum.weights, "tensor": torch.arange(3)}, str(path))
    assert not files.errors
    with weights_only(path):
        return files.read(path)


def test_a_stage_is_written_so_that_every_python_may_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved(tmp_path, monkeypatch)["zero_stage"] is ZeroStageEnum.weights


def test_written_by_name_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventlens_ds.runtime.shard_files._pickle_stage_by_value", lambda: None)
    monkeypatch.delitem(copyreg.dispatch_table, ZeroStageEnum, raising=False)
    with pytest.raises(DataError, match="shard.pt: refused, it holds more than tensors and plain data: .*getattr"):
        saved(tmp_path, monkeypatch)
