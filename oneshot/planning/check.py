"""Refuse a run that cannot fit, before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from oneshot.checkpoint.loading.configs import config_fields
from oneshot.checkpoint.quantized.scheme import is_stored
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.planning.facts import CPU, GPU, Choice, Sharded, Zero
from oneshot.planning.lookup import model_shape
from oneshot.planning.memory import Memory, estimate
from oneshot.planning.model import own_code
from oneshot.planning.table import gib
from oneshot.planning.work import work_of
from oneshot.settings import Settings

EXIT_NO_ROOM = 3
# of a DeepSpeed JSON: with these, states or frozen weights are smaller than what is estimated
_SMALLER = ("bf16_master_weights_and_grads", "fp16_master_weights_and_grads", "zero_quantized_nontrainable_weights")


class CannotFit(UserError):
    """The run's least need exceeds what its devices have."""

    code = EXIT_NO_ROOM


def refuse_what_cannot_fit(
    settings: Settings,
    runtime: Runtime,
    checkpoint: Path,
    method: str,
    *,
    stage: Literal["repair", "finetune"] = "repair",
    item: int = 2,
) -> None:
    """Return if the run may fit, or if the settings force it.

    Only the lower bound is compared, with all the memory that a GPU or, without one, the machine has: what is counted
    is held without doubt, so that no run is refused that could have worked. A model whose shape is not known is let
    through. Takes no memory, and at the first sight of a config a moment.

    Args:
        checkpoint: folder of the full checkpoint (of an adapter: its base)
        method: by name; of a fine-tune the one that ``work.FINETUNE`` has for it
        stage: whose settings hold the rank of a LoRA
        item: bytes of a weight as it is loaded

    Raises:
        CannotFit: it cannot fit
    """
    if settings.plan.force:
        return
    config = config_fields(checkpoint)
    packed = is_stored(config)
    if config.get("quantization_config") and not packed:
        return  # smaller than bf16, by a scheme that is not known here
    deepspeed = getattr(getattr(runtime.accelerator, "deepspeed_plugin", None), "deepspeed_config", None) or {}
    if any(key in str(deepspeed) for key in _SMALLER):
        return
    zero = Zero.of(deepspeed)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if runtime.world_size > 1 else 1
    choice = Choice(
        method=method,
        precision="nf4" if packed or settings.model.quantize else "bf16",
        sharding=_sharding(runtime, zero),
        gpus=runtime.world_size,
        per_node=ranks,
        double_quant=packed or settings.model.double_quant,  # at least
        item=item,
    )
    try:
        shape = model_shape(config, remote=own_code(settings.model, config, checkpoint))
    except UserError:
        return
    device = GPU if runtime.device.type == "cuda" else CPU
    work = work_of(replace(settings, plan=replace(settings.plan, stage=stage)), method, runtime.world_size)
    if settings.repair.targets and stage == "repair":
        work = replace(work, rank=0)  # which layers these are is not known here
    found = estimate(shape, choice, work, zero, device)
    _compare(runtime, choice, found, ranks)


def _compare(runtime: Runtime, choice: Choice, found: Memory, ranks: int) -> None:
    has, machine = _memory_of(runtime), _machine()
    if runtime.device.type == "cuda":
        needs, where = found.lower, "GPU"
        if needs <= has and found.host_lower > machine:
            needs, has, where = found.host_lower, machine, "machine"
    else:
        needs, has, where = found.lower * ranks + found.host_lower, machine, "machine"
    if needs > has:
        raise CannotFit(
            f"Method {choice.method} in {choice.held_in} under {choice.sharding} on {choice.gpus} "
            f"process{'es' if choice.gpus > 1 else ''} takes at least {gib(needs)} GiB of a {where} that has "
            f"{gib(has)}: 'oneshot plan' shows what fits; --plan.force true starts it all the same."
        )


def _sharding(runtime: Runtime, zero: Zero) -> Sharded:
    if runtime.sharding == "zero3":
        return "zero3 offload" if zero.offload_weights else "zero3"
    return "zero2" if runtime.sharding == "zero2" else "none"


def _memory_of(runtime: Runtime) -> int:
    """Bytes that this rank's GPU has; without one, those of the machine."""
    if runtime.device.type != "cuda":
        return _machine()
    import torch

    return int(torch.cuda.get_device_properties(runtime.device).total_memory)


def _machine() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
