"""In how many passes a step of a repair is taken, and which rows each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oneshot.distributed.runtime import Runtime, all_gather_int

# what autograd may keep of one pass's rows, in bytes, where that is more than half of the weights: by kind of device
ROOM = {"cpu": 512 << 20, "cuda": 8 << 30}


def passes_of(runtime: Runtime, model: Any, places: int, rows: int) -> int:
    """Return in how many passes so many places keep what autograd holds of one small beside the weights. Collective.

    The estimate is what goes into and comes out of the linear layers that are modules, the output head left out:
    fused experts are not counted, and what is recomputed is.

    Args:
        places: tokens of this rank's rows, padding included
        rows: those of them that can be dealt out
    """
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if hasattr(m, "in_features") and hasattr(m, "out_features") and m is not head]
    held = places * model.dtype.itemsize * sum(layer.in_features + layer.out_features for layer in layers)
    weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    room = max(ROOM.get(runtime.device.type, ROOM["cuda"]), weights // 2)
    return max(all_gather_int(runtime, max(1, min(-(-held // room), rows))))


def dealt(rows: Sequence[int], own: int, count: int) -> list[int]:
    """Deal rows of so many tokens, in their order, out to passes of about as many, the first with ``own`` more.

    Returns:
        how many rows each pass has
    """
    found = [0] * count
    total, before = own + sum(rows), own
    for tokens in rows:
        found[min(int((before + tokens / 2) * count / total), count - 1)] += 1
        before += tokens
    return found
