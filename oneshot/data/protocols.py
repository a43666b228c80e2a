"""What the rooms ask of a tokenizer and of a language model; transformers' classes have it, and others may."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


class Tokenizer(Protocol):
    """Text to token ids and back, with a chat template."""

    pad_token_id: int | None
    eos_token_id: int | None
    bos_token: str | None
    eos_token: str | None
    model_max_length: int

    @property
    def is_fast(self) -> bool: ...

    def __call__(self, text: str, /, **options: Any) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    @property
    def apply_chat_template(self) -> Callable[..., Any]: ...

    def get_chat_template(self) -> str: ...

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> Any: ...

    def save_pretrained(self, folder: Path, /) -> Any: ...


class CausalLM(Protocol):
    """Logits of token ids, and greedy answers."""

    config: Any

    def __call__(self, **inputs: Any) -> Any: ...

    def generate(self, **options: Any) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...
