"""Tiny random checkpoints of the architectures of the matrix: an aligned one and a fine-tuned one of each, in seconds.

The text models' configs are those that the planner is tested with (``tests/unit/tiny_configs.py``), with the vocabulary
of the tokenizer that is trained here on the shipped prompts.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from oneshot.measure.probes import ASSETS

V, LENGTH = 512, 256
SPECIAL = (
    "<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|image|>", "<|in|>", "<|out|>", "<|audio|>",
    "<|video|>",
)  # fmt: skip
IMAGE, BEGIN, END, AUDIO, VIDEO = range(6, 11)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT = {"vocab_size": V, "max_position_embeddings": LENGTH, "initializer_range": 0.15}

DENSE = (
    "llama", "llama-tied", "apertus", "arcee", "cohere", "cohere2", "exaone4", "falcon", "gemma", "gemma2",
    "gemma3_text", "gemma3n_text", "gemma4_text", "glm4", "gpt2", "gpt_neox", "granite", "helium", "ministral3",
    "mistral", "nemotron", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm",
    "starcoder2",
)  # fmt: skip
HYBRID = ("bamba", "falcon_h1", "lfm2", "mamba2", "qwen3_5_text")
MIXTURE = (
    "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoehybrid", "jamba", "lfm2_moe", "llama4_text", "mixtral",
    "nemotron_h", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text",
)  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEN = {**TOWER, "image_size": 28, "patch_size": 14}
QWEN_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN,
               "vision_end_token_id": END}  # fmt: skip
IMAGE_TOKENS = {"image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END}


def _rope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}}


def _text(name: str, **more: Any) -> dict[str, Any]:
    """Fields of a text model of this type."""
    from tiny_configs import SPARSE, TINY

    given = TINY[name] if name in TINY else SPARSE[name][0]
    fields = {**given, **{key: value for key, value in TEXT.items() if key in given or key == "initializer_range"}}
    if "n_positions" in fields:
        fields["n_positions"] = LENGTH
    if "vocab_size_per_layer_input" in fields:
        fields["vocab_size_per_layer_input"] = V
    if "altup_num_inputs" in fields:
        fields["altup_num_inputs"] = 4
    return {**fields, **more}


def _multimodal() -> dict[str, tuple[str, dict[str, Any]]]:
    """Class of transformers and fields of each."""
    text = {key: value for key, value in _text("qwen2").items() if key != "head_dim"}
    partial = _rope(1, 1, 0, partial_rotary_factor=0.25)
    deep = {**QWEN_TOWER, "num_position_embeddings": 16}
    return {
        "gemma3": ("Gemma3Config", {"text_config": _text("gemma3_text"), "vision_config": SEEN, **IMAGE_TOKENS,
                                    "mm_tokens_per_image": 4}),
        "gemma4": ("Gemma4Config", {
            "text_config": _text("gemma4_text"), "audio_config": None, "image_token_index": IMAGE,
            "vision_config": {**TOWER, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 14},
            "boi_token_index": BEGIN, "eoi_token_index": END, "audio_token_id": AUDIO, "video_token_id": VIDEO}),
        "llama4": ("Llama4Config", {"text_config": _text("llama4_text"), **IMAGE_TOKENS, "vision_config": {
            **SEEN, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5}}),
        "mistral3": ("Mistral3Config", {"text_config": {**_text("mistral"), "model_type": "mistral"},
                                        "vision_config": {**SEEN, "model_type": "pixtral", "head_dim": 16},
                                        "image_token_index": IMAGE}),
        "qwen2_5_vl": ("Qwen2_5_VLConfig", {"text_config": {**text, **_rope(2, 3, 3)}, **QWEN_TOKENS,
                                            "vision_config": {**QWEN_TOWER, "fullatt_block_indexes": [0]}}),
        "qwen3_vl": ("Qwen3VLConfig", {"text_config": {**_text("qwen3"), **_rope(2, 3, 3)}, **QWEN_TOKENS,
                                       "vision_config": {**deep, "deepstack_visual_indexes": [0]}}),
        "qwen3_vl_moe": ("Qwen3VLMoeConfig", {"text_config": {**_text("qwen3_moe"), **_rope(2, 3, 3)}, **QWEN_TOKENS,
                                              "vision_config": {**deep, "deepstack_visual_indexes": [0]}}),
        "qwen3_5": ("Qwen3_5Config", {"text_config": {**_text("qwen3_5_text"), **partial}, **QWEN_TOKENS,
                                      "vision_config": deep}),
        "qwen3_5_moe": ("Qwen3_5MoeConfig", {"text_config": {**_text("qwen3_5_moe_text"), **partial}, **QWEN_TOKENS,
                                             "vision_config": deep}),
    }  # fmt: skip


MULTIMODAL = (
    "gemma3", "gemma4", "llama4", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe",
)  # fmt: skip
EVERY = (*DENSE, *HYBRID, *MIXTURE, *MULTIMODAL)


@cache
def tokenizer() -> Any:
    """A small byte-level tokenizer of the shipped prompts, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = [m["content"] for path in sorted(ASSETS.glob("*.jsonl")) for m in _messages(path)]
    trainer = trainers.BpeTrainer(
        vocab_size=V, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[3:]), model_max_length=LENGTH, chat_template=TEMPLATE,
    )  # fmt: skip


def _messages(path: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [message for row in rows for message in row.get("messages", [])]


def model_of(name: str) -> Any:
    """The random model of an architecture, in fp32: of a multimodal one the class that answers prompts with images."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    if name in MULTIMODAL:
        kind, fields = _multimodal()[name]
        config = getattr(t, kind)(**fields)
        model = getattr(t, kind.removesuffix("Config") + "ForConditionalGeneration")(config)
    else:
        kind = name.removesuffix("-tied")
        tied = {"tie_word_embeddings": True} if name != kind else {}
        model = t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(kind, **_text(kind), **tied))
    model = model.float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "sinks" in key:
                parameter.normal_(std=0.05)
    return model


def build(name: str, folder: Path) -> tuple[Path, Path]:
    """Write the aligned and the fine-tuned checkpoint of an architecture; every weight of it differs by a tenth."""
    import torch

    model = model_of(name)
    aligned, finetuned = folder / "aligned", folder / "finetuned"
    model.save_pretrained(aligned)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * (spread or 0.1))
    model.save_pretrained(finetuned)
    for each in (aligned, finetuned):
        tokenizer().save_pretrained(each)
    return aligned, finetuned
