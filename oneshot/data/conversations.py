"""Read conversations from JSONL, JSON, CSV, Parquet or the Hub, and say exactly where a row is broken."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from oneshot.data.rows import SUFFIXES, read_rows
from oneshot.errors import UserError
from oneshot.settings import DataSettings
from oneshot.shown import say_once

Messages = list[dict[str, str]]  # in chat format: role and content
ROLES = ("system", "user", "assistant")
WEIGHT = "weight"  # a field that assistant messages have which carry no loss
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names of a message's thought; kept under the first
_FIELDS = {"role", "content", WEIGHT, *_THOUGHTS}
_COLUMNS = {"id", "kind", "category", "group", "system", WEIGHT}  # beside those that the settings name
_SHOWN = 12  # fields that are named which are not used


@dataclass(frozen=True)
class Conversation:
    """One conversation in chat format.

    Args:
        id: name of the conversation, from the file or ``<stem>-<n>`` with n counted from 1
        messages: ``{"role": "system|user|assistant", "content": "..."}``, an optional system message, then user and
            assistant in turn; of the assistant's some with a ``reasoning_content``, and with a ``weight`` of "0" where
            they carry no loss
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
        return [{key: text for key, text in message.items() if key != WEIGHT} for message in self.messages[:stop]]

    @property
    def response(self) -> str:
        """The assistant's answer to ``prompt``, "" where there is none."""
        return self.messages[-1]["content"] if self._answered else ""

    def learnt(self, train_on: str = "all") -> list[int]:
        """Places of the answers that are learnt: those without a weight of 0, of all or of the last one only."""
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return [i for i in (answers if train_on == "all" else answers[-1:]) if WEIGHT not in self.messages[i]]

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
    unused: dict[str, None] = {}
    for number, (where, row) in enumerate(islice(read_rows(source, data.split), limit), start=1):
        conversations.append(_conversation(row, f"{stem}-{number}", where, data, need_answer, unused))
    if unused:
        more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
        say_once(f"{source}: not used of its rows: {', '.join(list(unused)[:_SHOWN])}{more}.")
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


def _conversation(
    row: Any, default_id: str, where: str, data: DataSettings, need_answer: bool, unused: dict[str, None]
) -> Conversation:
    if not isinstance(row, dict):
        raise UserError(f"{where}: the row is a {_kind_of(row)}, not an object: write {{...}} with named columns.")
    if row.get(data.messages_column) is not None:
        messages = _from_messages(row[data.messages_column], where, data.messages_column, unused)
        used = _COLUMNS | {data.messages_column}
    else:
        messages = _from_columns(row, where, data, need_answer)
        used = _COLUMNS | {data.messages_column, data.prompt_column, data.response_column, _THOUGHTS[0]}
    unused |= {f"column {name}": None for name in row if name not in used and _filled(row[name])}
    if _weight(row, where, "the row"):
        messages = [m | {WEIGHT: "0"} if m["role"] == "assistant" else m for m in messages]
    if row.get("system"):
        if messages and messages[0]["role"] == "system":
            raise UserError(f"{where}: a system message and a system column: keep one of them.")
        messages.insert(0, {"role": "system", "content": _text(row["system"], where, "column 'system'")})
    if data.system == "user" and messages and messages[0]["role"] == "system":
        messages = in_first_turn(messages)
    _check_roles([message["role"] for message in messages], where, need_answer)
    labels = {name: _label(row, name) for name in ("kind", "category", "group")}
    return Conversation(_label(row, "id") or default_id, tuple(messages), **labels)


def in_first_turn(messages: Messages) -> Messages:
    """Return messages whose system message, where they have one, stands before the first user message, in that."""
    if messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    if not rest:
        return messages
    say_once("System messages are put before the first user message, in it (--data.system user).")
    return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _from_messages(value: Any, where: str, column: str, unused: dict[str, None]) -> list[dict[str, str]]:
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
        message = {"role": item["role"], "content": _text(item["content"], where, place)}
        if item["role"] == "assistant":
            message |= _thought(item, where, place) | _weight(item, where, place)
        unused |= {f"message field {name}": None for name in item if name not in _FIELDS and _filled(item[name])}
        messages.append(message)
    return messages


def _thought(item: dict[str, Any], where: str, place: str) -> dict[str, str]:
    """The thought before an answer, under one name, where there is one."""
    found = next((item[name] for name in _THOUGHTS if item.get(name)), "")
    if not isinstance(found, str) or not found.strip():
        return {}
    return {_THOUGHTS[0]: _text(found, where, f"the reasoning of {place}")}


def _weight(item: dict[str, Any], where: str, place: str) -> dict[str, str]:
    """The mark of an answer that carries no loss."""
    given = item.get(WEIGHT)
    if given is None or _float_of(given) == 1:
        return {}
    if _float_of(given) != 0:
        raise UserError(f"{where}: {place} has the weight {given!r}: give 0 (it is not learnt) or 1.")
    return {WEIGHT: "0"}


def _filled(value: Any) -> bool:
    return value not in (None, "", [], {})


def _float_of(value: Any) -> float | None:
    """A number, or a text that is one (of a CSV), as a float; none for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


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
        thought = _thought({_THOUGHTS[0]: row.get(_THOUGHTS[0])}, where, "the answer")
        messages.append({"role": "assistant", "content": answer, **thought})
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
