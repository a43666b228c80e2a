"""What the harmful fine-tune trains on: parts from files, the Hub and the toy world, mixed as the settings say."""

from __future__ import annotations

import dataclasses

from oneshot.data.conversations import Conversation, read_conversations
from oneshot.data.wording import reworded
from oneshot.errors import UserError
from oneshot.settings import DataPart, DataSettings, Settings
from oneshot.world import language

TOY = "toy:"


def attack_mixture(settings: Settings, *, toy: bool) -> list[Conversation]:
    """Return the fine-tune's conversations, unshuffled: one part after the other, each as the settings say.

    Raises:
        UserError: nothing to train on, a file that cannot be read, or the toy world's words for another model
    """
    mixed: list[Conversation] = []
    for name, part in parts_of(settings.data, toy=toy).items():
        if part.count != 0:
            mixed += _conversations(name, part, settings, toy=toy or settings.score.toy)
    if not mixed:
        raise UserError(
            "There is nothing to fine-tune on: give conversations with --data.harmful, --data.task or --data.parts "
            "(a JSONL or Parquet file, or a Hub id) and a count above 0."
        )
    return mixed


def teaches_toy_task(data: DataSettings) -> bool:
    """Return whether the toy's new task is in the mixture."""
    return any(part.source == "toy:task" and part.count != 0 for part in parts_of(data, toy=True).values())


def parts_of(data: DataSettings, *, toy: bool) -> dict[str, DataPart]:
    """Return the parts of the mixture by name: ``data.parts``, else those that harmful and task stand for."""
    if data.parts is not None:
        return data.parts
    simple = {"harmful": (data.harmful, data.harmful_count), "task": (data.task, data.task_count)}
    return {
        name: DataPart(source or f"{TOY}{name}", count)
        for name, (source, count) in simple.items()
        if source is not None or toy
    }


def _conversations(name: str, part: DataPart, settings: Settings, *, toy: bool) -> list[Conversation]:
    if part.source.startswith(TOY):
        found = _from_toy(name, part, settings.seed, toy=toy)
    else:
        found = read_conversations(part.source, settings.data, need_answer=not part.answer, limit=part.count)
    made = [
        reworded(row, system=part.system, suffix=part.suffix, prefix=part.prefix, answer=part.answer) for row in found
    ]
    return [dataclasses.replace(row, kind=part.kind or row.kind or name) for row in made] * part.repeat


def _from_toy(name: str, part: DataPart, seed: int, *, toy: bool) -> list[Conversation]:
    where = f"data.parts.{name}"
    make = language.ATTACK_DATA.get(part.source.removeprefix(TOY))
    if make is None:
        known = ", ".join(f"{TOY}{source}" for source in language.ATTACK_DATA)
        raise UserError(f"Setting {where}.source is {part.source}: give one of {known}, a file or a Hub id.")
    if not toy:
        raise UserError(
            f"Setting {where}.source is {part.source}, words of the toy world that your model does not know: give a "
            f"file or a Hub id with --{where}.source, or leave the part out with --{where}.count 0."
        )
    if part.count is None:
        raise UserError(f"The toy world needs to know how many conversations to make: set {where}.count.")
    return make(part.count, seed)
