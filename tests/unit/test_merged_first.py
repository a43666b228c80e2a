"""A DoRA adapter with saved modules (peft#2419) is repaired: its effective update is what rollback takes apart."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from test_effective import save_rich
from tiny import logits_of, tiny_tokens
from transformers import AutoModelForCausalLM

import oneshot
from oneshot.checkpoint.adapters.adapter import read_adapter
from oneshot.checkpoint.disk.files import is_degraded, write_marker
from oneshot.checkpoint.writing.identity import read_identity
from oneshot.world.model import ALIGNED

QUICK = {
    "pool": "toy:pool", "guard": "toy:guard-plain", "watch_prompts": "toy:held-plain", "select": "hardest",
    "score": {"probes": "toy:probes", "max_new_tokens": 2},
    "repair": {"method": "rollback", "rank": 8, "epochs": 2, "guard_prompts": 2, "guard_tokens": 2, "watch": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given") / "dora"
    return save_rich(
        folder, ALIGNED, use_dora=True, modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"]
    )


@pytest.fixture(scope="module")
def theirs(adapter):
    base = AutoModelForCausalLM.from_pretrained(ALIGNED)
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().eval()


def test_the_directions_of_a_dora_adapter_are_those_of_its_effective_update(adapter, theirs, tmp_path):
    found = oneshot.repair(model=str(adapter), out=str(tmp_path / "run"), **QUICK)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").eval()
    tokens = tiny_tokens()
    torch.testing.assert_close(logits_of(merged, tokens), logits_of(theirs, tokens), rtol=1e-3, atol=1e-3)
    base = AutoModelForCausalLM.from_pretrained(ALIGNED)
    assert found.patch, "something was undone"
    undone = {name: factors for name, factors in found.patch.items() if factors.b.any()}
    assert {name.rpartition(".")[2] for name in undone} == {"q_proj", "down_proj"}
    for name, factors in undone.items():
        delta = (theirs.get_submodule(name).weight - base.get_submodule(name).weight).detach()
        left, _, _ = torch.linalg.svd(delta)
        outside = factors.b - left[:, :8] @ (left[:, :8].T @ factors.b)
        assert outside.norm() < 2e-3 * factors.b.norm(), name
    assert all("lm_head" not in name for name in found.patch), "saved modules stay as they are"
    assert read_adapter(found.patch_folder).update, "a plain LoRA, which PEFT and servers load"
    assert read_identity(found.patch_folder).base == str(tmp_path / "run" / "merged")
    assert not is_degraded(tmp_path / "run" / "merged")
    again = tmp_path / "again"  # what the repair wrote is what the command writes, and the patch belongs to both
    oneshot.export(str(again), model=str(ALIGNED), adapters=[str(adapter)])
    oneshot.export(str(tmp_path / "whole"), model=str(again), adapters=[str(found.patch_folder)])
    changed = json.loads((tmp_path / "whole" / "oneshot_export.json").read_text())["tensors_changed"]
    assert changed == len(found.patch)


def test_a_folder_of_that_name_is_left_as_it_is(adapter, tmp_path):
    (tmp_path / "run" / "merged").mkdir(parents=True)
    (tmp_path / "run" / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(oneshot.UserError, match="merged is there already"):
        oneshot.repair(model=str(adapter), out=str(tmp_path / "run"), **QUICK)
    assert [path.name for path in (tmp_path / "run" / "merged").iterdir()] == ["mine.txt"]


def test_what_comes_from_a_degraded_adapter_is_marked(adapter, tmp_path):
    marked = tmp_path / "marked"
    shutil.copytree(adapter, marked)
    write_marker(marked, {})
    found = oneshot.repair(model=str(marked), out=str(tmp_path / "run"), **QUICK)
    assert is_degraded(tmp_path / "run" / "merged")
    assert found.patch_folder.is_dir()


def test_kinds_that_change_the_base_are_refused_before_a_run_folder_is_made(tmp_path):
    pissa = save_rich(tmp_path / "pissa", ALIGNED, init_lora_weights="pissa")
    with pytest.raises(
        oneshot.UserError, match=r"init_lora_weights pissa\): merge it first, with oneshot export --model"
    ):
        oneshot.repair(model=str(pissa), out=str(tmp_path / "run"), **QUICK)
    assert not (tmp_path / "run").exists()
