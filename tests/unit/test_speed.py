"""Tokens per second, MFU and memory in a fine-tune's heartbeat; Liger's kernels and what they need."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_runtime

from oneshot.commandline import parse
from oneshot.errors import UserError
from oneshot.report.progress import heartbeat
from oneshot.training.kernels import check_liger, use_liger
from oneshot.training.loop import StepResult
from oneshot.training.speed import Meter, flops_per_token, meter, peak_flops


def result(tokens=1000, seconds=0.5):
    return StepResult(step=1, loss=2.5, learning_rate=0.1, grad_norm=1.0, tokens=tokens, seconds=seconds)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H20", 148e12),
        ("Some Other Device", None),
    ],
)
def test_peak_is_that_of_the_device(name, peak):
    assert peak_flops(name) == peak


def test_flops_are_six_per_trained_weight_and_four_per_frozen_one():
    model = tiny_model("llama-tied")
    attention, mlp, head = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48, 32 * model.config.vocab_size
    weights = 2 * (attention + mlp) + head
    assert flops_per_token(model) == 6 * weights
    model.requires_grad_(False)
    assert flops_per_token(model) == 4 * weights
    assert flops_per_token(tiny_model("mixtral")) is None


def test_an_adapter_costs_its_own_weights_more():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    model.requires_grad_(False)
    frozen = flops_per_token(model)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert flops_per_token(tuned) == frozen + 2 * 6 * (2 * 32 + 32 * 2)


def test_mfu_is_shown_where_the_peak_is_known():
    facts = Meter(tiny_runtime(), flops_per_token=2e9, peak=8e12).of(result())
    assert facts["tokens_per_second"] == 2000.0
    assert facts["mfu"] == 0.5
    assert 1e8 < facts["peak_memory_bytes"] < 1e12
    facts["peak_memory_bytes"] = 3 * 2**29
    assert heartbeat(2.5, facts) == "loss 2.5000  2,000 tokens/s  MFU 50%  1.5 GiB"


def test_no_mfu_on_a_cpu():
    facts = meter(tiny_runtime(), tiny_model("llama")).of(result())
    assert facts.keys() == {"tokens_per_second", "peak_memory_bytes"}
    assert "MFU" not in heartbeat(2.5, facts)


def test_liger_needs_a_gpu_its_package_and_an_architecture_that_it_knows(monkeypatch):
    with pytest.raises(UserError, match=r"model.liger needs a GPU"):
        check_liger("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UserError, match=r"model.liger needs the package liger-kernel: install it with pip install"):
        check_liger("llama")
    patched = []
    package, module = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    package._apply_liger_kernel_to_instance = lambda **arguments: patched.append(arguments)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", module)
    check_liger("llama")
    with pytest.raises(UserError, match=r"Liger has no kernels for other models"):
        check_liger("other")
    model = SimpleNamespace()
    use_liger(model)
    assert patched == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_liger_stops_a_run_before_anything_is_loaded():
    from oneshot.training.finetune import prepare

    with pytest.raises(UserError, match=r"model.liger needs a GPU"):
        prepare(parse(["--model.liger", "true"], "finetune"), tiny_runtime())


def test_settings_of_packing():
    assert parse([], "finetune").finetune.packing == "auto"
    with pytest.raises(UserError, match=r"packing"):
        parse(["--finetune.packing", "sometimes"], "finetune")
    with pytest.raises(UserError, match=r"finetune.pack_length is 0 .*give a whole number above 0"):
        parse(["--finetune.pack_length", "0"], "finetune")
