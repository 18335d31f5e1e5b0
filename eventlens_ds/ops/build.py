"""Compiles csrc/ into one shared library on the LibTorch stable ABI; used by setup.py, by tests and by hand.

In: a folder of sources, an installed torch (found, never imported) and the compilers g++ and nvcc, called directly
because torch.utils.cpp_extension refuses CUDA beside a CPU torch. Out: a library that serves torch 2.10 to 2.13 and
every Python. Decision: what a library was built from is written into it as one line of JSON, which `read_record`
finds in the file without loading it; so a library of older sources is refused instead of called.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "_csrc.abi3.so"
OBSTACLE = "_csrc.obstacle.txt"
"""Beside the place of the library: why there is none, one line."""

ARCHS = "8.0;9.0+PTX"
TORCH_TARGET = "0x020a000000000000"
"""The stable ABI of torch 2.10: symbols that came later are not used, so one library loads in all later versions."""

CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra")
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off", "-DUSE_CUDA")
_MARKER = b"eventlens_csrc_record:"


class BuildError(RuntimeError):
    """A compiler is missing or failed; the message ends with its own lines."""


@dataclass(frozen=True)
class TorchInstallation:
    """Where torch lies, its version, and the CUDA version it was built for ("" for a CPU build)."""

    root: Path
    version: str
    cuda: str


def find_torch() -> TorchInstallation:
    """The torch of this environment, read from its files: importing it would cost seconds in every install."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed where csrc/ is built (pip needs --no-build-isolation)")
    root = Path(spec.submodule_search_locations[0])
    text = (root / "version.py").read_text()
    version = re.search(r"__version__ = '([^']+)'", text)
    cuda = re.search(r"^cuda: Optional\[str\] = '([^']+)'", text, re.MULTILINE)
    return TorchInstallation(root, version.group(1) if version else "unknown", cuda.group(1) if cuda else "")


def find_nvcc() -> str:
    """Path of nvcc from CUDA_HOME, CUDA_PATH or PATH; "" when there is none."""
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next((found for folder in folders if (found := shutil.which("nvcc", path=f"{folder}/bin"))), "") or (
        shutil.which("nvcc") or ""
    )


def find_cxx() -> str:
    """The C++ compiler: $CXX, else g++, clang++ or c++ from PATH. Raises BuildError when there is none."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise BuildError("no C++ compiler (g++, clang++ or $CXX)")


def fingerprint(csrc: Path) -> str:
    """Hash of all sources in csrc/, names and contents; "" for a folder without any (an installed wheel)."""
    digest = hashlib.sha256()
    paths = sorted(path for path in csrc.glob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h"))
    for path in paths:
        digest.update(f"{path.name}\0{len(path.read_bytes())}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16] if paths else ""


def read_record(library: Path) -> dict[str, str]:
    """What a library says about itself: sources, cuda (architectures or ""), no_cuda (reason or ""), torch.

    Raises BuildError for a file without a record.
    """
    content = library.read_bytes()
    start = content.find(_MARKER)
    if start < 0:
        raise BuildError(f"{library.name} has no build record")
    line = content[start + len(_MARKER) :].split(b"\n", 1)[0]
    try:
        record = json.loads(line)
    except ValueError:
        raise BuildError(f"{library.name} has a damaged build record") from None
    return {str(key): str(value) for key, value in record.items()}


def gencode(archs: str) -> list[str]:
    """nvcc flags of an architecture list such as "8.0;9.0+PTX" (the syntax of TORCH_CUDA_ARCH_LIST)."""
    flags: list[str] = []
    for entry in filter(None, re.split(r"[;,\s]+", archs)):
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(f"EVENTLENS_CUDA_ARCHS: {entry!r} is not an architecture such as 8.0, 9.0a or 9.0+PTX")
        number = "".join(match.group(1, 2, 3))
        code = f"[sm_{number},compute_{number}]" if match.group(4) else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    if not flags:
        raise BuildError(f"EVENTLENS_CUDA_ARCHS names no architecture: {archs!r}")
    return flags


def cuda_obstacle(mode: str, torch: TorchInstallation) -> str:
    """Why the CUDA part is left out in a mode (auto, 0, 1); "" when it is to be built."""
    if mode not in ("auto", "0", "1"):
        raise BuildError(f"EVENTLENS_BUILD_CUDA is auto, 0 or 1, not {mode!r}")
    if mode == "0":
        return "left out by EVENTLENS_BUILD_CUDA=0"
    if not find_nvcc():
        return "no nvcc in CUDA_HOME or on PATH"
    if mode == "auto" and not torch.cuda:
        return f"torch {torch.version} is a CPU build (EVENTLENS_BUILD_CUDA=1 builds all the same)"
    return ""


def build(target: Path, csrc: Path, cuda: str = "auto", archs: str = ARCHS) -> dict[str, str]:
    """Compile `csrc` into the library `target` and return its record; does nothing when it is up to date.

    cuda="auto" leaves the CUDA part out when it cannot be built and records why; "1" raises BuildError instead; "0"
    leaves it out. A failure of the C++ part always raises BuildError with the compiler's lines.
    """
    torch = find_torch()
    obstacle = cuda_obstacle(cuda, torch)
    if obstacle and cuda == "1":
        raise BuildError(f"EVENTLENS_BUILD_CUDA=1: {obstacle}")
    record = {"sources": fingerprint(csrc), "cuda": "" if obstacle else archs, "no_cuda": obstacle}
    record |= {"torch": torch.version, "cxx": find_cxx()}
    if target.is_file() and _same_record(target, record):
        return record
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="csrc-", dir=target.parent) as scratch:
        folder = Path(scratch)
        if not obstacle:
            try:
                _compile_and_link(folder, target, csrc, torch, record)
                return record
            except BuildError as error:
                if cuda == "1":
                    raise
                record |= {"cuda": "", "no_cuda": f"nvcc or the linker failed: {first_error(str(error))}"}
        _compile_and_link(folder, target, csrc, torch, record)
    return record


def compile_command(source: Path, target: Path, torch: TorchInstallation, record: dict[str, str]) -> list[str]:
    """The compiler call for one source file."""
    include = torch.root / "include"
    common = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-c", str(source), "-o", str(target)]
    if source.suffix == ".cu":
        return [find_nvcc(), *NVCC_FLAGS, *gencode(record["cuda"]), "-isystem", str(include), *common]
    text = json.dumps(json.dumps(record))
    return [record["cxx"], *CXX_FLAGS, f"-DEVENTLENS_RECORD={text}", "-isystem", str(include), *common]


def link_command(objects: Sequence[Path], target: Path, torch: TorchInstallation, record: dict[str, str]) -> list[str]:
    """The linker call. torch's libraries are found by name when the library is loaded, after `import torch`."""
    libraries = torch.root / "lib"
    flags = ["-shared", *map(str, objects), "-o", str(target), f"-L{libraries}"]
    if not record["cuda"]:
        return [record["cxx"], *flags, "-ltorch_cpu", "-lc10"]
    # --no-as-needed: libtorch.so defines nothing itself but is what brings in libtorch_cuda.so at run time.
    names = ["-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    if (libraries / "libtorch_cuda.so").is_file():
        names += ["-ltorch_cuda", "-lc10_cuda"]
    return [find_nvcc(), "-cudart", "static", *gencode(record["cuda"]), *flags, *names]


def _compile_and_link(folder: Path, target: Path, csrc: Path, torch: TorchInstallation, record: dict[str, str]) -> None:
    suffixes = (".cpp", ".cu") if record["cuda"] else (".cpp",)
    sources = sorted(path for path in csrc.glob("*") if path.suffix in suffixes)
    objects = [folder / f"{source.name}.o" for source in sources]
    commands = [compile_command(*pair, torch, record) for pair in zip(sources, objects)]
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in pool.map(_call, commands):
            pass
    linked = folder / target.name
    _call(link_command(objects, linked, torch, record))
    os.replace(linked, target)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\nexit code {done.returncode}\n{done.stderr or done.stdout}")


def _same_record(target: Path, record: dict[str, str]) -> bool:
    try:
        return read_record(target) == record
    except BuildError:
        return False


def first_error(text: str) -> str:
    """The first line of a compiler's output that names an error."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[-1] if lines else "")
