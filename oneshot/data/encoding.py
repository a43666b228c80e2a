"""Conversations to token ids with the tokenizer's own chat template; the loss is on the assistant's tokens only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.data.conversations import Conversation
from oneshot.data.protocols import Tokenizer
from oneshot.errors import UserError
from oneshot.reading import limited

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100
# What rendering a conversation may take, and how much longer than the conversation the text may be. Templates of known
# models take milliseconds, and add a system message and some markers to each turn.
_TEMPLATE_SECONDS, _TEMPLATE_MEMORY = 5.0, 1 << 30
_TEMPLATE_ADDS, _TEMPLATE_TIMES = 1_000_000, 10
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation, and the same length of labels: ``IGNORE`` off the assistant's tokens."""

    input_ids: list[int]
    labels: list[int]

    def answer_tokens(self) -> int:
        """Return how many tokens carry loss."""
        return sum(label != IGNORE for label in self.labels)


def require_chat_template(tokenizer: Tokenizer) -> None:
    """Raise UserError where the tokenizer has no chat template (or several, none of them called default)."""
    template = getattr(tokenizer, "chat_template", None)
    if not template or (isinstance(template, dict) and not template.get("default")):
        raise UserError(
            f"Tokenizer {_name(tokenizer)} has no chat template: use an instruction-tuned checkpoint or put a "
            "chat_template.jinja into its folder."
        )


def encode(conversation: Conversation, tokenizer: Tokenizer, max_length: int | None) -> Encoded:
    """Encode a conversation; labels cover every assistant turn: its content and its end-of-turn token.

    The conversation is never truncated. ``{% generation %}`` blocks of the template decide what is the assistant's;
    without them, the text that each assistant turn adds to the prompt before it.

    Raises:
        UserError: no chat template, one that rejects the conversation or rewrites earlier turns, no assistant turn,
            or more than ``max_length`` tokens (none: no limit)
    """
    require_chat_template(tokenizer)
    messages = [dict(message) for message in conversation.messages]
    name = f"conversation {conversation.id}"
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError(f"The {name} has no assistant turn: give the answer to learn from.")
    text = _render(tokenizer, messages, name)
    ids, offsets = _tokenize(tokenizer, text)
    if max_length is not None and len(ids) > max_length:
        raise UserError(
            f"The {name} has {len(ids)} tokens, the limit is {max_length}: shorten it, leave it out or raise "
            "model.max_length."
        )
    answer = _template_mask(tokenizer, messages, ids, len(turns))
    if answer is None:
        answer = [False] * len(ids)
        for start, end in _answer_spans(tokenizer, messages, turns, text, name):
            first, stop = _token_range(tokenizer, text, ids, offsets, start, end)
            answer[first:stop] = [True] * (stop - first)
    return Encoded(ids, [token if mine else IGNORE for token, mine in zip(ids, answer)])


def encode_prompt(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of messages followed by the template's generation prompt, ready for the model's answer.

    Raises:
        UserError: no chat template, or one that rejects the messages
    """
    require_chat_template(tokenizer)
    text = _render(tokenizer, [dict(message) for message in messages], "prompt", generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def context_length(config: Any, tokenizer: Tokenizer, max_length: int | None) -> int:
    """Return the longest sequence in tokens: the smaller of the model's context and the setting.

    The tokenizer's own limit counts only where the model's config names none: it is often a stale or made-up number.

    Raises:
        UserError: none of the three is known
    """
    limits = [limit for limit in (model_context(config, tokenizer), max_length) if limit is not None]
    if not limits:
        raise UserError(f"The context length of {_name(tokenizer)} is not known: set model.max_length.")
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


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], name: str, *, generation_prompt: bool = False) -> str:
    import jinja2

    try:
        with limited(f"The chat template of {_name(tokenizer)}", seconds=_TEMPLATE_SECONDS, memory=_TEMPLATE_MEMORY):
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))
    except UserError:
        raise
    except (
        jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"The chat template of {_name(tokenizer)} rejects the {name} ({reason}): "
            "give messages whose roles it knows (some take no system message)."
        ) from error
    most = _TEMPLATE_ADDS + _TEMPLATE_TIMES * sum(len(content) for m in messages for content in m.values())
    if len(text) > most:
        raise UserError(
            f"The chat template of {_name(tokenizer)} makes {len(text):,} characters of the {name}, more than "
            f"{most:,}: it is damaged or hostile, leave it out."
        )
    return text


def _tokenize(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Token ids of rendered text (the template wrote BOS already), and their places in it where they are known."""
    fast = bool(tokenizer.is_fast)
    # verbose=False: the warning about long texts says nothing that our own error does not say better.
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    return list(out["input_ids"]), [tuple(pair) for pair in out["offset_mapping"]] if fast else None


def _template_mask(
    tokenizer: Tokenizer, messages: list[dict[str, str]], ids: list[int], turns: int
) -> list[bool] | None:
    """What ``{% generation %}`` blocks mark; None where there are none or they do not reach every assistant turn."""
    if not tokenizer.is_fast or not GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        return None
    with limited(f"The chat template of {_name(tokenizer)}", seconds=_TEMPLATE_SECONDS):
        out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    mask = [bool(value) for value in out["assistant_masks"]]
    runs = sum(mine and not before for before, mine in zip([False, *mask], mask))
    # transformers stops marking at the first block whose first character it finds in no token.
    return mask if list(out["input_ids"]) == ids and runs >= turns else None


def _answer_spans(
    tokenizer: Tokenizer, messages: list[dict[str, str]], turns: list[int], text: str, name: str
) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns in the rendered text, each up to its end-of-turn marker."""
    spans = []
    for turn in turns:
        before = _render(tokenizer, messages[:turn], name, generation_prompt=True)
        after = text if turn == len(messages) - 1 else _render(tokenizer, messages[: turn + 1], name)
        if not text.startswith(after):
            # Some templates close the text as a whole, after the last turn only; that is not this turn's end.
            after = after.rstrip().removesuffix(tokenizer.eos_token or "").rstrip()
        if not text.startswith(after) or not after.startswith(before) or len(after) <= len(before):
            raise UserError(
                f"The chat template of {_name(tokenizer)} rewrites earlier turns of the {name}, so its answers "
                "cannot be told apart: give a template that only appends, or one with {% generation %} blocks."
            )
        spans.append((len(before), _end_of_turn(after, len(before), messages[turn]["content"])))
    return spans


def _end_of_turn(text: str, start: int, content: str) -> int:
    """Where a turn that reaches to the end of ``text`` ends: a newline after the end-of-turn marker is not part of it.

    Where only whitespace follows the content, that whitespace is itself what ends the turn, and stays.
    """
    found = text.find(content.strip(), start)
    closing = text[found + len(content.strip()) :] if found >= 0 else text[start:]
    return len(text.rstrip()) if closing.strip() else len(text)


def _token_range(
    tokenizer: Tokenizer, text: str, ids: list[int], offsets: list[tuple[int, int]] | None, start: int, end: int
) -> tuple[int, int]:
    """First and one past the last token of the span; a token that straddles a border counts as the assistant's.

    Without that, a template that ends its prompt in a space would lose the first word of each answer.
    """
    if offsets is None:
        return _common(tokenizer, text[:start], ids)[0], _common(tokenizer, text[:end], ids)[1]
    # Trimmed offsets leave tokens of mere spaces without width, at the end of what they cover.
    inside = [index for index, (low, high) in enumerate(offsets) if high > start and (low < end or low == high <= end)]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _common(tokenizer: Tokenizer, prefix: str, ids: list[int]) -> tuple[int, int]:
    """How many tokens of ``prefix`` open ``ids`` as well, and how many of ``ids`` reach into ``prefix``."""
    part, _ = _tokenize(tokenizer, prefix)
    reach = min(len(part), len(ids))
    same = next((index for index in range(reach) if part[index] != ids[index]), reach)
    return same, reach


def _name(tokenizer: Tokenizer) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
