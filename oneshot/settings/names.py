"""The names of all settings, what they hold and what is said of them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from dataclasses import dataclass
from typing import Any

from oneshot.settings.checks import joined
from oneshot.settings.kinds import bare, descend, docs, kinds, options, words
from oneshot.settings.run import Settings

ANY = "NAME"  # stands for the names that a user gives, of the parts of a mixture or of sets of prompts


@dataclass(frozen=True)
class Described:
    """One setting, as people are told of it.

    Args:
        name: in full; NAME stands for a name that the user gives
        wanted: what it may hold, in words
        default: as YAML would have it; none where it must be given
        doc: what it is
    """

    name: str
    wanted: str
    default: str | None
    doc: str


def kind_at(name: str) -> Any:
    """Return the annotation of a setting or section by its full name; none where there is no such setting."""
    kind: Any = Settings
    for key in name.split("."):
        kind = descend(kind, key)
    return kind


def described(section: Any = Settings, name: str = "") -> list[Described]:
    """Return a section's settings in their order, those of nested sections in their place."""
    found = []
    said = docs(section)
    for field in dataclasses.fields(section):
        kind, full = kinds(section)[field.name], joined(name, field.name)
        if dataclasses.is_dataclass(kind):
            found += described(kind, full)
            continue
        found.append(Described(full, words(kind), _default(field), said[field.name]))
        for inner in filter(dataclasses.is_dataclass, (descend(option, ANY) for option in options(kind))):
            found += described(inner, joined(full, ANY))
    return found


@functools.lru_cache
def all_names() -> tuple[str, ...]:
    """Return the full names of all settings."""
    return tuple(one.name for one in described())


def close_names(name: str) -> list[str]:
    """Return the settings, three at most, whose names a user may have meant by one that there is not.

    A name misspelt in one part is found by that part, one given without its section, or in another one, by its last.
    """
    *parents, last = name.split(".")
    kind: Any = Settings
    for depth, key in enumerate([*parents, last]):
        inner = descend(kind, key)
        if inner is None:
            fields = [one for option in options(kind) for one in _fields(option)]
            close = difflib.get_close_matches(key, fields, n=3)
            rest = [*parents, last][depth + 1 :]
            named = [".".join([*parents[:depth], one, *rest]) for one in close]
            found = [one for one in named if kind_at(one) is not None]
            if found:
                return found
            break
        kind = inner
    same = [one for one in all_names() if one.rpartition(".")[2] == last and ANY not in one]
    return same[:3] or difflib.get_close_matches(name, all_names(), n=3, cutoff=0.75)


def _fields(option: Any) -> list[str]:
    base, _ = bare(option)
    return list(kinds(base)) if dataclasses.is_dataclass(base) else []


def _default(field: Any) -> str | None:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return None
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
