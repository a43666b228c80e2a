"""A patch is written under names by which PEFT loads all of it, or not at all; on tiny random models."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import transformers
from test_carrier import merged

from oneshot.checkpoint.adapters import injected
from oneshot.checkpoint.adapters.adapter import read_adapter, write_patch
from oneshot.checkpoint.adapters.injected import check_loads, not_injected, write_loadable
from oneshot.checkpoint.adapters.update import Factors, Update
from oneshot.errors import UserError
from oneshot.patch.linears import select_linears

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
MIXTURE = {**SMALL, **EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MAMBA = {
    "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}  # fmt: skip
# a base of each way: short names do, PEFT takes dense and shared MLPs for experts, and layers that are read directly
MODELS = {
    "Llama": SMALL,
    "Glm4Moe": {**MIXTURE, "head_dim": 8},
    "DeepseekV3": {**MIXTURE, **LATENT, "num_key_value_heads": 4},
    "FalconH1": {**SMALL, **MAMBA, "head_dim": 8},
}


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def patch_of(model: Any, only: str = "") -> tuple[Update, list[str]]:
    linears = select_linears(model, only or None)
    generator = torch.Generator().manual_seed(1)
    update = {
        name: Factors(
            0.1 * torch.randn(layer.out_features, 2, generator=generator),
            0.1 * torch.randn(2, layer.in_features, generator=generator),
        )
        for name, layer in linears.targets.items()
    }
    return update, linears.every


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 27)[None], use_cache=False).logits


@pytest.mark.parametrize("only", ["", r"(mlp|feed_forward)\.(shared_experts\.)?down_proj"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_what_was_measured(name, only, tmp_path):
    from peft import PeftModel

    model = tiny(name)
    update, linears = patch_of(model, only)
    write_loadable(tmp_path, update, linears, "base", torch.float32, copy.deepcopy(model).to("meta"))
    meant = merged(model, update)
    loaded = PeftModel.from_pretrained(model, tmp_path)
    assert (logits_of(loaded) - logits_of(meant)).abs().max() < 1e-5
    assert read_adapter(tmp_path).update.keys() == update.keys()


def test_short_names_lose_shared_experts(tmp_path):
    model = tiny("Glm4Moe").to("meta")
    update, linears = patch_of(tiny("Glm4Moe"))
    write_patch(tmp_path, update, linears, "base", torch.float32)
    lost = not_injected(tmp_path, model)
    assert "model.layers.0.mlp.down_proj" in lost
    assert "model.layers.1.mlp.shared_experts.up_proj" in lost
    assert not any("self_attn" in name for name in lost)


def test_the_model_is_left_as_it_was(tmp_path):
    model = tiny("Llama").to("meta")
    before = [(name, type(module)) for name, module in model.named_modules()]
    update, linears = patch_of(tiny("Llama"))
    write_patch(tmp_path, update, linears, "base", torch.float32)
    assert not_injected(tmp_path, model) == []
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_a_dense_model_keeps_short_names(tmp_path):
    update, linears = patch_of(tiny("Llama"))
    write_loadable(tmp_path, update, linears, "base", torch.float32, tiny("Llama").to("meta"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "q_proj" in config["target_modules"]
    assert config["target_parameters"] is None


@pytest.mark.parametrize("wrong", ["no such layer", "another shape"])
def test_what_no_names_load_is_refused(wrong, tmp_path):
    model = tiny("Llama").to("meta")
    factors = Factors(torch.ones(32, 2), torch.ones(2, 32))
    name = "model.layers.0.self_attn.q_proj"
    update = (
        {name: factors, f"{name}_of_old": Factors(factors.b + 1, factors.a + 1)}
        if wrong == "no such layer"
        else {name: Factors(torch.ones(31, 2), torch.ones(2, 32))}
    )
    with pytest.raises(UserError, match=r"PEFT .*repair\.targets"):
        write_loadable(tmp_path, update, [name], "base", torch.float32, model)


def test_a_repair_refuses_what_peft_would_not_load(monkeypatch, tmp_path):
    monkeypatch.setattr(injected, "not_injected", lambda *_: ["model.layers.0.mlp.up_proj"])
    update, linears = patch_of(tiny("Llama"))
    with pytest.raises(UserError, match=r"no place for what belongs to model\.layers\.0\.mlp\.up_proj"):
        write_loadable(tmp_path, update, linears, "base", torch.float32, tiny("Llama").to("meta"))


def test_an_adapter_that_peft_loads_in_part_is_refused(tmp_path):
    model = tiny("Glm4Moe")
    update, linears = patch_of(model)
    write_patch(tmp_path, update, linears, "base", torch.float32)
    with pytest.raises(UserError, match="finds no place"):
        check_loads(tmp_path, model.to("meta"))


@pytest.mark.parametrize("name", ["FalconH1", "Llama"])
def test_layers_that_are_read_directly_are_left_out(name):
    model = tiny(name)
    linears = select_linears(model)
    assert [n for n in linears.left_out if n.endswith("out_proj")] == [
        n for n, _ in model.named_modules() if n.endswith("mamba.out_proj")
    ]
    assert not any(n.endswith("out_proj") for n in linears.targets)
