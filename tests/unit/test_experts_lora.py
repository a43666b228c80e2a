"""Method lora on fused experts: PEFT trains factors of all experts of a parameter, read back matrix by matrix."""

import pytest
import torch
from test_expert_hook import mixture
from tiny import logits_of, tiny_runtime, tiny_update
from tiny_configs import V

from oneshot.checkpoint.adapters.experts import ExpertMatrix
from oneshot.patch.attach import attached_update
from oneshot.patch.bench import with_lora
from oneshot.patch.linears import select_linears
from oneshot.patch.methods.lora import lora_factors
from oneshot.settings import FinetuneSettings
from oneshot.training.lora import with_lora as to_finetune


@pytest.mark.parametrize("own", [False, True], ids=["alone", "with the user's own attached"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "llama4_text"])
def test_what_peft_trains_is_the_update_that_is_read_back(kind, own):
    model, tokens = mixture(kind), torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(5))
    linears = select_linears(model)
    users = tiny_update(linears.targets, seed=4, scale=0.01) if own else {}
    with attached_update(model, users):
        before = logits_of(model, tokens)
        wrapped = with_lora(model, linears, 4, 2)
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(std=0.05)
        theirs = logits_of(wrapped, tokens)
        update = lora_factors(tiny_runtime(), wrapped)
        plain = wrapped.unload()
        assert set(update) == set(linears.targets)
        for name, factors in update.items():
            assert factors.rank == (2 if isinstance(linears.targets[name], ExpertMatrix) else 4)
        with attached_update(plain, update):
            ours = logits_of(plain, tokens)
    assert float((theirs - before).norm() / before.norm()) > 0.01
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("width", [32, 64, 112], ids=["gate_up square", "down square", "none square"])
def test_one_projection_of_experts_is_read_back_as_peft_trains_it(projection, width):
    model = mixture("llama4_text", hidden_size=64, intermediate_size=width)
    tokens = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(5))
    wrapped = with_lora(model, select_linears(model, rf"experts\.\d+\.{projection}"), 4)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    theirs, update = logits_of(wrapped, tokens), lora_factors(tiny_runtime(), wrapped)
    plain = wrapped.unload()
    before = logits_of(plain, tokens)
    with attached_update(plain, update):
        ours = logits_of(plain, tokens)
    assert float((theirs - before).norm() / before.norm()) > 0.01
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "qwen3_next", "llama4_text"]
)
def test_a_fine_tune_trains_layers_and_experts_and_no_router(kind):
    model = mixture(kind)
    targets = select_linears(model).targets
    wrapped, left_out = to_finetune(model, FinetuneSettings(method="lora", lora_rank=3), 0)
    trained = lora_factors(tiny_runtime(), wrapped)
    assert trained.keys() == targets.keys()
    assert {factors.rank for factors in trained.values()} == {3}
    assert left_out == ""


def test_a_fine_tune_says_which_experts_it_leaves_out():
    model = mixture("qwen3_moe")
    next(model.parameters()).quant_state = object()  # as bitsandbytes marks what it has packed
    wrapped, left_out = to_finetune(model, FinetuneSettings(method="lora"), 0)
    assert "leaves fused experts and the MLPs beside them out" in left_out
    assert not any(".experts." in name for name in lora_factors(tiny_runtime(), wrapped))
