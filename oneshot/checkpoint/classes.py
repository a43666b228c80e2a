"""Which class a checkpoint is loaded as, what of it is its language part, and which layers are what they seem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Linear layers, by the ends of their names, of which mixers of a type of model read the weight past the layer: what is
# added to the layer is not seen there, and PEFT refuses the first five (its _check_lora_target_modules_mamba)
_READ_DIRECTLY = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), "out_proj"),
    "jamba": "dt_proj",
}
_LINEAR_TOO = ("FalconLinear",)  # of transformers: a linear layer by another name, which would stay in 16 bits


def auto_class(config: Any) -> Any:
    """Return the auto class that loads a checkpoint as what it says it is, else as a causal language model.

    A multimodal checkpoint is loaded whole, as it is served: by ``AutoModelForCausalLM`` some lose their towers, others
    are not known.

    Args:
        config: transformers' own
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    kind, said = type(config), getattr(config, "architectures", None) or []
    autos = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    known = [auto for auto in autos if kind in auto._model_mapping]
    named = [auto for auto in known if {made.__name__ for made in _classes(auto, kind)} & set(said)]
    return next(iter([*named, *known]), AutoModelForCausalLM)


def refuses_sdpa(fields: Mapping[str, Any]) -> bool:
    """Return whether the class that config.json names has no scaled-dot-product attention; false where it is unknown.

    Args:
        fields: of config.json
    """
    import transformers

    names = fields.get("architectures") or [""]
    found = getattr(transformers, str(names[0]), None)
    return found is not None and not getattr(found, "_supports_sdpa", True)


def is_plain(model: Any, name: str, module: nn.Linear) -> bool:
    """Return whether what a linear layer does is what its weight says, so that an adapter on it is seen.

    It is not where a mixer reads the weight past the layer, and of routers, which choose experts: those that are linear
    layers by their class, or hold one.
    """
    around = model.get_submodule(name.rpartition(".")[0])
    return not is_router(module) and not is_router(around) and not is_read_directly(model, name)


def is_router(module: nn.Module) -> bool:
    """Return whether a module chooses experts, by its class, which in some models is made of a linear layer's."""
    return type(module).__name__.endswith("Router")


def is_read_directly(model: Any, name: str) -> bool:
    """Return whether a mixer reads a linear layer's weight past the layer, which a packed one does not allow either."""
    return _READ_DIRECTLY.get(getattr(model.config, "model_type", "")) == name.rpartition(".")[2]


def is_linear_alone(module: nn.Module) -> bool:
    """Return whether a module is a linear layer and no more: routers may be of a class made of one.

    transformers holds none but these in 4 bits.
    """
    from torch import nn

    return type(module) is nn.Linear or type(module).__name__ in _LINEAR_TOO


def is_held_in_nf4(model: Any, name: str, module: nn.Module) -> bool:
    """Return whether a layer can be held in 4 bits, by what it is; transformers skips some of these, such as the head.

    Args:
        model: whose layer it is, on any device
    """
    return is_linear_alone(module) and not is_read_directly(model, name)


def outside_language(model: Any) -> list[str]:
    """Return the dotted beginnings of names outside a multimodal model's language part: towers and what joins them.

    Empty for a text model. The output head belongs to the language part.

    Args:
        model: of transformers, as it was loaded, on any device
    """
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    language = model.get_decoder()
    inside = {id(module) for part in (language, model.get_output_embeddings()) for module in _modules(part)}
    around = {id(module) for module in model.modules() if any(id(below) in inside for below in module.modules())}
    return [
        f"{name}."
        for name, module in model.named_modules()
        if id(module) not in around | inside and id(model.get_submodule(name.rpartition(".")[0])) in around
    ]


def train_language(model: Any) -> None:
    """Have every parameter take gradients but those outside a multimodal model's language part, which text never meets.

    Args:
        model: see ``outside_language``
    """
    model.requires_grad_(True)
    for beginning in outside_language(model):
        model.get_submodule(beginning.removesuffix(".")).requires_grad_(False)


def _classes(auto: Any, kind: Any) -> tuple[Any, ...]:
    """The classes that an auto class makes of a kind of config, of which there may be several."""
    found = auto._model_mapping[kind]
    return found if isinstance(found, tuple) else (found,)


def _modules(part: nn.Module | None) -> list[nn.Module]:
    return [] if part is None else list(part.modules())
