"""Does a reference fit a model? Compared is what a repair takes apart; a vocabulary may have grown (LlamaFactory#6749).

A fine-tune that pads its vocabulary or adds tokens has more rows of embedding and head than what it was made from. No
patch changes these matrices by default, and where one is to, the rows beyond the smaller vocabulary stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

from oneshot.checkpoint.disk.files import TensorEntry, find_weight, list_tensors
from oneshot.checkpoint.loading.partitioned import skeleton
from oneshot.checkpoint.loading.segments import open_stored
from oneshot.errors import UserError


def check_reference(checkpoint: Path, reference: Path, *, trust_remote_code: bool = False) -> None:
    """Raise UserError unless the reference holds the model's matrices, all shapes alike but for the vocabulary's.

    The two may hold them in different forms (experts merged, or each by itself, or as the transposes of what the model
    computes with): then the model's class decides.
    """
    ours, theirs = list_tensors(checkpoint), list_tensors(reference)
    alike = False  # all blocks, as the model's class makes them of either
    for name, entry in ours.items():
        found = _found(theirs, name)
        other = theirs.get(found or "")
        if other is None and not (in_block(name) and (_is_matrix(name, entry) or _is_fused(entry))):
            continue  # a tied head may be stored in one of the two only
        if other is not None and (other.shape == entry.shape or other_rows(name, entry.shape, other.shape)):
            continue
        unlike: str | None = name
        if in_block(name) and (other is None or (_is_fused(entry) and _is_fused(other))):
            unlike = None if alike else _unlike(checkpoint, reference, trust_remote_code)
            alike = unlike is None
        if unlike is not None:
            shapes = other and f"has {found} of shape {list(other.shape)}, the model has {list(entry.shape)}"
            raise UserError(
                f"The reference {reference} {shapes or f'lacks {unlike}'}: give the aligned checkpoint that this model "
                "was fine-tuned from."
            )


def _is_matrix(name: str, entry: TensorEntry) -> bool:
    return name.endswith(".weight") and len(entry.shape) == 2


def _is_fused(entry: TensorEntry) -> bool:
    return len(entry.shape) == 3


def _unlike(checkpoint: Path, reference: Path, trust_remote_code: bool) -> str | None:
    """A tensor of the model's blocks that cannot be made of what the reference stores; none if there is none."""
    import torch

    model = skeleton(checkpoint, list_tensors(checkpoint), torch.float32, "eager", trust_remote_code)
    ours, theirs = open_stored(checkpoint, model).loading.made, open_stored(reference, model).loading.made
    shapes = {name: parts.shape for name, parts in theirs.items()}
    return next((name for name, parts in ours.items() if in_block(name) and shapes.get(name) != parts.shape), None)


def vocabularies(checkpoint: Path, reference: Path) -> tuple[int, int] | None:
    """Return the rows of both vocabularies, the model's first, where they differ."""
    ours, theirs = list_tensors(checkpoint), list_tensors(reference)
    for name, entry in ours.items():
        other = theirs.get(_found(theirs, name) or "")
        if other is not None and other_rows(name, entry.shape, other.shape):
            return entry.shape[0], other.shape[0]
    return None


def why_grown(checkpoint: Path, reference: Path) -> str | None:
    """Return the sentence that says by how many rows the vocabularies differ; none where they do not."""
    rows = vocabularies(checkpoint, reference)
    if rows is None:
        return None
    ours, theirs = rows
    return (
        f"The model's vocabulary has {abs(ours - theirs)} rows {'more' if ours > theirs else 'fewer'} than the "
        f"reference's ({ours} against {theirs}): rows that only one of them has are not compared and not patched."
    )


def in_block(name: str) -> bool:
    """Return whether a tensor is one of a numbered block: neither embedding nor head."""
    return any(part.isdigit() for part in name.split("."))


def other_rows(name: str, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether two tensors of these shapes are embeddings or heads of two vocabularies, alike but for rows."""
    matrix = len(one) == 2 and not re.search(r"wpe|pos", name)  # positions are no words
    known = not in_block(name) and (matrix or name.endswith("head.bias"))
    return known and one[:1] != other[:1] and one[1:] == other[1:]


def _found(tensors: dict[str, TensorEntry], name: str) -> str | None:
    return find_weight(tensors, name.removesuffix(".weight")) if name.endswith(".weight") else name
