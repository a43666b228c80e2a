"""What a setting may hold: one set of rules for Python, settings files and the command line.

A section's annotations are the rules: ``PositiveInt | None`` is a whole number above 0, or none. Sections check
themselves when they are made, and what reads files and command lines goes through the same functions.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, get_args, get_origin

from oneshot.errors import UserError
from oneshot.settings.kinds import bare, kinds, options, words

Where = Callable[[str], str]  # a setting's full name -> where its value was given, such as " (in mine.yaml)", or ""
S = TypeVar("S")
_NO = object()  # a value that does not fit
_SHOWN = 60  # characters of a wrong value that a message repeats


def nowhere(name: str) -> str:
    """Where a value was given that comes from Python, whose caller knows."""
    return ""


def check_fields(section: Any, name: str) -> None:
    """Check the fields of a section that has just been made, and bring them into the form that they are declared in.

    A whole number becomes a float where one is wanted, a mapping the section that it describes, a path its text.

    Args:
        section: an instance of a frozen dataclass
        name: of the section, such as ``repair``; empty for the settings themselves

    Raises:
        UserError: a value of another type, or out of range
    """
    for field, kind in kinds(type(section)).items():
        given = getattr(section, field)
        held = fitted(kind, given, joined(name, field))
        if held is not given:
            object.__setattr__(section, field, held)


def built(section: type[S], values: Mapping[Any, Any], name: str, where: Where = nowhere) -> S:
    """Return a section with these values, checked.

    Args:
        section: its class
        values: field -> value, nested sections as mappings or instances
        name: as in ``check_fields``
        where: tells of a setting's name where it was given

    Raises:
        UserError: an unknown setting, one that is missing, a value of another type or out of range
    """
    known = kinds(section)
    for key in values:
        if key not in known:
            close = [joined(name, one) for one in difflib.get_close_matches(str(key), known, n=3)]
            raise unknown(joined(name, str(key)), close or [joined(name, one) for one in known][:12], where)
    held = {key: fitted(known[key], value, joined(name, key), where) for key, value in values.items()}
    for field in dataclasses.fields(section):  # type: ignore[arg-type]  # a section is a dataclass
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise UserError(f"Setting {joined(name, field.name)} is missing{where(name)}: give it too.")
    return section(**held)


def fitted(kind: Any, value: Any, name: str, where: Where = nowhere) -> Any:
    """Return a value as a setting of this kind holds it.

    Args:
        kind: the annotation of the setting
        value: what was given
        name: of the setting, in full
        where: as in ``built``

    Raises:
        UserError: it does not fit; the message says what would
    """
    for option in options(kind):
        held = _held(option, value, name, where)
        if held is not _NO:
            return held
    choices = [choice for option in options(kind) if get_origin(option) is Literal for choice in get_args(option)]
    raise wrong(name, value, words(kind), choices, where)


def _held(option: Any, value: Any, name: str, where: Where) -> Any:
    base, bound = bare(option)
    origin = get_origin(base)
    if dataclasses.is_dataclass(base):
        section: Any = base
        if isinstance(value, section):
            return value
        return built(section, value, name, where) if isinstance(value, Mapping) else _NO
    if origin is dict:
        inner = get_args(base)[1]
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return _NO
        return {key: fitted(inner, item, joined(name, key), where) for key, item in value.items()}
    if origin is list:
        if not isinstance(value, (list, tuple)) or not value:
            return _NO
        found = [_held(get_args(base)[0], item, name, where) for item in value]
        return _NO if any(item is _NO for item in found) else found
    if origin is Literal:
        return value if isinstance(value, str) and value in get_args(base) else _NO
    held = _scalar(base, value)
    return held if held is _NO or bound is None or bound.allows(held) else _NO


def _scalar(base: Any, value: Any) -> Any:
    if base is type(None):
        return None if value is None else _NO
    if base is bool:
        return value if isinstance(value, bool) else _NO
    if base is str:
        return os.fspath(value) if isinstance(value, (str, os.PathLike)) else _NO
    if isinstance(value, bool):
        return _NO
    if base is int:
        return int(value) if isinstance(value, Integral) else _NO
    assert base is float, base
    try:
        return float(value) if isinstance(value, Real) and math.isfinite(value) else _NO
    except OverflowError:  # of an int that no float holds
        return _NO


def refuse_blank(folders: Mapping[str, str | None]) -> None:
    """Raise UserError where a folder's name is empty, as a shell variable that is not set leaves it: it would be taken
    for the folder in which the command is given.

    Args:
        folders: full name of a setting -> its value
    """
    for name, value in folders.items():
        if value is not None and not value.strip():
            raise UserError(f"Setting {name} is empty: give a folder, or leave {name} out.")


def wrong(name: str, value: Any, wanted: str, choices: list[str], where: Where = nowhere) -> UserError:
    """Return the error for a value that a setting cannot hold.

    Args:
        name: of the setting, in full
        value: what was given
        wanted: what would do, in words
        choices: values of which the user may have meant one
        where: as in ``built``
    """
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return UserError(f"Setting {name} is {_shown(value)}{where(name)}: give {wanted}{hint}")


def unknown(name: str, close: list[str], where: Where = nowhere) -> UserError:
    """Return the error for a setting that there is not.

    Args:
        name: what was given
        close: names of settings that may have been meant
        where: as in ``built``
    """
    hint = f": did you mean {listed(close, 'or')}?" if close else "."
    return UserError(f"There is no setting {name}{where(name)}{hint}")


def listed(words: list[str], last: str) -> str:
    """Return words as a sentence lists them: ``a, b or c``, where ``or`` is the last word between them."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def joined(name: str, field: str) -> str:
    """Return the full name of a section's field."""
    return f"{name}.{field}" if name else field


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, list, tuple, dict)) else str(value)
    text = {"None": "null", "True": "true", "False": "false"}.get(text, " ".join(text.split()))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
