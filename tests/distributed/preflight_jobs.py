"""Ranks that look around, one of them on a machine where something is wrong."""

from __future__ import annotations

import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import torch

from oneshot.distributed import preflight
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError

Usage = namedtuple("Usage", "total used free")


def look(runtime: Runtime, folder: str, wrong: str, needed: int = 1000) -> dict[str, Any]:
    """Two machines of one rank each; ``wrong`` is what the second has amiss."""
    host = f"machine{runtime.rank}"
    preflight._host = lambda: host  # type: ignore[assignment]
    preflight._VISIBLE_WITHIN = 1.0
    here = Path(folder)
    if runtime.rank == 1:
        if wrong == "code":
            preflight._code = lambda: "other"  # type: ignore[assignment]
        elif wrong == "clock":
            now = time.time
            time.time = lambda: now() + 90  # type: ignore[assignment]
        elif wrong == "folder":
            here = here / "missing"
        elif wrong == "not shared":
            here = here / "own"
            here.mkdir()
        elif wrong == "disk":
            shutil.disk_usage = lambda _: Usage(10, 10, 10)  # type: ignore[assignment]
        elif wrong == "network":
            reduce = preflight.all_reduce_sum

            def broken(runtime: Runtime, tensor: torch.Tensor) -> torch.Tensor:
                total = reduce(runtime, tensor)
                total[7] += 1
                return total

            preflight.all_reduce_sum = broken  # type: ignore[assignment]
    clock = time.perf_counter()
    assert preflight.machines(runtime) == 2
    checks = preflight.preflight(runtime, here, needed)
    seconds = time.perf_counter() - clock
    said = ""
    try:
        preflight.refuse(checks)
    except UserError as error:
        said = str(error)
    return {"names": [check.name for check in checks], "said": said, "seconds": seconds}
