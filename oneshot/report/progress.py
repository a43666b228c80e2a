"""Progress for people: a live bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from oneshot import shown
from oneshot.checkpoint.load import Source, what_to_say
from oneshot.distributed.runtime import Runtime

if TYPE_CHECKING:
    from rich.console import Console

LOG_LINES = 10
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
def progress(console: Console | None, what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yield ``tell(done, text)``. Without a console (ranks other than 0) nothing is shown."""
    if console is None:
        yield lambda done, text: None
    elif console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, text="")
            yield lambda done, text: bar.update(task, completed=done, text=text)
    else:
        every = max(1, total // LOG_LINES)

        def line(done: int, text: str) -> None:
            if done % every == 0 or done == total:
                console.print(f"{what} {done}/{total} {text}", highlight=False)

        yield line
