"""Where the values of a model's tensors lie in a checkpoint's, and back: transformers' own conversions, traced.

transformers renames, merges and splits tensors as it loads and saves them (a list of experts becomes one tensor). Its
own code is run on tensors without values that know which elements of which tensors theirs would be.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST = 1 << 16  # ranges of a tensor: of more, each is too short to be read alone
_TURNED = "^T"  # ends the name of a tensor that is stored under the rest of it with the last two dimensions swapped


@dataclass(frozen=True)
class Segment:
    """Elements ``start`` to ``stop`` (exclusive) of a flattened tensor."""

    name: str
    start: int
    stop: int

    @property
    def stored(self) -> str:
        """What the files, and messages, call the tensor."""
        return self.name.removesuffix(_TURNED)

    @property
    def is_turned(self) -> bool:
        """Whether it is stored with its last two dimensions swapped."""
        return self.name.endswith(_TURNED)


@dataclass(frozen=True)
class Traced:
    """A tensor without values: ranges of others that, one after another, are its own (contiguous, row after row).

    ``is_whole`` says that it is one of them, whole.
    """

    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    is_whole: bool = False

    @cached_property
    def ends(self) -> list[int]:
        """For each segment the element of this tensor that follows it."""
        return list(itertools.accumulate(segment.stop - segment.start for segment in self.segments))

    def take(self, start: int, stop: int) -> Iterable[Segment]:
        """Yield the ranges that are elements ``start`` to ``stop`` of this tensor."""
        at = bisect.bisect_right(self.ends, start)
        while start < stop:
            segment, end = self.segments[at], min(self.ends[at], stop)
            shift = segment.stop - self.ends[at]
            yield Segment(segment.name, start + shift, end + shift)
            start, at = end, at + 1

    # what transformers' operations ask of a tensor; what asks for more has no ranges

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if name not in _FUNCTIONS:
            raise NotImplementedError(name)
        return _FUNCTIONS[name](*args, **(kwargs or {}))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def contiguous(self) -> Traced:
        return self

    def squeeze(self, dim: int) -> Traced:
        kept = [n for at, n in enumerate(self.shape) if at != dim % self.ndim or n != 1]
        return Traced(tuple(kept), self.segments)

    def reshape(self, *shape: Any) -> Traced:
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        known = math.prod(n for n in wanted if n != -1)
        return Traced(tuple(math.prod(self.shape) // known if n == -1 else n for n in wanted), self.segments)

    def transpose(self, dim0: int, dim1: int) -> Traced:
        if not self.is_whole or {dim0 % self.ndim, dim1 % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            raise NotImplementedError("transpose")
        (own,) = self.segments
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return Traced(shape, (Segment(own.name + _TURNED, own.start, own.stop),))

    def chunk(self, chunks: int, dim: int = 0) -> list[Traced]:
        return _split(self, -(-self.shape[dim] // chunks), dim)


def whole(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Traced]:
    """Return tensors of these names and shapes as ranges of themselves."""
    return {name: Traced(tuple(shape), (Segment(name, 0, math.prod(shape)),), True) for name, shape in shapes.items()}


def _joined(shape: tuple[int, ...], segments: Iterable[Segment]) -> Traced:
    """A tensor of segments, those that follow one another made one."""
    found: list[Segment] = []
    for segment in segments:
        if found and found[-1].name == segment.name and found[-1].stop == segment.start:
            segment = Segment(segment.name, found.pop().start, segment.stop)
        found.append(segment)
        if len(found) > _MOST:
            raise NotImplementedError(f"a tensor in more than {_MOST} parts")
    return Traced(shape, tuple(found))


def _stack(tensors: list[Traced], dim: int = 0) -> Traced:
    rows = [Traced((*t.shape[:dim], 1, *t.shape[dim:]), t.segments) for t in tensors]
    if len({t.shape for t in tensors}) != 1:
        raise ValueError("tensors of different shapes cannot be stacked")
    return _cat(rows, dim)


def _cat(tensors: list[Traced], dim: int = 0) -> Traced:
    first = tensors[0].shape
    dim %= len(first)
    outer, inner = math.prod(first[:dim]), [math.prod(t.shape[dim:]) for t in tensors]
    shape = (*first[:dim], sum(t.shape[dim] for t in tensors), *first[dim + 1 :])
    if any((*t.shape[:dim], *t.shape[dim + 1 :]) != (*first[:dim], *first[dim + 1 :]) for t in tensors):
        raise ValueError("tensors of different shapes cannot be concatenated")
    rows = (t.take(row * n, (row + 1) * n) for row in range(outer) for t, n in zip(tensors, inner))
    return _joined(shape, itertools.chain.from_iterable(rows))


def _split(tensor: Traced, sizes: int | list[int], dim: int = 0) -> list[Traced]:
    dim %= tensor.ndim
    whole, inner = tensor.shape[dim], math.prod(tensor.shape[dim + 1 :])
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
    if sum(sizes) != whole:
        raise ValueError("the parts of a tensor are not the whole of it")
    found, begin = [], 0
    for size in sizes:
        shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
        rows = range(begin * inner, math.prod(tensor.shape), whole * inner)
        found.append(
            _joined(shape, itertools.chain.from_iterable(tensor.take(row, row + size * inner) for row in rows))
        )
        begin += size
    return found


def _unbind(tensor: Traced, dim: int = 0) -> list[Traced]:
    return [part.squeeze(dim) for part in _split(tensor, 1, dim)]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "stack": _stack, "cat": _cat, "split": _split, "chunk": Traced.chunk, "unbind": _unbind, "squeeze": Traced.squeeze,
    "transpose": Traced.transpose,
}  # fmt: skip


@dataclass(frozen=True)
class Loading:
    """How a model's tensors are made of a checkpoint's.

    Attributes:
        made: tensor of the model -> the ranges that it is
        reasons: tensor of the model -> why it is none
        conversions: those of transformers' that were used, by which it also goes back
    """

    made: dict[str, Traced]
    reasons: dict[str, str]
    conversions: list[Any]


def trace_loading(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> Loading:
    """Return what ``from_pretrained`` would make of stored tensors of these names and shapes.

    Args:
        model: on any device, also partitioned: its names, and shapes where an operation asks for them
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    transforms = get_model_conversion_mapping(model)
    converters = {p: t for t in transforms if isinstance(t, WeightConverter) for p in t.source_patterns}
    own = dict.fromkeys(model.state_dict(keep_vars=True), True)
    made: dict[str, Traced] = {}
    merged: dict[str, Any] = {}
    stored = whole(shapes)
    for key in sorted(shapes, key=dot_natural_key):
        target, pattern = _renamed(key, transforms, model.base_model_prefix, own)
        if target not in own:
            continue
        if pattern is None:
            made.setdefault(target, stored[key])
            continue
        if target not in merged:
            merged[target] = deepcopy(converters[pattern])
        merged[target].add_tensor(target, key, pattern, stored[key])
    reasons: dict[str, str] = {}
    for target, converter in merged.items():
        try:
            found = converter.convert(target, model=_Unpartitioned(model), config=model.config)
            made |= {name: t[0] if isinstance(t, list) else t for name, t in found.items()}
        except Exception as error:  # whatever an operation does with a tensor that is none
            operations = ", ".join(type(operation).__name__ for operation in converter.operations)
            names = [target.replace(converter.target_patterns[0], each) for each in converter.target_patterns]
            said = f"of stored tensors by {operations} ({str(error) or type(error).__name__})"
            reasons |= {name: f"transformers makes {name} {said}" for name in names}
    return Loading(made, reasons, [transform for transform in transforms if transform.was_used()])


@dataclass(frozen=True)
class _Unpartitioned:
    """A model whose parameters have the shapes that they have whole and in full precision."""

    model: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def get_parameter(self, name: str) -> Any:
        """Stands for a parameter; has a shape alone."""
        found = self.model.get_parameter(name)
        shape = getattr(found, "unpacked_shape", None) or getattr(found, "ds_shape", found.shape)
        return SimpleNamespace(shape=tuple(shape))


def _renamed(key: str, transforms: list[Any], prefix: str, own: dict[str, bool]) -> tuple[str, str | None]:
    """What ``from_pretrained`` calls a stored tensor, and which converter's pattern it matches."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    target, pattern = rename_source_key(key, renamings, converters, prefix, own)
    if target not in own and key in own:
        target, pattern = rename_source_key(key, [], [], prefix, own)
    return target, pattern


def trace_saving(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Traced]:
    """Return what ``save_pretrained`` would store of a model's tensors of these names and shapes, by the stored names.

    Raises:
        NotImplementedError: what is stored are no ranges of them
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        stored: Any = revert_weight_conversion(model, cast(Any, whole(shapes)))
    except Exception as error:  # as in loading
        raise NotImplementedError(str(error) or type(error).__name__) from error
    if any(segment.is_turned for parts in stored.values() for segment in parts.segments):
        raise NotImplementedError("transpose")
    return dict(stored)
