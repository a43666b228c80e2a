"""Being told to stop: the signals of schedulers and people are noted, and acted on between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from oneshot.whole import write_whole

_ECHO = 2.0  # seconds
# Slurm's --signal=USR1@300, a scheduler's or launcher's SIGTERM, and Ctrl-C
NOTED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# names the file that a job script looks for when the run has ended before its time: progress was saved, start it again
PROGRESS_FILE = "ONESHOT_PROGRESS_FILE"
# names the file in which a job script finds the run's own exit code: launchers turn every failure into a 1
CODE_FILE = "ONESHOT_CODE_FILE"


class Interrupted(Exception):
    """The run was told to stop, and has saved how far it came. The message says where."""


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Within the block the signals end nothing; yields a function that says whether one has come.

    A second Ctrl-C is obeyed at once; one that comes with the first has only been passed
    on by a launcher. Outside of the main thread, where Python hears no signals, none is noted.
    """
    seen: dict[int, float] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        first = seen.setdefault(number, time.monotonic())
        if number == signal.SIGINT and time.monotonic() - first > _ECHO:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in NOTED}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell_progress(step: int) -> None:
    """Tell the job script, if there is one, that a state was saved: what ends now may be started again."""
    path = os.environ.get(PROGRESS_FILE)
    if path:
        write_whole(Path(path), f"{step}\n")


def tell_code(code: int) -> None:
    """Tell the job script, if there is one, with what exit code the run failed; the first rank's word counts."""
    path = os.environ.get(CODE_FILE)
    if path:
        # a failure is not to fail for want of this
        with contextlib.suppress(OSError), Path(path).open("x", encoding="utf-8") as stream:
            stream.write(f"{code}\n")
