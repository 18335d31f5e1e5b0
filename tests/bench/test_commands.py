"""`eventlens bench`: the names it offers are the benchmarks that exist.

In: the modules of eventlens_ds.bench. Out: nothing. Decision: a module with a `main` is a benchmark, so one that is
added without being listed, or listed without being there, fails here.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import eventlens_ds.bench
from eventlens_ds import cli


def test_every_benchmark_is_listed_and_exists():
    found = set()
    for path in Path(eventlens_ds.bench.__path__[0]).glob("*.py"):
        body = ast.parse(path.read_text()).body
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body):
            found.add(path.stem)
    assert found == set(cli.BENCHMARKS)


@pytest.mark.parametrize("name", ["roi_align", "moa"])
def test_the_arguments_of_a_benchmark_reach_it(name: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", name, "--device", "cpu", "--quick", "--list"]) == 0
    assert len(capsys.readouterr().out.split()) == 3
    with pytest.raises(SystemExit):
        cli.main(["bench", name, "--help"])
    assert f"usage: eventlens bench {name} " in capsys.readouterr().out


def test_a_gpu_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["bench", "moa", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
