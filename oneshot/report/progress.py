"""Progress for people: a live bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from oneshot import shown
from oneshot.checkpoint.loading.load import Source, what_to_say
from oneshot.distributed.runtime import Runtime
from oneshot.distributed.steps import BYTES, Going, shown_by

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

EVERY = 30.0  # seconds between two lines of a log file
LONG = 5.0  # seconds from which on the end of a phase is told
SETTLED = 1.0  # seconds after which a bar is shown
LOG_WIDTH = 100  # columns of a log file, which has none of its own


def heartbeat(loss: float, facts: Mapping[str, float]) -> str:
    """Return what a training step tells people: loss, tokens per second, MFU where it is known, peak memory."""
    parts = [f"loss {loss:.4f}", f"{facts['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in facts:
        parts.append(f"MFU {facts['mfu']:.0%}")
    parts.append(f"{facts['peak_memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join(parts)


def open_console(runtime: Runtime) -> Console | None:
    """Return where rank 0 prints, a terminal or a log file; none on other ranks."""
    return wide_enough(shown.open_console()) if runtime.is_main else None


def say_dtype(console: Console | None, source: Source) -> None:
    """Say it, on rank 0, where a model is not computed in its checkpoint's dtype, or not read as its config says."""
    for said in what_to_say(source) if console else ():
        assert console is not None
        console.print(said, highlight=False, soft_wrap=True)


def wide_enough(console: Console, columns: int = LOG_WIDTH) -> Console:
    """Return the console where it is a terminal, else one for the same file with at least so many columns."""
    if console.is_terminal:
        return console
    # not the console's own width: without a terminal it is a guess of 80 columns
    return shown.open_console(file=console.file, width=max(LOG_WIDTH, columns), force_terminal=False, color_system=None)


@contextlib.contextmanager
def progress(console: Console | None) -> Iterator[None]:
    """Within the block show what is under way (``oneshot.distributed.steps``).

    Args:
        console: none (ranks other than 0) shows nothing
    """
    shows = None if console is None else Bars(console) if _is_live(console) else Lines(console)
    with shown_by(shows):
        yield


def counted(going: Going) -> str:
    """Return how much of a phase is done, and how fast it is: 12/120 prompts, 3.1/s; "" where nothing is counted."""
    if not going.total:
        return ""
    done = f"{going.done:,.0f}/{going.total:,.0f} {going.unit}"
    if going.unit == BYTES:
        done = f"{going.done / 1e9:.2f}/{going.total / 1e9:.2f} GB"
    return f"{done}, {_rate(going)}" if going.done > going.start else done


def ended(going: Going) -> str:
    """Return what is said at a phase's end: answers: 120 prompts in 37.2 s (3.2/s)."""
    rest = f"  {going.text}" if going.text else ""
    if not going.total:
        return f"{going.name}: {going.seconds:,.1f} s{rest}"
    done = f"{going.done / 1e9:.2f} GB" if going.unit == BYTES else f"{going.done - going.start:,.0f} {going.unit}"
    return f"{going.name}: {done} in {going.seconds:,.1f} s ({_rate(going)}){rest}"


class Lines:
    """Phases in a log file: a line at most every ``EVERY`` seconds, and one at the end of each that took long."""

    def __init__(self, console: Console) -> None:
        self.console, self.last = console, time.monotonic()

    def begun(self, going: Going) -> None:
        pass

    def moved(self, going: Going) -> None:
        now = time.monotonic()
        if now - self.last >= EVERY:
            self.last = now
            self._print(f"{going.name} {counted(going)}  {going.text}".rstrip())

    def ended(self, going: Going, *, whole: bool) -> None:
        if whole and (going.always or going.seconds >= LONG):
            self.last = time.monotonic()
            self._print(ended(going))

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


class Bars:
    """Phases in a terminal: a bar for each that is under way for a moment; when it ends, as in a log file."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lines = Lines(console)
        self._tasks: list[tuple[Going, TaskID]] = []
        self._live: Progress | None = None

    def begun(self, going: Going) -> None:
        if self._live is None:
            self._live = _bars(self.console)
            self._live.start()
        total = going.total or None
        self._tasks.append((going, self._live.add_task(going.name, total=total, counted=counted(going), text="")))

    def moved(self, going: Going) -> None:
        assert self._live is not None
        task = next(task for one, task in self._tasks if one is going)
        self._live.update(task, completed=going.done, counted=counted(going), text=going.text)

    def ended(self, going: Going, *, whole: bool) -> None:
        assert self._live is not None
        for one, task in [pair for pair in self._tasks if pair[0] is going]:
            self._live.remove_task(task)
            self._tasks.remove((one, task))
        if not self._tasks:
            self._live.stop()
            self._live = None
        self._lines.ended(going, whole=whole)


def _bars(console: Console) -> Progress:
    """rich's bars, of which those that have just begun are not shown yet: most end at once."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    class Settled(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table([task for task in self.tasks if (task.elapsed or 0) >= SETTLED])

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[counted]}", markup=False),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    return Settled(*columns, console=console, transient=True, refresh_per_second=4)


def _rate(going: Going) -> str:
    rate = (going.done - going.start) / max(going.seconds, 1e-9)
    if going.unit == BYTES:
        return f"{rate / 1e6:,.0f} MB/s"
    return f"{rate:.3g}/s" if rate < 1000 else f"{rate:,.0f}/s"


def _is_live(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal
