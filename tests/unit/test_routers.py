"""Adapters that change routers too, as PEFT's "all-linear" does: read, attached, merged, taken out and repaired."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_carrier import close, logits_of, merged, same_products, trained
from test_merge_experts import checkpoint, loaded, run
from tiny import tiny_runtime

from oneshot.checkpoint.adapters.adapter import read_adapter, write_repaired_adapter
from oneshot.checkpoint.adapters.added import merge_into
from oneshot.checkpoint.adapters.experts import bare_matrices, named_layers
from oneshot.checkpoint.adapters.injected import check_loads, write_loadable
from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.writing.identity import UPDATE, check_identity, read_identity, write_identity
from oneshot.patch.attach import attached, attached_update
from oneshot.patch.directions import adapter_directions, update_factors
from oneshot.patch.linears import select_linears

USERS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "by name": {
        "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": ["gate.weight", "router.weight"],
        "alpha_pattern": {r"(gate|router)\.weight": 10},
    },
}  # fmt: skip
CASES = [("qwen3_moe", "all-linear"), ("mixtral", "all-linear"), ("deepseek_v3", "all-linear"), ("mixtral", "by name"),
         ("gpt_oss", "by name"), ("llama4_text", "by name"), ("phimoe", "by name")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("routers")


def users(name: str, fields: str, folder: Path, tmp_path: Path) -> tuple[Any, Path, Any]:
    """A model, its folder, and the model with a user's adapter merged, which is in ``own``."""
    model, base = checkpoint(name, folder)
    theirs = trained(model, tmp_path / "own", **USERS[fields])
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    (tmp_path / "own" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return model, base, theirs


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_it_is_read_attached_merged_and_taken_out_as_peft_has_it(name, fields, folder, tmp_path):
    model, base, theirs = users(name, fields, folder, tmp_path)
    adapter = read_adapter(tmp_path / "own")
    routers = adapter.update.keys() & bare_matrices(model).keys()
    assert routers
    assert routers <= adapter.weights
    with attached_update(model, adapter.update):
        assert close(logits_of(model), logits_of(theirs))
    assert not any("weight" in module.__dict__ for module in model.modules())
    added = copy.deepcopy(model)
    merge_into(tiny_runtime(), added, adapter.update)
    assert all(close(added.get_parameter(n), p, 1e-6) for n, p in theirs.named_parameters())
    ours = loaded(run(tmp_path / "merged", model=str(base), adapters=[str(tmp_path / "own")]))
    assert all(torch.equal(ours[n], p) for n, p in theirs.named_parameters())
    back = run(tmp_path / "back", model=str(tmp_path / "merged"), adapters=[str(tmp_path / "own")], subtract=True)
    assert all(close(loaded(back)[n], p, 1e-6) for n, p in model.named_parameters())


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_a_repaired_one_is_loaded_by_peft_whole(name, fields, folder, tmp_path):
    model, base, _ = users(name, fields, folder, tmp_path)
    adapter, meta = read_adapter(tmp_path / "own"), copy.deepcopy(model).to("meta")
    directions = adapter_directions(adapter.update, "cpu")
    half = {n: update_factors(d, torch.full_like(d.s, 0.5)) for n, d in directions.items()}
    write_repaired_adapter(tmp_path / "new", adapter, half)
    check_loads(tmp_path / "new", meta)
    wanted = merged(model, half)
    assert close(logits_of(PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "new"))), logits_of(wanted))
    write_identity(tmp_path / "new", base, kind=UPDATE, base=str(base), model=meta)
    after = run(tmp_path / "after", model=str(base), adapters=[str(tmp_path / "new")])
    identity = read_identity(tmp_path / "new")
    assert identity is not None
    assert sum("gate.weight" in n or "router.weight" in n for n in identity.changed) == len(bare_matrices(model))
    check_identity(tmp_path / "new", after, applied=True)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_patch_that_holds_it_is_written_for_peft_and_summed(name, folder, tmp_path):
    model, base, theirs = users(name, "all-linear", folder, tmp_path)
    update, meta = read_adapter(tmp_path / "own").update, copy.deepcopy(model).to("meta")
    write_loadable(tmp_path / "patch", update, select_linears(model).every, str(base), torch.float32, meta)
    plain = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "patch"))
    assert close(logits_of(plain), logits_of(theirs))
    one, two = str(tmp_path / "own"), str(tmp_path / "patch")
    total = run(tmp_path / "sum", adapters=[one, two], weights=[0.5, 0.5])
    assert close(logits_of(PeftModel.from_pretrained(copy.deepcopy(model), str(total))), logits_of(theirs))


def test_an_adapter_with_mixtrals_names_of_before_keeps_them(folder, tmp_path):
    model, _, theirs = users("mixtral", "by name", folder, tmp_path)
    path = tmp_path / "own" / "adapter_model.safetensors"
    own = load_file(path)
    old = {key.replace("mlp.gate", "block_sparse_moe.gate"): tensor for key, tensor in own.items()}
    save_file(old, path)
    adapter = read_adapter(tmp_path / "own")
    assert all(close(merged(model, adapter.update).get_parameter(n), p, 1e-6) for n, p in theirs.named_parameters())
    write_repaired_adapter(tmp_path / "new", adapter, adapter.update)
    assert load_file(tmp_path / "new" / "adapter_model.safetensors").keys() == old.keys() != own.keys()
    assert same_products(read_adapter(tmp_path / "new").update, adapter.update)


def test_the_gradient_of_what_is_undone_of_a_router_is_autograds(folder):
    model, _ = checkpoint("qwen3_moe", folder)
    model.requires_grad_(False)
    name = next(iter(bare_matrices(model)))
    layer = named_layers(model, [name])
    tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(5))
    size = layer[name].out_features, layer[name].in_features
    generator = torch.Generator().manual_seed(1)
    b, a = (0.1 * torch.randn(*each, generator=generator) for each in ((size[0], 2), (2, size[1])))
    scale = torch.ones((), requires_grad=True)

    def loss() -> torch.Tensor:
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits.float().logsumexp(-1)
        return found.sum()

    with attached(layer, {name: Factors(scale * b, a)}):
        loss().backward()
    weight = layer[name].module.weight
    with torch.no_grad():
        weight += b @ a
    weight.requires_grad_(True)
    (expected,) = torch.autograd.grad(loss(), [weight])
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(float((expected * (b @ a)).sum()), rel=1e-4)
