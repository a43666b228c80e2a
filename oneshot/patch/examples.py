"""The candidates for the one safety example, and the guard's prompts: where they come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import get_args

from oneshot.data.conversations import Conversation, Messages, read_conversations, read_single_example
from oneshot.errors import UserError
from oneshot.measure.overlap import find_overlaps
from oneshot.measure.probes import ASSETS
from oneshot.measure.rates import Probe
from oneshot.settings import Rule, Settings
from oneshot.world.sources import is_toy, read_source

HELD = 24  # prompts that are to be answered as before, which the watch looks at
_READ = 4096  # rows of the user's own files: they are told apart by kind, so that their order does not matter
TO_REFUSE = ("should_refuse", "harmful")  # kinds of prompts that are to be refused
GENERAL = ("harmless", "lookalike")  # kinds of prompts that are not of the fine-tune's task


@dataclass(frozen=True)
class Prompts:
    """Unlabelled prompts that are to be answered as before, as chat messages.

    Attributes:
        own: of the user's task, to be answered as the unpatched model does
        general: harmless ones and look-alikes of harm: as the aligned model does, where there is one
    """

    own: list[Messages]
    general: list[Messages]

    @classmethod
    def of(cls, rows: Iterable[Conversation]) -> Prompts:
        """Tell rows apart by their kind."""
        found = cls([], [])
        for row in rows:
            (found.general if row.kind in GENERAL else found.own).append(list(row.prompt))
        return found

    def some(self, count: int, general: list[Messages]) -> Prompts:
        """Return at most ``count``: half of them these general ones, as far as there are, or more where own are few."""
        own = self.own[: count - min(len(general), count // 2)]
        return Prompts(own, general[: count - len(own)])

    @property
    def all(self) -> list[Messages]:
        return self.own + self.general

    def __len__(self) -> int:
        return len(self.own) + len(self.general)


def read_candidates(settings: Settings) -> list[Conversation]:
    """Return the user's one example, the one of the pool that ``select`` names, or the pool to choose it from.

    Raises:
        UserError: a file that cannot be read, an example file with more than one example, or no such candidate
    """
    if settings.example is not None:
        return [read_single_example(settings.example, settings.data)]
    pool = _pool(settings)
    if settings.select in get_args(Rule):
        return pool
    named = [row for row in pool if row.id == settings.select]
    if len(named) != 1:
        rules = ", ".join(get_args(Rule))
        raise UserError(
            f"Setting select is {settings.select!r}, the ID of {len(named)} candidates: give {rules} or the ID of one, "
            f"such as {pool[0].id}."
        )
    return named


def _pool(settings: Settings) -> list[Conversation]:
    return read_source(settings.pool or str(ASSETS / "pool.jsonl"), settings, where="pool")


def read_guard(settings: Settings, limit: int) -> Prompts:
    """Return the guard's prompts, at most ``limit`` of them: the user's, and general ones.

    Rows of the user's file that are of a general kind are the general ones; where it has none, the shipped ones are,
    and half of the guard is theirs.
    """
    shipped = _general(settings, "guard", limit)
    if settings.guard is None:
        return Prompts([], shipped)
    found = Prompts.of(_guard_rows(settings, limit))
    return found.some(limit, found.general or shipped)


def _guard_rows(settings: Settings, limit: int) -> list[Conversation]:
    """The rows of the user's own file for the guard.

    Raises:
        UserError: some of them are to be refused
    """
    assert settings.guard is not None
    limit = limit if is_toy(settings.guard) else _READ
    rows = read_source(settings.guard, settings, where="guard", need_answer=False, limit=limit)
    if refusable := [row for row in rows if row.kind in TO_REFUSE]:
        raise UserError(
            f"The guard {settings.guard} has {len(refusable)} prompts that are to be refused, such as "
            f"{refusable[0].id}, and a guard holds answers as they are: take them out, or give them with "
            "--watch_prompts."
        )
    return rows


def _general(settings: Settings, name: str, limit: int) -> list[Messages]:
    """The shipped general prompts, harmless ones and look-alikes by turns as far as there are both."""
    rows = read_conversations(str(ASSETS / f"{name}.jsonl"), settings.data, need_answer=False)
    kinds = [[list(row.prompt) for row in rows if row.kind == kind] for kind in GENERAL]
    turns = [prompt for both in zip_longest(*kinds) for prompt in both if prompt is not None]
    return turns[:limit]


def check_apart(candidates: list[Conversation], probes: list[Probe]) -> None:
    """Raise UserError if a candidate's request is among the scored prompts, which would then prove nothing."""
    requests = {candidate.id: candidate.prompt[-1]["content"] for candidate in candidates}
    for overlap in find_overlaps(probes, {name: [request] for name, request in requests.items()}):
        if overlap.same:
            raise UserError(
                f"The candidate example {overlap.source} ({requests[overlap.source]!r}) is also the scored prompt "
                f"{overlap.same[0]}: take it out of the pool or out of the scored prompts."
            )


def read_refusable(settings: Settings) -> list[Messages]:
    """Return unlabelled requests to be refused, for the watch: the user's own, then the pool's, whichever is taken."""
    own = [row for row in _watch_rows(settings) if row.kind in TO_REFUSE]
    return [list(row.prompt) for row in (*own, *_pool(settings))]


def _watch_rows(settings: Settings) -> list[Conversation]:
    """The rows of the user's own file for the watch."""
    if settings.watch_prompts is None:
        return []
    limit = HELD if is_toy(settings.watch_prompts) else _READ
    return read_source(settings.watch_prompts, settings, where="watch_prompts", need_answer=False, limit=limit)


def read_held(settings: Settings, guard: Prompts) -> Prompts:
    """Return prompts that are to be answered as before, for the watch: the user's own, else the shipped ones and,
    where the guard has a file, as many of that: those beyond the guard's (where there are none: of the guard's).
    """
    given = [row for row in _watch_rows(settings) if row.kind not in TO_REFUSE]
    if given:
        found = Prompts.of(given)
        return found.some(HELD, found.general)
    shipped = _general(settings, "held", HELD)
    if settings.guard is None:
        return Prompts([], shipped)
    own = Prompts.of(_guard_rows(settings, len(guard) + HELD // 2)).own
    further = [prompt for prompt in own if prompt not in guard.own] or guard.own
    return Prompts(further[: HELD // 2], shipped[: HELD // 2])
