"""Add low-rank updates to a checkpoint on disk: streamed tensor by tensor, in pieces of rows, no model in memory.

A weight W becomes W + sum_i w_i s_i (b_i @ a_i), computed in fp32 in the order in which PEFT multiplies, and rounded
once to the dtype of the file. Tensors that nothing is added to are copied byte for byte. Ranks share the tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from oneshot.checkpoint.adapters.update import Factors, Update
from oneshot.checkpoint.disk.files import TensorEntry, list_tensors
from oneshot.checkpoint.disk.folders import naming, replacing
from oneshot.checkpoint.layout import ITEM_SIZES, Range, tensor_bytes
from oneshot.checkpoint.merging.merge_plan import Change, MergePlan, plan_merge, shared_out
from oneshot.checkpoint.quantized.dequantize import through_nf4, unpacked
from oneshot.checkpoint.reads.manifest import Pieces, write_manifest
from oneshot.checkpoint.reads.ranges import Piece, read_range, torch_dtype
from oneshot.checkpoint.writing.beside import carry
from oneshot.checkpoint.writing.merge_experts import Term, experts_through_nf4
from oneshot.checkpoint.writing.write import Slot, create_shards, opened_shards, write_range
from oneshot.distributed.phases import count
from oneshot.distributed.runtime import Runtime, agree, gather_objects
from oneshot.distributed.steps import BYTES, steps
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch

_PIECE = 8 << 20  # bytes read and written at a time, about
_BLOCK = 1 << 18  # elements computed at a time, about: in fp32 they stay in the processor's cache
_UNCHANGED = Change()
_HELD = 2  # parameters of experts, both of a layer: files hold the parts of one among those of the other
_ROWS = 64  # rows come in multiples of this: BLAS then gives the bits that it gives for the whole product
_COPIED_AS = {1: "U8", 2: "I16", 4: "I32", 8: "I64"}  # bytes are copied as integers: dtypes without a torch name too


def merge(
    runtime: Runtime,
    plan: MergePlan,
    folder: Path,
    beside: Callable[[Path], None] | None = None,
    last: Callable[[Path], None] | None = None,
) -> None:
    """Write the merged checkpoint as ``folder``, which appears when it is complete. Collective.

    Args:
        beside: writes further files into the folder, on rank 0, before it appears and before the weights are in it
        last: the same, once they are

    Raises:
        UserError: on every rank, if any rank could not read or write, or a weight is not finite after the merge
    """
    shares = shared_out(plan, runtime.world_size)
    with replacing(runtime, folder) as temporary:
        with agree(runtime, f"creating the checkpoint {folder}"):
            if runtime.is_main:
                if beside is not None:  # first: a marker is there before the shards are
                    beside(temporary)
                create_shards(temporary, plan.slots, plan.headers)
                carry(plan.base, plan.files, temporary, plan.config, plan.tokenizer)
        with agree(runtime, f"writing the checkpoint {folder}"):
            written = _write_share(runtime, plan, shares[runtime.rank], temporary)
        count(
            read=sum(tensor_bytes(plan.tensors[name].shape, plan.tensors[name].dtype) for name in shares[runtime.rank])
        )
        everything = gather_objects(runtime, written)
        with agree(runtime, f"checking the checkpoint {folder}"):
            if runtime.is_main:
                found = list_tensors(temporary)
                assert {n: e.shape for n, e in found.items()} == {n: s.shape for n, s in plan.slots.items()}
                write_manifest(temporary, everything, {})
                if last is not None:
                    last(temporary)


def merge_update(
    runtime: Runtime,
    checkpoint: Path,
    update: Update,
    folder: Path,
    *,
    tokenizer: Path | None = None,
    trust_remote_code: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write ``folder`` as the checkpoint with an update added, from its files. Collective.

    The model's card and a safety-degraded marker are not carried over: what the result is, the caller knows.

    Args:
        tokenizer: folder of the tokenizer that goes along; none: the checkpoint's own
        beside: as of ``merge``

    Raises:
        UserError: the update does not fit the checkpoint, or as ``merge``
    """
    terms = {module: Term(Factors(f.b.float().cpu(), f.a.float().cpu()), 1.0) for module, f in update.items()}
    plan = plan_merge(checkpoint, [("The update", terms)], trust_remote_code=trust_remote_code)
    merge(runtime, replace(plan, tokenizer=tokenizer), folder, beside)


def _write_share(runtime: Runtime, plan: MergePlan, share: list[str], folder: Path) -> Pieces:
    """Compute and write tensors, one piece being written while the next is computed."""
    written: Pieces = {name: [] for name in share}
    nbytes = sum(tensor_bytes(plan.slots[name].shape, plan.slots[name].dtype) for name in share)
    with (
        opened_shards(folder, plan.slots) as descriptors,
        ThreadPoolExecutor(1) as writer,
        steps("weights merged", nbytes, BYTES) as going,
    ):
        before: Future[None] | None = None
        for name, start, values in _merged(runtime, plan, share):
            if before is not None:
                before.result()
            slot = plan.slots[name]
            before = writer.submit(_write, descriptors[slot.shard], slot, start, values, folder, written[name])
            going.add(values.nbytes)
        if before is not None:
            before.result()
    return written


def _write(descriptor: int, slot: Slot, start: int, values: torch.Tensor, folder: Path, written: list[Piece]) -> None:
    stored = slot if values.is_floating_point() else replace(slot, dtype=_COPIED_AS[values.element_size()])
    with naming(folder / slot.shard):
        written += write_range(descriptor, stored, Range(start, start + len(values), len(values)), values)


def _merged(runtime: Runtime, plan: MergePlan, share: list[str]) -> Iterator[tuple[str, int, torch.Tensor]]:
    """What is to be written, piece by piece: (tensor, first element, values). Values last until the second next."""
    import torch

    buffers = itertools.cycle([torch.empty(_PIECE, dtype=torch.uint8) for _ in range(2)])
    held: dict[str, dict[str, torch.Tensor]] = {}
    for name in share:
        slot, terms, change = plan.slots[name], plan.terms.get(name), plan.changes.get(name, _UNCHANGED)
        altered = terms is not None or change is not _UNCHANGED
        row = max(1, slot.shape[-1]) if len(slot.shape) > 1 else 1
        whole = _whole(runtime, plan, name, held)
        entry, item = plan.tensors[name], ITEM_SIZES[slot.dtype]
        if not altered and whole is None:
            entry = replace(entry, dtype=_COPIED_AS[item])
        rows = math.prod(slot.shape) // row
        for first, last in _pieces(rows, _PIECE // (row * item), terms or []):
            start, stop = first * row, last * row
            values = _filled(next(buffers), plan, name, entry, start, stop) if whole is None else whole[start:stop]
            if altered:
                _alter(values.view(-1, row), first, terms or [], change)
                _check_finite(values, name, slot.dtype, plan.base)
            yield name, start, values


def _whole(
    runtime: Runtime, plan: MergePlan, name: str, held: dict[str, dict[str, torch.Tensor]]
) -> torch.Tensor | None:
    """A whole tensor, flat, where it is not the stored one: another in its place, or one after NF4.

    Args:
        held: parameters of experts that were last read whole, kept from call to call
    """
    change = plan.changes.get(name)
    if change is not None and change.whole is not None:
        dtype = torch_dtype(replace(plan.tensors[name], dtype=plan.slots[name].dtype), name)
        return change.whole.to(dtype, copy=True).flatten()
    if (parameter := plan.fused.get(name)) is not None and plan.experts is not None:
        if parameter not in held:
            if len(held) == _HELD:
                del held[next(iter(held))]
            held[parameter] = experts_through_nf4(plan.experts, parameter, runtime.device, double=plan.double_quant)
        return held[parameter].pop(name)
    return _dequantized(runtime, plan, name) if name in plan.packed or name in plan.quantized else None


def _dequantized(runtime: Runtime, plan: MergePlan, name: str) -> torch.Tensor:
    """A whole weight after NF4, flat."""
    import torch

    entry, shape = plan.tensors[name], plan.slots[name].shape
    stored = _filled(torch.empty(0, dtype=torch.uint8), plan, name, entry, 0, math.prod(entry.shape))
    if name in plan.packed:
        return unpacked(stored, plan.packed[name], runtime.device)
    return through_nf4(stored.view(shape), runtime.device, double=plan.double_quant)


def _filled(
    buffer: torch.Tensor, plan: MergePlan, name: str, entry: TensorEntry, start: int, stop: int
) -> torch.Tensor:
    """Elements of a stored tensor, flat, in the buffer if they fit; checked where the checkpoint has checksums."""
    import torch

    dtype = torch_dtype(entry, name)
    size = (stop - start) * dtype.itemsize
    fits = size <= len(buffer)
    values = buffer[:size].view(dtype) if fits else torch.empty(stop - start, dtype=dtype)
    read_range(entry, Range(start, stop, stop - start), values, name, plan.pieces.get(name, ()))
    return values


def _alter(rows: torch.Tensor, first: int, terms: list[Term], change: Change) -> None:
    """Change rows of a tensor, of which the first has number ``first``, in place: in fp32, rounded once."""
    import torch

    if change.rows is not None:
        for number, values in zip(*change.rows):
            if first <= number < first + len(rows):
                rows[number - first] = values.to(rows.dtype)
    if not terms and change.added is None and change.norms is None:
        return
    wide = torch.promote_types(rows.dtype, torch.float32)
    for begin, end in _cuts(len(rows), _BLOCK // rows.shape[1]):
        total = rows[begin:end].to(wide, copy=True)
        own = slice(first + begin, first + end)
        for term in terms:
            if term.first <= own.start and own.stop <= term.first + len(term.factors.b):
                product = term.factors.b[own.start - term.first : own.stop - term.first] @ term.factors.a
                total += product.mul_(term.scale)  # scaled after the product: PEFT's order, hence its bits
        if change.added is not None:
            total += change.added[own, None]
        if change.norms is not None:
            total *= (change.norms[own] / torch.linalg.norm(total, dim=1))[:, None]
        rows[begin:end] = total


def _check_finite(values: torch.Tensor, name: str, dtype: str, base: Path) -> None:
    import torch

    if not torch.stack(torch.aminmax(values)).isfinite().all():  # NaN is both the least and the greatest
        raise UserError(
            f"{name} holds NaN or infinity after the merge, in {dtype}: check that {base} is finite, and that the "
            "adapter is not too large for it."
        )


def _pieces(rows: int, most: int, terms: list[Term]) -> Iterator[tuple[int, int]]:
    """Cut rows as ``_cuts`` does, and wherever a summand begins or ends: each has a part of it whole, or nothing."""
    edges = {0, rows, *(edge for term in terms for edge in (term.first, term.first + len(term.factors.b)))}
    for first, last in itertools.pairwise(sorted(edges)):
        for start, stop in _cuts(last - first, most):
            yield first + start, first + stop


def _cuts(rows: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of about ``most``, none of less than ``_ROWS`` where there are as many."""
    step = max(_ROWS, most // _ROWS * _ROWS)
    starts = [start for start in range(0, rows, step) if start == 0 or rows - start >= _ROWS]
    yield from zip(starts, [*starts[1:], rows])
