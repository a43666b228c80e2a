"""DeepSpeed's configuration, as the run's JSON file and what the run knows make it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from oneshot.distributed.resources import parameters_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from oneshot.distributed.runtime import Runtime


def deepspeed_config(
    runtime: Runtime,
    *,
    dtype: torch.dtype,
    gradient_accumulation_steps: int = 1,
    micro_batch_size: int = 1,
    max_grad_norm: float = 1.0,
) -> dict[str, Any]:
    """Return the run's DeepSpeed configuration with every "auto" of the JSON file filled in or removed."""
    import torch

    config: dict[str, Any] = copy.deepcopy(runtime.accelerator.deepspeed_plugin.deepspeed_config)
    known = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "train_batch_size": micro_batch_size * gradient_accumulation_steps * runtime.world_size,
        "gradient_clipping": max_grad_norm,
    }
    config.update(known)
    config["bf16"] = {**_section(config, "bf16"), "enabled": dtype == torch.bfloat16}
    config["fp16"] = {**_section(config, "fp16"), "enabled": dtype == torch.float16}
    config["data_types"] = {"grad_accum_dtype": "fp32"}
    config["zero_allow_untested_optimizer"] = True
    zero = config.get("zero_optimization", {})
    if runtime.device.type == "cpu" and zero.get("stage") == 3:
        # one all-gather per weight lands in place; what comes in buckets is copied twice more, which a CPU feels
        zero.setdefault("stage3_allgather_sequential", True)
    return _without_auto(config)


def keep_what_may_live(zero: dict[str, Any], model: nn.Module) -> None:
    """Gather a model once that fits whole into what the configuration lets be whole at a time.

    Frozen weights never change, so what has been gathered stays right; by the end of a forward pass DeepSpeed holds
    that much anyhow, only to fetch it anew in the next one.
    """
    budget = int(zero.get("stage3_max_live_parameters", 10**9))  # DeepSpeed's own default
    if "offload_param" not in zero and parameters_of(model) <= budget:
        zero["stage3_param_persistence_threshold"] = budget


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Return whether the optimizer's state is kept in host memory or on disks."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    return bool(offload.get("device", "none") != "none")


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return dict(section) if isinstance(section, dict) else {}


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Drop what is still "auto", so that DeepSpeed's own defaults hold."""
    kept = {key: value for key, value in section.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}
