"""Updates added to the weights of a loaded model, and whether they fit it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.experts import BareMatrix, ExpertMatrix, layers_of, weight_of
from oneshot.checkpoint.adapters.update import Factors, Update
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def merge_into(runtime: Runtime, model: nn.Module, update: Update) -> None:
    """Add an update to the model's own weights, in place, whole or partitioned. Collective.

    Raises:
        UserError: the update names a module that the model lacks, or does not fit it
    """
    import torch

    from oneshot.distributed.engine import modified

    layers, changes = layers_of(model), dict[Any, list[tuple[Any, Factors]]]()  # weight -> what is added to it
    for name, factors in update.items():
        check_fits(layers, name, factors)
        layer = layers[name]
        changes.setdefault(weight_of(layer), []).append((layer, factors))
    for weight, several in changes.items():
        with torch.no_grad(), modified(runtime, weight):  # of fused experts all at once
            for layer, factors in several:
                added = (factors.b @ factors.a).to(weight.device, weight.dtype)
                if isinstance(layer, ExpertMatrix):
                    weight.data[layer.index] += added.T if layer.transposed else added
                else:
                    weight.data += added


def check_fits(layers: dict[str, Any], name: str, factors: Factors) -> None:
    """Raise UserError unless the update of layer ``name`` fits the model's layer of that name.

    Args:
        layers: as ``layers_of`` returns them
    """
    from torch import nn

    module = layers.get(name)
    if not isinstance(module, (nn.Linear, ExpertMatrix, BareMatrix)):
        raise UserError(
            f"The adapter changes {name}, which is no linear layer of this base model, nor a router: check the "
            "base, or merge the adapter with PEFT."
        )
    found, shape = (factors.b.shape[0], factors.a.shape[1]), (module.out_features, module.in_features)
    if found == shape:
        return
    raise UserError(
        f"The adapter's update of {name} is {found[0]} x {found[1]}, the layer is {shape[0]} x {shape[1]}: the adapter "
        "belongs to another base model."
    )
