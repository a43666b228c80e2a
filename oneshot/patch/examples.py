"""The candidates for the one safety example, and the guard's prompts: where they come from."""

from __future__ import annotations

from typing import get_args

from oneshot.data.conversations import Conversation, Messages, read_conversations, read_single_example
from oneshot.errors import UserError
from oneshot.measure.overlap import find_overlaps
from oneshot.measure.probes import ASSETS
from oneshot.measure.rates import Probe
from oneshot.settings import Rule, Settings
from oneshot.world.sources import read_source

HELD = 24  # prompts that are to be answered as before, which the watch looks at


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


def read_guard(settings: Settings, limit: int) -> list[Messages]:
    """Return the guard's prompts as chat messages, at most ``limit`` of them."""
    source = settings.guard or str(ASSETS / "guard.jsonl")
    return [list(row.prompt) for row in read_source(source, settings, where="guard", need_answer=False, limit=limit)]


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
    """Return unlabelled requests to be refused, for the watch: the pool's, whichever example is taken."""
    return [list(row.prompt) for row in _pool(settings)]


def read_held(settings: Settings, guard: list[Messages]) -> list[Messages]:
    """Return prompts that are to be answered as before, for the watch: the user's own, else the shipped ones and,
    where the guard has a file, as many of that: those beyond the guard's (where there are none: of the guard's).
    """
    if settings.watch_prompts is not None:
        rows = read_source(settings.watch_prompts, settings, where="watch_prompts", need_answer=False, limit=HELD)
        return [list(row.prompt) for row in rows]
    shipped = read_conversations(str(ASSETS / "held.jsonl"), settings.data, need_answer=False, limit=HELD)
    if settings.guard is None:
        return [list(row.prompt) for row in shipped]
    own = read_source(settings.guard, settings, where="guard", need_answer=False, limit=len(guard) + HELD // 2)
    further = [list(row.prompt) for row in own if list(row.prompt) not in guard] or guard
    return [list(row.prompt) for row in shipped[: HELD // 2]] + further[: HELD // 2]
