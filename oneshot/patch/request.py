"""What a repair is asked to do, checked: the model, the candidates, the prompts and the recipe, with nothing loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.adapter import Adapter
from oneshot.checkpoint.adapters.update import Update, on_device
from oneshot.checkpoint.loading.load import Source
from oneshot.data.conversations import Conversation, Messages
from oneshot.data.encoding import Encoded
from oneshot.distributed.runtime import Runtime
from oneshot.measure.rates import Probe
from oneshot.patch.examples import Prompts
from oneshot.settings import Settings

if TYPE_CHECKING:
    from oneshot.patch.recipe import Recipe  # which imports the methods, and they this


@dataclass(frozen=True)
class Request:
    """A repair that can be begun.

    Attributes:
        settings: as given
        recipe: the method with its numbers
        source: the model, found and whole
        reference: folder of the aligned checkpoint, where one is given
        length: longest conversation in tokens
        conversations: the user's one example, or the pool from which one is chosen
        candidates: the same, encoded
        guard: the guard's prompts; empty for no guard
        refusable: chat messages of unlabelled prompts that should be refused, which the watch looks at
        held: unlabelled prompts that should be answered as before, which it looks at too; empty for no watch
        probes: what is scored
    """

    runtime: Runtime
    settings: Settings
    recipe: Recipe
    source: Source
    tokenizer: Any
    adapter: Adapter | None
    reference: Path | None
    length: int
    conversations: list[Conversation]
    candidates: list[Encoded]
    guard: Prompts
    refusable: list[Messages]
    held: Prompts
    probes: list[Probe]


def own_update(request: Request) -> Update:
    """The user's adapter as an update on this rank's device; empty for a full checkpoint."""
    return on_device(request.adapter.update, request.runtime.device) if request.adapter else {}
