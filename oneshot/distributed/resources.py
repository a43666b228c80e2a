"""What a run uses: memory of this process, peaks of every rank, and how large its model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.distributed.runtime import Runtime, gather_objects

if TYPE_CHECKING:
    from torch import nn


def measured(runtime: Runtime) -> dict[str, Any]:
    """Return peak_rss_bytes and peak_gpu_bytes, one value per rank (GPU: empty without one). Collective."""
    import resource

    import torch

    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
    gpu = torch.cuda.max_memory_allocated(runtime.device) if runtime.device.type == "cuda" else None
    ranks = gather_objects(runtime, {"rss": rss, "gpu": gpu})
    return {
        "peak_rss_bytes": [rank["rss"] for rank in ranks],
        "peak_gpu_bytes": [rank["gpu"] for rank in ranks if rank["gpu"] is not None],
    }


def reset_peak() -> int:
    """Set the process's peak resident memory back to what it holds now (Linux), and return that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_bytes()


def peak_bytes() -> int:
    """Return the process's peak resident memory since ``reset_peak``, in bytes (Linux)."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Return the process's resident memory in bytes (Linux)."""
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def parameters_of(model: nn.Module) -> int:
    """Return how many parameters a model has, partitioned or whole; packed ones as they are packed."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
