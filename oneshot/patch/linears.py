"""Which layers a patch may touch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.experts import BareMatrix, ExpertMatrix, expert_matrices, fused_experts
from oneshot.checkpoint.classes import is_plain, outside_language
from oneshot.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    Layer = nn.Linear | ExpertMatrix | BareMatrix


@dataclass(frozen=True)
class Linears:
    """The linear layers of a model, and the matrices of fused experts, which are as good as linear layers.

    Attributes:
        targets: name -> layer, those to be patched, in the model's order
        every: names of all linear layers that are modules, output head included
        left_out: modules that hold weight matrices in another form (routers, convolutions, layers that are read
            directly, experts that cannot be computed each by itself), and a multimodal model's towers, which no patch
            touches
    """

    targets: dict[str, Layer]
    every: list[str]
    left_out: list[str]


def select_linears(model: Any, pattern: str | None = None) -> Linears:
    """Choose the layers to patch: all of the language part's ``nn.Linear`` but the output head, and of fused experts.

    Or those of all of them whose name the pattern matches. Experts come projection by projection, so that those of one
    parameter lie side by side.

    Args:
        pattern: regular expression, searched in the names of modules and of experts' matrices; it also finds the head,
            and a multimodal model's towers

    Raises:
        UserError: a broken pattern, one that matches nothing, or one that matches a head tied to the embedding
    """
    import torch
    from torch import nn

    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fused = fused_experts(model)
    odd = {name for name, module in every.items() if not is_plain(model, name, module)}
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    able = {name: layer for name, layer in layers_in_order(model).items() if name not in odd}
    outside = tuple(outside_language(model))
    if pattern is None:
        targets = {name: layer for name, layer in able.items() if layer is not head and not name.startswith(outside)}
    else:
        try:
            matcher = re.compile(pattern)
        except re.error as error:
            raise UserError(f"Setting repair.targets {pattern!r} is no regular expression: {error}.") from error
        targets = {name: layer for name, layer in able.items() if matcher.search(name)}
        if any(layer is head for layer in targets.values()) and head.weight is embedding.weight:
            raise UserError(
                f"Setting repair.targets {pattern!r} matches the output head, which shares its weights with the "
                "embedding here: leave it out."
            )
    left_out = [
        name
        for name, module in model.named_modules()
        if (not isinstance(module, (nn.Linear, nn.Embedding)) or name in odd)
        and name not in fused
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


def layers_in_order(model: Any) -> dict[str, Layer]:
    """Return every linear layer and every fused expert's matrix, in the model's order.

    Experts come projection by projection, as ``grouped`` takes them.
    """
    from torch import nn

    matrices = dict[str, dict[str, list[ExpertMatrix]]]()
    for matrix in expert_matrices(model).values():
        matrices.setdefault(matrix.path, {}).setdefault(matrix.projection, []).append(matrix)
    found: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module
        for several in matrices.get(name, {}).values():
            found |= {matrix.name: matrix for matrix in several}
    return found


def grouped(layers: Mapping[str, Layer]) -> list[tuple[int, list[str]]]:
    """Return the names of the layers, those of one parameter of fused experts together, all others alone.

    What is exchanged between ranks goes by these groups: a call for each of thousands of experts would take longer.
    With each comes its first one's place among all, by which layers are dealt out to ranks: those of one parameter lie
    side by side, as in ``layers_in_order``.
    """
    groups, first = dict[str, list[str]](), 0
    for name, layer in layers.items():
        groups.setdefault(layer.parameter if isinstance(layer, ExpertMatrix) else name, []).append(name)
    found = []
    for group in groups.values():
        found.append((first, group))
        first += len(group)
    return found


def takes_head(model: Any, layers: Mapping[str, Layer]) -> bool:
    """Return whether the output head is among the layers: who takes their inputs apart needs it to see every token."""
    head = model.get_output_embeddings()
    return any(layer is head for layer in layers.values())


def shape_of(layer: Layer) -> tuple[int, int]:
    """Return (m, n) = (out, in) features; unlike ``weight.shape`` it also holds for partitioned and 4-bit weights."""
    return layer.out_features, layer.in_features


def _dimensions(parameter: Any) -> int:
    """Dimensions of a parameter, partitioned (ZeRO-3) or not."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
