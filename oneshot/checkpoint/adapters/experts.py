"""Experts of a mixture that are held together: one (experts, ., .) parameter per projection, a matrix for each expert.

To a repair each is a layer of its own, named "<experts module>.<expert>.<projection>", with factors as of a linear
layer: y = x W^T, W (out, in), whichever way the parameter holds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.classes import is_router

if TYPE_CHECKING:
    from torch import nn

_ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")  # of a module of fused experts; gate and up are one where fused


@dataclass(frozen=True)
class ExpertMatrix:
    """One expert's matrix of one projection; holds no weight of its own.

    Attributes:
        module: the fused experts, ``path`` its name in the model
        projection: name of the parameter in it that holds all experts' matrices
        index: which expert
        out_features, in_features: shape (m, n) of the matrix as it multiplies, of partitioned parameters too
        transposed: whether the parameter holds (n, m)
    """

    module: nn.Module
    path: str
    projection: str
    index: int
    out_features: int
    in_features: int
    transposed: bool

    @property
    def parameter(self) -> str:
        return f"{self.path}.{self.projection}"

    @property
    def name(self) -> str:
        return f"{self.path}.{self.index}.{self.projection}"


@dataclass(frozen=True)
class BareMatrix:
    """The weight (m, n) of a module that multiplies by it but is no linear layer, such as a router of experts.

    Routers may be of a class made of a linear layer's: what they return is more than the product.

    No repair chooses it; adapters change it where PEFT's ``target_parameters`` name it.
    """

    module: nn.Module
    path: str
    out_features: int
    in_features: int

    @property
    def parameter(self) -> str:
        return f"{self.path}.weight"


def bare_matrices(model: nn.Module) -> dict[str, BareMatrix]:
    """Return the matrices of modules that are no linear layers by the modules' names; embeddings are none of them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = {}
    for path, module in model.named_modules():
        shape = _shape(module._parameters.get("weight"))
        if len(shape) == 2 and (is_router(module) or not isinstance(module, (nn.Linear, nn.Embedding, Conv1D))):
            found[path] = BareMatrix(module, path, *shape)
    return found


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold fused experts of which each can be used by itself, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_single(module) and any(_held(module, projection) for projection in PROJECTIONS)
    }


def mixtures(model: nn.Module) -> list[nn.Module]:
    """Return the modules in which tokens are sent to experts: those that hold them, fused or not."""
    experts = [path for path, _ in model.named_modules() if f".{path}".endswith(".experts")]
    paths = dict.fromkeys([*experts, *fused_experts(model)])
    return [model.get_submodule(path.rpartition(".")[0]) for path in paths]


def is_single(module: nn.Module) -> bool:
    """Return whether each expert of a module can be used by itself.

    So it is behind transformers' experts interface, and in Llama-4, whose experts are behind none.
    """
    return hasattr(module, "is_transposed") or computes_all_at_once(module)


def computes_all_at_once(module: nn.Module) -> bool:
    """Return whether every expert is given every token, scaled by its weight, 0 included, as Llama-4's are.

    Its parameters are (experts, in, out), gate before up; the module's one argument is (experts * tokens, hidden).
    """
    return any(each.__name__ == "Llama4TextExperts" for each in type(module).__mro__)  # PEFT derives from its class


def is_transposed(module: nn.Module) -> bool:
    """Return whether the parameters of fused experts are (experts, in, out)."""
    return computes_all_at_once(module) or bool(module.is_transposed)


def expert_matrices(model: nn.Module) -> dict[str, ExpertMatrix]:
    """Return every fused expert's matrices by name, layer after layer, expert after expert."""
    found = {}
    for path, module in fused_experts(model).items():
        held = [projection for projection in PROJECTIONS if _held(module, projection)]
        for index in range(_shape(getattr(module, held[0]))[0]):
            for projection in held:
                transposed = is_transposed(module)
                first, second = _shape(getattr(module, projection))[1:]
                m, n = (second, first) if transposed else (first, second)
                matrix = ExpertMatrix(module, path, projection, index, m, n, transposed)
                found[matrix.name] = matrix
    return found


def bare_and_experts(model: nn.Module) -> dict[str, BareMatrix | ExpertMatrix]:
    """Return the matrices of a model that are no layers of their own, by name: routers', then fused experts'."""
    return {**bare_matrices(model), **expert_matrices(model)}


def is_one_expert(name: str) -> bool:
    """Return whether a matrix or a layer is one expert's, by its name; which of them a token meets the router says."""
    return _ONE_EXPERT.search(name) is not None


def weight_of(layer: Any) -> nn.Parameter:
    """Return the parameter that holds the matrix of a linear layer, of an expert or of a router."""
    if isinstance(layer, BareMatrix):
        layer = layer.module
    held = getattr(layer.module, layer.projection) if isinstance(layer, ExpertMatrix) else layer.weight
    return held  # type: ignore[no-any-return]


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Return all that an update may name: the model's modules, every fused expert's matrices, and routers' weights."""
    return {**dict(model.named_modules()), **bare_and_experts(model)}


def named_layers(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return the modules, experts' and routers' matrices of these names, in their order."""
    known = layers_of(model)
    return {name: known[name] for name in names}


def _held(module: nn.Module, projection: str) -> bool:
    return len(_shape(module._parameters.get(projection))) == 3


def _shape(parameter: Any) -> tuple[int, ...]:
    """Shape of a parameter, partitioned (ZeRO-3) or not, of one in 4 bits what it had."""
    if parameter is None:
        return ()
    return tuple(getattr(parameter, "unpacked_shape", None) or getattr(parameter, "ds_shape", parameter.shape))
