"""Liger's fused kernels for rotary positions, norms and MLPs, where the user asks for them."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from oneshot.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def check_liger(model_type: str) -> None:
    """Raise UserError unless Liger kernels can be used here: a GPU, the package, and an architecture that it knows."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("Setting model.liger needs a GPU: leave it out.")
    if model_type not in _known_to_liger():
        raise UserError(f"Setting model.liger: Liger has no kernels for {model_type} models: leave it out.")


def use_liger(model: nn.Module) -> None:
    """Replace the kernels of a transformers model, in place; the loss stays ours, which weighs tokens over all ranks.

    Liger patches some functions of the architecture's module in transformers too, for the rest of the process.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def _known_to_liger() -> Container[str]:
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UserError(
            "Setting model.liger needs the package liger-kernel: install it with pip install 'oneshot[liger]', or "
            "leave the setting out."
        ) from error
    known: Container[str] = MODEL_TYPE_TO_APPLY_LIGER_FN
    return known
