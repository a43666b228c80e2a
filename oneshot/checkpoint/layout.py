"""Which rank owns which elements of which tensor under ZeRO-3. Pure arithmetic, no torch.

DeepSpeed flattens a parameter and cuts it into equal contiguous ranges of ceil(numel / world size) elements; the last
ones may be short or empty and are padded in memory (``deepspeed/runtime/zero/partition_parameters.py``,
``_partition_param``). In a safetensors file a tensor is contiguous too, so that a rank's partition is a byte range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Range:
    """Elements ``start`` to ``stop`` (exclusive) of a flattened tensor, of which a partition of ``size`` is filled."""

    start: int
    stop: int
    size: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def padding(self) -> int:
        """Elements of the partition beyond the end of the tensor."""
        return self.size - self.numel


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Return the bytes of a tensor; ``dtype`` by its safetensors name."""
    return math.prod(shape) * ITEM_SIZES[dtype]


def partition_size(numel: int, world_size: int) -> int:
    """Return how many elements every rank holds of a tensor, padding included."""
    return -(-numel // world_size)


def partition(shape: tuple[int, ...], rank: int, world_size: int) -> Range:
    """Return the range of a tensor that a rank owns.

    Raises:
        ValueError: rank not in 0 .. world_size - 1
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size}")
    numel = math.prod(shape)
    size = partition_size(numel, world_size)
    start = min(rank * size, numel)
    return Range(start, min(start + size, numel), size)


def owners(shape: tuple[int, ...], world_size: int) -> list[Range]:
    """Return the ranges of all ranks, in rank order; they cover every element exactly once."""
    return [partition(shape, rank, world_size) for rank in range(world_size)]


def rank_bytes(shapes: dict[str, tuple[int, ...]], item_size: int, rank: int, world_size: int) -> int:
    """Return the bytes that a rank holds of all tensors, padding included."""
    return sum(partition(shape, rank, world_size).size * item_size for shape in shapes.values())
