"""What a checkpoint's tensors are in its model: which are linear layers, which are shared, which would be 4-bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.classes import is_held_in_nf4, is_plain
from oneshot.checkpoint.disk.files import find_weight
from oneshot.checkpoint.loading.partitioned import skeleton
from oneshot.checkpoint.loading.ties import is_untied
from oneshot.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """The layers of a checkpoint's model; the model itself holds no weights.

    Attributes:
        model: on the meta device, parameters and all
        linears: module name -> ``nn.Linear`` (on the meta device), output head included
        patchable: names of those whose weight can be read and changed by itself, output head left out
        others: stored weights of embeddings, norms and whatever else is no linear layer
        transposed: stored tensors of Conv1D layers, (n, m) where a linear layer has (m, n)
        tied: module names and stored tensors of an embedding that is also the output head
        quantized: stored tensors that QLoRA loads in 4 bits: linear layers, as transformers chooses them
        converted: stored tensors that transformers splits, fuses or permutes while it loads them
        untied: whether embedding and head are two weights though the config ties them
        head, embedding: names of these modules, where the model has them
    """

    model: Any
    linears: dict[str, nn.Linear]
    patchable: list[str]
    others: frozenset[str]
    transposed: frozenset[str]
    tied: frozenset[str]
    quantized: frozenset[str]
    converted: frozenset[str]
    untied: bool
    head: str | None = None
    embedding: str | None = None


def architecture_of(folder: Path, tensors: dict[str, Any], *, trust_remote_code: bool = False) -> Architecture:
    """Read what the stored tensors are from the folder's config.

    Args:
        tensors: names of the folder's weights, packed ones under the name of the weight that they hold

    Raises:
        UserError: transformers cannot build a causal language model from the config
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    try:
        model = skeleton(folder, tensors, torch.bfloat16, "eager", trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # what is wrong in a config shows as an error of any kind, in the model's own code
        raise UserError(
            f"{folder / 'config.json'} describes no model that can be built here ({first_line(error)}): correct it."
        ) from error
    weighed = [name for name, module in model.named_modules() if name and hasattr(module, "weight")]
    stored = {name: find_weight(tensors, name) for name in weighed}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    by_kind: dict[str, set[str]] = {"linear": set(), "transposed": set(), "other": set()}
    for name, module in model.named_modules():
        tensor = stored.get(name)
        if tensor is not None:
            kind = "linear" if name in linears else "transposed" if isinstance(module, Conv1D) else "other"
            by_kind[kind].add(tensor)
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    quantized = {
        stored[name]
        for name, module in linears.items()
        if should_convert_module(name, skipped) and is_held_in_nf4(model, name, module)
    }
    converted = _converted(model, tensors)
    head = model.get_output_embeddings()
    return Architecture(
        model=model,
        linears=linears,
        patchable=[
            name
            for name, module in linears.items()
            if module is not head and is_plain(model, name, module) and stored[name] and stored[name] not in converted
        ],
        others=frozenset(by_kind["other"] - by_kind["linear"]),
        transposed=frozenset(by_kind["transposed"]),
        tied=frozenset(_tied(model, stored)),
        quantized=frozenset(name for name in quantized if name is not None),
        converted=converted,
        untied=is_untied(model, folder),
        head=next((name for name, module in model.named_modules() if module is head), None),
        embedding=next((n for n, module in model.named_modules() if module is model.get_input_embeddings()), None),
    )


def _tied(model: Any, stored: dict[str, str | None]) -> set[str]:
    """Names of head and embedding, as modules and as stored, where they are one parameter."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or getattr(head, "weight", None) is not embedding.weight:
        return set()
    names = {name for name, module in model.named_modules() if module is head or module is embedding}
    return names | {found for name in names if (found := stored[name]) is not None}


def _converted(model: Any, tensors: dict[str, Any]) -> frozenset[str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    transforms = get_model_conversion_mapping(model, add_legacy=False)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    return frozenset(name for name in tensors if any(c.rename_source_key(name)[1] is not None for c in converters))
