"""How a stage ends: its exit code, and one error that people see."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from oneshot.distributed.signals import Interrupted, tell_code
from oneshot.distributed.watchdog import watched
from oneshot.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from oneshot.shown import one_line, plain
from oneshot.whole import disk_full, is_full

HEARD_WITHIN = 3.0  # seconds that a rank waits with its own end for the first failing rank's message
# what gloo and NCCL say of a peer that is gone, or silent for too long
_LOST = ("timed out", "timeout", "connection reset", "connection closed")
_FIRST, _HEARD = "oneshot/first_failure", "oneshot/heard"
T = TypeVar("T")


def end_with(prog: str, run: Callable[[], object], *, hang_minutes: float, debug: bool) -> None:
    """Run a stage, and leave the process with the right exit code.

    A user's mistake prints one sentence and exits with 2, anything else exits with 1. With several ranks, the first one
    to fail is the one that is heard, and every rank ends at once.

    Args:
        prog: what the stage is called in messages
        run: the stage
        hang_minutes: a rank that has not moved for so long is ended; 0 for never
        debug: show tracebacks
    """
    try:
        with watched(hang_minutes):
            run()
    except UserError as error:
        fail(prog, str(error), error.code, debug)
    except Interrupted as stop:  # on every rank alike
        if os.environ.get("RANK", "0") == "0":
            print(f"{prog}: {stop}", file=sys.stderr, flush=True)
        _leave_together(EXIT_STOPPED)
    except KeyboardInterrupt:
        fail(prog, "interrupted", EXIT_INTERRUPTED, debug)
    except Exception as error:
        if isinstance(error, OSError) and error.filename and is_full(error):
            fail(prog, str(disk_full(Path(error.filename))), EXIT_FAILED, debug)
        hint = "" if debug else " (--debug shows the traceback)"
        if _ranks() > 1 and any(words in str(error).lower() for words in _LOST):
            hint = f"; another rank, its node or the network is gone, or needs more ONESHOT_TIMEOUT_MINUTES{hint}"
        fail(prog, f"{type(error).__name__}: {_one_line(error)}{hint}", EXIT_FAILED, debug)
    if _ranks() > 1:
        _leave_together()


def _leave_together(code: int = 0) -> NoReturn:
    """End this process once all ranks are done, past the interpreter's own teardown.

    There gloo's threads now and then abort a process that has finished, and the launcher then takes the run for failed.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
    atexit._run_exitfuncs()
    _exit(code)


def fail(prog: str, message: str, code: int, debug: bool) -> NoReturn:
    """Say what went wrong, if this rank is the one to be heard, and leave the process with this exit code."""
    if _ranks() == 1:
        if debug:
            _trace()
        _say(prog, message)
        tell_code(code)
        sys.exit(code)
    rank = os.environ.get("RANK", "0")
    if _to_be_heard(rank):
        if debug:
            _trace()
        _say(prog, f"rank {rank}: {message}")
        tell_code(code)
        _tell_the_others()
    # not sys.exit: leaving in order would wait for the other ranks, which wait for this one
    _exit(code)


def _to_be_heard(rank: str) -> bool:
    """Whether this rank is the first to fail, as the run's key-value store knows; others fail as a consequence.

    The launcher ends every rank as soon as one is gone, so a rank that is not the first stays until that one has
    been heard. Where the network is cut, the store is out of reach, and each side speaks for itself.
    """
    store = _store()
    if store is None:
        # before the ranks have met: most likely all of them read the same bad setting, and rank 0 says so for all
        if rank != "0":
            time.sleep(HEARD_WITHIN)
        return True

    def ask() -> bool:
        try:
            if store.compare_set(_FIRST, "", rank) == rank.encode():
                return True
            store.wait([_HEARD], timedelta(seconds=HEARD_WITHIN))
        except Exception:  # the store dies with the rank or agent that keeps it, whose own error has been shown
            return False
        return False

    return _bounded(ask, 2 * HEARD_WITHIN, otherwise=True)


def _tell_the_others() -> None:
    store = _store()
    if store is None:
        return

    def tell() -> None:
        with contextlib.suppress(Exception):  # the same
            store.set(_HEARD, "")

    _bounded(tell, HEARD_WITHIN, otherwise=None)


def _bounded(call: Callable[[], T], seconds: float, *, otherwise: T) -> T:
    """Return what ``call`` returns, or ``otherwise`` if it takes longer: the store itself knows no time limit."""
    answers: list[T] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else otherwise


def _store() -> Any:
    """The run's key-value store; none before the ranks have met. Loads nothing that is not loaded."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store()


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _exit(code: int) -> NoReturn:
    """End the process at once; what was printed is not lost."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone away must not keep us
            stream.flush()
    os._exit(code)


def _one_line(error: Exception) -> str:
    return one_line(error)


def _say(prog: str, message: str) -> None:
    print(f"{prog}: error: {one_line(message)}", file=sys.stderr, flush=True)


def _trace() -> None:
    """Show the traceback of what is being handled, without keys and tokens."""
    print(plain(traceback.format_exc()), file=sys.stderr, flush=True)
