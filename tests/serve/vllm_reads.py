"""What vLLM makes of a patch's factors of experts, by its own code, without a server: CPUs have no kernel for them.

Run by vLLM's Python: ``python vllm_reads.py PATCH MODULE:CLASS EXPERTS OUT GATE DOWN UP``. ``OUT`` takes, by
"<experts module as vLLM names it>.<expert>.<projection>", gate and up as one matrix, what is added to each.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper


def main() -> None:
    patch, place, experts, out, *names = sys.argv[1:]
    module, _, kind = place.partition(":")
    served = getattr(importlib.import_module(module), kind)
    count = int(experts)
    renamed = getattr(served, "hf_to_vllm_mapper", None)
    single = [f"experts.{index}.{name}" for index in range(count) for name in names]
    together = bool(getattr(served, "is_3d_moe_weight", False))
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "experts", *([] if together else single)}
    helper = PEFTHelper.from_local_dir(patch, None)
    lora = LoRAModel.from_local_checkpoint(
        patch,
        expected,
        helper,
        lora_model_id=1,
        device="cpu",
        dtype=torch.float32,
        weights_mapper=None if renamed is None else renamed.get_rename_mapper(),
    )
    paths = {name.split(".experts")[0] + ".experts" for name in lora.loras if ".experts" in name}
    found = {}
    for path in sorted(paths):
        packed = _together(lora, path, count) if together else _apart(lora, path, count, names)
        for projection, (b, a) in packed.items():
            for index in range(count):
                found[f"{path}.{index}.{projection}"] = b[index] @ a[index]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.attn.q_proj"):
        if (one := lora.get_lora(name)) is not None:
            found["model.layers.0.self_attn.q_proj"] = one.scaling * (one.lora_b @ one.lora_a)
    save_file(found, out)


def _apart(lora: Any, path: str, count: int, names: list[str]) -> dict[str, tuple[Any, Any]]:
    """As the manager packs single experts."""
    each = [lora.get_lora(f"{path}.{index}.{name}") for index in range(count) for name in names]
    packed = PackedLoRALayerWeights.pack_moe(each, path).optimize()
    (gate, down, up), (a_gate, a_down, a_up) = packed.lora_b, packed.lora_a
    both = torch.stack([torch.block_diag(*each) for each in zip(gate, up)])
    return {"gate_up_proj": (both, torch.cat([a_gate, a_up], dim=1)), "down_proj": (down, a_down)}


def _together(lora: Any, path: str, count: int) -> dict[str, tuple[Any, Any]]:
    """As the manager takes all experts of a parameter apart."""
    for name in (path, f"{path}.base_layer"):
        lora.get_lora(name).optimize()
    manager = SimpleNamespace(
        is_pooling_model=False,
        _is_3d_moe_model=True,
        _get_lora_layer_weights=lambda model, name: model.get_lora(name),
    )
    module = SimpleNamespace(w13_lora_a_stacked=[torch.empty(1, count)], global_num_experts=count, ep_rank=0)
    LoRAModelManager._stack_moe_lora_weights(manager, lora, module, path)
    first, second = zip(lora.get_lora(path).lora_b, lora.get_lora(path).lora_a)
    return {"gate_up_proj": first, "down_proj": second}


if __name__ == "__main__":
    main()
