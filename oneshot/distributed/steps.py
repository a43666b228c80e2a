"""What a run does at the moment: phases that take long, by name, each with how much there is to do and is done.

Like the clock of ``oneshot.distributed.phases``: a stage says who shows them (``shown_by``), and whatever counts its
steps (``steps``, ``each``) finds that by itself. Where nobody shows them, as on ranks other than 0, nothing is done.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

T = TypeVar("T")
BYTES = "bytes"  # the unit that is shown as GB


@dataclass
class Going:
    """A phase under way.

    Attributes:
        name: for people
        total: how many steps it has; 0 where that is not known
        unit: what a step is, in the plural; ``BYTES``
        always: its end is told even where it took no time to speak of
        done: steps so far, those before ``start`` included
        start: steps that had been done before it began: a fine-tune that is gone on with
        text: what else there is to say
        since: when it began, in seconds of ``time.monotonic``
    """

    name: str
    total: float
    unit: str
    always: bool = False
    done: float = 0
    start: float = 0
    text: str = ""
    since: float = field(default_factory=lambda: time.monotonic())
    shows: Shows | None = None
    within: Going | None = None

    @property
    def seconds(self) -> float:
        """What it has taken so far."""
        return time.monotonic() - self.since

    def add(self, steps: float = 1, text: str | None = None) -> None:
        """Say that so many more steps are done."""
        if self.within is not None:
            self.within.add(steps, text)
            return
        self.done = min(self.done + steps, self.total) if self.total else self.done + steps
        self.text = self.text if text is None else text
        if self.shows is not None:
            self.shows.moved(self)

    def at(self, done: float, text: str | None = None) -> None:
        """Say how many steps are done; the first time: that the ones before the last had been done already."""
        if not self.done:
            self.done = self.start = max(done - 1, 0)
        self.add(done - self.done, text)


class Shows(Protocol):
    """Who shows phases: told of each as it begins, moves and ends. They are ended in the order in which they nest."""

    def begun(self, going: Going) -> None: ...
    def moved(self, going: Going) -> None: ...
    def ended(self, going: Going, *, whole: bool) -> None: ...


@dataclass
class _Open:
    shows: Shows
    under_way: list[Going] = field(default_factory=list)


_OPEN: ContextVar[_Open | None] = ContextVar("steps", default=None)


@contextlib.contextmanager
def shown_by(shows: Shows | None) -> Iterator[None]:
    """Within the block phases are shown, where something shows them already, by that."""
    if shows is None or _OPEN.get() is not None:
        yield
        return
    token = _OPEN.set(_Open(shows))
    try:
        yield
    finally:
        _OPEN.reset(token)


@contextlib.contextmanager
def steps(name: str, total: float, unit: str, *, always: bool = False) -> Iterator[Going]:
    """Within the block a phase is under way, which is to be told what is done; one within another of its name is part
    of that one.

    Args:
        total, unit, always: as of ``Going``
    """
    found = _OPEN.get()
    if found is None:
        yield Going(name, total, unit, always)
        return
    outer = next((one for one in found.under_way if one.name == name), None)
    if outer is not None:
        yield Going(name, total, unit, within=outer)
        return
    going = Going(name, total, unit, always, shows=found.shows)
    found.under_way.append(going)
    found.shows.begun(going)
    whole = False
    try:
        yield going
        whole = True
    finally:
        found.under_way.remove(going)
        found.shows.ended(going, whole=whole)


def each(items: Collection[T], name: str, unit: str) -> Iterator[T]:
    """Yield the items, a step each."""
    with steps(name, len(items), unit) as going:
        for item in items:
            yield item
            going.add()
