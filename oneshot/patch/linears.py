"""Which layers a patch may touch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.architecture import is_plain
from oneshot.checkpoint.classes import outside_language
from oneshot.errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Linears:
    """The linear layers of a model.

    Attributes:
        targets: name -> layer, those to be patched
        every: names of all linear layers, output head included
        left_out: modules that hold weight matrices in another form than a plain ``nn.Linear`` (fused experts, routers,
            convolutions, layers that are read directly), and a multimodal model's towers, which no patch touches
    """

    targets: dict[str, nn.Linear]
    every: list[str]
    left_out: list[str]


def select_linears(model: Any, pattern: str | None = None) -> Linears:
    """Choose the layers to patch: every ``nn.Linear`` of the language part but the output head, or those that match.

    Args:
        pattern: regular expression, searched in module names; it also finds the head, and a multimodal model's towers

    Raises:
        UserError: a broken pattern, one that matches nothing, or one that matches a head tied to the embedding
    """
    import torch
    from torch import nn

    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    odd = {name for name, module in every.items() if not is_plain(model, name, module)}
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    outside = tuple(outside_language(model))
    if pattern is None:
        targets = {
            name: module
            for name, module in every.items()
            if module is not head and name not in odd and not name.startswith(outside)
        }
    else:
        try:
            matcher = re.compile(pattern)
        except re.error as error:
            raise UserError(f"Setting repair.targets {pattern!r} is no regular expression: {error}.") from error
        targets = {name: module for name, module in every.items() if matcher.search(name) and name not in odd}
        if any(module is head for module in targets.values()) and head.weight is embedding.weight:
            raise UserError(
                f"Setting repair.targets {pattern!r} matches the output head, which shares its weights with the "
                "embedding here: leave it out."
            )
    left_out = [
        name
        for name, module in model.named_modules()
        if (not isinstance(module, (nn.Linear, nn.Embedding)) or name in odd)
        and not name.startswith(outside)
        and any(isinstance(p, torch.Tensor) and _dimensions(p) >= 2 for p in module.parameters(recurse=False))
    ]
    left_out += [name.removesuffix(".") for name in outside if not any(each.startswith(name) for each in targets)]
    if not targets:
        others = f"; its {len(left_out)} others, such as {left_out[0]}, are no nn.Linear" if left_out else ""
        raise UserError(
            f"No linear layer to patch{f' matches repair.targets {pattern!r}' if pattern else ''}: "
            f"the model has {len(every)} (for example {next(iter(every), 'none')}){others}."
        )
    return Linears(targets, sorted(every), left_out)


def takes_head(model: Any, linears: Mapping[str, nn.Linear]) -> bool:
    """Return whether the output head is among the layers: who takes their inputs apart needs it to see every token."""
    head = model.get_output_embeddings()
    return any(module is head for module in linears.values())


def shape_of(module: nn.Linear) -> tuple[int, int]:
    """Return (m, n) = (out, in) features; unlike ``weight.shape`` it also holds for partitioned and 4-bit weights."""
    return module.out_features, module.in_features


def _dimensions(parameter: Any) -> int:
    """Dimensions of a parameter, partitioned (ZeRO-3) or not."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
