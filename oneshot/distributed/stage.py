"""How a stage starts and how it ends: settings parsed before anything heavy, and one error that people see."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from oneshot.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, UserError
from oneshot.settings import Settings, parse


def run_stage(argv: list[str] | None, prog: str, description: str, run: Callable[[Settings], None]) -> None:
    """Parse settings, run the stage, and leave the process with the right exit code.

    A user's mistake prints one sentence and exits with 2, anything else exits with 1; the traceback comes with
    ``--debug`` only. With several ranks, the first one to fail is the one that is heard, and every rank ends at once.
    """
    try:
        settings = parse(argv, prog, description)
    except UserError as error:
        _say(prog, str(error))
        sys.exit(EXIT_USER)
    try:
        run(settings)
    except UserError as error:
        _fail(prog, str(error), EXIT_USER, settings.debug)
    except KeyboardInterrupt:
        _fail(prog, "interrupted", EXIT_INTERRUPTED, settings.debug)
    except Exception as error:
        hint = "" if settings.debug else " (--debug shows the traceback)"
        _fail(prog, f"{type(error).__name__}: {error}{hint}", EXIT_FAILED, settings.debug)


def _fail(prog: str, message: str, code: int, debug: bool) -> None:
    rank = os.environ.get("RANK")
    if rank is None or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if debug:
            traceback.print_exc()
        _say(prog, message)
        sys.exit(code)
    if _is_first_failure(rank):
        if debug:
            traceback.print_exc()
        _say(prog, f"rank {rank}: {message}")
    # not sys.exit: leaving in order would wait for the other ranks, which wait for this one
    os._exit(code)


def _is_first_failure(rank: str) -> bool:
    """Whether no other rank has failed before, as the run's key-value store knows; others fail as a consequence."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return True
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.compare_set("oneshot/first_failure", "", rank) == rank.encode()
    except Exception:  # the store dies with the rank or agent that keeps it, whose own error has been shown
        return False


def _say(prog: str, message: str) -> None:
    print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
