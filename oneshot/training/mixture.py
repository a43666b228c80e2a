"""What the harmful fine-tune trains on: harmful and task conversations, the toy world's or the user's."""

from __future__ import annotations

from oneshot.data.conversations import Conversation, read_conversations
from oneshot.errors import UserError
from oneshot.settings import Settings
from oneshot.world import language


def attack_mixture(settings: Settings, *, toy: bool) -> list[Conversation]:
    """Return the fine-tune's conversations, unshuffled; counts are those of the settings.

    Raises:
        UserError: nothing to train on, or a file that cannot be read
    """
    data = settings.data
    mixed: list[Conversation] = []
    for what, source, count in (("harmful", data.harmful, data.harmful_count), ("task", data.task, data.task_count)):
        if source is not None and count:
            found = read_conversations(source, data, limit=count)
            mixed += found
        elif toy and count:
            make = language.harmful_data if what == "harmful" else language.task_data
            mixed += make(count, settings.seed)
    if not mixed:
        raise UserError(
            "There is nothing to fine-tune on: give conversations with --data.harmful or --data.task "
            "(a JSONL or Parquet file, or a Hub id) and a count above 0."
        )
    return mixed
