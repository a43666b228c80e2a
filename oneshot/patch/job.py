"""What a repair works on, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oneshot.checkpoint.adapter import Adapter
from oneshot.checkpoint.load import Source
from oneshot.checkpoint.update import Update, on_device
from oneshot.data.encoding import Encoded
from oneshot.distributed.runtime import Runtime
from oneshot.patch.linears import Linears
from oneshot.patch.objective import Aligned
from oneshot.patch.select import Chosen
from oneshot.patch.trace import Tracer
from oneshot.settings import ModelSettings

Messages = list[dict[str, str]]


@dataclass
class Job:
    """What a repair works on.

    Attributes:
        candidates: the user's one example, or the pool from which one is chosen
        prompts: chat messages of their requests
        rule: how it is chosen, see ``oneshot.patch.select``
        shortlist: how many candidates are repaired with to choose one
        seed: of what is drawn
        guard: chat messages of the guard's prompts; empty for no guard
        refusable: of unlabelled prompts that should be refused, which the watch looks at
        held: of unlabelled prompts that should be answered as before, which it looks at too; empty for no watch
        aligned: the aligned model's logits on the rows that the choice is judged by, where they are known
    """

    runtime: Runtime
    source: Source
    model_settings: ModelSettings
    tokenizer: Any
    adapter: Adapter | None
    reference: Path | None
    candidates: list[Encoded]
    prompts: list[Messages]
    rule: str
    shortlist: int
    seed: int
    guard: list[Messages]
    refusable: list[Messages]
    held: list[Messages]
    tracer: Tracer
    aligned: Aligned | None = None


@dataclass
class Outcome:
    """What a repair left.

    Attributes:
        update: what to add to the checkpoint (of an adapter: to its base) to get the repaired model
        linears: the layers that were eligible
        chosen: the example that was taken
        stopped_by: why the repair ended
        facts: figures of the method, for the report
    """

    update: Update
    linears: Linears
    chosen: Chosen
    stopped_by: str
    facts: dict[str, Any] = field(default_factory=dict)


Measure = Callable[[Any, str], Any]  # (model, stage); what it returns is its own
Finish = Callable[[Any, Update, Linears], None]  # (model, update, linears), while the model is still loaded


def own_update(job: Job) -> Update:
    """The user's adapter as an update on this rank's device; empty for a full checkpoint."""
    return on_device(job.adapter.update, job.runtime.device) if job.adapter else {}
