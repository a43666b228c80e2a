"""Tensors that files hold in 8 or 4 bits with a scale per block, and the numbers that they stand for.

FP8 as DeepSeek has it: ``X`` beside ``X_scale_inv``, one fp32 scale for each block of rows and columns. MXFP4 as
gpt-oss has it: ``X_blocks`` (experts, out, groups, 16) beside ``X_scales`` (experts, out, groups), two numbers to a
byte and a power of two for each group of 32; the model holds them as (experts, in, out).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.disk.files import TensorEntry, read_tensor
from oneshot.checkpoint.layout import Range
from oneshot.checkpoint.names import CONFIG
from oneshot.checkpoint.quantized.scheme import QUANTIZATION
from oneshot.errors import UserError
from oneshot.reading import read_object

if TYPE_CHECKING:
    import torch

_INVERSE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"  # how names end
_AT_ONCE = 1 << 20  # numbers made at a time
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Scaled:
    """A tensor with scales.

    Attributes:
        shape: of the numbers as the model holds them
        name, entry: of what is stored of the numbers
        scales: of the scales, name and entry
        block: rows and columns of a scale; none: the numbers are MXFP4
    """

    shape: tuple[int, ...]
    name: str
    entry: TensorEntry
    scales: tuple[str, TensorEntry]
    block: tuple[int, int] | None = None

    def read_scales(self) -> torch.Tensor:
        name, entry = self.scales
        return read_tensor(entry, name)

    def stored_range(self, start: int, stop: int) -> Range:
        """Return the bytes that numbers ``start`` to ``stop`` are made of; of MXFP4 those of whole experts."""
        if self.block is not None or start == stop:
            return Range(start, stop, stop - start)
        each = math.prod(self.shape[1:])
        low, high = start // each * each // 2, -(-stop // each) * each // 2
        return Range(low, high, high - low)


def scaled_tensors(folder: Path, tensors: dict[str, TensorEntry]) -> dict[str, Scaled]:
    """Return what a checkpoint holds with scales, by the name that the numbers would have.

    Raises:
        UserError: FP8 with scales of other blocks than its config says
    """
    found, said = {}, None
    for name, entry in tensors.items():
        stem = name.removesuffix(_BLOCKS)
        scales = stem + _SCALES
        if name != stem and entry.dtype == "U8" and len(entry.shape) == 4 and scales in tensors:
            experts, rows, groups, _ = entry.shape
            found[stem] = Scaled((experts, 32 * groups, rows), name, entry, (scales, tensors[scales]))
        elif entry.dtype == "F8_E4M3" and len(entry.shape) == 2 and (inverse := name + _INVERSE) in tensors:
            said = said or _said(folder)
            block = _block(folder, name, entry.shape, tensors[inverse].shape, said)
            found[name] = Scaled(entry.shape, name, entry, (inverse, tensors[inverse]), block)
    return found


def _said(folder: Path) -> tuple[int, int]:
    """Rows and columns of a block, as the checkpoint's config.json says."""
    fields: Any = read_object(folder / CONFIG).get(QUANTIZATION) if (folder / CONFIG).is_file() else None
    block = fields.get("weight_block_size") if isinstance(fields, dict) else None
    known = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    return (block[0], block[1]) if known and block else (128, 128)


def _block(
    folder: Path, name: str, shape: tuple[int, ...], scales: tuple[int, ...], said: tuple[int, int]
) -> tuple[int, int]:
    if math.prod(scales) == 1:
        return shape[0], shape[1]
    if scales != tuple(-(-n // size) for n, size in zip(shape, said)):
        raise UserError(
            f"{folder} holds {name} of shape {list(shape)} in FP8 with scales of shape {list(scales)}, which are none "
            f"of blocks of {said[0]} x {said[1]}: give the checkpoint in bf16."
        )
    return said


def numbers(scaled: Scaled, scales: torch.Tensor, first: int, data: torch.Tensor) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield the numbers that bytes stand for, in parts: (which elements of the tensor, int64 (n,); fp32 (n,)).

    Args:
        first: byte of the stored tensor that ``data`` (uint8) begins with
    """
    import torch

    step = _AT_ONCE if scaled.block is not None else _AT_ONCE // 2
    for begin in range(0, len(data), step):
        part, at = data[begin : begin + step], first + begin
        if scaled.block is not None:
            values = part.view(torch.float8_e4m3fn).float() * _of(scaled, scales, at, part)
            yield torch.arange(at, at + len(part)), values
            continue
        _, columns, rows = scaled.shape
        where = torch.arange(at, at + len(part))
        values = torch.tensor(_FP4)[torch.stack([part & 15, part >> 4], dim=1).long()]
        exponents = scales.reshape(-1)[where // 16].int() - 127
        place = (2 * where[:, None] + torch.arange(2)).flatten()  # as stored: expert, row, column
        column, row, expert = place % columns, place // columns % rows, place // (columns * rows)
        yield (expert * columns + column) * rows + row, torch.ldexp(values, exponents[:, None]).flatten()


def _of(scaled: Scaled, scales: torch.Tensor, at: int, part: torch.Tensor) -> torch.Tensor:
    """The scale of each of the numbers from ``at`` on."""
    import torch

    assert scaled.block is not None
    columns = scaled.shape[1]
    rows = torch.arange(at // columns, -(-(at + len(part)) // columns))
    of_rows = scales.float().reshape(-1, -(-columns // scaled.block[1]))[rows // scaled.block[0]]
    each = of_rows.repeat_interleave(scaled.block[1], dim=1)[:, :columns].reshape(-1)
    return each[at % columns :][: len(part)]
