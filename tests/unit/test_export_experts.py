"""What ``oneshot export`` makes of adapters of mixtures is what PEFT loads, or it is refused, or it says so."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_carrier import close, logits_of, merged, tiny, update_of
from tiny import tiny_runtime

from oneshot.checkpoint.adapters.adapter import read_adapter, write_patch
from oneshot.checkpoint.adapters.carrier import APART, STACKED, in_form
from oneshot.checkpoint.adapters.injected import not_injected, write_loadable
from oneshot.errors import UserError
from oneshot.patch.linears import select_linears
from oneshot.report.exports import Exported, ExportRequest, export


def saved(name: str, folder: Path) -> tuple[Any, Path]:
    """A mixture on disk, and a patch of all its layers as a repair writes it."""
    model = tiny(name)
    model.save_pretrained(folder / "base")
    meta, every = copy.deepcopy(model).to("meta"), select_linears(model).every
    write_loadable(folder / "patch", update_of(model), every, str(folder / "base"), torch.float32, meta)
    return model, folder / "patch"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A mixture's name -> what ``saved`` makes of it, for tests that change neither the model nor its files."""
    return functools.cache(lambda name: saved(name, tmp_path_factory.mktemp(name)))


def run(out: Path, *adapters: Path, **wishes: Any) -> Exported:
    wishes = {"adapters": [str(one) for one in adapters], **wishes}
    return export(tiny_runtime(), ExportRequest(out, **wishes), "oneshot export")


def as_merged(model: Any, folder: Path) -> bool:
    """Whether plain PEFT makes of an adapter what its factors say."""
    meant = merged(model, read_adapter(folder).update)
    return close(logits_of(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()), logits_of(meant))


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen2_moe", "llama4_text"])
@pytest.mark.parametrize("wishes", [{"rank": 3, "rank_experts": 1}, {"weights": [0.5, 0.25]}, {"expert_form": STACKED}])
def test_what_is_made_of_a_mixtures_patch_is_loaded_whole(name, wishes, kept, tmp_path):
    model, patch = kept(name)
    done = run(tmp_path / "out", *[patch] * len(wishes.get("weights", [1])), **wishes)
    assert as_merged(model, done.folder)
    assert not any("Not loaded back" in line for line in done.lines)


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_single_experts_are_loaded_whole_where_peft_takes_them(name, kept, tmp_path):
    model, patch = kept(name)
    together = run(tmp_path / "together", patch, expert_form=STACKED)
    assert as_merged(model, run(tmp_path / "apart", together.folder, expert_form=APART).folder)


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "nemotron_h", "llama4_text"])
def test_a_form_that_peft_does_not_load_is_refused(name, kept, tmp_path):
    _, patch = kept(name)
    with pytest.raises(UserError, match=r"PEFT .*--expert_form 3d"):
        run(tmp_path / "out", patch, expert_form=APART)
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_own_form_peft_does_not_load_takes_the_other(kept, tmp_path):
    """As it was trained with another transformers: of Qwen2-MoE, PEFT takes no single experts any more."""
    model, patch = kept("qwen2_moe")
    update = read_adapter(patch).update
    write_patch(tmp_path / "old", in_form(update, model, APART), [], str(patch.parent / "base"), torch.float32)
    assert not_injected(tmp_path / "old", copy.deepcopy(model).to("meta"))
    done = run(tmp_path / "out", tmp_path / "old", rank=3)
    assert as_merged(model, done.folder)


@pytest.mark.parametrize("lack", ["no folder", "no weights"])
def test_without_the_base_layers_are_named_as_they_were_and_it_is_said(lack, tmp_path):
    model, patch = saved("deepseek_v3", tmp_path)
    if lack == "no folder":
        shutil.rmtree(tmp_path / "base")
    else:
        (tmp_path / "base" / "model.safetensors").unlink()
    done = run(tmp_path / "out", patch, rank=3, rank_experts=1)
    assert any("Not loaded back by PEFT" in line for line in done.lines)
    assert "Not loaded back by PEFT" in (done.folder / "README.md").read_text()
    before, after = (json.loads((one / "adapter_config.json").read_text()) for one in (patch, done.folder))
    assert sorted(after["target_parameters"]) == sorted(before["target_parameters"])
    assert as_merged(model, done.folder)


def test_single_experts_names_are_not_guessed_without_the_base(tmp_path):
    _, patch = saved("gpt_oss", tmp_path)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match="run it where the base is"):
        run(tmp_path / "out", patch, expert_form=APART)
