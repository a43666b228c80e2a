import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, logits_of, targets_of, tiny_model, tiny_runtime, tiny_tokens, tiny_update

from oneshot.checkpoint.adapters.adapter import read_adapter, target_names, write_patch, write_repaired_adapter
from oneshot.checkpoint.adapters.added import check_fits, merge_into
from oneshot.checkpoint.adapters.update import Factors, concatenated
from oneshot.checkpoint.disk.files import ADAPTER_CONFIG, ADAPTER_TENSORS
from oneshot.errors import UserError
from oneshot.patch.attach import attached
from oneshot.patch.linears import select_linears

TOKENS = tiny_tokens()


def with_peft(model, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def layers_of(model, update):
    return {name: module for name, module in model.named_modules() if name in update}


def attached_logits(model, update):
    with attached(layers_of(model, update), update):
        return logits_of(model, TOKENS)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def users_adapter(folder, family="llama", *, seed=5, **options):
    """A LoRA as a user would have saved it, both factors random."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model(family), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_loads_with_plain_peft(family, tmp_path):
    model = tiny_model(family)
    linears = select_linears(model)
    update = tiny_update(linears.targets, ranks=(2, 5, 1))  # unequal ranks are padded with zeros
    plain, wanted = logits_of(model, TOKENS), attached_logits(model, update)
    assert (plain - wanted).abs().max() > 0.05
    write_patch(tmp_path, update, linears.every, "some/base", torch.float32)

    patched = with_peft(tiny_model(family), tmp_path)
    same(logits_of(patched, TOKENS), wanted)
    same(logits_of(patched.merge_and_unload(), TOKENS), wanted)

    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["r"] == config["lora_alpha"] == 5
    stored = load_file(tmp_path / ADAPTER_TENSORS)
    assert len(stored) == 2 * len(update)
    assert {tensor.shape[0 if "lora_A" in key else 1] for key, tensor in stored.items()} == {5}

    again = read_adapter(tmp_path)
    assert set(again.update) == set(update)
    for name, factors in update.items():
        torch.testing.assert_close(again.update[name].b @ again.update[name].a, factors.b @ factors.a)


def test_a_patch_of_some_layers_touches_no_other(tmp_path):
    model = tiny_model("qwen2")
    linears = select_linears(model, r"layers\.1\..*(q_proj|down_proj)")
    update = tiny_update(linears.targets)
    assert len(update) == 2
    write_patch(tmp_path, update, linears.every, "base", torch.float32)
    wanted = attached_logits(model, update)
    patched = with_peft(tiny_model("qwen2"), tmp_path)
    wrapped = {name.removeprefix("base_model.model.") for name, m in patched.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == set(update)
    same(logits_of(patched, TOKENS), wanted)


def test_a_patch_is_stored_in_the_dtype_asked_for(tmp_path):
    linears = select_linears(tiny_model("llama"))
    write_patch(tmp_path, tiny_update(linears.targets), linears.every, "base", torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / ADAPTER_TENSORS).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 4},
        {"lora_alpha": 12},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}},
        {"alpha_pattern": {"q_proj|down_proj": 20}},
        {"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 20}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_users_adapter_is_read_as_peft_applies_it(options, tmp_path):
    theirs = users_adapter(tmp_path, **options)
    adapter = read_adapter(tmp_path)
    wanted = logits_of(theirs, TOKENS)
    assert (logits_of(tiny_model("llama"), TOKENS) - wanted).abs().max() > 0.1
    same(attached_logits(tiny_model("llama"), adapter.update), wanted)


@pytest.mark.parametrize("options", [{"lora_alpha": 12}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_the_repaired_adapter_keeps_config_rank_scaling_and_names(options, tmp_path):
    users_adapter(tmp_path / "own", **options)
    adapter = read_adapter(tmp_path / "own")
    half = {name: Factors(0.5 * factors.b, -factors.a) for name, factors in adapter.update.items()}
    write_repaired_adapter(tmp_path / "repaired", adapter, half)

    before, after = (load_file(tmp_path / name / ADAPTER_TENSORS) for name in ("own", "repaired"))
    assert {k: (t.shape, t.dtype) for k, t in after.items()} == {k: (t.shape, t.dtype) for k, t in before.items()}
    configs = [json.loads((tmp_path / name / ADAPTER_CONFIG).read_text()) for name in ("own", "repaired")]
    assert configs[0] == configs[1]
    again = read_adapter(tmp_path / "repaired")
    assert again.scaling == adapter.scaling
    wanted = attached_logits(tiny_model("llama"), half)
    assert (attached_logits(tiny_model("llama"), adapter.update) - wanted).abs().max() > 0.1
    same(logits_of(with_peft(tiny_model("llama"), tmp_path / "repaired"), TOKENS), wanted)


def test_a_module_that_is_scaled_to_nothing_stays_nothing(tmp_path):
    users_adapter(tmp_path / "own", alpha_pattern={"v_proj": 0})
    adapter = read_adapter(tmp_path / "own")
    write_repaired_adapter(tmp_path / "repaired", adapter, adapter.update)
    for name, factors in read_adapter(tmp_path / "repaired").stored.items():
        wanted = adapter.stored[name].b if adapter.scaling[name] else torch.zeros_like(factors.b)
        torch.testing.assert_close(factors.b, wanted)


def test_a_repaired_adapter_of_lower_rank_is_padded_to_its_own(tmp_path):
    """Directions of an adapter whose rank exceeds the layer's size are fewer than the rank that its config names."""
    users_adapter(tmp_path / "own", r=40, target_modules=["k_proj"])  # k_proj has 16 outputs
    adapter = read_adapter(tmp_path / "own")
    fewer = {n: Factors(f.b[:, :16].contiguous(), f.a[:16].contiguous()) for n, f in adapter.update.items()}
    write_repaired_adapter(tmp_path / "repaired", adapter, fewer)
    wanted = attached_logits(tiny_model("llama"), fewer)
    same(logits_of(with_peft(tiny_model("llama"), tmp_path / "repaired"), TOKENS), wanted)


def change_tensors(folder, change):
    tensors = load_file(folder / ADAPTER_TENSORS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_TENSORS)


def test_damaged_adapters_are_refused(tmp_path):
    def fresh(name):
        users_adapter(tmp_path / name)
        return tmp_path / name

    cut = fresh("cut")
    whole = (cut / ADAPTER_TENSORS).read_bytes()
    (cut / ADAPTER_TENSORS).write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors has .* cut off"):
        read_adapter(cut)

    gone = fresh("gone")
    (gone / ADAPTER_TENSORS).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(gone)

    half = fresh("half")
    change_tensors(half, lambda tensors: tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"))
    with pytest.raises(UserError, match=r"only one factor of model\.layers\.1\.self_attn\.q_proj"):
        read_adapter(half)

    empty = fresh("empty")
    change_tensors(empty, lambda tensors: tensors.clear())
    with pytest.raises(UserError, match="holds no LoRA factors"):
        read_adapter(empty)

    hollow = fresh("hollow")  # what ZeRO-3 and PEFT write where nothing was gathered
    change_tensors(hollow, lambda tensors: tensors.update({key: torch.zeros(0) for key in tensors}))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        read_adapter(hollow)

    rankless = fresh("rankless")
    change_tensors(
        rankless,
        lambda tensors: tensors.update({k: t[:0] if "lora_A" in k else t[:, :0].clone() for k, t in tensors.items()}),
    )
    with pytest.raises(UserError, match=r"factors of \S+ do not fit"):
        read_adapter(rankless)

    unfit = fresh("unfit")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    change_tensors(unfit, lambda tensors: tensors.update({key: tensors[key][:, :2].contiguous()}))
    with pytest.raises(UserError, match=r"factors of model\.layers\.1\.self_attn\.q_proj do not fit"):
        read_adapter(unfit)

    other = fresh("other")
    config = json.loads((other / ADAPTER_CONFIG).read_text())
    (other / ADAPTER_CONFIG).write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(UserError, match=r"\(IA3 adapter\): merge it first"):
        read_adapter(other)


def test_an_empty_patch_is_never_written(tmp_path):
    with pytest.raises((AssertionError, ValueError)):
        write_patch(tmp_path / "patch", {}, ["a"], "base", torch.float32)
    assert not (tmp_path / "patch" / ADAPTER_TENSORS).exists()


def test_concatenated_adds_updates():
    linears = targets_of(tiny_model("llama"))
    names = list(linears)
    first, second = tiny_update(linears, seed=1), tiny_update(linears, seed=2, ranks=(2,))
    del first[names[0]], second[names[1]]
    kept = first[names[2]]
    both = concatenated(first, second)
    assert set(both) == set(names)
    assert both[names[0]] is second[names[0]]
    assert both[names[1]] is first[names[1]]
    for name in names[2:]:
        assert both[name].rank == 5
        wanted = first[name].b @ first[name].a + second[name].b @ second[name].a
        torch.testing.assert_close(both[name].b @ both[name].a, wanted)
    assert first[names[2]] is kept, "the arguments are left alone"


def test_merge_into_equals_pefts_merge(tmp_path):
    theirs = users_adapter(tmp_path, use_rslora=True).merge_and_unload()
    ours = tiny_model("llama")
    merge_into(tiny_runtime(), ours, read_adapter(tmp_path).update)
    wanted, changed = theirs.state_dict(), tiny_model("llama").state_dict()
    assert set(ours.state_dict()) == set(wanted)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
        moved = any(part in name for part in ("q_proj", "v_proj", "down_proj"))
        assert torch.equal(tensor, changed[name]) != moved, name


def test_an_adapter_of_another_base_is_refused():
    model = tiny_model("llama")
    update = tiny_update(targets_of(tiny_model("llama", intermediate_size=64)), ranks=(2,))
    modules = dict(model.named_modules())
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(UserError, match=r"mlp\.up_proj is 64 x 32, the layer is 48 x 32"):
        check_fits(modules, name, update[name])
    with pytest.raises(UserError, match=r"layers\.9\.mlp, which is no linear layer"):
        check_fits(modules, "model.layers.9.mlp", update[name])
    with pytest.raises(UserError, match=r"model\.norm, which is no linear layer"):
        merge_into(tiny_runtime(), model, {"model.norm": update[name]})


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("llama", None),
        ("llama", r"q_proj$"),
        ("llama", r"layers\.0\."),
        ("gpt_neox", None),
        ("gpt_neox", r"dense_4h_to_h"),
        ("gpt_neox", r"attention\.dense"),
        ("phi", r"dense|fc1"),
        ("qwen2_moe", r"self_attn|shared_expert"),
    ],
)
def test_shorttarget_names_match_exactly_the_modules(family, pattern):
    from peft import LoraConfig, get_peft_model

    model = tiny_model(family)
    linears = select_linears(model, pattern)
    names = target_names(sorted(linears.targets), linears.every)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=names))
    matched = {n.removeprefix("base_model.model.") for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    assert matched == set(linears.targets)
    if pattern in (None, r"q_proj$", "dense_4h_to_h"):
        assert all("." not in name for name in names), "short names where they are unambiguous"
