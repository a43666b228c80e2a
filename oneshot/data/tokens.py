"""Conversations tokenized once: kept compactly in memory and, between runs, in a cache on disk.

The cache holds nothing that cannot be made again: a file that is missing, damaged or of another key is passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from oneshot.data import encoding, templates, thoughts, turns
from oneshot.data.cache import folder_of, read_cached, write_cached
from oneshot.data.conversations import Conversation
from oneshot.data.encoding import IGNORE, Encoded, encode
from oneshot.data.protocols import Tokenizer

if TYPE_CHECKING:
    import torch

LIBRARIES = ("transformers", "tokenizers", "jinja2")  # what decides on tokens beside the tokenizer's own files


@dataclass(frozen=True)
class Tokens(Sequence[Encoded]):
    """Encoded conversations at 5 bytes per token, where lists of integers take about 40.

    Attributes:
        ids: int32 (all tokens), one conversation after the other
        learnt: bool (all tokens), true where a token carries loss
        ends: int64 (conversations), one past the last token of each
    """

    ids: torch.Tensor
    learnt: torch.Tensor
    ends: torch.Tensor

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        ids = self.ids[start:end]
        return Encoded(ids.tolist(), ids.masked_fill(~self.learnt[start:end], IGNORE).tolist())


def encode_all(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    max_length: int | None,
    cache: Path | None = None,
    train_on: str = "all",
) -> Tokens:
    """Encode all conversations, or read them from the cache where a run before has encoded the very same.

    Args:
        max_length: in tokens, as in ``encode``
        cache: folder of the cache; none: neither read nor written. Slow tokenizers, which cannot be told apart by
            their content, are never cached
        train_on: as in ``encode``

    Raises:
        UserError: as ``encode``
    """
    key = _key(conversations, tokenizer, max_length, train_on) if cache is not None else None
    path = cache / f"{key}.safetensors" if cache is not None and key else None
    found = _read(path, len(conversations)) if path else None
    if found is None:
        found = _gather([encode(row, tokenizer, max_length, train_on=train_on) for row in conversations])
        if path:
            write_cached(vars(found), path)
    return found


def cache_folder() -> Path:
    """Return the user's folder for cached tokens: ``$XDG_CACHE_HOME/oneshot/tokens``, by default under ``~/.cache``."""
    return folder_of("tokens")


def _gather(rows: list[Encoded]) -> Tokens:
    import torch

    return Tokens(
        ids=torch.tensor([token for row in rows for token in row.input_ids], dtype=torch.int32),
        learnt=torch.tensor([label != IGNORE for row in rows for label in row.labels], dtype=torch.bool),
        ends=torch.tensor([len(row.input_ids) for row in rows], dtype=torch.int64).cumsum(0),
    )


def _key(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, max_length: int | None, train_on: str
) -> str | None:
    """Name of what encoding would return: the texts themselves, everything that turns them into tokens, the limit."""
    if not tokenizer.is_fast:
        return None
    template = tokenizer.get_chat_template()
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        digest.update(json.dumps(part, sort_keys=True, ensure_ascii=True, default=str).encode())
        digest.update(b"\0")

    add([max_length, train_on, {name: metadata.version(name) for name in LIBRARIES}])
    for part in (encoding, templates, thoughts, turns):
        add(Path(str(part.__file__)).read_text(encoding="utf-8"))
    fast: Any = tokenizer
    add([template, fast.special_tokens_map, fast.backend_tokenizer.to_str()])
    add(date.today().isoformat() if "strftime_now" in template else None)  # such templates write today's date
    for row in conversations:
        add(row.messages)
    return digest.hexdigest()


def _read(path: Path, count: int) -> Tokens | None:
    """The cached tokens; none where the file is missing, cut off, altered or of another form."""
    tensors = read_cached(path)
    if tensors is None or set(tensors) != {"ids", "learnt", "ends"}:
        return None
    tokens = Tokens(**tensors)
    return tokens if len(tokens) == count else None
