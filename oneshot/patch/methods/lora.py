"""Method lora: AdamW on a new LoRA adapter, on frozen weights, which may be in 4 bits."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.adapter import PREFIX
from oneshot.checkpoint.adapters.carrier import swapped_in
from oneshot.checkpoint.adapters.carrier_read import uncarried
from oneshot.checkpoint.adapters.update import Factors, Update, concatenated
from oneshot.distributed.engine import gathered
from oneshot.distributed.runtime import Runtime
from oneshot.patch.cost import Cost
from oneshot.patch.guard import RepairBatch
from oneshot.patch.method import Defaults, Method
from oneshot.patch.path import Attempt
from oneshot.patch.request import own_update
from oneshot.patch.training import train_on

if TYPE_CHECKING:
    import torch

    from oneshot.patch.bench import Bench


def solve(bench: Bench, batch: RepairBatch, attempt: Attempt) -> Generator[Update, None, tuple[Update, dict[str, Any]]]:
    """Train the adapter, in one go; see ``Method.solve``."""
    train_on(bench, batch, attempt)
    yield from ()
    own = own_update(bench.request)
    return concatenated(own, lora_factors(bench.request.runtime, bench.model)), {}


def lora_factors(runtime: Runtime, model: Any) -> Update:
    """Return the factors of a PEFT model's trained LoRA of scaling 1, whole on every rank. Collective."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            module, _, rest = name.removeprefix(PREFIX).partition(".lora_")
            with gathered(runtime, [parameter]):
                found.setdefault(module, {})[rest[0]] = parameter.detach().float().clone()
    pairs = {module: Factors(pair["B"], pair["A"]) for module, pair in found.items()}
    config = model.active_peft_config.to_dict()
    return uncarried(pairs, config, Path("the new adapter"), swapped_in(model)).stored


METHOD = Method(
    name="lora",
    summary="AdamW on a new LoRA adapter",
    solve=solve,
    cost=Cost(trains="adapter", moments=2),
    defaults=Defaults(epochs=10, learning_rate=2e-4),
    four_bit=Defaults(epochs=10, learning_rate=2e-4),
    tried_by="lowrank",
)
