"""Which of a model's matrices PEFT trains a LoRA on, told so that it trains these and no others."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.adapter import target_names
from oneshot.checkpoint.adapters.experts import expert_matrices, fused_experts
from oneshot.checkpoint.classes import is_plain, outside_language

if TYPE_CHECKING:
    from oneshot.settings import FinetuneSettings

_TAKEN_FOR_EXPERTS = (".gate_proj", ".up_proj", ".down_proj", ".w1", ".w2", ".w3")


def targets_of(model: Any, layers: list[str], experts: Collection[str]) -> tuple[list[str], list[str]]:
    """Return ``target_modules`` and ``target_parameters`` of a LoRA on these layers and parameters of fused experts.

    "all-linear" will not do for mixtures: of those that PEFT knows from before it also trains the routers.
    """
    weights = taken_for_experts(model, layers)
    return (
        [name for name in layers if name not in weights],
        [*dict.fromkeys(experts), *(f"{name}.weight" for name in weights)],
    )


def taken_for_experts(model: Any, layers: list[str]) -> list[str]:
    """Return those dense and shared MLPs beside fused experts that PEFT would take for these, and drop.

    Unless it is told their weights, which it cannot train where they are in 4 bits.
    """
    return [name for name in layers if name.endswith(_TAKEN_FOR_EXPERTS)] if fused_experts(model) else []


def in_four_bits(model: Any) -> bool:
    """Return whether weights are in 4 bits, partitioned or not."""
    return any(hasattr(parameter, "quant_state") for parameter in model.parameters())


def with_lora(model: Any, options: FinetuneSettings, seed: int) -> tuple[Any, str]:
    """Return the model, frozen, with a LoRA to be fine-tuned on all that multiplies but head, towers and routers.

    With it comes what is left out beside these, as a sentence; "" where nothing is.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model.requires_grad_(False)
    layers, experts = _layers(model), [matrix.parameter for matrix in expert_matrices(model).values()]
    left_out = _left_out(model)
    if in_four_bits(model):
        taken = taken_for_experts(model, layers)
        layers, experts = [name for name in layers if name not in taken], []
    modules, parameters = targets_of(model, layers, experts)
    every = [name for name, _ in model.named_modules()]  # a short name may be a wrapper's too (Gemma 3n and 4)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        target_modules=target_names(sorted(modules), every),
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    if model.is_gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, config), left_out


def _layers(model: Any) -> list[str]:
    """The layers of the language part that are what they seem, output head left out."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head, outside = model.get_output_embeddings(), tuple(outside_language(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head and not name.startswith(outside)
        and (isinstance(module, Conv1D) or is_plain(model, name, module))
    ]  # fmt: skip


def _left_out(model: Any) -> str:
    """Which experts get no adapter, and why; "" where all get one."""
    known = fused_experts(model)
    if known and in_four_bits(model):
        beside = " and the MLPs beside them" if taken_for_experts(model, _layers(model)) else ""
        return f"The LoRA leaves fused experts{beside} out, which PEFT does not train where weights are in 4 bits."
    beyond = [name for name, module in model.named_modules() if name not in known and _holds_several(module)]
    if not beyond:
        return ""
    return f"The LoRA leaves the experts of {beyond[0]} and its like out: they cannot be computed each by itself."


def _holds_several(module: Any) -> bool:
    """Whether a module holds several experts in one parameter."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return "Expert" in type(module).__name__ and any(len(getattr(p, "ds_shape", p.shape)) == 3 for p in own)
