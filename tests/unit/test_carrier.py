"""Factors of fused experts in PEFT adapters, in both forms: plain PEFT puts each where it belongs, and so do we."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_configs import SPARSE

from oneshot.checkpoint.adapters.adapter import Adapter, read_adapter, write_patch, write_repaired_adapter
from oneshot.checkpoint.adapters.carrier import APART, STACKED, Carried, expert_of, in_form
from oneshot.checkpoint.adapters.experts import ExpertMatrix, expert_matrices, fused_experts
from oneshot.checkpoint.adapters.injected import check_loads, not_injected, write_loadable
from oneshot.checkpoint.adapters.update import Factors, Update
from oneshot.errors import UserError
from oneshot.patch.directions import adapter_directions, update_factors
from oneshot.patch.linears import select_linears

# model type -> the form that its class in vLLM takes, where PEFT takes it, too
FORMS = {
    "qwen3_moe": APART,
    "mixtral": APART,
    "deepseek_v3": APART,
    "glm4_moe": APART,
    "qwen3_next": APART,
    "gpt_oss": STACKED,
    "qwen3_5_moe_text": STACKED,
    "qwen2_moe": STACKED,  # vLLM takes single experts, PEFT does not
    "nemotron_h": STACKED,
    "jamba": STACKED,
    "granitemoe": STACKED,
    "llama4_text": STACKED,
}
RANK, EXPERT_RANK = 5, 2


def tiny(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name, **SPARSE[name][0])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some are left unset
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def matrix_of(model: Any, one: ExpertMatrix) -> torch.Tensor:
    whole = model.get_parameter(one.parameter)[one.index]
    return whole.T if one.transposed else whole


def update_of(model: Any, rank: int = RANK, expert_rank: int = EXPERT_RANK) -> Update:
    generator = torch.Generator().manual_seed(1)

    def random(m: int, n: int, rank: int) -> Factors:
        return Factors(*(0.1 * torch.randn(*size, generator=generator) for size in ((m, rank), (rank, n))))

    linears = {name: random(x.out_features, x.in_features, rank) for name, x in select_linears(model).targets.items()}
    experts = {name: random(x.out_features, x.in_features, expert_rank) for name, x in expert_matrices(model).items()}
    return {**linears, **experts}


def merged(model: Any, update: Update) -> Any:
    model = copy.deepcopy(model)
    experts = expert_matrices(model)
    with torch.no_grad():
        for name, factors in update.items():
            if name in experts:
                matrix_of(model, experts[name]).add_(factors.b @ factors.a)
            else:
                model.get_submodule(name).weight += factors.b @ factors.a
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 27)[None], use_cache=False).logits


def close(one: torch.Tensor, other: torch.Tensor, bound: float = 1e-5) -> bool:
    return float((one - other).detach().norm() / other.detach().norm()) < bound


def product(factors: Factors) -> torch.Tensor:
    return factors.b @ factors.a


def same_products(one: Update, other: Update, bound: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(
        float((product(one[name]) - product(other[name])).abs().max()) < bound for name in one
    )


@pytest.mark.parametrize("name", FORMS)
def test_plain_peft_adds_to_every_expert_what_is_its_own(name, tmp_path):
    model = tiny(name)
    update = update_of(model)
    write_loadable(
        tmp_path, update, select_linears(model).every, "base", torch.float32, copy.deepcopy(model).to("meta")
    )
    adapter = read_adapter(tmp_path)
    assert adapter.experts is not None
    assert adapter.experts.form == FORMS[name]
    assert same_products(adapter.update, update)
    meant = merged(model, update)
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    assert close(logits_of(loaded), logits_of(meant))
    whole = dict(loaded.merge_and_unload().named_parameters())
    for parameter, value in meant.named_parameters():
        assert close(whole[parameter], value), parameter


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_each_form_is_written_on_request_and_is_the_other(name, tmp_path):
    model = tiny(name)
    update, meta = update_of(model), copy.deepcopy(model).to("meta")
    meant = logits_of(merged(model, update))
    for form in (STACKED, APART):
        folder = tmp_path / form
        write_loadable(folder, in_form(update, meta, form), select_linears(model).every, "base", torch.float32, meta)
        adapter = read_adapter(folder)
        assert adapter.experts is not None
        assert adapter.experts.form == form
        assert same_products(adapter.update, update, 1e-9)
        assert all(adapter.update[one].rank == EXPERT_RANK for one in update if expert_of(one))
        assert close(logits_of(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()), meant)


@pytest.mark.parametrize("form", [STACKED, APART])
def test_experts_may_have_the_rank_of_the_other_layers(form, tmp_path):
    """Beside dense MLPs of the same rank PEFT would take the experts for fused ones of twice the rank."""
    model = tiny("deepseek_v3")
    update, meta = update_of(model, 3, 3), copy.deepcopy(model).to("meta")
    write_loadable(tmp_path, in_form(update, meta, form), select_linears(model).every, "base", torch.float32, meta)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert close(logits_of(loaded), logits_of(merged(model, update)))


@pytest.mark.parametrize("form", [STACKED, APART])
def test_some_experts_alone_and_no_linear_layer(form, tmp_path):
    model = tiny("qwen3_next")
    update = {name: f for name, f in update_of(model).items() if (one := expert_of(name)) and one[1] == 3}
    some = {name: f for name, f in update.items() if "layers.1." in name and name.endswith("down_proj")}
    meta = copy.deepcopy(model).to("meta")
    for part, folder in ((update, tmp_path / "all"), (some, tmp_path / "some")):
        write_loadable(folder, in_form(part, meta, form), [], "base", torch.float32, meta)
        read = read_adapter(folder).update
        assert same_products({name: read[name] for name in part}, part)
        assert not any(bool(product(read[name]).any()) for name in read.keys() - part.keys())
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        assert close(logits_of(loaded), logits_of(merged(model, part)))


def test_a_form_that_peft_does_not_take_is_refused(tmp_path):
    model = tiny("qwen2_moe").to("meta")
    update = update_of(tiny("qwen2_moe"))
    with pytest.raises(UserError, match="PEFT"):
        write_loadable(tmp_path, in_form(update, model, APART), [], "base", torch.float32, model)


def test_factors_on_the_wrong_parameter_are_found(tmp_path):
    model = tiny("granitemoe")
    update = update_of(model)
    write_patch(tmp_path, update, select_linears(model).every, "base", torch.float32)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    only = [name for name in config["target_parameters"] if name.endswith("down_proj")]
    config["target_parameters"] = only
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lost = not_injected(tmp_path, model.to("meta"))
    assert any(name.endswith("experts.base_layer") for name in lost)
    with pytest.raises(UserError, match="finds no place"):
        check_loads(tmp_path, model)


def test_parameters_in_another_order_are_no_others_for_having_the_same_shape(tmp_path):
    torch.manual_seed(0)
    square = {**SPARSE["nemotron_h"][0], "moe_intermediate_size": SPARSE["nemotron_h"][0]["hidden_size"]}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("nemotron_h", **square))
    update = {name: f for name, f in update_of(model).items() if expert_of(name)}
    write_patch(tmp_path, update, [], "base", torch.float32)
    model = model.to("meta")
    assert not_injected(tmp_path, model) == []
    for module in fused_experts(model).values():
        module._parameters["up_proj"] = module._parameters.pop("up_proj")  # now the last one
    assert len(not_injected(tmp_path, model)) == 2 * len(fused_experts(model))


def trained(model: Any, folder: Any, **fields: Any) -> Any:
    """What a user trains with PEFT: random factors under its own names; the merged model."""
    loaded = get_peft_model(copy.deepcopy(model), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **fields))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    loaded.save_pretrained(folder)
    return loaded.merge_and_unload()


USERS: dict[str, dict[str, Any]] = {
    "both": {"r": 3, "lora_alpha": 6, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "one": {"r": 3, "lora_alpha": 6, "target_parameters": ["mlp.experts.down_proj"]},
    "the other": {"r": 3, "lora_alpha": 6, "target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True},
    "patterns": {
        "r": 3, "lora_alpha": 6, "target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"],
        "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {r"layers.1.*experts.gate_up_proj": 12},
    },
    "names of others": {
        "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.up_proj", "down_proj", "experts.w1", "no_such_bias"],
    },
    "old names": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("fields", USERS)
def test_what_users_train_is_read_as_peft_applies_it(name, fields, tmp_path):
    if fields in {"gpt_oss": ("old names",), "nemotron_h": set(USERS) - {"names of others"}}.get(name, ()):
        pytest.skip(f"{name} has no such names")
    model = tiny(name)
    theirs = trained(model, tmp_path, **{"target_modules": [], **USERS[fields]})
    update = read_adapter(tmp_path).update
    meant = merged(model, update)
    for parameter, value in theirs.named_parameters():
        assert close(meant.get_parameter(parameter), value, 1e-6), parameter
    changed = {n for n, p in theirs.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed


@pytest.mark.parametrize("fields", ["both", "one", "patterns", "names of others"])
def test_a_repaired_adapter_keeps_its_form(fields, tmp_path):
    model = tiny("qwen3_moe")
    trained(model, tmp_path / "own", **{"target_modules": [], **USERS[fields]})
    adapter = read_adapter(tmp_path / "own")
    halved = {name: Factors(0.5 * f.b, f.a) for name, f in adapter.update.items() if ".3." not in name}
    write_repaired_adapter(tmp_path / "new", adapter, halved)
    check_same_form(adapter, tmp_path, model)
    again = read_adapter(tmp_path / "new").update
    assert same_products({name: again[name] for name in halved}, halved)
    assert not any(bool(product(again[name]).any()) for name in again.keys() - halved.keys())


def check_same_form(adapter: Adapter, folder: Any, model: Any) -> None:
    from safetensors.torch import load_file

    one, two = (load_file(folder / which / "adapter_model.safetensors") for which in ("own", "new"))
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    assert not_injected(folder / "new", copy.deepcopy(model).to("meta")) == []


def test_single_experts_with_factors_of_their_own_for_gate_and_up(tmp_path):
    """As others train them: unlike ours, gate and up share no factor, and PEFT makes one of twice the rank."""
    model = tiny("mixtral")
    generator = torch.Generator().manual_seed(5)
    experts = {}
    for layer in range(2):
        for index in range(8):
            for name, (m, n) in {"w1": (112, 64), "w3": (112, 64), "w2": (64, 112)}.items():
                pair = (0.1 * torch.randn(*size, generator=generator) for size in ((m, 3), (3, n)))
                experts[f"model.layers.{layer}.block_sparse_moe.experts.{index}.{name}"] = Factors(*pair)
    own = Carried(experts, APART, {"gate_up_proj": 3}, ("w1", "w3", "w2"), experts=frozenset(experts))
    write_patch(tmp_path / "own", own, [], "base", torch.float32)
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text()) | {"lora_alpha": 6}
    (tmp_path / "own" / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(tmp_path / "own")
    assert adapter.update["model.layers.0.mlp.experts.0.gate_up_proj"].rank == 6
    meant = merged(model, adapter.update)
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "own").merge_and_unload()
    for parameter, value in theirs.named_parameters():
        assert close(meant.get_parameter(parameter), value, 1e-6), parameter
    rolled, generator = {}, torch.Generator().manual_seed(6)
    for name, found in adapter_directions(adapter.update, "cpu").items():
        exact = update_factors(found, torch.ones(len(found.s)))
        assert close(product(exact), product(adapter.update[name]))
        rolled[name] = update_factors(found, torch.rand(len(found.s), generator=generator))
    write_repaired_adapter(tmp_path / "new", adapter, rolled)
    check_same_form(adapter, tmp_path, model)
    assert same_products(read_adapter(tmp_path / "new").update, rolled)
