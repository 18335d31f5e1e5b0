"""Installs the Python package; needs neither a compiler nor a GPU (metadata is in pyproject.toml).

ds_configs/ and slurm/ lie beside the package, where people edit them. A wheel carries a copy inside the package; an
editable install reads them where they are.

csrc/ is compiled into eventlens_ds/ops/_csrc.abi3.so when a C++ compiler and torch are there (--no-build-isolation),
with CUDA kernels when nvcc and a CUDA torch are there. Without it everything works, RoI-align on a CPU slower.
  EVENTLENS_BUILD_CUDA=auto|0|1   auto: as above, and never fail the install. 0: C++ only. 1: build the CUDA part even
                                  beside a CPU build of torch; fail with the compiler's lines when that does not work
  EVENTLENS_CUDA_ARCHS            default 8.0;9.0+PTX
  EVENTLENS_BUILD_EXT=0           compile nothing
`python setup.py build_ext --inplace` compiles again after a change in csrc/.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DATA = {"ds_configs": "*.json", "slurm": "*.sh"}


def load_build_module():
    """eventlens_ds/ops/build.py by its path: importing the package would need its dependencies."""
    spec = importlib.util.spec_from_file_location("eventlens_csrc_build", ROOT / "eventlens_ds" / "ops" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildWithData(build_py):
    """build_py that also copies the data folders into the built package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder, pattern in DATA.items():
            target = Path(self.build_lib) / "eventlens_ds" / folder
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for path in sorted(Path(folder).glob(pattern)):
                shutil.copy2(path, target)


class BuildCsrc(build_ext):
    """build_ext that calls the compilers itself; see eventlens_ds/ops/build.py."""

    def run(self) -> None:
        if not self.extensions:
            return
        build = load_build_module()
        folder = self._folder()
        library, obstacle = folder / build.LIBRARY, folder / build.OBSTACLE
        obstacle.unlink(missing_ok=True)
        mode = os.environ.get("EVENTLENS_BUILD_CUDA", "auto")
        archs = os.environ.get("EVENTLENS_CUDA_ARCHS", build.ARCHS)
        try:
            record = build.build(library, ROOT / "csrc", mode, archs)
        except build.BuildError as error:
            if mode == "1":
                sys.exit(f"csrc: {error}")
            folder.mkdir(parents=True, exist_ok=True)
            library.unlink(missing_ok=True)
            obstacle.write_text(f"{build.first_error(str(error))}\n")
            self.warn(f"csrc is left out: {error}")
            return
        self.announce(f"csrc: {library}, CUDA: {record['cuda'] or record['no_cuda']}", level=4)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self._folder().glob("_csrc.*"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _folder(self) -> Path:
        base = ROOT if self.inplace or getattr(self, "editable_mode", False) else Path(self.build_lib)
        return base / "eventlens_ds" / "ops"


has_csrc = any((ROOT / "csrc").glob("*.cpp")) and os.environ.get("EVENTLENS_BUILD_EXT", "1") != "0"
setup(
    cmdclass={"build_py": BuildWithData, "build_ext": BuildCsrc},
    ext_modules=[Extension("eventlens_ds.ops._csrc", [], py_limited_api=True, optional=True)] if has_csrc else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if has_csrc else {},
)
