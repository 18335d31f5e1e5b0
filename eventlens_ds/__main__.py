"""`eventlens` and `python -m eventlens_ds`, which also starts the ranks of a command.

In: the arguments of `eventlens`. Out: its exit code. Decision: the process ends by runtime/failures.py, because any
command may have joined a process group.
"""

from typing import NoReturn

from eventlens_ds.cli import main
from eventlens_ds.runtime.failures import leave


def run() -> NoReturn:
    """The console script."""
    leave(main)


if __name__ == "__main__":
    run()
