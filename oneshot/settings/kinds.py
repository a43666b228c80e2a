"""The kinds of values that settings hold, as annotations, and how they are called when people are told of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Bound:
    """Where a number's range begins.

    Args:
        least: the least value
        above: the number must be above it
    """

    least: float
    above: bool

    def allows(self, value: float) -> bool:
        """Whether a number is in the range."""
        return value > self.least if self.above else value >= self.least


PositiveInt = Annotated[int, Bound(0, above=True)]
PositiveFloat = Annotated[float, Bound(0, above=True)]
CountInt = Annotated[int, Bound(0, above=False)]
CountFloat = Annotated[float, Bound(0, above=False)]


def kinds(section: Any) -> Mapping[str, Any]:
    """Return the annotations of a section's fields by name."""
    return _kinds(section)


@lru_cache
def _kinds(section: Any) -> Mapping[str, Any]:
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def options(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the kind alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def bare(kind: Any) -> tuple[Any, Bound | None]:
    """Return an annotation's type and its bound, if it has one."""
    if get_origin(kind) is Annotated:
        base, bound = get_args(kind)
        return base, bound
    return kind, None


def words(kind: Any) -> str:
    """Return in plain words what a setting of this kind may hold: ``a whole number above 0, or null``."""
    said = " or ".join(_words(option) for option in options(kind) if option is not type(None))
    return f"{said}, or null" if type(None) in options(kind) else said


def _words(kind: Any) -> str:
    base, bound = bare(kind)
    origin, inner = get_origin(base), get_args(base)
    if base in (int, float):
        limit = "" if bound is None else f" above {bound.least:g}" if bound.above else f" of {bound.least:g} or more"
        return ("a whole number" if base is int else "a number") + limit
    if origin is Literal:
        return inner[0] if len(inner) == 1 else f"one of {', '.join(inner)}"
    if origin is list:
        return f"a list such as [1, 2], each {_words(inner[0])}"
    if origin is dict:
        return _words_by_name(inner[1])
    if dataclasses.is_dataclass(base):
        return "settings by name, such as {" + next(iter(kinds(base))) + ": ...}"
    return {bool: "true or false", str: "text"}[base]


def _words_by_name(inner: Any) -> str:
    base, _ = bare(inner)
    if base is float:
        return "one by method, such as {lora: 1.0e-3}"
    if base is str:
        return "texts by name, such as {NAME: TEXT}"
    return "settings by name, such as {NAME: {" + next(iter(kinds(base))) + ": TEXT}}"


def descend(kind: Any, key: str) -> Any:
    """Return the kind of what stands under a key of a setting of this kind; none where nothing can."""
    for option in options(kind):
        base, _ = bare(option)
        if dataclasses.is_dataclass(base) and key in kinds(base):
            return kinds(base)[key]
        if get_origin(base) is dict:
            return get_args(base)[1]
    return None


def docs(section: Any) -> dict[str, str]:
    """Return what a section's docstring says of its fields, by name, each in one line."""
    found: dict[str, str] = {}
    name = ""
    _, _, arguments = (inspect.getdoc(section) or "").partition("Args:\n")
    for line in arguments.splitlines():
        begun = re.match(r" {4}(\w+): (.*)", line)
        if begun:
            name = begun[1]
            found[name] = begun[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found


def summary(section: Any) -> str:
    """Return the first line of a section's docstring."""
    return (inspect.getdoc(section) or "").partition("\n")[0]
