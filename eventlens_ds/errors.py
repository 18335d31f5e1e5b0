"""The errors a user can cause, and the exit code each one ends the process with.

In: one clear line naming the file, key or number. Out: the command line prints that line and exits with `code`.
Decision: few classes; whatever is not one of them is our own bug and shows its traceback.
"""


class UserError(Exception):
    """Bad usage or configuration (exit 2): unknown key, missing path, impossible combination."""

    code = 2


class ArgumentError(UserError, ValueError):
    """Arguments of an op that do not fit together (exit 2); a ValueError for those who use the ops as a library."""


class DataError(UserError):
    """Data or a checkpoint failed a check (exit 3): broken line, damaged file, other model."""

    code = 3


class LeaseError(UserError):
    """The run folder is in use by another job (exit 4)."""

    code = 4


class RankLost(UserError):
    """A rank is dead, stopped or stuck (exit 5)."""

    code = 5


class PreflightError(UserError):
    """What would run does not (exit 6)."""

    code = 6
