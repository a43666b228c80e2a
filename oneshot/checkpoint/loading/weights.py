"""Read a rank's ranges of a model's parameters from a checkpoint, 4-bit or as stored, in the order of its files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from oneshot.checkpoint.layout import ITEM_SIZES, partition
from oneshot.checkpoint.loading.segments import Stored, range_reads
from oneshot.checkpoint.quantized.nf4 import FourBit, Share, as_bytes, pack, weights_behind
from oneshot.checkpoint.reads.ranges import Read, read_all, read_in_order
from oneshot.checkpoint.reads.traced import Traced
from oneshot.distributed.runtime import Runtime
from oneshot.distributed.steps import BYTES, steps
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


def read_own(
    runtime: Runtime,
    model: nn.Module,
    stored: Stored,
    own: dict[str, torch.Tensor],
    four_bit: FourBit | None,
) -> Iterator[str]:
    """Read this rank's range of every parameter, as of ``read_in_order``; yields their names, alike on all ranks.

    Args:
        own: parameter -> (n,), where the range goes that ``partition`` gives this rank, with or without its padding
    """
    reads: dict[str, list[Read]] = {}
    packed: list[Share] = []
    parts, names = {}, sorted(own, key=lambda name: _end(stored, stored.loading.made[name]))
    held = dict(model.named_parameters())
    for name in names:
        parts[name] = stored.loading.made[name]
        shape = tuple(getattr(held[name], "ds_shape", held[name].shape))
        wanted = replace(partition(shape, runtime.rank, runtime.world_size), size=len(own[name]))
        if four_bit is None or not four_bit.takes(name):
            reads[name] = range_reads(stored, parts[name], wanted, own[name])
        elif four_bit.stored:
            (entry,) = {segment.name for segment in parts[name].segments}
            whole = Read(stored.tensors[entry], wanted, own[name], entry, stored.pieces.get(entry, ()))
            reads[name] = [as_bytes(whole)]
        else:
            packed.append(Share(name, parts[name], wanted, own[name]))
    problem: Exception | None = None
    sizes = {name: stored.nbytes(parts[name]) for name in names}
    with steps("weights read", sum(sizes.values()), BYTES) as going:
        try:
            for name in _by_parameter(reads):
                yield name
                going.add(sizes[name])
        except (OSError, UserError) as error:
            problem = error
        if four_bit is not None and packed:
            for name in _read_packed(four_bit, stored, packed, runtime.device, problem):
                yield name
                going.add(sizes[name])
        elif problem is not None:
            raise problem


def _end(stored: Stored, parts: Traced) -> tuple[str, int]:
    """Where the last of a whole tensor's ranges lies in the files, the same for all ranks."""
    behind = (stored.behind(segment) for segment in parts.segments)
    return max((str(entry.shard), entry.offset + own.stop * ITEM_SIZES[entry.dtype]) for _, entry, own in behind)


def _by_parameter(reads: dict[str, list[Read]]) -> Iterator[str]:
    """Do all reads in the files' order; yields each parameter when its reads, and all those named before, are done."""
    of = {read: name for name, some in reads.items() for read in some}
    left = {name: len(some) for name, some in reads.items()}
    waiting = list(reads)[::-1]
    for read in read_in_order(of):
        left[of[read]] -= 1
        while waiting and not left[waiting[-1]]:
            yield waiting.pop()


def _read_packed(
    four_bit: FourBit, stored: Stored, packed: list[Share], device: torch.device, problem: Exception | None
) -> Iterator[str]:
    """Quantize a layer while the next one is read; yields their names, and raises at the end."""

    def weights(share: Share) -> torch.Tensor:
        wanted, out = weights_behind(four_bit, share, device)
        read_all(range_reads(stored, share.parts, wanted, out))
        return out

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(weights, packed[0])
        for number, share in enumerate(packed, 1):
            coming = following
            if number < len(packed) and problem is None:
                following = pool.submit(weights, packed[number])
            try:
                if problem is None:
                    pack(four_bit, share, coming.result())
            except (OSError, UserError) as error:
                problem = error
            yield share.name
    if problem is not None:
        raise problem
