"""Factors of fused experts added to a checkpoint, taken out, lowered, extracted: whatever form its files have."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from test_carrier import close, expert_of, merged, product, same_products, tiny, update_of
from tiny import in_full, tiny_runtime

from oneshot.checkpoint.adapters.adapter import read_adapter
from oneshot.checkpoint.adapters.carrier import APART, STACKED, in_form
from oneshot.checkpoint.adapters.experts import expert_matrices
from oneshot.checkpoint.adapters.injected import write_loadable
from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.disk.files import is_degraded, write_marker
from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.checkpoint.merging.merge import merge_update
from oneshot.checkpoint.writing.identity import REPAIR, UPDATE, check_identity, read_identity, write_identity
from oneshot.checkpoint.writing.merge_experts import Term, by_layer
from oneshot.checkpoint.writing.standing import ORIGINAL, begin_standing, settle
from oneshot.errors import UserError
from oneshot.patch.linears import select_linears
from oneshot.report.exports import ExportRequest, export
from oneshot.settings import ModelSettings, RepairSettings
from oneshot.world.model import build_tokenizer

# stored one by one, under Mixtral's names, together, together and transposed
STORED = ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


def checkpoint(name: str, folder: Path, seed: int = 0) -> tuple[Any, Path]:
    """A random model and its folder."""
    model, place = tiny(name, seed), folder / f"{name}-{seed}"
    if not place.exists():
        model.save_pretrained(place)
        build_tokenizer().save_pretrained(place)
    return model, place


def patch(model: Any, base: Path, folder: Path, form: str = "") -> Path:
    meta = copy.deepcopy(model).to("meta")
    update = update_of(model)
    held = in_form(update, meta, form) if form else update
    write_loadable(folder, held, select_linears(model).every, str(base), torch.float32, meta)
    write_identity(folder, base, kind=UPDATE, base=str(base), model=meta)
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def run(out: Path, **fields: Any) -> Path:
    export(tiny_runtime(), ExportRequest(out=out, **fields), "oneshot export")
    return out


@pytest.mark.parametrize("name", [*STORED, "deepseek_v3", "jamba", "nemotron_h", "llama4_text"])
def test_a_merge_has_the_bits_of_pefts_own(name, folder, tmp_path):
    model, base = checkpoint(name, folder)
    own = patch(model, base, tmp_path / "patch", STACKED)
    peft = dict(PeftModel.from_pretrained(copy.deepcopy(model), own).merge_and_unload().named_parameters())
    ours = loaded(run(tmp_path / "merged", model=str(base), adapters=[str(own)]))
    assert all(torch.equal(ours[parameter], value) for parameter, value in peft.items())
    assert any(not torch.equal(ours[parameter], value) for parameter, value in model.named_parameters())


@pytest.mark.parametrize("name", [*STORED, "llama4_text"])
def test_the_update_itself_is_merged_as_the_adapter(name, folder, tmp_path):
    model, base = checkpoint(name, folder)
    update = {name: factors for name, factors in update_of(model).items() if ".5." in name or "q_proj" in name}
    merge_update(tiny_runtime(), base, update, tmp_path / "merged")
    ours, meant = loaded(tmp_path / "merged"), merged(model, update)
    assert all(close(ours[parameter], value, 1e-6) for parameter, value in meant.named_parameters())


@pytest.mark.parametrize(
    ("name", "form"), [("qwen3_moe", APART), ("mixtral", STACKED), ("gpt_oss", STACKED), ("llama4_text", STACKED)]
)
def test_what_was_added_is_taken_out_again(name, form, folder, tmp_path):
    model, base = checkpoint(name, folder)
    own = patch(model, base, tmp_path / "patch", form)
    there = run(tmp_path / "merged", model=str(base), adapters=[str(own)])
    back = loaded(run(tmp_path / "back", model=str(there), adapters=[str(own)], subtract=True))
    assert all(close(back[parameter], value, 1e-6) for parameter, value in model.named_parameters())
    with pytest.raises(UserError, match="nothing to subtract"):
        run(tmp_path / "no", model=str(base), adapters=[str(own)], subtract=True)


@pytest.mark.parametrize(("name", "form"), [("qwen3_moe", APART), ("gpt_oss", STACKED), ("llama4_text", STACKED)])
def test_the_tensors_of_experts_are_part_of_what_a_patch_belongs_to(name, form, folder, tmp_path):
    model, base = checkpoint(name, folder)
    own = patch(model, base, tmp_path / "patch", form)
    identity = read_identity(own)
    assert identity is not None
    stored = {key for key in load_file(base / "model.safetensors") if "experts" in key and "bias" not in key}
    assert stored
    assert stored <= identity.changed.keys()
    check_identity(own, base)
    _, other = checkpoint(name, folder, seed=1)
    with pytest.raises(UserError, match="belongs to another model"):
        run(tmp_path / "no", model=str(other), adapters=[str(own)])


def test_an_adapter_of_other_experts_is_refused(folder, tmp_path):
    model, base = checkpoint("qwen3_moe", folder)
    own = patch(model, base, tmp_path / "patch")
    _, other = checkpoint("mixtral", folder)
    with pytest.raises(UserError, match="belongs to another"):
        run(tmp_path / "no", model=str(other), adapters=[str(own)], force=True)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("form", [STACKED, APART])
def test_an_adapter_is_lowered_and_keeps_its_form(form, folder, tmp_path):
    model, base = checkpoint("mixtral", folder)
    own = patch(model, base, tmp_path / "patch", form)
    lower = read_adapter(run(tmp_path / "lower", adapters=[str(own)], rank=1))
    assert lower.experts is not None
    assert lower.experts.form == form
    whole = read_adapter(own).update
    for name, factors in lower.update.items():
        assert factors.rank == 1
        u, s, v = torch.linalg.svd(product(whole[name]), full_matrices=False)
        assert close(product(factors), s[0] * torch.outer(u[:, 0], v[0]), 1e-4), name
    ours = loaded(run(tmp_path / "merged", model=str(base), adapters=[str(tmp_path / "lower")]))
    meant = merged(model, lower.update)
    assert all(close(ours[parameter], value, 1e-6) for parameter, value in meant.named_parameters())


def test_adapters_of_both_forms_are_summed(folder, tmp_path):
    model, base = checkpoint("qwen3_moe", folder)
    one, two = (patch(model, base, tmp_path / form, form) for form in (APART, STACKED))
    total = read_adapter(run(tmp_path / "sum", adapters=[str(one), str(two)], weights=[1.0, 2.0])).update
    meant = {name: Factors(3 * factors.b, factors.a) for name, factors in read_adapter(one).update.items()}
    assert same_products(total, meant, 1e-5)
    assert any(expert_of(name) for name in total)


@pytest.mark.parametrize("name", [*STORED, "llama4_text"])
def test_the_difference_of_two_checkpoints_holds_every_expert(name, folder, tmp_path):
    (_, base), (other, changed) = checkpoint(name, folder), checkpoint(name, folder, seed=1)
    options = {"model": str(base), "extract": str(changed), "rank": 64, "rank_experts": 64}
    run(tmp_path / "patch", **options)
    update = read_adapter(tmp_path / "patch").update
    ours = loaded(run(tmp_path / "merged", model=str(base), adapters=[str(tmp_path / "patch")]))
    for module in update:
        one = expert_of(module)
        parameter = f"{one[0]}.{one[2]}" if one else f"{module}.weight"
        assert close(ours[parameter], other.get_parameter(parameter), 1e-5), parameter
    assert all(name in update for name in update_of(other))


def test_experts_have_a_rank_of_their_own(folder, tmp_path):
    (_, base), (_, changed) = checkpoint("qwen3_moe", folder), checkpoint("qwen3_moe", folder, seed=1)
    options = {"model": str(base), "extract": str(changed), "rank": 5}
    default = read_adapter(run(tmp_path / "default", **options)).update
    assert {factors.rank for name, factors in default.items() if expert_of(name)} == {RepairSettings().rank_experts}
    update = read_adapter(run(tmp_path / "small", **options, rank_experts=2)).update
    assert {factors.rank for name, factors in update.items() if expert_of(name)} == {2}
    assert {factors.rank for name, factors in update.items() if not expert_of(name)} == {5}
    again = read_adapter(run(tmp_path / "one", adapters=[str(tmp_path / "small")], rank_experts=1)).update
    assert {factors.rank for name, factors in again.items() if expert_of(name)} == {1}
    assert {factors.rank for name, factors in again.items() if not expert_of(name)} == {5}


def test_an_adapter_is_turned_into_the_other_form(folder, tmp_path):
    model, base = checkpoint("mixtral", folder)
    own = patch(model, base, tmp_path / "2d", APART)
    together = run(tmp_path / "3d", adapters=[str(own)], expert_form="3d")
    back = run(tmp_path / "back", adapters=[str(together)], expert_form="2d")
    one, two = (load_file(place / "adapter_model.safetensors") for place in (own, back))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    both = [read_adapter(place) for place in (together, back)]
    assert [read.experts and read.experts.form for read in both] == [STACKED, APART]
    with pytest.raises(UserError, match="expert_form is for adapters"):
        run(tmp_path / "no", model=str(base), adapters=[str(own)], expert_form="2d")


def test_a_measured_patch_keeps_its_verdict_in_another_form_and_in_that_alone(folder, tmp_path):
    model, base = checkpoint("mixtral", folder)
    degraded = shutil.copytree(base, tmp_path / "degraded")
    write_marker(degraded, {})
    own = patch(model, degraded, tmp_path / "2d", APART)
    write_identity(own, degraded, kind=REPAIR, base=str(degraded), model=copy.deepcopy(model).to("meta"))
    begin_standing(own, degraded=True, form=ORIGINAL, checkpoint=degraded)
    assert not settle(own, "repaired", [], base="it", degraded=True)

    together = run(tmp_path / "3d", adapters=[str(own)], expert_form="3d")
    assert not is_degraded(together)
    assert not is_degraded(run(tmp_path / "merged", model=str(degraded), adapters=[str(together)]))
    assert is_degraded(run(tmp_path / "less", adapters=[str(own)], rank=1, rank_experts=1))
    assert is_degraded(run(tmp_path / "half", adapters=[str(own)], weights=[0.5], expert_form="3d"))
    config = together / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    with pytest.raises(UserError, match="not the file that was written"):
        run(tmp_path / "again", adapters=[str(together)], expert_form="2d")


def test_an_expert_that_is_a_layer_of_its_own_gets_its_part():
    """As in models whose code is their own: there gate and up are two layers."""
    gate, up, down = (f"model.layers.0.mlp.experts.3.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    both = Term(Factors(torch.arange(8.0).view(4, 2), torch.ones(2, 3)), 2.0)
    one = Term(Factors(torch.ones(3, 2), torch.ones(2, 2)), 2.0)
    added = {"model.layers.0.mlp.experts.3.gate_up_proj": both, down: one}
    found = dict(by_layer(added, {gate, up, down}))
    assert found.keys() == {gate, up, down}
    assert torch.equal(torch.cat([product(found[gate].factors), product(found[up].factors)]), product(both.factors))
    assert {term.scale for term in found.values()} == {2.0}
    assert dict(by_layer(added, {"model.layers.0.self_attn.q_proj"})) == added


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_experts_pass_through_nf4_as_they_are_loaded(name, double, folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import quantize_4bit

    model, base = checkpoint(name, folder)
    own = patch(model, base, tmp_path / "patch")
    options = {"model": str(base), "adapters": [str(own)], "base": "dequantized", "double_quant": double}
    ours, update = loaded(run(tmp_path / "merged", **options)), read_adapter(own).update
    for one in expert_matrices(model).values():
        whole = model.get_parameter(one.parameter).detach()
        packed, state = quantize_4bit(whole, blocksize=64, compress_statistics=double, quant_type="nf4")
        left = in_full(packed, state)[one.index]
        added = product(update[one.name])
        assert torch.equal(ours[one.parameter][one.index], left + (added.T if one.transposed else added)), one.name


@pytest.mark.parametrize("name", ["llama4_text", "phimoe", "jamba", "nemotron_h", "qwen3_moe"])
def test_all_that_passes_through_nf4_is_what_is_loaded_in_nf4(name, folder, tmp_path):
    """A router stays as it is, even where its class is made of a linear layer's."""
    pytest.importorskip("bitsandbytes")
    model, base = checkpoint(name, folder)
    one = next(layer for layer in select_linears(model).targets if layer.endswith("q_proj"))
    wide = model.get_submodule(one)
    nothing = {one: Factors(torch.zeros(wide.out_features, 1), torch.zeros(1, wide.in_features))}
    write_loadable(tmp_path / "patch", nothing, [one], str(base), torch.float32, copy.deepcopy(model).to("meta"))
    options = {"model": str(base), "adapters": [str(tmp_path / "patch")], "base": "dequantized"}
    ours = loaded(run(tmp_path / "merged", **options))
    settings = ModelSettings(path=str(base), attention="eager", dtype="float32", quantize="nf4")
    packed = dict(load_model(tiny_runtime(), find_source(settings, tiny_runtime()), settings).named_parameters())
    assert packed.keys() == ours.keys()
    for parameter, value in packed.items():
        state = getattr(value, "quant_state", None)
        meant = value if state is None else in_full(value.data, state)
        assert torch.equal(ours[parameter].flatten(), meant.detach().flatten()), parameter
    assert any(hasattr(value, "quant_state") for value in packed.values())
