"""A user's adapter on one projection of Llama-4's experts: its base says which way round it is, no file does."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_carrier import APART, close, logits_of, tiny, trained, update_of
from test_merge_experts import loaded, run
from tiny import tiny_runtime
from tiny_configs import SPARSE

from oneshot.checkpoint.adapters.adapter import Adapter, is_settled, read_adapter, write_patch, write_repaired_adapter
from oneshot.checkpoint.adapters.added import merge_into
from oneshot.checkpoint.adapters.carrier import in_form
from oneshot.checkpoint.loading.around import on_base, users_adapter
from oneshot.checkpoint.loading.load import find_source
from oneshot.errors import UserError
from oneshot.patch.attach import attached_update
from oneshot.settings import ModelSettings
from oneshot.world.model import build_tokenizer

PROJECTIONS = ("gate_up_proj", "down_proj")
# experts' width, of 64: gate and up are square; down is; none is
WIDTHS = (32, 64, 112)


@pytest.fixture(scope="module", params=WIDTHS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A Llama-4 on disk, and adapters on gate and up, on down and on both, each with what PEFT makes of it."""
    root, (fields, *rest) = tmp_path_factory.mktemp("around"), SPARSE["llama4_text"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(SPARSE, "llama4_text", ({**fields, "intermediate_size": request.param}, *rest))
        model = tiny("llama4_text")
    model.save_pretrained(root / "base")
    build_tokenizer().save_pretrained(root / "base")
    theirs = {}
    held_by = {**{one: [one] for one in PROJECTIONS}, "both": PROJECTIONS, "names of others": [*PROJECTIONS, "up_proj"]}
    for name, held in held_by.items():
        fields = {"target_modules": [], "target_parameters": [f"experts.{one}" for one in held]}
        theirs[name] = dict(trained(model, root / name, r=3, lora_alpha=6, **fields).named_parameters())
        edit(root / name, base_model_name_or_path=str(root / "base"))
    return SimpleNamespace(root=root, folder=root / "base", model=model, theirs=theirs)


def edit(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change(base: SimpleNamespace, *names: str) -> dict[str, torch.Tensor]:
    """What PEFT adds to the parameters of experts, for all of these adapters together."""
    own = dict(base.model.named_parameters())
    return {
        key: sum((base.theirs[name][key] - value for name in names), torch.zeros_like(value)).detach()
        for key, value in own.items()
        if ".experts." in key
    }


def check_adds(base: SimpleNamespace, adapter: Path, *names: str) -> None:
    """Plain PEFT adds with an adapter what it does with those of these names together."""
    theirs = PeftModel.from_pretrained(copy.deepcopy(base.model), adapter).merge_and_unload()
    for key, added in change(base, *names).items():
        own = theirs.get_parameter(key).detach() - base.model.get_parameter(key).detach()
        assert float((own - added).norm()) < 1e-4 * max(float(added.norm()), 1.0), key


@pytest.mark.parametrize("name", [*PROJECTIONS, "names of others"])
def test_it_is_merged_as_peft_merges_it(name, base, tmp_path):
    assert is_settled(read_adapter(base.root / name)) == (name not in PROJECTIONS)
    ours = loaded(run(tmp_path / "merged", model=str(base.folder), adapters=[str(base.root / name)]))
    assert all(torch.equal(ours[key], value) for key, value in base.theirs[name].items())
    assert any(bool(added.any()) for added in change(base, name).values())


@pytest.mark.parametrize("name", PROJECTIONS)
def test_it_is_merged_so_with_a_module_that_was_saved_whole(name, base, tmp_path):
    shutil.copytree(base.root / name, tmp_path / "own")
    tensors = load_file(tmp_path / "own" / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = torch.full((64,), 0.5)
    save_file(tensors, tmp_path / "own" / "adapter_model.safetensors", metadata={"format": "pt"})
    ours = loaded(run(tmp_path / "merged", model=str(base.folder), adapters=[str(tmp_path / "own")]))
    assert torch.equal(ours["model.norm.weight"], torch.full((64,), 0.5))
    assert all(close(ours[key], base.theirs[name][key], 1e-6) for key in change(base, name))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_repair_and_a_score_add_it_as_peft_does_and_write_it_back(name, base, tmp_path):
    source = find_source(ModelSettings(path=str(base.root / name)), tiny_runtime())
    adapter = users_adapter(source)
    assert isinstance(adapter, Adapter)
    assert is_settled(adapter)
    theirs = copy.deepcopy(base.model)
    theirs.load_state_dict({key: value.detach() for key, value in base.theirs[name].items()}, strict=False)
    with attached_update(base.model, adapter.update):
        assert close(logits_of(base.model), logits_of(theirs))
    ours = copy.deepcopy(base.model)
    merge_into(tiny_runtime(), ours, adapter.update)
    assert close(logits_of(ours), logits_of(theirs))
    write_repaired_adapter(tmp_path / "written", adapter, adapter.update)
    check_adds(base, tmp_path / "written", name)


@pytest.mark.parametrize("names", [PROJECTIONS, (PROJECTIONS[1], "both"), ("both", PROJECTIONS[0])])
@pytest.mark.parametrize("gone", [False, True], ids=["base here", "base gone"])
def test_a_sum_of_adapters_is_theirs(names, gone, base, tmp_path):
    for name in names:
        shutil.copytree(base.root / name, tmp_path / name)
        edit(tmp_path / name, base_model_name_or_path=str(tmp_path / "gone" if gone else base.folder))
    check_adds(base, run(tmp_path / "sum", adapters=[str(tmp_path / name) for name in names]), *names)


def test_what_nothing_here_tells_is_refused(base, tmp_path):
    shutil.copytree(base.root / "down_proj", tmp_path / "own")
    edit(tmp_path / "own", base_model_name_or_path="gone")
    apart = in_form(update_of(base.model), base.model, APART)
    write_patch(tmp_path / "apart", apart, [], "gone", torch.float32)
    with pytest.raises(UserError, match="does not tell which way round, and their base is not here"):
        run(tmp_path / "sum", adapters=[str(tmp_path / "own"), str(tmp_path / "apart")])


def test_of_others_it_stays_as_it_is(tmp_path):
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    trained(model, tmp_path / "own", target_modules=[], target_parameters=["experts.down_proj"])
    adapter = read_adapter(tmp_path / "own")
    assert not is_settled(adapter)
    after = on_base(adapter, tmp_path / "base")
    assert is_settled(after)
    assert all(torch.equal(after.update[name].b, factors.b) for name, factors in adapter.update.items())
