"""The toy world's tokenizer and model: the real transformers classes, in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.world import language

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

PAD, BOS, END, USER, ASSISTANT, SYSTEM, UNKNOWN = (
    "<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<unk>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ ' <|' + message['role'] + '|> ' + message['content'] + ' <|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|assistant|>' }}{% endif %}"
)
ALIGNED = Path(__file__).parent / "aligned"
NAME = "toy:aligned"  # how settings name it


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the language, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, END, USER, ASSISTANT, SYSTEM, UNKNOWN]
    vocabulary = {word: i for i, word in enumerate(special + language.words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocabulary_size: int, seed: int, *, hidden: int = 96, layers: int = 3) -> LlamaForCausalLM:
    """Return an untrained Llama, fp32, seeded; as it is shipped 0.34 M parameters.

    Args:
        hidden: width, a multiple of 8 (four heads of even width)
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_common(vocabulary_size, hidden, layers), intermediate_size=8 * hidden // 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def build_mixture(vocabulary_size: int, seed: int, *, hidden: int = 96, layers: int = 3) -> Qwen3MoeForCausalLM:
    """Return an untrained mixture of 8 experts, of which each token is sent to 2, fp32, seeded; 0.58 M parameters."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sparse: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": hidden // 2}
    sparse |= {"head_dim": hidden // 4, "norm_topk_prob": True}
    config = Qwen3MoeConfig(**_common(vocabulary_size, hidden, layers), **sparse)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3MoeForCausalLM(config)


def _common(vocabulary_size: int, hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
