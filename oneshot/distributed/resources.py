"""What a run used: peak memory of every rank."""

from __future__ import annotations

from typing import Any

from oneshot.distributed.runtime import Runtime, gather_objects


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
