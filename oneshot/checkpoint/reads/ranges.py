"""Read element ranges of tensors straight from safetensors files: no more bytes than asked for, no full tensor.

In the order of the files, in large requests of which several are under way (``storage.py`` says how many), without
mmap. Bytes that a manifest has checksums of are compared with them on the way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from oneshot.checkpoint.disk.files import MANIFEST, TensorEntry
from oneshot.checkpoint.layout import ITEM_SIZES, Range
from oneshot.checkpoint.reads.storage import ALIGNED, OpenFile, Storage, fill, opened, storage_of
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch

CHUNK = 16 << 20  # bytes of a piece with a checksum, and of a request, at most
_BUFFER = 3 * CHUNK  # bytes that the requests under way may hold, together
Piece = tuple[int, int, str]  # first element of a tensor, last + 1, XXH3-64 of their bytes (hexadecimal)


@dataclass(frozen=True, eq=False)
class Read:
    """A range of a stored tensor that is wanted, and where it goes.

    A piece is checked by whoever wants its first element, so that ranks which share a tensor check each piece once.
    Where it goes on beyond the range, what is missing is read for the check alone.

    Attributes:
        wanted: elements of the stored tensor
        out: (wanted.size,), contiguous, on any device; its dtype may differ from the file's. What is beyond
            ``wanted.numel`` becomes zero. None reads for the checksums alone
        name: the tensor's, for messages
        pieces: the whole tensor's, in order, of CHUNK bytes at most; none checks nothing
        take: (first element of the stored tensor, values from there on in the file's dtype, on the CPU, which are gone
            afterwards) -> what is done with them, in whatever thread, instead of copying them to ``out``
    """

    entry: TensorEntry
    wanted: Range
    out: torch.Tensor | None
    name: str = "a tensor"
    pieces: Sequence[Piece] = ()
    take: Callable[[int, torch.Tensor], Any] | None = None


@dataclass(frozen=True)
class _Part:
    """Elements ``start`` to ``stop`` of a read, read on to ``end`` where their checksum is of so many."""

    read: Read
    start: int
    stop: int
    end: int
    checksum: str = ""

    @property
    def begin(self) -> int:
        """First byte in the file."""
        return _byte(self.read, self.start)

    @property
    def nbytes(self) -> int:
        return _byte(self.read, self.end) - self.begin


@dataclass
class _Block:
    """One request: parts that follow one another in a file."""

    file: OpenFile
    parts: list[_Part]

    @property
    def end(self) -> int:
        return self.parts[-1].begin + self.parts[-1].nbytes

    @property
    def nbytes(self) -> int:
        return self.end - self.parts[0].begin


@dataclass
class _Buffers:
    """Memory of each thread for what it reads; page-locked where values go on to a GPU."""

    pinned: bool
    stopped: bool = False  # a read has failed, or nobody waits any more
    _own: threading.local = field(default_factory=threading.local)

    def of(self, nbytes: int) -> torch.Tensor:
        """So many bytes, their first one where O_DIRECT wants it."""
        import torch

        whole: torch.Tensor | None = getattr(self._own, "whole", None)
        if whole is None or len(whole) < nbytes + ALIGNED:
            whole = self._own.whole = torch.empty(nbytes + ALIGNED, dtype=torch.uint8, pin_memory=self.pinned)
        first = -whole.data_ptr() % ALIGNED
        return whole[first : first + nbytes]


def piece_read(entry: TensorEntry, piece: Piece, name: str) -> Read:
    """Return the read of a piece for its checksum alone."""
    return Read(entry, Range(piece[0], piece[1], 0), None, name, [piece])


def read_range(
    entry: TensorEntry, wanted: Range, out: torch.Tensor, name: str = "a tensor", pieces: Sequence[Piece] = ()
) -> None:
    """Fill ``out`` with a range of one tensor; arguments as of ``Read``, raises as ``read_in_order``."""
    read_all([Read(entry, wanted, out, name, pieces)])


def read_all(reads: Iterable[Read]) -> None:
    """Do as ``read_in_order``, and wait for all."""
    for _ in read_in_order(reads):
        pass


def read_in_order(reads: Iterable[Read]) -> Iterator[Read]:
    """Fill what is wanted, several requests at a time, and yield each read, in the order of the files, once it is done.

    An error is raised after all have been yielded, those behind it unread, so that ranks which exchange what each has
    read stay in step.

    Raises:
        UserError: a file ends too soon, its dtype cannot be read, or its bytes are not those that were written
    """
    ordered = sorted(reads, key=file_order)
    problem: Exception | None = None
    with contextlib.ExitStack() as stack:
        buffers = _Buffers(pinned=any(read.out is not None and read.out.is_cuda for read in ordered))
        waiting = _start(stack, ordered, buffers)
        for read in ordered:
            for future in waiting.pop(read):
                try:
                    future.result()
                except (OSError, UserError) as error:
                    buffers.stopped, problem = True, problem or error
            yield read
    if problem is not None:
        raise problem


def _start(stack: contextlib.ExitStack, ordered: list[Read], buffers: _Buffers) -> dict[Read, list[Future[None]]]:
    """Begin to read; each read's requests."""
    of_folder: dict[Path, set[Path]] = {}
    for read in ordered:
        if read.out is not None:  # for its checksum alone any dtype is read, as the bytes that it is
            torch_dtype(read.entry, read.name)
            read.out[read.wanted.numel :] = 0
        if read.wanted.numel:
            of_folder.setdefault(read.entry.shard.parent, set()).add(read.entry.shard)
    ways = {folder: storage_of(files) for folder, files in of_folder.items()}
    blocks = list(_blocks(ordered, stack, ways))
    largest = max((block.nbytes for block in blocks), default=1)
    threads = max(1, min(max((way.in_flight for way in ways.values()), default=1), _BUFFER // largest, len(blocks)))
    pool = stack.enter_context(ThreadPoolExecutor(threads, "read"))
    stack.callback(setattr, buffers, "stopped", True)  # before the pool waits for its threads
    waiting: dict[Read, list[Future[None]]] = {read: [] for read in ordered}
    for block in blocks:
        future = pool.submit(_do, block, buffers)
        for read in dict.fromkeys(part.read for part in block.parts):
            waiting[read].append(future)
    return waiting


def _blocks(ordered: list[Read], stack: contextlib.ExitStack, ways: dict[Path, Storage]) -> Iterator[_Block]:
    """Cut what is wanted into requests, in the order of the files."""
    block: _Block | None = None
    for read in ordered:
        path = read.entry.shard
        for part in _parts(read, ways[path.parent].block) if read.wanted.numel else ():
            if block is None or block.file.path != path:
                file = stack.enter_context(opened(path, ways[path.parent].direct))
            elif block.end == part.begin and block.nbytes + part.nbytes <= ways[path.parent].block:
                block.parts.append(part)
                continue
            if block is not None:
                yield block
            block = _Block(file, [part])
    if block is not None:
        yield block


def _parts(read: Read, most: int) -> Iterator[_Part]:
    """Cut a read where the pieces that it has to check begin, and what it need not check at multiples of ``most``."""
    wanted, item = read.wanted, ITEM_SIZES[read.entry.dtype]
    own = [piece for piece in read.pieces if wanted.start <= piece[0] < wanted.stop]
    first = own[0][0] if own else wanted.stop
    start = wanted.start
    while start < first:
        stop = min(first, start + max(1, (most - _byte(read, start) % most) // item))
        yield _Part(read, start, stop, stop)
        start = stop
    for start, end, checksum in own:
        yield _Part(read, start, min(end, wanted.stop), end, checksum)


def _do(block: _Block, buffers: _Buffers) -> None:
    """Read a block: what needs no change straight to where it goes, the rest by way of this thread's memory."""
    import torch

    if buffers.stopped:
        return
    file, begin = block.file, block.parts[0].begin
    direct = file.direct
    lead = begin % ALIGNED if direct else 0
    staged, at = buffers.of(-(-(lead + block.nbytes) // ALIGNED) * ALIGNED), lead
    memory: list[list[torch.Tensor]] = []  # for each part the bytes that it is read into
    for part in block.parts:
        place = _place(part)
        kept = place.view(torch.uint8) if place is not None and not direct and _fits(part.read) else staged[:0]
        memory.append([kept, staged[at + len(kept) : at + part.nbytes]])
        at += part.nbytes
    views = [staged] if direct else [own for pair in memory for own in pair]
    got = fill(file, begin - lead, [_memory(view) for view in views if len(view)]) - lead
    for part, (kept, rest) in zip(block.parts, memory):
        got -= part.nbytes
        if got < 0:
            raise UserError(
                f"{file.path} ended in the middle of {part.read.name}: the file was cut off, copy it again."
            )
        if part.checksum:
            _check(part, kept, rest)
        place = _place(part)
        if place is not None and not len(kept):
            _put(part, place, rest[: (part.stop - part.start) * ITEM_SIZES[part.read.entry.dtype]])


def _place(part: _Part) -> torch.Tensor | None:
    """Where the values of a part go."""
    out, first = part.read.out, part.read.wanted.start
    return None if out is None else out[part.start - first : part.stop - first]


def _fits(read: Read) -> bool:
    """Whether the bytes of the file are those of ``out``."""
    out, dtype = read.out, torch_dtype(read.entry, read.name)
    return out is not None and read.take is None and out.dtype == dtype and out.device.type == "cpu"


def _put(part: _Part, place: torch.Tensor, data: torch.Tensor) -> None:
    dtype = torch_dtype(part.read.entry, part.read.name)
    if data.storage_offset() % dtype.itemsize:  # a file whose tensors are not aligned
        data = data.clone()
    if part.read.take is not None:
        part.read.take(part.start, data.view(dtype))
    else:
        place.copy_(data.view(dtype).to(place.device))


def _check(part: _Part, kept: torch.Tensor, rest: torch.Tensor) -> None:
    """Compare a piece with its checksum."""
    digest = xxhash.xxh3_64(_memory(kept))
    digest.update(_memory(rest))
    if digest.hexdigest() != part.checksum:
        raise UserError(
            f"{part.read.entry.shard} was altered: {part.read.name} does not have the checksum that {MANIFEST} gives "
            f"for elements {part.start} to {part.end}; copy the file again."
        )


def _memory(data: torch.Tensor) -> memoryview:
    return memoryview(data.numpy())  # type: ignore[arg-type]


def file_order(read: Read) -> tuple[str, int]:
    """Return the key by which reads are sorted into the order of the files."""
    return str(read.entry.shard), _byte(read, read.wanted.start)


def _byte(read: Read, element: int) -> int:
    return read.entry.offset + element * ITEM_SIZES[read.entry.dtype]


def torch_dtype(entry: TensorEntry, name: str) -> torch.dtype:
    """Return torch's dtype of a stored tensor; UserError if it has none that oneshot reads."""
    import torch

    names = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    }  # fmt: skip
    if entry.dtype not in names:
        raise UserError(f"{entry.shard} holds {name} as {entry.dtype}, which oneshot cannot partition.")
    return names[entry.dtype]
