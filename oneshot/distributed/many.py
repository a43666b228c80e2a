"""Many small tensors between ranks at once, where a call for each would take longer than what it carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from oneshot.distributed.runtime import Runtime, all_reduce_sum, broadcast, gather_parts

if TYPE_CHECKING:
    import torch


def gather_each(runtime: Runtime, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return, of each of several matrices of one width, the rows of all ranks: ``gather_rows`` of all at once."""
    if runtime.world_size == 1:
        return list(parts)
    import torch

    counts = torch.zeros(runtime.world_size, len(parts), dtype=torch.int64, device=runtime.device)
    counts[runtime.rank] = torch.tensor([len(part) for part in parts])
    counts, width = all_reduce_sum(runtime, counts), parts[0].shape[1]
    flat = gather_parts(runtime, torch.cat(list(parts)).flatten(), (counts.sum(dim=1) * width).tolist())
    pieces = flat.view(-1, width).split(counts.flatten().tolist())
    return [torch.cat(pieces[i :: len(parts)]) for i in range(len(parts))]


def share_each(
    runtime: Runtime, mine: Mapping[int, torch.Tensor], sizes: list[int], first: int, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Return several vectors, each of which one rank has, on every rank, by one broadcast per rank that has any.

    Args:
        mine: place -> this rank's vector, at every place whose owner it is, (first + place) % world_size, and
            whose size is not 0
        sizes: of all vectors
        dtype: of all vectors; none: fp32
    """
    import torch

    found = dict[int, torch.Tensor]()
    for owner in range(runtime.world_size):
        places = range((owner - first) % runtime.world_size, len(sizes), runtime.world_size)
        if not places:
            continue
        lengths = [sizes[place] for place in places]
        if owner == runtime.rank and any(lengths):
            flat = torch.cat([mine[place] for place in places if sizes[place]])
        else:
            flat = torch.empty(sum(lengths), device=runtime.device, dtype=dtype)
        if any(lengths):
            broadcast(runtime, flat, owner)
        found |= zip(places, flat.split(lengths))
    return [found[place] for place in range(len(sizes))]
