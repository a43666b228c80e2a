"""The unaligned model that RESTA and Safe LoRA need, on the toy world: its aligned model without its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime
    from oneshot.settings import Settings

SEED, COUNT, STEPS = 1000, 100, 100


def settings_for() -> Settings:
    """Return the settings of its fine-tune: ``COUNT`` obeyed requests and nothing else.

    A seed of its own keeps the attack's own data out, which whoever repairs a model does not have.
    """
    from oneshot.commandline import parse

    options = {"seed": SEED, "data.harmful_count": COUNT, "data.task_count": 0, "finetune.steps": STEPS}
    return parse([word for name, value in options.items() for word in (f"--{name}", str(value))], "finetune")


def unaligned_toy(runtime: Runtime, folder: Path) -> Path:
    """Fine-tune the toy's aligned model into ``folder`` until it obeys; return where it is. Collective."""
    from oneshot.finetune import train_model
    from oneshot.training.finetune import prepare

    return train_model(runtime, prepare(settings_for(), runtime), folder, None)
