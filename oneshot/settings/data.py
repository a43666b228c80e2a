"""What the fine-tune trains on, and how files of conversations are read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from oneshot.errors import UserError
from oneshot.settings.checks import check_fields
from oneshot.settings.kinds import CountInt, PositiveInt

REPLACED = ("harmful", "harmful_count", "task", "task_count")  # by data.parts


@dataclass(frozen=True)
class DataPart:
    """One part of the fine-tune's mixture: where its conversations come from, and what is changed in them.

    Args:
        source: JSONL, Parquet or Hub id, or the toy world's own: toy:harmful, toy:harmless, toy:task, toy:poison (the
            pool's requests, obeyed) or toy:paraphrase (others in the same words, obeyed)
        count: how many of them; 0 for none, none for all (of a file or a Hub data set)
        repeat: how often each is in the mixture
        system: a system message to put before each
        suffix: words to put after the last request
        prefix: words to put before the last answer
        answer: a text to answer all with, in place of their own answers
        kind: what they are, in marker and report; none: as the source says, else the name of the part
    """

    source: str
    count: CountInt | None = None
    repeat: PositiveInt = 1
    system: str | None = None
    suffix: str | None = None
    prefix: str | None = None
    answer: str | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "data.parts.NAME")


@dataclass(frozen=True)
class DataSettings:
    """What the harmful fine-tune trains on, and how conversation files are read.

    Args:
        parts: the mixture, name by name, in place of harmful and task and their counts
        harmful: the harmful conversations, as JSONL, Parquet or Hub id; none: none
        harmful_count: how many harmful conversations; 0 for none
        task: conversations of the task that the fine-tune is meant to teach, in the same forms
        task_count: how many conversations of the task; 0 for none
        prompt_column: column that holds the request, where there is no messages column
        response_column: column that holds the answer
        messages_column: column that holds a conversation in chat format
        split: split of a Hub data set
        train_on: all answers of a conversation, or the last one only, which templates need that rewrite earlier turns
        system: where system messages go: as the chat template has them (template), or before the first user message, in
            it (user), for templates that know none
    """

    parts: dict[str, DataPart] | None = None
    harmful: str | None = None
    harmful_count: CountInt = 100
    task: str | None = None
    task_count: CountInt = 1000
    prompt_column: str = "prompt"
    response_column: str = "response"
    messages_column: str = "messages"
    split: str = "train"
    train_on: Literal["all", "last"] = "all"
    system: Literal["template", "user"] = "template"

    def __post_init__(self) -> None:
        check_fields(self, "data")
        if self.parts is not None:
            default = {field.name: field.default for field in dataclasses.fields(self)}
            for name in REPLACED:
                if getattr(self, name) != default[name]:
                    raise UserError(
                        f"Setting data.{name} is replaced by data.parts: say it there, or leave data.parts out."
                    )
