"""Errors that people see: user mistakes are one sentence and exit code 2; tracebacks only with ``--debug``."""

from __future__ import annotations

EXIT_USER = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_STOPPED = 75  # told to stop, all saved: start it again (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """A mistake that the user can mend. The message is one sentence: what is wrong, where, and what to do."""

    code = EXIT_USER


class DiskFull(UserError):
    """There is no room for what is to be written. The message says where, and of how many bytes."""

    code = EXIT_FAILED


class Unmet(UserError):
    """A repair that is finished and did not come to what ``--require`` asks for."""

    code = 4


def first_line(error: Exception) -> str:
    """Return the first line of a library's error without its full stop, to be quoted; its class where it says none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
