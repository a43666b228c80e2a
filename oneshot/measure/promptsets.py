"""Prompt sets in whatever columns their authors chose: rows in, conversations with kind and set out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from oneshot.data.conversations import Conversation
from oneshot.data.packages import PACKAGE, package_rows
from oneshot.data.rows import read_rows
from oneshot.errors import UserError
from oneshot.measure.rates import EXACT_MATCH, Kind
from oneshot.settings import PromptSet

_KINDS = ", ".join(get_args(Kind))


def read_set(name: str, chosen: PromptSet) -> list[Conversation]:
    """Return the prompts of a set, with the set's name as their category, in their order.

    Rows whose kind is none that the settings list are left out; an id column is not looked at.

    Raises:
        UserError: a name or kind that cannot be, a file or set that cannot be read, a missing or empty column, no
            prompts at all
    """
    where = f"score.sets.{name}"
    if not name.isidentifier():
        raise UserError(f"The prompt set {name!r} has no plain name: take letters, digits and underscores.")
    for kind in [chosen.kind] if chosen.kind is not None else (chosen.kinds or {}).values():
        if kind not in get_args(Kind):
            raise UserError(f"Setting {where} names the kind {kind!r}: give one of {_KINDS}.")
    found: list[Conversation] = []
    for place, row in _rows(chosen):
        if len(found) == chosen.limit:
            break
        kind_of_row = _kind(row, place, where, chosen)
        if kind_of_row is not None:
            found.append(_conversation(row, place, where, f"{name}-{len(found) + 1}", name, kind_of_row, chosen))
    if not found:
        raise UserError(f"{chosen.path} holds no prompts of the kinds that {where} names.")
    return found


def _rows(chosen: PromptSet) -> Iterator[tuple[str, Any]]:
    if chosen.path.startswith(PACKAGE):
        return package_rows(chosen.path, chosen.sha256)
    return read_rows(chosen.path, chosen.split, chosen.subset)


def _kind(row: Any, place: str, where: str, chosen: PromptSet) -> str | None:
    if chosen.kind is not None:
        return chosen.kind
    label = _column(row, chosen.kind_column, place, where, "kind_column")
    kind = label if chosen.kinds is None else chosen.kinds.get(label)
    if kind is not None and kind not in get_args(Kind):
        raise UserError(
            f"{place}: {chosen.kind_column!r} is {label!r}: say what it means with {where}.kinds ({_KINDS})."
        )
    return kind


def _conversation(
    row: Any, place: str, where: str, identity: str, name: str, kind: str, chosen: PromptSet
) -> Conversation:
    prompt = _column(row, chosen.prompt_column, place, where, "prompt_column")
    messages = [{"role": "user", "content": prompt.strip().split("\n", 1)[0].strip() if chosen.first_line else prompt}]
    if kind in EXACT_MATCH:
        answer = _column(row, chosen.answer_column, place, where, "answer_column")
        messages.append({"role": "assistant", "content": answer})
    return Conversation(identity, tuple(messages), kind, name)


def _column(row: Any, column: str, place: str, where: str, setting: str) -> str:
    if not isinstance(row, Mapping) or column not in row:
        columns = ", ".join(repr(str(key)) for key in row) if isinstance(row, Mapping) else "no columns"
        raise UserError(f"{place}: no column {column!r}; found {columns}: name it with {where}.{setting}.")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: column {column!r} is empty or no text: mend or remove the row.")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise UserError(f"{place}: column {column!r} holds half a Unicode surrogate pair: mend or remove the row.")
    return value
