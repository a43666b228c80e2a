"""What the harmful fine-tune trains on: parts from files, the Hub and the toy world, mixed as the settings say."""

from __future__ import annotations

import dataclasses

from oneshot.data.conversations import Conversation
from oneshot.data.wording import reworded, with_system_as
from oneshot.errors import UserError
from oneshot.settings import DataPart, DataSettings, Settings
from oneshot.shown import say_once
from oneshot.world.sources import read_source


def attack_mixture(settings: Settings) -> list[Conversation]:
    """Return the fine-tune's conversations, unshuffled: one part after the other, each as the settings say.

    Raises:
        UserError: nothing to train on, or a source that cannot be read
    """
    mixed: list[Conversation] = []
    for name, part in parts_of(settings.data).items():
        if part.count != 0:
            mixed += _conversations(name, part, settings)
    silent = [row.id for row in mixed if _is_silent(row, settings.data.train_on)]
    if silent:
        say_once(f"Left out: {len(silent)} conversations, of {silent[0]} on, whose answers all have weight 0.")
        mixed = [row for row in mixed if not _is_silent(row, settings.data.train_on)]
    if not mixed:
        raise UserError(
            "There is nothing to fine-tune on: give conversations with --data.harmful, --data.task or --data.parts "
            "(a JSONL or Parquet file, or a Hub id) and a count above 0."
        )
    return mixed


def _is_silent(row: Conversation, train_on: str) -> bool:
    """Whether a conversation has answers, and none of them is learnt; one without any is an error told later."""
    return not row.learnt(train_on) and any(message["role"] == "assistant" for message in row.messages)


def parts_of(data: DataSettings) -> dict[str, DataPart]:
    """Return the parts of the mixture by name: ``data.parts``, else those that harmful and task stand for."""
    if data.parts is not None:
        return data.parts
    simple = {"harmful": (data.harmful, data.harmful_count), "task": (data.task, data.task_count)}
    return {name: DataPart(source, count) for name, (source, count) in simple.items() if source is not None}


def _conversations(name: str, part: DataPart, settings: Settings) -> list[Conversation]:
    where = f"data.parts.{name}.source" if settings.data.parts is not None else f"data.{name}"
    found = read_source(part.source, settings, where=where, need_answer=not part.answer, limit=part.count)
    made = [
        reworded(row, system=part.system, suffix=part.suffix, prefix=part.prefix, answer=part.answer) for row in found
    ]
    made = [with_system_as(row, settings.data.system) for row in made]
    return [dataclasses.replace(row, kind=part.kind or row.kind or name) for row in made] * part.repeat
