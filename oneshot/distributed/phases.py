"""Where a run's time goes: named phases, of which the innermost that is open gets the time.

A stage opens a clock; ``phase`` and ``count`` find it by themselves and do nothing where there is none. The clock is of
the thread that opened it: two runs in one process do not mix, and what a phase hands to other threads counts as long as
it waits for them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

if TYPE_CHECKING:
    from oneshot.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")

OTHER = "other"  # what no phase has


@dataclass
class Spent:
    """What one phase took on this rank.

    Attributes:
        seconds: without those of the phases within it
        calls: how often it was entered
        passes, tokens: forward passes through a model, and tokens in them, padding included
        read_bytes, written_bytes: of checkpoints, adapters and training states
        peak_rss_bytes, peak_gpu_bytes: what the process held, where that was more than ever before; else 0
    """

    seconds: float = 0.0
    calls: int = 0
    passes: int = 0
    tokens: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    peak_rss_bytes: int = 0
    peak_gpu_bytes: int = 0


class Clock:
    """Adds up what each phase takes.

    Args:
        detailed: also count, look at memory, and wait for the GPU wherever a phase begins or ends, or the phase that
            asks for a result would get the time of those that computed it
    """

    def __init__(self, *, detailed: bool) -> None:
        self.detailed = detailed
        self.spent = {OTHER: Spent(calls=1)}
        self.current = OTHER
        self._since = time.perf_counter()
        self._peaks = peaks() if detailed else {}

    def settle(self) -> None:
        """Give the current phase the time since this was last called."""
        spent = self.spent[self.current]
        if self.detailed:
            _await_gpu()
            for name, held in peaks().items():
                if held > self._peaks.get(name, 0):
                    self._peaks[name] = held
                    setattr(spent, name, held)
        now = time.perf_counter()
        spent.seconds += now - self._since
        self._since = now


_CLOCK: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextlib.contextmanager
def clock(*, detailed: bool) -> Iterator[Clock]:
    """Within the block phases are measured; those of a clock around it are not."""
    opened = Clock(detailed=detailed)
    token = _CLOCK.set(opened)
    try:
        yield opened
    finally:
        _CLOCK.reset(token)


def timed(run: Callable[Concatenate[Settings, P], T]) -> Callable[Concatenate[Settings, P], T]:
    """Have a stage run on a clock of its own, with details where its settings say ``profile``."""

    @functools.wraps(run)
    def on_a_clock(settings: Settings, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with clock(detailed=settings.profile):
            return run(settings, *args, **kwargs)

    return on_a_clock


def running() -> Clock | None:
    """Return the clock of this thread's run, all of it settled until now; none where none was opened."""
    found = _CLOCK.get()
    if found is not None:
        found.settle()
    return found


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Within the block, or the function that this decorates, time belongs to the phase, save that of phases within."""
    found = _CLOCK.get()
    if found is None:
        yield
        return
    found.settle()
    before, found.current = found.current, name
    found.spent.setdefault(name, Spent()).calls += 1
    try:
        yield
    finally:
        found.settle()
        found.current = before


def counting() -> bool:
    """Return whether counts are wanted, for those that take an effort to know."""
    found = _CLOCK.get()
    return found is not None and found.detailed


def count(*, passes: int = 0, tokens: int = 0, read: int = 0, written: int = 0) -> None:
    """Add to the current phase: forward passes, tokens in them, bytes read and written by this rank."""
    found = _CLOCK.get()
    if found is None:
        return
    spent = found.spent[found.current]
    spent.passes += passes
    spent.tokens += tokens
    spent.read_bytes += read
    spent.written_bytes += written


def count_passes(model: Any) -> None:
    """Have the forward passes of a transformers model counted from now on, if counts are wanted.

    Its input embeddings tell: whatever part of the model is called, they come once in a pass.
    """
    if not counting():
        return

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input"]
        count(passes=1, tokens=ids.numel())

    with contextlib.suppress(NotImplementedError):  # a model of foreign code that does not say where they are
        model.get_input_embeddings().register_forward_pre_hook(note, with_kwargs=True)


def peaks() -> dict[str, int]:
    """Return the most bytes that this process has held: peak_rss_bytes and, of a GPU in use, peak_gpu_bytes."""
    import resource

    held = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux reports KiB
    torch = _torch_on_gpu()
    return held if torch is None else {**held, "peak_gpu_bytes": torch.cuda.max_memory_allocated()}


def _await_gpu() -> None:
    torch = _torch_on_gpu()
    if torch is not None:
        torch.cuda.synchronize()


def _torch_on_gpu() -> Any:
    """torch, where it is loaded and has work on a GPU: this is no reason to load it, or to wake one."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None
