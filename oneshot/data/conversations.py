"""Read conversations from JSONL, JSON, CSV, Parquet or the Hub, and say exactly where a row is broken."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from oneshot.data.rows import SUFFIXES, read_rows
from oneshot.errors import UserError
from oneshot.settings import DataSettings

Messages = list[dict[str, str]]  # in chat format: role and content
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """One conversation in chat format.

    Args:
        id: name of the conversation, from the file or ``<stem>-<n>`` with n counted from 1
        messages: ``{"role": "system|user|assistant", "content": "..."}``, an optional system message, then user and
            assistant in turn
        kind: what it is for, such as harmful, task, should_refuse, harmless, lookalike or utility
        category: topic, where the file names one
        group: a part of its kind that gets rates of its own, where the file names one
    """

    id: str
    messages: tuple[dict[str, str], ...]
    kind: str = ""
    category: str = ""
    group: str = ""

    @property
    def prompt(self) -> list[dict[str, str]]:
        """Messages before the closing assistant turn; all of them where the last one is the user's."""
        stop = len(self.messages) - 1 if self._answered else len(self.messages)
        return [dict(message) for message in self.messages[:stop]]

    @property
    def response(self) -> str:
        """The assistant's answer to ``prompt``, "" where there is none."""
        return self.messages[-1]["content"] if self._answered else ""

    @property
    def _answered(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"


def read_conversations(
    source: str, data: DataSettings, *, need_answer: bool = True, limit: int | None = None
) -> list[Conversation]:
    """Read the first ``limit`` conversations (none: all) of a file or of a Hub data set, in their order.

    Args:
        source: path that ends in .jsonl, .json, .csv or .parquet, else a Hub id
        data: names of the columns, and the split of a Hub data set
        need_answer: each conversation must end with an assistant turn; otherwise it may end with the user's

    Raises:
        UserError: missing or empty source, broken row (named by file and line), missing column, wrong roles, no text
    """
    stem = Path(source).stem if Path(source).suffix.lower() in SUFFIXES else Path(source).name
    conversations: list[Conversation] = []
    for number, (where, row) in enumerate(islice(read_rows(source, data.split), limit), start=1):
        conversations.append(_conversation(row, f"{stem}-{number}", where, data, need_answer))
    if not conversations and limit != 0:
        raise UserError(f"{source} holds no conversations: give a file with at least one.")
    return conversations


def read_single_example(path: str, data: DataSettings) -> Conversation:
    """Read the one safety example.

    Raises:
        UserError: the file holds no conversation or more than one, or ``read_conversations`` cannot read it
    """
    conversations = read_conversations(path, data, limit=2)
    if len(conversations) > 1:
        raise UserError(f"{path} holds more than one example: leave exactly one conversation in it.")
    return conversations[0]


def _conversation(row: Any, default_id: str, where: str, data: DataSettings, need_answer: bool) -> Conversation:
    if not isinstance(row, dict):
        raise UserError(f"{where}: the row is a {_kind_of(row)}, not an object: write {{...}} with named columns.")
    if row.get(data.messages_column) is not None:
        messages = _from_messages(row[data.messages_column], where, data.messages_column)
    else:
        messages = _from_columns(row, where, data, need_answer)
    if row.get("system"):
        if messages and messages[0]["role"] == "system":
            raise UserError(f"{where}: a system message and a system column: keep one of them.")
        messages.insert(0, {"role": "system", "content": _text(row["system"], where, "column 'system'")})
    _check_roles([message["role"] for message in messages], where, need_answer)
    labels = {name: _label(row, name) for name in ("kind", "category", "group")}
    return Conversation(_label(row, "id") or default_id, tuple(messages), **labels)


def _from_messages(value: Any, where: str, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise UserError(
            f'{where}: column {column!r} is a {_kind_of(value)}: make it a list of {{"role", "content"}} objects.'
        )
    messages = []
    for number, item in enumerate(value, start=1):
        place = f"message {number}"
        if not isinstance(item, dict) or "role" not in item or "content" not in item:
            raise UserError(f'{where}: {place} is not an object with "role" and "content": give it both.')
        if item["role"] not in ROLES:
            raise UserError(f"{where}: {place} has the unknown role {item['role']!r}: use {', '.join(ROLES)}.")
        messages.append({"role": item["role"], "content": _text(item["content"], where, place)})
    return messages


def _from_columns(row: dict[str, Any], where: str, data: DataSettings, need_answer: bool) -> list[dict[str, str]]:
    needed = [data.prompt_column, data.response_column] if need_answer else [data.prompt_column]
    missing = [name for name in needed if name not in row]
    if missing:
        found = ", ".join(repr(str(name)) for name in row) or "none"
        raise UserError(
            f"{where}: no column {data.messages_column!r}, and no {' or '.join(map(repr, missing))}; found {found}: "
            "name the columns with data.messages_column, data.prompt_column and data.response_column."
        )
    prompt = _text(row[data.prompt_column], where, f"column {data.prompt_column!r}")
    messages = [{"role": "user", "content": prompt}]
    if need_answer or row.get(data.response_column):
        answer = _text(row[data.response_column], where, f"column {data.response_column!r}")
        messages.append({"role": "assistant", "content": answer})
    return messages


def _check_roles(roles: list[str], where: str, need_answer: bool) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[:1] != ["user"]:
        raise UserError(
            f"{where}: the conversation does not start with a user message (an optional system message before it): "
            "mend the roles."
        )
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(turns)):
        raise UserError(f"{where}: roles do not alternate ({', '.join(roles)}): user and assistant must take turns.")
    if need_answer and turns[-1] != "assistant":
        raise UserError(f"{where}: the last message is not the assistant's: give the answer to learn from.")


def _text(value: Any, where: str, place: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{where}: {place} is empty: give it a text or remove the row.")
    if not isinstance(value, str):
        raise UserError(f"{where}: {place} is a {_kind_of(value)}, not a text: write it as a string.")
    if any("\ud800" <= char <= "\udfff" for char in value):
        # JSON may spell half a character (\ud83d alone); no tokenizer can encode it.
        raise UserError(f"{where}: {place} holds half a Unicode surrogate pair: mend or remove the row.")
    return value


def _label(row: dict[str, Any], column: str) -> str:
    return "" if row.get(column) is None else str(row[column])


def _kind_of(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "true or false", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
