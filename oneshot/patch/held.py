"""What of a checkpoint the matrices of a patch are, and how far two checkpoints differ in the rest.

By the model's tensors, where its class knows them: so it does not matter what files call them, whether they hold a
layer's experts together or apart, or in FP8 or MXFP4; and by the files' own, of what the model does not use.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.experts import ExpertMatrix, fused_experts
from oneshot.checkpoint.disk.files import find_weight
from oneshot.checkpoint.layout import FLOATS, Range
from oneshot.checkpoint.loading.segments import Stored, expert_range, range_reads
from oneshot.checkpoint.quantized.scheme import BESIDE, holds_packed
from oneshot.checkpoint.reads.ranges import read_all
from oneshot.checkpoint.reads.traced import Traced, whole

if TYPE_CHECKING:
    from oneshot.patch.linears import Layer

_CHUNK = 4 << 20  # elements compared at a time
_LOW = ("I8", "F8_E4M3", "F8_E5M2")  # quantized weights, one to an element
_Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Held:
    """A tensor of a checkpoint.

    Attributes:
        name: the model's, or the files' of what it does not use
        parts: which ranges of stored tensors it is
        taken: which of its elements (first, last + 1) are a patch's matrices, in order, apart
        experts: whether fused experts hold it
        packed: how many numbers stand in an element
    """

    name: str
    parts: Traced
    taken: _Spans = ()
    experts: bool = False
    packed: int = 1

    @property
    def shown(self) -> str:
        """What people find it as: the files' name, where they hold it as one."""
        names = {segment.stored for segment in self.parts.segments}
        return names.pop() if len(names) == 1 else self.name

    @property
    def numbers(self) -> int:
        """How many weights it holds."""
        return self.packed * math.prod(self.parts.shape)

    @property
    def reached(self) -> int:
        """How many of them are a patch's matrices."""
        return self.packed * sum(stop - start for start, stop in self.taken)

    @property
    def left(self) -> list[tuple[int, int]]:
        """Which of its elements are not."""
        ends = [0, *(place for span in self.taken for place in span), math.prod(self.parts.shape)]
        return [(start, stop) for start, stop in zip(ends[::2], ends[1::2]) if start < stop]


def held_tensors(stored: Stored, model: Any, targets: Mapping[str, Layer]) -> list[Held]:
    """Return all that is a weight in a checkpoint, the scales beside quantized ones left out.

    Args:
        stored: opened as the tensors of ``model``
        model: its plain one, on any device
        targets: name -> layer, what a patch changes
    """
    matrices, wholes = _taken(stored, targets)
    fused = tuple(f"{path}." for path in fused_experts(model))
    packed = _numbers_in(stored)
    used: set[str] = set()
    found: list[Held] = []
    for name, parts in stored.loading.made.items():
        names = {segment.stored for segment in parts.segments}
        used |= names
        if names <= packed.keys():
            every = ((0, math.prod(parts.shape)),)
            own = every if name in wholes or names <= wholes else _merged(matrices.get(name, []))
            found.append(Held(name, parts, own, name.startswith(fused), packed[next(iter(names))]))
    for name in packed.keys() - used:
        parts = _by_name(stored, name)
        own = ((0, math.prod(parts.shape)),) if name in wholes else ()
        found.append(Held(name, parts, own, packed=packed[name]))
    return sorted(found, key=lambda each: each.name)


def _taken(stored: Stored, targets: Mapping[str, Layer]) -> tuple[dict[str, list[tuple[int, int]]], set[str]]:
    """Parameter of experts -> elements that are matrices to patch; names of tensors that are one whole."""
    matrices, wholes = defaultdict[str, list[tuple[int, int]]](list), set[str]()
    for name, layer in targets.items():
        if isinstance(layer, ExpertMatrix):
            own = expert_range(layer)[0]
            matrices[layer.parameter].append((own.start, own.stop))
        elif f"{name}.weight" in stored.loading.made:
            wholes.add(f"{name}.weight")
        elif (other := find_weight(stored.tensors, name)) is not None:
            wholes.add(other)
    return matrices, wholes


def _merged(spans: list[tuple[int, int]]) -> _Spans:
    """Spans in order, those that meet made one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            start, stop = found[-1][0], max(stop, found.pop()[1])
        found.append((start, stop))
    return tuple(found)


def _numbers_in(stored: Stored) -> dict[str, int]:
    """Tensor that is a weight, as ``Stored`` calls it -> how many numbers each of its elements is."""
    tensors, scaled = stored.tensors, stored.scaled
    bytes_of = {own for name in scaled for own in stored.files_names(name)}
    found = dict.fromkeys(scaled, 1)
    low = {name.removesuffix(".weight") for name, entry in tensors.items() if entry.dtype in _LOW}
    nf4 = {name for name in tensors if holds_packed(tensors, name)}
    for name, entry in tensors.items():
        if name in bytes_of or (name.endswith(BESIDE) and name.rpartition(".")[0] in low):
            continue
        if name in nf4:
            found[name] = 2
        elif entry.dtype in (*FLOATS, *_LOW) and not any(name.startswith(f"{each}.") for each in nf4):
            found[name] = 1
    return found


def _by_name(stored: Stored, name: str) -> Traced:
    scaled = stored.scaled.get(name)
    return whole({name: stored.tensors[name].shape if scaled is None else scaled.shape})[name]


def counterpart(held: Held, other: Stored) -> Traced | None:
    """Return the same tensor of another checkpoint, opened as those of the same model; none where it has none."""
    if (parts := other.loading.made.get(held.name)) is not None:
        return parts
    if held.shown in other.tensors or held.shown in other.scaled:
        return _by_name(other, held.shown)
    found = find_weight(other.tensors, held.shown.removesuffix(".weight"))
    return None if found is None else _by_name(other, found)


def energy_left(ours: Stored, held: Held, theirs: Stored, other: Traced | None) -> float | None:
    """Return the squared norm of the difference in what no matrix of the patch is, over the rows that both have.

    Args:
        other: what ``counterpart`` returns

    Returns:
        none where they cannot be compared: quantized in another way, of another shape, or missing
    """
    if other is None or held.parts.shape[1:] != other.shape[1:]:
        return None
    if not all(stored.is_float(part) for stored, one in ((ours, held.parts), (theirs, other)) for part in one.segments):
        return None
    common, total = min(math.prod(held.parts.shape), math.prod(other.shape)), 0.0
    for wanted in _chunks(held, common, _step(ours, held.parts, theirs, other)):
        total += _squared((ours, held.parts), (theirs, other), wanted)
    return total


def _chunks(held: Held, common: int, step: int) -> Iterator[Range]:
    for first, last in held.left:
        for start in range(first, min(last, common), step):
            stop = min(start + step, last, common)
            yield Range(start, stop, stop - start)


def _step(ours: Stored, held: Traced, theirs: Stored, other: Traced) -> int:
    """How many elements to compare at a time: whole experts of MXFP4, which is not read in parts of them."""
    own = [stored.scaled.get(part.name) for stored, one in ((ours, held), (theirs, other)) for part in one.segments]
    of_experts = any(scaled is not None and scaled.block is None for scaled in own)
    return math.prod(held.shape[1:]) if of_experts else _CHUNK


def _squared(ours: tuple[Stored, Traced], theirs: tuple[Stored, Traced], wanted: Range) -> float:
    import torch

    values = torch.zeros(wanted.numel)
    sides = ((*ours, 1), (*theirs, -1))
    read_all(read for stored, parts, sign in sides for read in range_reads(stored, parts, wanted, values, sign))
    return float(values.double().square().sum())
