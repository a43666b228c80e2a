"""Read a rank's ranges of a model's parameters from a checkpoint, 4-bit or as stored, in the order of its files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from oneshot.checkpoint.files import TensorEntry, list_tensors
from oneshot.checkpoint.layout import partition, tensor_bytes
from oneshot.checkpoint.manifest import Pieces, read_pieces
from oneshot.checkpoint.quantized import FourBit, as_bytes, pack, weights_behind
from oneshot.checkpoint.ranges import Read, file_order, read_all, read_in_order
from oneshot.distributed.runtime import Runtime
from oneshot.distributed.steps import BYTES, steps
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint and their checksums."""

    tensors: dict[str, TensorEntry]
    pieces: Pieces


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return what a folder holds; raises as ``list_tensors`` and ``read_pieces``."""
    tensors = list_tensors(folder)
    return Checkpoint(tensors, read_pieces(folder, tensors))


def read_own(
    runtime: Runtime,
    model: nn.Module,
    checkpoint: Checkpoint,
    own: dict[str, torch.Tensor],
    four_bit: FourBit | None,
) -> Iterator[str]:
    """Read this rank's range of every parameter, as of ``read_in_order``; yields their names, alike on all ranks.

    Args:
        own: parameter -> (n,), where the range goes that ``partition`` gives this rank, with or without its padding
    """
    reads, packed = [], []
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        wanted = replace(partition(shape, runtime.rank, runtime.world_size), size=len(own[name]))
        read = Read(checkpoint.tensors[name], wanted, own[name], name, checkpoint.pieces.get(name, ()))
        if four_bit is None or name.removesuffix(".weight") not in four_bit.layers:
            reads.append(read)
        elif four_bit.stored:
            reads.append(as_bytes(read))
        else:
            packed.append(read)
    problem: Exception | None = None
    sizes = {name: tensor_bytes(entry.shape, entry.dtype) for name, entry in checkpoint.tensors.items()}
    with steps("weights read", sum(sizes[read.name] for read in (*reads, *packed)), BYTES) as going:
        try:
            for read in read_in_order(reads):
                yield read.name
                going.add(sizes[read.name])
        except (OSError, UserError) as error:
            problem = error
        if four_bit is not None and packed:
            for name in _read_packed(four_bit, packed, runtime.device, problem):
                yield name
                going.add(sizes[name])
        elif problem is not None:
            raise problem


def _read_packed(
    four_bit: FourBit, packed: list[Read], device: torch.device, problem: Exception | None
) -> Iterator[str]:
    """Quantize a layer while the next one is read; yields their names, and raises at the end."""

    def weights(read: Read) -> Read:
        behind = weights_behind(four_bit, read, device)
        read_all([behind])
        return behind

    packed = sorted(packed, key=file_order)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(weights, packed[0])
        for number, read in enumerate(packed, 1):
            coming = following
            if number < len(packed) and problem is None:
                following = pool.submit(weights, packed[number])
            try:
                if problem is None:
                    pack(four_bit, read, coming.result())
            except (OSError, UserError) as error:
                problem = error
            yield read.name
    if problem is not None:
        raise problem
