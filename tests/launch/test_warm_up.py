"""Warming up compiles the kernels that a step of the recipe launches, and says so where there are none.

In: recipes. Out: modules that were run. Decision: without a GPU the same launches go through Triton's interpreter,
asked for by name; which kernels a compiler makes of them is seen on a GPU alone.
"""

from __future__ import annotations

import pytest
import torch

from eventlens_ds.config import load
from eventlens_ds.launch.warm_up import run_kernels, warm_up
from eventlens_ds.ops import dispatch


def test_on_a_cpu_there_is_nothing_to_warm_up() -> None:
    assert warm_up(load.load("tiny_event", []), False) == "no kernel is compiled on a CPU, nothing to warm up"


@pytest.mark.parametrize("router", ["task", "mixture", "topk"])
def test_every_kernel_of_a_recipe_is_launched(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_decisions", {})
    settings = ["--model.kernels=triton", "--data.row_tokens=64", "--objective.load_balance=0"]
    ran = list(run_kernels(load.load("tiny_event", [*settings, f"--model.adapters.router={router}"]), "cpu"))
    assert [name.endswith(("Adapters", "Mixture", "Router")) for name, _ in ran].count(True) == 1
    assert [name for name, _ in ran].count("RegionEncoder") == 1
    for _, module in ran:
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in module.parameters())
    assert {name: choice.split()[0] for name, choice in dispatch.decisions().items()} == {
        "moa on cpu": "triton",
        "roi_align on cpu": "triton",
    }
