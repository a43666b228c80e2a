"""Are all tokens rows of the model's embedding? Asked before it is loaded (transformers#12763, #11102)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from oneshot.data.encoding import encode_prompt
from oneshot.data.protocols import Tokenizer
from oneshot.errors import UserError


def embedding_rows(config: Any) -> int | None:
    """Return how many rows a model's embedding has by its config; none where that does not say."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if type(rows) is int and rows > 0 else None


def check_tokens(config: Any, tokenizer: Tokenizer, encoded: Iterable[Sequence[int]]) -> None:
    """Raise UserError where text as encoded, or the padding token, is no row of the embedding.

    Args:
        config: the model's
        encoded: token ids of each text
    """
    rows = embedding_rows(config)
    if rows is None:
        return
    if (pad := tokenizer.pad_token_id) is not None and pad >= rows:
        raise UserError(
            f"{_of(tokenizer)} pads with token {_name(tokenizer, pad)}, number {pad}, where the model's embedding has "
            f"{rows} rows: set another pad_token in its tokenizer_config.json, such as the eos_token, or give the "
            "model whose embedding was resized."
        )
    if (most := _largest(encoded)) >= rows:
        raise UserError(
            f"{_of(tokenizer)} makes token {_name(tokenizer, most)}, number {most}, of the text that is given, "
            f"where the model's embedding has {rows} rows: give the tokenizer that belongs to the model, or the "
            "model whose embedding was resized."
        )


def check_for_reference(config: Any, tokenizer: Tokenizer, encoded: Iterable[Sequence[int]], reference: Path) -> None:
    """Raise UserError where text as encoded has a token that the reference, of this config, knows nothing of."""
    rows = embedding_rows(config)
    if rows is not None and (most := _largest(encoded)) >= rows:
        raise UserError(
            f"The text that is given has token {_name(tokenizer, most)}, number {most}, where the embedding of the "
            f"reference {reference} has {rows} rows: it cannot be asked, so leave out text with what the fine-tune "
            "has added to the vocabulary."
        )


def rendered(tokenizer: Tokenizer, prompts: Iterable[Sequence[dict[str, str]]]) -> Iterator[list[int]]:
    """Yield the token ids of prompts, as the chat template renders them."""
    return (encode_prompt(messages, tokenizer) for messages in prompts)


def _largest(encoded: Iterable[Sequence[int]]) -> int:
    return max((max(ids, default=-1) for ids in encoded), default=-1)


def _of(tokenizer: Tokenizer) -> str:
    return f"The tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"


def _name(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(token))
