"""A repair that has nothing to work on is refused before a model is loaded."""

import importlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.disk.files import write_marker
from oneshot.checkpoint.loading import load
from oneshot.commandline import parse
from oneshot.errors import UserError
from oneshot.patch.apart import is_zero, same_weights
from oneshot.world.model import ALIGNED


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """What a repair with these words says, which loads nothing and leaves nothing."""
    stage = importlib.import_module("oneshot.repair")
    monkeypatch.chdir(tmp_path)

    def unloaded(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(load, "load_model", unloaded)

    def run(*words):
        (tmp_path / "probes.jsonl").write_text(json.dumps({"kind": "harmless", "prompt": "fold a plum"}) + "\n")
        more = ["--pool", "toy:pool", "--guard", "toy:guard-plain", "--watch_prompts", "toy:held-plain"]
        more += ["--score.probes", "probes.jsonl", "--preflight", "never", "--out", "run"]
        with pytest.raises(UserError) as raised:
            stage.run(parse([*map(str, words), *more], "repair"), quiet=True)
        assert not (tmp_path / "run").exists()
        return str(raised.value)

    return run


def copied(folder, *, dtype=None, change=None):
    shutil.copytree(ALIGNED, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    save_file({n: t.to(dtype or t.dtype).contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    return folder


def test_a_model_that_is_its_own_reference(refused, tmp_path):
    name = "meta-llama/Meta-Llama-3-70B-Instruct"
    assert "Model and reference are the same" in refused("--config", "llama3-70b"), "before anything is downloaded"
    assert f"are the same, {name}" in refused("--model.path", name, "--reference", name)
    (tmp_path / "link").symlink_to(copied(tmp_path / "model"))
    assert "are the same, link" in refused("--model.path", "link", "--reference", "model/")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_the_reference(dtype, refused, tmp_path):
    copied(tmp_path / "copy", dtype=dtype)
    copied(tmp_path / "norms", dtype=dtype, change=lambda t: t["model.norm.weight"].mul_(1.1))
    for one, other, method in (("copy", ALIGNED, "sft"), (ALIGNED, "copy", "auto"), ("norms", ALIGNED, "rollback")):
        said = refused("--model.path", one, "--reference", other, "--repair.method", method)
        assert "hold the same weights" in said
    assert not same_weights(tmp_path / "norms", ALIGNED, in_blocks=False), (
        "what no patch holds is an update to train on"
    )


def test_one_number_that_differs_is_an_update(tmp_path):
    def last(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"][-1, -1] += 0.5

    tuned = copied(tmp_path / "tuned", change=last)
    for in_blocks in (True, False):
        assert not same_weights(tuned, ALIGNED, in_blocks=in_blocks)
        assert same_weights(ALIGNED, ALIGNED, in_blocks=in_blocks)


def test_a_degraded_reference(refused, tmp_path):
    write_marker(copied(tmp_path / "bad"), {})
    copied(tmp_path / "model", change=lambda t: t["model.layers.0.mlp.up_proj.weight"].add_(0.1))
    assert "The reference bad is marked as safety-degraded" in refused("--model.path", "model", "--reference", "bad")


def test_an_adapter_of_zeros(refused, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(ALIGNED)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "new")
    for method in ("auto", "lowrank"):
        said = refused("--model.path", "new", "--model.base", ALIGNED, "--repair.method", method)
        assert "The adapter new holds an update of zeros" in said


def test_an_update_is_zero_where_all_its_products_are():
    b, a = torch.zeros(3, 2), torch.zeros(2, 4)
    b[:, 0], a[1] = 1.0, 1.0
    assert is_zero({"x": Factors(b, a)})
    a[0, 3] = 1e-9
    assert not is_zero({"x": Factors(b, a)})
    a[0, 3] = float("nan")
    assert not is_zero({"x": Factors(b, a)})
