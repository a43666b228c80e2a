"""Weights that a config ties, but that the files hold apart: kept apart, as transformers' from_pretrained does.

``tie_word_embeddings: true`` beside another ``lm_head`` (transformers#42612, #45127) is a contradiction: transformers
takes both tensors, servers and older versions tie them. Here every way of reading gives transformers' head, and what is
written says false.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.disk.files import TensorEntry, find_weight
from oneshot.checkpoint.layout import Range
from oneshot.checkpoint.reads.ranges import read_range, torch_dtype

if TYPE_CHECKING:
    import torch

TIES = "tie_word_embeddings"  # of a config
_CHUNK = 4 << 20  # elements compared at a time
FEW = 4096  # of a tensor at first: what differs shows in them, and nothing more is read


def untie(model: Any, tensors: dict[str, TensorEntry]) -> None:
    """Give a model on the meta device each tied weight that a checkpoint holds beside its source, with other values."""
    import torch
    from torch import nn

    for target, source in list(model.all_tied_weights_keys.items()):
        one, other = (_stored(tensors, name) for name in (target, source))
        if one is None or other is None or one == other or _same(tensors, one, other):
            continue
        path, _, name = target.rpartition(".")
        tied = model.get_parameter(source)
        setattr(model.get_submodule(path), name, nn.Parameter(torch.empty_like(tied, device="meta")))
        del model.all_tied_weights_keys[target]
        keep_apart(model.config)


def keep_apart(config: Any) -> None:
    """Have a model's config say that embedding and head are two weights."""
    for part in (config, config.get_text_config()):
        if getattr(part, TIES, False):
            setattr(part, TIES, False)


def is_untied(model: Any, folder: Path) -> bool:
    """Return whether a model holds apart what the config of the checkpoint in ``folder`` ties."""
    return not _ties(model.config) and _ties(type(model.config).from_pretrained(folder))


def _ties(config: Any) -> bool:
    return any(getattr(part, TIES, False) for part in (config, config.get_text_config()))


def alike(one: TensorEntry, other: TensorEntry, names: tuple[str, str], limit: int | None = None) -> bool:
    """Return whether two tensors are the same, up to the coarser dtype, in all or in the first ``limit`` elements."""
    import torch

    total = math.prod(one.shape)
    if one.shape != other.shape:
        return False
    pairs = list(zip((one, other), names))
    dtype = min((torch_dtype(entry, name) for entry, name in pairs), key=lambda each: each.itemsize)
    for start in range(0, min(total, limit or total), _CHUNK):
        stop = min(start + _CHUNK, total, limit or total)
        parts = [_part(entry, name, Range(start, stop, stop - start)).to(dtype) for entry, name in pairs]
        if not torch.equal(*parts):
            return False
    return True


def _same(tensors: dict[str, TensorEntry], one: str, other: str) -> bool:
    pair = tensors[one], tensors[other], (one, other)
    return alike(*pair, limit=FEW) and alike(*pair)


def _stored(tensors: dict[str, TensorEntry], name: str) -> str | None:
    if name in tensors or not name.endswith(".weight"):
        return name if name in tensors else None
    return find_weight(tensors, name.removesuffix(".weight"))


def _part(entry: TensorEntry, name: str, part: Range) -> torch.Tensor:
    import torch

    values = torch.empty(part.numel, dtype=torch_dtype(entry, name))
    read_range(entry, part, values, name)
    return values
