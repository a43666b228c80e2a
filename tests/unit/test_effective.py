"""Adapters that are more than a LoRA (peft#2419 and kin): their merge is what PEFT computes, or is refused by kind."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter import with_peft
from test_export import alone, refused, run
from test_merge import everything, save_base
from tiny import files_in, logits_of, tiny_tokens

from oneshot.checkpoint.adapter import read_adapter
from oneshot.checkpoint.effective import kinds_of
from oneshot.checkpoint.files import ADAPTER_CONFIG, ADAPTER_TENSORS
from oneshot.checkpoint.verify import check_shards
from oneshot.errors import UserError

__all__ = ["alone", "refused"]
TOKENS = tiny_tokens()
TARGETS = ["q_proj", "v_proj", "down_proj"]
STREAMED = {
    "dora": ("llama", {"use_dora": True}),
    "dora-rslora-patterns": (
        "qwen2",
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    ),
    "saved-head": ("llama", {"modules_to_save": ["lm_head"]}),
    "saved-both": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved-norms": ("llama", {"modules_to_save": ["norm", "input_layernorm"]}),
    "dora-saved": ("qwen2", {"use_dora": True, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tied-saved-head": ("llama-tied", {"modules_to_save": ["lm_head"]}),
    "tied-saved-embedding": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "tied-head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied-embedding": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "bias-all": ("qwen2", {"bias": "all"}),
    "bias-lora-only": ("qwen2", {"bias": "lora_only"}),
    "lora-bias": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tokens": ("llama", {"trainable_token_indices": [3, 5]}),
    "tied-tokens": ("llama-tied", {"trainable_token_indices": [3, 5]}),
    "tokens-of-both": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}}),
}
BY_PEFT = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "dora-embedding": ("llama", {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}),
    "dora-transposed": ("gpt2", {"use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


def save_rich(folder, base, *, seed=5, **options):
    """An adapter on a saved base, everything that it trains random, as a user would have saved it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), LoraConfig(**options))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(str(folder))
    return folder


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("kind", [*STREAMED, *BY_PEFT])
def test_an_adapter_that_is_more_than_a_lora_is_merged_as_peft_applies_it(kind, tmp_path):
    family, options = {**STREAMED, **BY_PEFT}[kind]
    base = tmp_path / "base"
    save_base(base, family)
    adapter = save_rich(tmp_path / "adapter", base, **options)
    wanted = logits_of(with_peft(loaded(base), adapter), TOKENS)
    assert (logits_of(loaded(base), TOKENS) - wanted).abs().max() > 0.1
    run("--model", base, "--adapter", adapter, "--out", tmp_path / "merged")
    torch.testing.assert_close(logits_of(loaded(tmp_path / "merged"), TOKENS), wanted, rtol=1e-3, atol=1e-3)
    assert not any(shard.problems for shard in check_shards(tmp_path / "merged"))
    assert not any(shard.problems for shard in check_shards(adapter))
    assert json.loads((tmp_path / "merged" / "oneshot_export.json").read_text())["adapters"][0]["kinds"]
