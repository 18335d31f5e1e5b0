"""What every test runs under, and the small world that most of them read.

In: nothing but the environment. Out: settings for a machine without GPU and network, set before triton, torch or
DeepSpeed is imported, and the fixtures `shared`, `world_folder` and `small`.
Decision: the world is drawn, written as shards and indexed once per session by the functions behind `eventlens data
build`, so tests of plan, model and training read what a user's run reads.
"""

from __future__ import annotations

import os

SETTINGS = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from eventlens_ds.runtime.failures import leave  # noqa: E402
from tests.creature_world import build_creatures  # noqa: E402
from tests.small_world import SmallRun, build_world, small_run  # noqa: E402

STATUS = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real files ($EVENTLENS_SHARED); skips where it is missing."""
    folder = Path(os.environ.get("EVENTLENS_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real files at {folder}; set EVENTLENS_SHARED")
    return folder


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded world of 40 training and 8 validation images, built into shards."""
    return build_world(tmp_path_factory.mktemp("world") / "built", images=40, val_images=8)


@pytest.fixture(scope="session")
def creatures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creatures of 12 training and 4 test classes, built into shards."""
    return build_creatures(tmp_path_factory.mktemp("creatures") / "built")


@pytest.fixture(scope="session")
def small(world_folder: Path) -> SmallRun:
    """Configuration, tokenizer, architecture and data of a run over `world_folder`."""
    return small_run(world_folder)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End as the trainer ends: tests that start a group in this process leave threads of gloo behind."""
    code = config.stash.get(STATUS, None)
    if code is not None:
        config.get_terminal_writer().flush()
        leave(lambda: code)
