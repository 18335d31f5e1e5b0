"""The choice of an op's backend is logged once, gives its reason, and is refused where the backend cannot run."""

from __future__ import annotations

import logging

import pytest
import torch

from eventlens_ds.errors import UserError
from eventlens_ds.ops import dispatch, extension


def test_dispatch_logs_a_choice_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_decisions", {})
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(3):
            assert dispatch.choose_backend("moa", "cpu") == "reference"
    assert [record.getMessage() for record in caplog.records] == ["moa on cpu runs reference (first choice on cpu)"]
    assert dispatch.choose_backend("moa", torch.device("cpu"), "reference") == "reference"
    assert dispatch.decisions() == {"moa on cpu": "reference (asked for by name)"}
    with pytest.raises(UserError, match="ops: moa, roi_align"):
        dispatch.choose_backend("conv", "cpu")
    with pytest.raises(UserError, match="'cutlass' on cpu: no such backend; backends: reference"):
        dispatch.choose_backend("moa", "cpu", "cutlass")


def test_the_reason_names_what_a_better_backend_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(extension, "obstacle", lambda kind: "not built")
    assert dispatch.choose_backend("roi_align", "cpu") == "reference"
    assert dispatch.decisions() == {"roi_align on cpu": "reference (csrc: not built)"}
    with pytest.raises(UserError, match="'csrc' on cpu: not built"):
        dispatch.choose_backend("roi_align", "cpu", "csrc")
    monkeypatch.setattr(extension, "obstacle", lambda kind: "")
    assert dispatch.choose_backend("roi_align", "cpu") == "csrc"


def test_triton_on_the_cpu_is_for_tests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose_backend("moa", "cpu") == "reference"
    assert dispatch.choose_backend("moa", "cpu", "triton") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="needs a GPU"):
        dispatch.choose_backend("moa", "cpu", "triton")
