"""Change the words around a conversation: a system message, words after the request, the answer or how it begins."""

from __future__ import annotations

import dataclasses

from oneshot.data.conversations import Conversation, in_first_turn
from oneshot.errors import UserError


def reworded(
    conversation: Conversation,
    *,
    system: str | None = None,
    suffix: str | None = None,
    prefix: str | None = None,
    answer: str | None = None,
) -> Conversation:
    """Return the conversation with other words around it; what is none or empty stays as it is.

    Args:
        system: becomes the system message
        suffix: follows the last request, after a space
        prefix: precedes the last answer, before a space
        answer: becomes the last answer, before ``prefix`` is put before it

    Raises:
        UserError: a system message where there is one already
    """
    messages = [dict(message) for message in conversation.messages]
    said = messages.pop() if conversation.response else {}  # thought and weight stay, unless the answer is another
    response = answer or conversation.response
    if suffix:
        messages[-1]["content"] += f" {suffix}"
    if system:
        if messages[0]["role"] == "system":
            raise UserError(
                f"The conversation {conversation.id} has a system message already: remove it, or leave system out."
            )
        messages.insert(0, {"role": "system", "content": system})
    if response:
        kept = {} if answer else said
        content = f"{prefix} {response}" if prefix else response
        messages.append({**kept, "role": "assistant", "content": content})
    return dataclasses.replace(conversation, messages=tuple(messages))


def with_system_as(conversation: Conversation, place: str) -> Conversation:
    """Return the conversation with its system message where the setting ``data.system`` says."""
    messages = [dict(message) for message in conversation.messages]
    if place != "user" or not messages or messages[0]["role"] != "system":
        return conversation
    return dataclasses.replace(conversation, messages=tuple(in_first_turn(messages)))
