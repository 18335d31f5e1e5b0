"""The optional build of csrc/: what is compiled when, what a failure says, and that a stale library is refused.

Small source folders stand in for csrc/ where only the build is tested; the slow tests compile csrc/ itself for sm_80
and sm_90 and load the result, and compare the vector widths of the CPU kernels.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eventlens_ds.errors import UserError
from eventlens_ds.ops import build, extension
from tests.ops.csrc_engines import engine

ROOT = Path(__file__).parents[2]
KERNEL = 'extern "C" __global__ void kernel(float* x) { x[threadIdx.x] = 1.0f; }\n'
FAILING_NVCC = "#!/bin/sh\necho 'kernel.cu(1): error: no such architecture' >&2\nexit 1\n"


def needs_compiler() -> None:
    try:
        build.find_cxx()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A csrc/ with nothing but the record and one kernel."""
    needs_compiler()
    folder = tmp_path / "csrc"
    folder.mkdir()
    shutil.copy2(extension.SOURCES / "record.cpp", folder)
    (folder / "kernel.cu").write_text(KERNEL)
    return folder


@pytest.fixture
def failing_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvcc that finds fault with everything, first in line."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(FAILING_NVCC)
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(path.parents[1]))
    return path


def load_fresh(monkeypatch: pytest.MonkeyPatch, folder: Path, sources: Path) -> extension.Loaded:
    """What extension makes of a library in another folder; it must refuse it, loading two is not possible."""
    monkeypatch.setattr(extension, "FOLDER", folder)
    monkeypatch.setattr(extension, "SOURCES", sources)
    return extension._load.__wrapped__()


def test_cpu_build_says_why_it_has_no_cuda(sources: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / build.LIBRARY
    record = build.build(target, sources, cuda="0")
    assert build.read_record(target) == record
    assert record["cuda"] == "" and record["no_cuda"] == "left out by EVENTLENS_BUILD_CUDA=0"
    assert record["sources"] == build.fingerprint(sources)
    assert [path.name for path in target.parent.iterdir()] == [build.LIBRARY], "no scratch is left"
    before = target.stat().st_mtime_ns
    build.build(target, sources, cuda="0")
    assert target.stat().st_mtime_ns == before, "an up-to-date library is not compiled again"
    (sources / "record.cpp").write_text((sources / "record.cpp").read_text() + "// changed\n")
    build.build(target, sources, cuda="0")
    assert target.stat().st_mtime_ns != before


def test_auto_falls_back_and_one_does_not(
    sources: Path, tmp_path: Path, failing_nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = build.find_torch()
    cuda_torch = build.TorchInstallation(found.root, found.version, "13.0")
    monkeypatch.setattr(build, "find_torch", lambda: cuda_torch)
    record = build.build(tmp_path / build.LIBRARY, sources, cuda="auto")
    assert record["cuda"] == "" and "kernel.cu(1): error: no such architecture" in record["no_cuda"]
    with pytest.raises(build.BuildError, match=r"(?s)nvcc.*exit code 1.*no such architecture"):
        build.build(tmp_path / "one.so", sources, cuda="1")
    assert not (tmp_path / "one.so").exists()
    monkeypatch.setattr(build, "find_torch", lambda: build.TorchInstallation(found.root, "2.13.0+cpu", ""))
    record = build.build(tmp_path / build.LIBRARY, sources, cuda="auto")
    assert "torch 2.13.0+cpu is a CPU build" in record["no_cuda"]


def test_a_broken_source_is_an_error_with_the_compilers_lines(sources: Path, tmp_path: Path) -> None:
    (sources / "broken.cpp").write_text("int broken( { return 0; }\n")
    with pytest.raises(build.BuildError, match=r"(?s)broken.cpp.*error"):
        build.build(tmp_path / build.LIBRARY, sources, cuda="0")


def test_missing_tools_have_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.find_cxx()
    torch_here = build.find_torch()
    assert torch_here.version == torch.__version__ and torch_here.cuda == (torch.version.cuda or "")
    assert build.cuda_obstacle("1", torch_here) == "no nvcc in CUDA_HOME or on PATH"
    with pytest.raises(build.BuildError, match="auto, 0 or 1, not 'yes'"):
        build.cuda_obstacle("yes", torch_here)


def test_architecture_lists() -> None:
    want = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"]
    assert build.gencode(build.ARCHS) == want
    assert build.gencode("9.0a") == ["-gencode", "arch=compute_90a,code=sm_90a"]
    for wrong in ("80", "8.0;hopper", ""):
        with pytest.raises(build.BuildError, match="EVENTLENS_CUDA_ARCHS"):
            build.gencode(wrong)


def test_a_stale_library_is_refused_and_not_loaded(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.build(tmp_path / build.LIBRARY, sources, cuda="0")
    loaded: list[object] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert load_fresh(monkeypatch, tmp_path, sources).obstacle == "" and len(loaded) == 1, "control: not stale"
    assert load_fresh(monkeypatch, tmp_path, tmp_path / "absent").obstacle == "", "a wheel has no sources beside it"
    (sources / "record.cpp").write_text((sources / "record.cpp").read_text() + "// newer\n")
    stale = load_fresh(monkeypatch, tmp_path, sources).obstacle
    assert "was built from other sources" in stale and "setup.py build_ext --inplace" in stale and len(loaded) == 2
    (tmp_path / build.LIBRARY).write_bytes(b"not a library")
    assert "has no build record" in load_fresh(monkeypatch, tmp_path, sources).obstacle
    (tmp_path / build.LIBRARY).write_bytes(b"eventlens_csrc_record:{broken\n")
    assert "damaged build record" in load_fresh(monkeypatch, tmp_path, sources).obstacle


def test_a_library_that_does_not_load_is_an_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = b'eventlens_csrc_record:{"sources": "", "cuda": "", "no_cuda": "", "torch": "2.9"}\n'
    (tmp_path / build.LIBRARY).write_bytes(record)
    found = load_fresh(monkeypatch, tmp_path, tmp_path / "absent").obstacle
    assert "built beside torch 2.9) does not load" in found


def test_obstacles_tell_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not built" in load_fresh(monkeypatch, tmp_path, tmp_path).obstacle
    (tmp_path / build.OBSTACLE).write_text("no C++ compiler (g++, clang++ or $CXX)\n")
    assert "(no C++ compiler" in load_fresh(monkeypatch, tmp_path, tmp_path).obstacle
    about = {"cuda": "", "no_cuda": "no nvcc in CUDA_HOME or on PATH"}
    monkeypatch.setattr(extension, "_load", lambda: extension.Loaded("", about))
    assert extension.obstacle("cpu") == ""
    assert extension.obstacle("cuda") == "the extension has no CUDA part: no nvcc in CUDA_HOME or on PATH"
    assert extension.obstacle("mps") == "csrc/ has no kernels for mps"
    with pytest.raises(UserError, match="csrc cannot run on cuda: .*no nvcc"):
        extension.require(torch.device("cuda"))


def setup_in_a_copy(tmp_path: Path, sources: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """`python setup.py build_ext --inplace` in a copy of the checkout that has small sources; (result, ops folder)."""
    tree = tmp_path / "tree"
    ops = tree / "eventlens_ds" / "ops"
    ops.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "eventlens_ds/__init__.py"):
        shutil.copy2(ROOT / name, tree / name)
    shutil.copy2(ROOT / "eventlens_ds" / "ops" / "build.py", ops)
    shutil.copytree(sources, tree / "csrc")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EVENTLENS_BUILD")}
    done = subprocess.run(command, cwd=tree, env={**inherited, **environment}, capture_output=True, text=True)
    return done, ops


def test_setup_without_a_compiler_installs_and_leaves_a_reason(sources: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    empty = {"PATH": str(tmp_path), "CXX": ""}
    done, ops = setup_in_a_copy(tmp_path, sources, **empty)
    assert done.returncode == 0, done.stderr
    assert (ops / build.OBSTACLE).read_text() == "no C++ compiler (g++, clang++ or $CXX)\n"
    assert not (ops / build.LIBRARY).exists()


def test_setup_with_build_cuda_1_fails_with_the_compilers_lines(
    sources: Path, tmp_path: Path, failing_nvcc: Path
) -> None:
    pytest.importorskip("setuptools")
    done, ops = setup_in_a_copy(tmp_path, sources, EVENTLENS_BUILD_CUDA="1")
    assert done.returncode != 0 and "kernel.cu(1): error: no such architecture" in done.stderr
    assert not (ops / build.LIBRARY).exists()


def test_setup_builds_in_place_or_not_at_all(sources: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    done, ops = setup_in_a_copy(tmp_path / "with", sources, EVENTLENS_BUILD_CUDA="0")
    assert done.returncode == 0 and build.read_record(ops / build.LIBRARY)["cuda"] == "", done.stderr
    done, ops = setup_in_a_copy(tmp_path / "without", sources, EVENTLENS_BUILD_EXT="0")
    assert done.returncode == 0 and not list(ops.glob("_csrc.*")), done.stderr


PROGRAM = """
import hashlib, sys
from pathlib import Path
import torch
from eventlens_ds.ops import extension
extension.FOLDER = Path(sys.argv[1])
extension.SOURCES = Path(sys.argv[2])
assert not extension.obstacle("cpu"), extension.obstacle("cpu")
from tests.ops.csrc_engines import engine
from tests.ops.test_csrc_roi_align import large_problem
using, digest = engine("csrc"), hashlib.sha256()
tokens, boxes, offsets = large_problem()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    plan = using.plan(boxes, (19, 21), (7, 7), 1 / 14, 2, True, False)
    got = using.forward([tokens.to(dtype)], *plan, offsets, (19, 21), 2)
    back = using.backward(got, *plan, offsets, (19, 21), 2, 3, 1)
    for result in (got, back):
        digest.update(result.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def digest_of(folder: Path, sources: Path) -> str:
    """Hash of results by the library in a folder, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(sources)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_every_vector_width_gives_the_same_bits(tmp_path: Path) -> None:
    engine("csrc")
    digests = {digest_of(extension.FOLDER, extension.SOURCES)}
    for supported in ("0", '(__builtin_strcmp(x, "avx2") == 0)'):
        sources = tmp_path / f"csrc{len(digests)}{supported[:1]}"
        shutil.copytree(extension.SOURCES, sources)
        text = (sources / "weighted_sum.cpp").read_text()
        define = f"#define __builtin_cpu_supports(x) {supported}\n"
        (sources / "weighted_sum.cpp").write_text(
            text.replace("namespace eventlens {", define + "namespace eventlens {", 1)
        )
        folder = tmp_path / f"library{supported[:1]}"
        build.build(folder / build.LIBRARY, sources, cuda="0")
        digests.add(digest_of(folder, sources))
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.skipif(not build.find_nvcc(), reason="no nvcc in CUDA_HOME or on PATH")
def test_csrc_is_built_for_both_chips_without_spills_and_loads_here(tmp_path: Path) -> None:
    engine("csrc")
    target = tmp_path / build.LIBRARY
    record = build.build(target, extension.SOURCES, cuda="1")
    assert record["cuda"] == "8.0;9.0+PTX" and record["no_cuda"] == ""
    assert digest_of(tmp_path, extension.SOURCES) == digest_of(extension.FOLDER, extension.SOURCES)
    undefined = subprocess.run(["nm", "-D", "-u", str(target)], capture_output=True, text=True).stdout
    weak = {line.split()[1].split("@")[0] for line in undefined.splitlines() if line.split()[0] == "w"}
    of_libtorch_cuda = {"current_cuda_stream", "c10_cuda_check_msg", "c10_cuda_free_error_msg"}
    assert all(any(name.endswith(symbol) for name in weak) for symbol in of_libtorch_cuda), weak
    for source in sorted(extension.SOURCES.glob("*.cu")):
        command = build.compile_command(source, tmp_path / "object.o", build.find_torch(), record)
        done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        entries = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", done.stderr)
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert {chip for _, chip in entries} == {"sm_80", "sm_90"} and len(entries) == len(spills) > 0
        assert all(set(numbers) == {"0"} for numbers in spills), f"{source.name} spills"


def test_record_is_exported(tmp_path: Path) -> None:
    """The record is a symbol of the loaded library and the line that read_record finds in the file."""
    engine("csrc")
    library = extension.FOLDER / build.LIBRARY
    line = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(str(library)), "eventlens_csrc_record")))
    assert line.decode().startswith("eventlens_csrc_record:{") and extension.record() == build.read_record(library)
