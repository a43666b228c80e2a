"""How fast a fine-tune runs: tokens per second, model FLOPs utilization and memory, for its heartbeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oneshot.distributed.runtime import Runtime

if TYPE_CHECKING:
    from torch import nn

    from oneshot.training.loop import StepResult

# Dense bf16 tensor-core peak in FLOP/s by part of the device's name, from NVIDIA's data sheets; the first that fits.
PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10", 125e12),
    ("A40", 150e12),
    ("A30", 165e12),
)


@dataclass(frozen=True)
class Meter:
    """What a step's speed is measured against.

    Attributes:
        flops_per_token: that a training step needs (recomputation under gradient checkpointing not counted); none:
            not known
        peak: FLOP/s of all devices together; none: not known, as for every CPU
    """

    runtime: Runtime
    flops_per_token: float | None
    peak: float | None

    def of(self, result: StepResult) -> dict[str, float]:
        """Return tokens_per_second, peak_memory_bytes (this rank's GPU, else its process) and, where known, mfu."""
        speed = result.tokens / result.seconds
        facts = {"tokens_per_second": round(speed, 1), "peak_memory_bytes": peak_memory(self.runtime)}
        if self.peak and self.flops_per_token:
            facts["mfu"] = round(speed * self.flops_per_token / self.peak, 4)
        return facts


def meter(runtime: Runtime, model: nn.Module) -> Meter:
    """Return the meter of a model that trains on this run's devices."""
    import torch

    peak = None
    if runtime.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(runtime.device))
    return Meter(runtime, flops_per_token(model), peak and peak * runtime.world_size)


def peak_flops(name: str) -> float | None:
    """Return the dense bf16 peak (FLOP/s) of a device by its name, such as "NVIDIA H100 80GB HBM3"; none: not known."""
    words = name.replace("-", " ").upper().split()
    for part, peak in PEAK_FLOPS:
        if all(word in words for word in part.upper().split()):
            return peak
    return None


def flops_per_token(model: nn.Module) -> float | None:
    """Return what one token costs in a training step: 2 FLOPs per weight of a linear layer forward, 2 for the gradient
    of its input and, where the weight is trained, 2 for its own (Kaplan et al., arXiv 2001.08361; attention scores not
    counted). None for mixtures of experts, of which each token takes another part.
    """
    from torch import nn

    config = getattr(model, "config", None)
    if any("expert" in name and name[0] != "_" for name in getattr(config, "__dict__", {})):
        return None
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear) and not hasattr(module, "base_layer"):
            weights = module.in_features * module.out_features  # a partitioned or packed weight has another shape
            total += weights * (6.0 if module.weight.requires_grad else 4.0)
    return total or None


def peak_memory(runtime: Runtime) -> int:
    """Return the most bytes that this rank has held: of its GPU, or resident where it has none."""
    import resource

    import torch

    if runtime.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(runtime.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
