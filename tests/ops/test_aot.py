"""The compile gate: what it measures, that it refuses spills and too much shared memory, and where it works.

In: the small kernels of aot_kernels.py, and every kernel that ops/ ships. Decision: the offenders are real kernels
compiled by the real compiler; the interpreter's presence is real too, since the environment of this test sets it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eventlens_ds.errors import ArgumentError
from eventlens_ds.ops import aot

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, int], aot.Resources]:
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    try:
        found = aot.measure(["tests.ops.aot_kernels"])
    finally:
        patch.undo()
    return {(entry.name, entry.arch): entry for entry in found}


def test_every_case_is_compiled_for_its_architectures(measured):
    assert list(measured) == [("good", 80), ("good", 90), ("spilling", 90), ("oversized", 80), ("oversized", 90)]


def test_a_good_kernel_passes_the_gate(measured):
    for arch in (80, 90):
        entry = measured["good", arch]
        assert not aot.gate([entry]) and 16 < entry.registers <= 255 and 0 < entry.shared_bytes <= entry.limit
        assert entry.spill_stores == entry.spill_loads == entry.stack_bytes == 0 and entry.blocks_per_sm > 1


def test_a_spilling_kernel_is_refused(measured):
    entry = measured["spilling", 90]
    assert entry.registers == 255 and entry.stack_bytes > 0 and entry.spill_stores > 0
    (line,) = aot.gate([entry])
    assert line.startswith("spilling sm_90: spills ") and str(entry.spill_stores) in line


def test_a_kernel_over_the_shared_memory_is_refused(measured):
    for arch, limit in ((80, 166912), (90, 232448)):
        entry = measured["oversized", arch]
        (line,) = aot.gate([entry])
        assert str(entry.shared_bytes) in line and str(limit) in line and entry.blocks_per_sm == 0
        assert not aot.gate([replace(entry, shared_bytes=limit)])


def test_the_command_names_offenders_and_exits_1():
    command = [sys.executable, "-m", "eventlens_ds.ops.aot", "tests.ops.aot_kernels"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "5 compiled with Triton" in done.stdout and done.stderr.count("REFUSED") == 3


def test_a_kernel_of_the_interpreter_says_what_to_do():
    case = aot.CompileCase("k", print, {}, {})
    with pytest.raises(ArgumentError, match="TRITON_INTERPRET"):
        aot.compile(case, 90)
    with pytest.raises(ArgumentError, match="sm_75"):
        aot.compile(case, 75)


@pytest.mark.parametrize("wrong", ["signature={**good.signature, 'other': 'i32'}", "aligned=frozenset({'other'})"])
def test_a_case_that_does_not_fit_its_kernel_is_named(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "misfit_kernels.py").write_text(
        "from dataclasses import replace\n"
        "from tests.ops import aot_kernels\n"
        "def compile_cases():\n"
        f"    return [replace(good, {wrong}) for good in [next(aot_kernels.compile_cases())]]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="differ: other"):
        aot.measure(["misfit_kernels"])


def test_a_module_that_does_not_compile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_kernels.py").write_text("def compile_cases():\n    raise KeyError('no such dtype')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="no such dtype"):
        aot.measure(["broken_kernels"])


def test_a_list_that_two_modules_share_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "passing_on.py").write_text("from tests.ops.aot_kernels import compile_cases\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(aot.measure(["passing_on", "tests.ops.aot_kernels"])) == 5


def test_the_table_is_written_between_its_markers(measured, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{aot.START}\nold\n{aot.END}\nafter\n")
    aot.write_docs(page, list(measured.values()), "5 compiled")
    text = page.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("after\n")
        and "old" not in text
        and "| product | 80 | 2 | " in text
        and "| 0 | 0 | 16 - 192 |" in text
    )
    page.write_text("no markers")
    with pytest.raises(ArgumentError, match="markers"):
        aot.write_docs(page, [], "")


@pytest.mark.slow
def test_every_kernel_that_ships_passes_the_gate():
    modules = aot.kernel_modules()
    assert {name.split(".")[2] for name in modules} == {"roi_align", "moa"}
    resources = aot.measure(modules)
    assert {entry.arch for entry in resources} == {80, 90}
    assert not aot.gate(resources)
