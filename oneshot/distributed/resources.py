"""What a run uses: memory of this process, peaks of every rank, and how large its model is."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.distributed.runtime import Runtime, gather_objects

if TYPE_CHECKING:
    from torch import nn

_M_MMAP_THRESHOLD = -3  # of malloc.h: blocks from this size on are mapped and unmapped one by one
_SMALL = 10_000_000  # weights


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


def give_back_freed_memory(runtime: Runtime, model: nn.Module | None = None) -> None:
    """Let glibc return every large block to the system when it is freed (CPU only).

    By default it keeps blocks of up to 32 MiB, each hole of another size: activations, gradients and weights that come
    and go with every layer then hold up to twice what is in use.

    Args:
        model: what will be computed with; for a small one nothing is done, as a tenth of its time would go into mapping
    """
    if runtime.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    if model is not None and parameters_of(model) < _SMALL:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)  # a fixed value also keeps glibc from raising it


def parameters_of(model: nn.Module) -> int:
    """Return how many parameters a model has, partitioned or whole; packed ones as they are packed."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
