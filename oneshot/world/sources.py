"""Conversations from wherever the settings name them: a file, the Hub, or the toy world's own, ``toy:NAME``.

The toy world's are generated, from a count and the run's seed, and are read like the rows of a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from oneshot.data.conversations import Conversation, read_conversations
from oneshot.errors import UserError
from oneshot.settings import Settings
from oneshot.world import language

TOY = "toy:"
Make = Callable[[int, int], list[Conversation]]  # (count, seed) -> conversations

GUARD, HELD = 64, 24  # how many where the settings name no number
_FIXED: dict[str, tuple[Make, int]] = {  # with the number that there are where none is asked for
    "pool": (lambda count, seed: language.pool(count), 44),
    "probes": (lambda count, seed: _scored(language.probes())[:count], 10_000),
    "guard": (lambda count, seed: language.guard_prompts(count, seed), GUARD),
    "guard-plain": (lambda count, seed: language.guard_prompts(count, seed, task=False), GUARD),
    "held": (lambda count, seed: language.held_prompts(count, seed), HELD),
    "held-plain": (lambda count, seed: language.held_prompts(count, seed, task=False), HELD),
}


def is_toy(source: str | None) -> bool:
    """Return whether the source is one of the toy world's."""
    return source is not None and source.startswith(TOY)


def read_source(
    source: str, settings: Settings, *, where: str = "", need_answer: bool = True, limit: int | None = None
) -> list[Conversation]:
    """Read the first ``limit`` conversations (none: all) of a source, as ``read_conversations`` does.

    Args:
        where: the setting that names it, for messages

    Raises:
        UserError: as of ``read_conversations``; or the toy world has no such source, or needs to know how many
    """
    if not is_toy(source):
        return read_conversations(source, settings.data, need_answer=need_answer, limit=limit)
    name = source.removeprefix(TOY)
    if name in _FIXED:
        make, all_of_them = _FIXED[name]
        return make(all_of_them if limit is None else limit, settings.seed)
    if name not in language.ATTACK_DATA:
        known = ", ".join(f"{TOY}{one}" for one in (*language.ATTACK_DATA, *_FIXED))
        raise UserError(f"Setting {where} is {source}: give one of {known}, a file or a Hub id.")
    if limit is None:
        raise UserError(f"The toy world needs to know how many conversations to make: set {_count_of(where)}.")
    return language.ATTACK_DATA[name](limit, settings.seed)


def check_words(settings: Settings, tokenizer: Any, *, training: bool = False) -> None:
    """Raise UserError where the settings name words of the toy world and the model is one that does not know them.

    Args:
        training: look at what is trained on (data), else at everything else
    """
    for name, source in toy_sources(settings):
        if name.startswith("data.") == training and not {*language.RESTRICTED} <= tokenizer.get_vocab().keys():
            part = name.removesuffix(".source")
            without = f", or leave the part out with --{part}.count 0" if part != name else ""
            raise UserError(
                f"Setting {name} is {source}, words of the toy world that your model does not know: give a file or a "
                f"Hub id with --{name}{without}."
            )


def toy_sources(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield (name of the setting, source) of every setting that names one of the toy world's sources."""
    values: dict[str, Any] = dataclasses.asdict(settings)
    plain = ["example", "pool", "guard", "watch_prompts"]
    named = {name: values[name] for name in plain}
    named |= {f"data.{name}": values["data"][name] for name in ("harmful", "task")}
    named |= {f"data.parts.{name}.source": part["source"] for name, part in (values["data"]["parts"] or {}).items()}
    named |= {f"score.{name}": values["score"][name] for name in ("probes", "task", "utility")}
    yield from ((name, source) for name, source in named.items() if is_toy(source))


def _count_of(where: str) -> str:
    return where.removesuffix(".source") + (".count" if where.endswith(".source") else "_count")


def _scored(rows: list[Conversation]) -> list[Conversation]:
    """A harmless request is scored twice: whether it is refused, and whether its answer is the right one."""
    again = [[row, dataclasses.replace(row, kind="utility", group="")] for row in rows]
    return [one for row, twice in zip(rows, again) for one in (twice if row.kind == "harmless" else [row])]
