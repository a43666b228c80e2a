"""Read any range of a model's tensors from a checkpoint that holds them under other names, in parts or merged.

Each tensor is an ordered list of contiguous ranges of stored ones; no more bytes are read than asked for, and checked
against the manifest on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.experts import ExpertMatrix
from oneshot.checkpoint.files import TensorEntry, list_tensors
from oneshot.checkpoint.layout import Range
from oneshot.checkpoint.manifest import Pieces, read_pieces
from oneshot.checkpoint.ranges import Read, read_all
from oneshot.checkpoint.traced import Loading, Traced, trace_loading
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stored:
    """A checkpoint's files as a model's tensors.

    Attributes:
        folder: of the checkpoint
        tensors: what its files hold, by the files' names
        pieces: their checksums
        loading: how the model's tensors are made of them
    """

    folder: Path
    tensors: dict[str, TensorEntry]
    pieces: Pieces
    loading: Loading


def open_stored(model: PreTrainedModel, folder: Path) -> Stored:
    """Return a folder's tensors as those of ``model``, which may be on the meta device or partitioned.

    Raises:
        UserError: as ``list_tensors`` and ``read_pieces``
    """
    tensors = list_tensors(folder)
    loading = trace_loading(model, {name: entry.shape for name, entry in tensors.items()})
    return Stored(folder, tensors, read_pieces(folder, tensors), loading)


def traced(stored: Stored, name: str, shape: tuple[int, ...]) -> Traced:
    """Return the ranges that a tensor of the model is, having checked its shape.

    Raises:
        UserError: the checkpoint lacks it, holds it in another shape, or in a form that is no list of ranges
    """
    found = stored.loading.made.get(name)
    if found is None and (reason := stored.loading.reasons.get(name)) is not None:
        raise UserError(f"{stored.folder} cannot be read tensor by tensor: of {name}, {reason}.")
    if found is None:
        raise UserError(f"{stored.folder} holds no weight for {name}: is it a checkpoint of the same architecture?")
    if found.shape != shape:
        raise UserError(
            f"{stored.folder} holds {name} of shape {list(found.shape)} where the model's is {list(shape)}: give a "
            "checkpoint of the same architecture."
        )
    return found


def range_reads(stored: Stored, name: str, wanted: Range, out: torch.Tensor) -> list[Read]:
    """Return the reads that fill ``out`` with a range of one of the model's tensors.

    Args:
        wanted: elements of the model's tensor, flattened
        out: (wanted.size,), as of ``Read``; beyond ``wanted.numel`` it becomes zero
    """
    found = stored.loading.made[name]
    segments = list(found.take(wanted.start, wanted.stop))
    if not segments:  # an empty partition: a read of nothing, which zeroes the padding
        last = found.segments[-1]
        segments = [type(last)(last.name, last.stop, last.stop)]
    reads, at = [], 0
    for number, segment in enumerate(segments, 1):
        numel = segment.stop - segment.start
        size = wanted.size - at if number == len(segments) else numel
        part = Range(segment.start, segment.stop, size)
        pieces = stored.pieces.get(segment.name, ())
        reads.append(Read(stored.tensors[segment.name], part, out[at : at + size], segment.name, pieces))
        at += numel
    return reads


def expert_range(matrix: ExpertMatrix) -> tuple[Range, tuple[int, int]]:
    """Return which elements of its parameter an expert's matrix is, and their shape there."""
    shape = (matrix.out_features, matrix.in_features)
    numel, begin = math.prod(shape), matrix.index * math.prod(shape)
    return Range(begin, begin + numel, numel), shape[::-1] if matrix.transposed else shape


def read_expert(stored: Stored, matrix: ExpertMatrix) -> torch.Tensor:
    """Return one expert's matrix (out, in), fp32, on the CPU.

    Raises:
        UserError: as ``traced``, or as ``read_in_order``
    """
    import torch

    wanted, shape = expert_range(matrix)
    traced(stored, matrix.parameter, _whole(matrix))
    values = torch.empty(wanted.numel)
    read_all(range_reads(stored, matrix.parameter, wanted, values))
    return values.view(shape).T.contiguous() if matrix.transposed else values.view(shape)


def _whole(matrix: ExpertMatrix) -> tuple[int, ...]:
    """Shape of the parameter that holds all experts' matrices."""
    parameter: Any = getattr(matrix.module, matrix.projection)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
