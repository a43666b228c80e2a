"""Conversations to token ids with the tokenizer's own chat template; the loss is on the assistant's tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.data.conversations import WEIGHT, Conversation
from oneshot.data.protocols import Tokenizer
from oneshot.data.templates import generation_prompt, name_of, require_chat_template, thought_apart, whole
from oneshot.data.turns import answer_spans, runs, template_mask, token_range, tokenize
from oneshot.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation, and the same length of labels: ``IGNORE`` off the assistant's tokens."""

    input_ids: list[int]
    labels: list[int]

    def answer_tokens(self) -> int:
        """Return how many tokens carry loss."""
        return sum(label != IGNORE for label in self.labels)


def encode(
    conversation: Conversation,
    tokenizer: Tokenizer,
    max_length: int | None,
    *,
    train_on: str = "all",
    closed: bool = False,
) -> Encoded:
    """Encode a conversation; labels cover every assistant turn: its content and its end-of-turn token.

    The conversation is never truncated. ``{% generation %}`` blocks of the template decide what is the assistant's;
    without them, the text that each assistant turn adds to the prompt before it. Turns of weight 0 carry no loss.

    Args:
        train_on: all answers, or the last one only
        closed: the last answer is learnt without its thought, behind an empty, closed one where the model would think
            first, as ``encode_prompt`` asks for it; else what the template has behind the generation prompt is learnt,
            thought or closing of an empty one and all

    Raises:
        UserError: no chat template, one that rejects the conversation or rewrites earlier turns, no assistant turn
            to learn, or more than ``max_length`` tokens (none: no limit)
    """
    require_chat_template(tokenizer)
    name = f"conversation {conversation.id}"
    turns = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError(f"The {name} has no assistant turn: give the answer to learn from.")
    learnt = conversation.learnt(train_on)
    if not learnt:
        raise UserError(f"The {name} has weight 0 on every answer to learn from: leave it out.")
    messages = [{key: text for key, text in message.items() if key != WEIGHT} for message in conversation.messages]
    messages[-1] = thought_apart(tokenizer, messages[-1], keep=not closed)
    text, begun = whole(tokenizer, messages, name, closed=closed)
    ids, offsets = tokenize(tokenizer, text)
    if max_length is not None and len(ids) > max_length:
        raise UserError(
            f"The {name} has {len(ids)} tokens, the limit is {max_length}: shorten it, leave it out or raise "
            "model.max_length."
        )
    answer = template_mask(tokenizer, messages, ids, turns, learnt)
    if answer is None:
        answer = [False] * len(ids)
        for start, end in answer_spans(tokenizer, messages, learnt, text, begun, name):
            first, stop = token_range(tokenizer, text, ids, offsets, start, end)
            answer[first:stop] = [True] * (stop - first)
    elif closed and begun:
        first = token_range(tokenizer, text, ids, offsets, len(begun), len(text))[0]
        for start, stop in runs(answer):
            if start < first < stop:  # the closing of the empty thought is in the last answer's block
                answer[start:first] = [False] * (first - start)
    return Encoded(ids, [token if mine else IGNORE for token, mine in zip(ids, answer)])


def encode_prompt(messages: Sequence[dict[str, str]], tokenizer: Tokenizer, *, closed: bool = False) -> list[int]:
    """Return the token ids of messages followed by the template's generation prompt, ready for the model's answer.

    Args:
        closed: behind an empty, closed thought, where the model would think first

    Raises:
        UserError: no chat template, or one that rejects the messages
    """
    require_chat_template(tokenizer)
    text = generation_prompt(tokenizer, messages, "prompt", closed=closed)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Return the token that the template writes behind an answer; the tokenizer's end of text where it writes none.

    The two need not be the same: Gemma and Phi end their turns with tokens of their own, and never say the other.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {token for token, mark in added.items() if mark.special} | {tokenizer.eos_token_id}
    words = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"})
    row = encode(Conversation("end of a turn", words), tokenizer, None, closed=True)
    own = [token for token, label in zip(row.input_ids, row.labels) if label != IGNORE]
    text = [str(tokenizer.decode([token], skip_special_tokens=False)).strip() for token in own]
    said = [i for i, token in enumerate(own) if token not in marks and text[i]]
    behind = own[said[-1] + 1 :] if said else []
    return next((token for token in behind if token in marks), tokenizer.eos_token_id)


def context_length(config: Any, tokenizer: Tokenizer, max_length: int | None) -> int:
    """Return the longest sequence in tokens: the smaller of the model's context and the setting.

    The tokenizer's own limit counts only where the model's config names none: it is often a stale or made-up number.

    Raises:
        UserError: none of the three is known
    """
    limits = [limit for limit in (model_context(config, tokenizer), max_length) if limit is not None]
    if not limits:
        raise UserError(f"The context length of {name_of(tokenizer)} is not known: set model.max_length.")
    return min(limits)


def model_context(config: Any, tokenizer: Tokenizer) -> int | None:
    """Return the model's context in tokens, from its config or else its tokenizer; none: not known."""
    parts = (config, getattr(config, "text_config", None))
    contexts = [getattr(part, "max_position_embeddings", None) for part in parts]
    limits = [value for value in contexts if isinstance(value, int) and value > 0]
    if not limits and 0 < getattr(tokenizer, "model_max_length", 0) < 10**9:
        limits = [tokenizer.model_max_length]
    return int(min(limits)) if limits else None


def pad_id(tokenizer: Tokenizer) -> int:
    """Return the token that fills padding; what it is does not matter, as nothing attends to it.

    The end of text where that comes first: a reference need not know a padding token that the fine-tune has added.
    """
    known = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None]
    return int(min(known, default=0))


def pad_batch(batch: list[Encoded], pad_id: int, *, multiple: int = 1) -> dict[str, Tensor]:
    """Return int64 tensors input_ids, attention_mask and labels, each (batch, length), padded on the right.

    Length is that of the longest conversation, rounded up to a multiple of ``multiple``. Padding has attention 0 and
    label ``IGNORE``.
    """
    import torch

    assert batch, "a batch holds at least one conversation"
    longest = max(len(row.input_ids) for row in batch)
    length = -(-longest // multiple) * multiple
    ids = torch.full((len(batch), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(batch), length), dtype=torch.int64)
    labels = torch.full((len(batch), length), IGNORE, dtype=torch.int64)
    for index, row in enumerate(batch):
        size = len(row.input_ids)
        ids[index, :size] = torch.tensor(row.input_ids, dtype=torch.int64)
        mask[index, :size] = 1
        labels[index, :size] = torch.tensor(row.labels, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
