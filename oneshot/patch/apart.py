"""Is there anything to repair? A model that is its own reference, or an adapter of zeros, has no update to work on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from oneshot.checkpoint.adapters.update import Update
from oneshot.checkpoint.disk.files import TensorEntry, find_weight, is_degraded, list_tensors, local_folder
from oneshot.checkpoint.layout import FLOATS, ITEM_SIZES
from oneshot.checkpoint.loading.ties import FEW, alike
from oneshot.distributed.runtime import agree
from oneshot.errors import UserError
from oneshot.patch.request import Request
from oneshot.settings import Settings


def check_named_apart(settings: Settings) -> None:
    """Raise UserError where the settings name one checkpoint as model and as reference; nothing is downloaded."""
    path, reference = settings.model.path, settings.reference
    if path is None or reference is None:
        return
    ours, theirs = local_folder(path), local_folder(reference)
    if (path == reference and settings.model.revision == settings.reference_revision) or (
        ours is not None and theirs is not None and ours.resolve() == theirs.resolve()
    ):
        raise UserError(
            f"Model and reference are the same, {path}: give the fine-tuned checkpoint as --model.path, and what it "
            "was fine-tuned from as --reference."
        )


def check_update(request: Request) -> None:
    """Raise UserError where the fine-tune changed nothing that a patch may change, or the reference is no aligned one.

    Collective; nothing is loaded.
    """
    source, reference = request.source, request.reference
    if request.adapter is not None and not is_finite(request.adapter.update):
        raise UserError(
            f"The adapter {source.adapter} holds numbers that are none (NaN or infinite): its training has diverged, "
            "so train it anew."
        )
    if request.adapter is not None and is_zero(request.adapter.update):
        raise UserError(
            f"The adapter {source.adapter} holds an update of zeros, as one that was never trained: give the trained "
            "one."
        )
    with agree(request.runtime, "comparing model and reference"):
        if request.runtime.is_main and reference is not None:
            if is_degraded(reference):
                raise UserError(
                    f"The reference {reference} is marked as safety-degraded: give the aligned checkpoint that the "
                    "model was fine-tuned from."
                )
            patched = request.recipe.method.needs_update
            if request.adapter is None and same_weights(source.checkpoint, reference, in_blocks=patched):
                raise UserError(
                    f"Model and reference hold the same weights ({source.checkpoint} and {reference}): give the "
                    "fine-tuned checkpoint as --model.path, and what it was fine-tuned from as --reference."
                )


def is_finite(update: Update) -> bool:
    """Return whether all numbers of an update's factors are finite."""
    return all(bool(factor.isfinite().all()) for factors in update.values() for factor in (factors.a, factors.b))


def is_zero(update: Update) -> bool:
    """Return whether an update adds nothing."""
    products = (f.b.abs().amax(0) * f.a.abs().amax(1) for f in update.values())
    return not any(bool(product.any()) for product in products)


def same_weights(one: Path, other: Path, *, in_blocks: bool) -> bool:
    """Return whether two checkpoints have the same weights, whatever dtype they are stored in.

    A few elements of each are compared first, so that all are read only where these are alike. What is quantized is
    compared by its bytes; a matrix that the other holds in another form, experts apart or in fewer bits, may differ.

    Args:
        in_blocks: look only at matrices of the blocks, whose difference is what a method takes apart
    """
    ours, theirs = list_tensors(one), list_tensors(other)
    pairs = []
    for name, entry in ours.items():
        found = find_weight(theirs, name.removesuffix(".weight")) if name.endswith(".weight") else name
        matrix = len(entry.shape) >= 2 and any(part.isdigit() for part in name.split("."))
        if not matrix and in_blocks:
            continue
        pair = None if found is None or found not in theirs else _comparable(entry, theirs[found])
        if pair is not None and found is not None:
            pairs.append((*pair, (name, found)))
        elif matrix:
            return False
    few = all(alike(*pair, limit=FEW) for pair in pairs)
    return bool(pairs) and few and all(alike(*pair) for pair in pairs)


def _comparable(one: TensorEntry, other: TensorEntry) -> tuple[TensorEntry, TensorEntry] | None:
    """Two stored tensors as they can be compared, none where they are quantized in another way."""
    if {one.dtype, other.dtype} <= set(FLOATS):
        return one, other
    if one.dtype == other.dtype and ITEM_SIZES[one.dtype] == 1:
        return replace(one, dtype="U8"), replace(other, dtype="U8")
    return None
