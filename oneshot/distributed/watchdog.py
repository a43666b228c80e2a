"""A run that hangs shows where, on every rank, and ends: nothing else would, short of the job's time limit.

Python's own faulthandler does it, from a thread that needs neither the interpreter nor its lock.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator
from dataclasses import dataclass

_STDERR = 2  # the descriptor: what Python calls stderr may be somebody's buffer


@dataclass
class _Watch:
    """The process's one watch: seconds until a silent process is taken for hung; 0 while none is kept."""

    seconds: float = 0.0


_watch = _Watch()


@contextlib.contextmanager
def watched(minutes: float) -> Iterator[None]:
    """Within the block the process ends, its stacks on stderr, if ``alive`` is not called for so long; 0: never."""
    before, _watch.seconds = _watch.seconds, minutes * 60
    alive()
    try:
        yield
    finally:
        _watch.seconds = before
        faulthandler.cancel_dump_traceback_later()
        alive()


def alive() -> None:
    """Say that the process gets on: once a step, an epoch, a batch of answers."""
    if _watch.seconds:
        faulthandler.dump_traceback_later(_watch.seconds, exit=True, file=_STDERR)
