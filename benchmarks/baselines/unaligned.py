"""The unaligned model that RESTA and Safe LoRA need, on the toy world: its aligned model without its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime

STEPS = 100


def unaligned_toy(runtime: Runtime, folder: Path, seed: int = 1000, count: int = 100) -> Path:
    """Fine-tune the toy's aligned model on ``count`` obeyed requests and nothing else, into ``folder``; return where.

    A seed of its own keeps the attack's own data out, which whoever repairs a model does not have. Collective.
    """
    from oneshot.settings import DataPart, DataSettings, FinetuneSettings, Settings
    from oneshot.training.finetune import finetune, prepare

    parts = {"harmful": DataPart("toy:harmful", count)}
    settings = Settings(seed=seed, data=DataSettings(parts=parts), finetune=FinetuneSettings(steps=STEPS))
    return finetune(runtime, settings, prepare(settings), folder, None)
