"""Adapters that are more than a LoRA (peft#2419 and kin): their merge is what PEFT computes, or is refused by kind."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter import with_peft
from test_export import alone, refused, run
from test_merge import everything, save_base
from tiny import files_in, logits_of, tiny_tokens

from oneshot.checkpoint.adapters.adapter import read_adapter
from oneshot.checkpoint.adapters.effective import kinds_of
from oneshot.checkpoint.disk.files import ADAPTER_CONFIG, ADAPTER_TENSORS
from oneshot.checkpoint.writing.verify import check_shards
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
    "tied-saved-as-one": ("llama-tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
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
    if family == "llama-tied":  # older readers than transformers 5 go by the config alone
        tied = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
        assert tied == ("lm_head.weight" not in everything(tmp_path / "merged"))
        assert tied == (kind in ("tied-saved-as-one", "tied-tokens"))
    assert json.loads((tmp_path / "merged" / "oneshot_export.json").read_text())["adapters"][0]["kinds"]


@pytest.mark.parametrize(
    "kind", ["tied-tokens", "tied-saved-as-one", "tied-saved-head", "tied-saved-embedding", "tied-head", "plain"]
)
def test_a_tied_head_that_is_stored_as_well_changes_as_the_embedding_does(kind, tmp_path):
    base = tmp_path / "base"
    save_base(base, "llama-tied")
    tensors = everything(base)
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    adapter = save_rich(tmp_path / "adapter", base, **STREAMED.get(kind, ("", {}))[1])
    wanted = logits_of(with_peft(loaded(base), adapter), TOKENS)
    run("--model", base, "--adapter", adapter, "--out", tmp_path / "merged")
    torch.testing.assert_close(logits_of(loaded(tmp_path / "merged"), TOKENS), wanted, rtol=1e-3, atol=1e-3)
    written = everything(tmp_path / "merged")
    tied = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (kind in ("tied-tokens", "tied-saved-as-one", "plain"))
    assert ("lm_head.weight" in written) == (kind not in ("tied-tokens", "tied-saved-as-one"))


def test_a_tied_head_that_is_stored_as_well_grows_with_the_embedding(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    save_base(base, "llama-tied")
    tensors = everything(base)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, base / "model.safetensors", {"format": "pt"})
    model = loaded(base)
    model.resize_token_embeddings(len(embedding) + 8, mean_resizing=False)
    made = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    made.save_pretrained(str(tmp_path / "adapter"))
    run("--model", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged")
    merged = loaded(tmp_path / "merged")
    assert torch.equal(merged.lm_head.weight, model.get_input_embeddings().weight)
    assert merged.config.vocab_size == len(embedding) + 8


def test_kinds_are_refused_by_name_with_the_command_that_converts_them(tmp_path):
    save_base(tmp_path / "base", "qwen2")
    for number, (options, kind) in enumerate(
        [
            ({"use_dora": True}, "DoRA"),
            ({"modules_to_save": ["lm_head"]}, r"modules saved whole \(lm_head\.weight\)"),
            ({"bias": "all"}, r"modules saved whole \(\S+\.bias and 5 more\)"),
            ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA of an embedding"),
            ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
            ({"init_lora_weights": "olora"}, "init_lora_weights olora"),
        ]
    ):
        adapter = save_rich(tmp_path / str(number), tmp_path / "base", **options)
        with pytest.raises(
            UserError, match=rf"{kind}.*oneshot export --model \S*base --adapter {adapter} --out MERGED"
        ):
            read_adapter(adapter)


def changed_config(folder, **fields):
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, **fields}))


def test_what_has_no_sum_no_weight_and_no_checkpoint_is_said_before_anything_is_written(tmp_path, refused):
    base = tmp_path / "base"
    save_base(base)
    dora = save_rich(tmp_path / "dora", base, use_dora=True)
    plain = save_rich(tmp_path / "plain", base)
    bias = save_rich(tmp_path / "bias", base, lora_bias=True)
    tokens = save_rich(tmp_path / "tokens", base, trainable_token_indices=[3, 5])
    changed_config(tokens, trainable_token_indices=[3])
    longer = save_rich(tmp_path / "longer", base)
    changed_config(longer, layer_replication=[[0, 2], [0, 2]])
    alora = save_rich(tmp_path / "alora", base)
    changed_config(alora, alora_invocation_tokens=[1])
    corda = save_rich(tmp_path / "corda", base)
    changed_config(corda, init_lora_weights="corda")
    before = files_in(tmp_path)
    out = ("--out", tmp_path / "merged")
    for more in (("--weight", 0.5), ("--subtract",)):
        assert "DoRA), which has no sum" in refused("--model", base, "--adapter", dora, *more, *out)
    assert "merge it alone" in refused("--model", base, "--adapter", dora, "--adapter", plain, *out)
    assert f"oneshot export --model {base} --adapter {dora}" in refused("--adapter", dora, "--rank", 2, *out)
    assert "have no bias there" in refused("--model", base, "--adapter", bias, *out)
    assert "does not number the 2 rows" in refused("--model", base, "--adapter", tokens, *out)
    assert "active only after certain tokens" in refused("--model", base, "--adapter", alora, *out)
    assert "has layer_replication" in refused("--model", base, "--adapter", longer, *out)
    assert "PEFT cannot merge" in refused("--model", base, "--adapter", corda, *out)
    assert files_in(tmp_path) == before


def test_a_vocabulary_that_grew_with_the_saved_modules_goes_into_the_config(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    save_base(base)
    model = loaded(base)
    rows = model.config.vocab_size + 7
    model.resize_token_embeddings(rows, mean_resizing=False)
    saved = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}
    get_peft_model(model, LoraConfig(**saved)).save_pretrained(str(tmp_path / "adapter"))
    run("--model", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged")
    assert loaded(tmp_path / "merged").config.vocab_size == rows
    assert everything(tmp_path / "merged")["lm_head.weight"].shape[0] == rows


def test_a_damaged_adapter_of_these_kinds_is_refused(tmp_path, refused):
    base = tmp_path / "base"
    save_base(base)
    for number, change in enumerate((lambda t, k: t.pop(k), lambda t, k: t[k].fill_(float("nan")))):
        dora = save_rich(tmp_path / f"dora{number}", base, use_dora=True)
        tensors = load_file(dora / ADAPTER_TENSORS)
        change(tensors, "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
        save_file(tensors, dora / ADAPTER_TENSORS)
        line = refused("--model", base, "--adapter", dora, "--out", tmp_path / "merged")
        assert ("only one factor" if number == 0 else "NaN or infinity in") in line
        assert kinds_of(dora).merged == ["DoRA"]


@pytest.mark.parametrize("kind", ["pissa", "ia3"])
def test_what_peft_would_load_in_part_is_refused_by_name(kind, tmp_path, refused):
    from peft import IA3Config, get_peft_model

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_base(base)
    if kind == "ia3":
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
        get_peft_model(loaded(base), config).save_pretrained(str(adapter))
    else:
        save_rich(adapter, base, init_lora_weights="pissa")
    tensors = load_file(adapter / ADAPTER_TENSORS)
    moved = {name.replace("layers.1.", "layers.9."): tensor for name, tensor in tensors.items()}
    save_file(moved, adapter / ADAPTER_TENSORS, {"format": "pt"})
    said = refused("--model", base, "--adapter", adapter, "--out", tmp_path / "merged")
    assert "only in part" in said
    assert "layers." in said
    assert not (tmp_path / "merged").exists()
