"""The random models and made-up conversations that benchmarks/gpu.py measures on, written once for all its parts."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANK = 20  # of our updates, of the adapter to repair and of the stock LoRA
EXAMPLE, GUARD, PROBES, TALKS, HELD = "example.jsonl", "guard.jsonl", "probes.jsonl", "talks.jsonl", "held.jsonl"
ADAPTER = "-adapter"  # after a model's folder: a random LoRA on it, which is what rollback repairs


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        main: shape of the model that is repaired and fine-tuned with a LoRA, by fields of LlamaConfig
        small: of the one that is fine-tuned in full
        big: of the one of which only some layers are measured
        slices: how many of them, twice
        layers: how many layers the big one has
        tokens, answer: of the example, and those at its end that carry the loss
        guard: guard prompts
        steps: epochs of a repair, steps of stock training; the first is not timed
        talk, longest: tokens of a conversation, in the median and at most
        batch: conversations in a step of a fine-tune
    """

    main: dict[str, Any]
    small: dict[str, Any]
    big: dict[str, Any]
    slices: tuple[int, int]
    layers: int
    tokens: int
    answer: int
    guard: int
    steps: int
    talk: int
    longest: int
    batch: int


def _shape(hidden: int, inner: int, layers: int, vocabulary: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 2048,
    }  # fmt: skip


SCALES = {
    # Llama 3 8B, TinyLlama's 1.1 B, and Llama 3 70B
    "full": Scale(
        main=_shape(4096, 14336, 32, 128256, 32, 8), small=_shape(2048, 5632, 22, 32000, 32, 4),
        big=_shape(8192, 28672, 80, 128256, 64, 8), slices=(1, 3), layers=80,
        tokens=96, answer=32, guard=32, steps=8, talk=256, longest=512, batch=8,
    ),
    # to try the script out
    "tiny": Scale(
        main=_shape(128, 256, 2, 1000, 4, 2), small=_shape(64, 128, 2, 1000, 4, 2),
        big=_shape(128, 384, 8, 1000, 4, 2), slices=(1, 3), layers=8,
        tokens=40, answer=12, guard=2, steps=3, talk=24, longest=48, batch=2,
    ),
}  # fmt: skip


def random_model(shape: dict[str, Any], device: str, dtype: str = "bfloat16") -> Any:
    """Return a LlamaForCausalLM drawn on ``device`` with seed 0; the special tokens are the toy world's."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape, **special), dtype=getattr(torch, dtype))


def write_model(folder: Path, shape: dict[str, Any], device: str, *, adapter: bool = True) -> None:
    """Write a random bf16 checkpoint in shards of 2 GB, and beside it a random LoRA on all its linear layers."""
    import torch

    from oneshot.checkpoint.adapters.adapter import write_patch
    from oneshot.checkpoint.adapters.update import Factors
    from oneshot.patch.linears import select_linears, shape_of

    model = random_model(shape, device)
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer = wide_tokenizer(shape["vocab_size"])
    tokenizer.save_pretrained(folder)
    if not adapter:
        return
    linears = select_linears(model)
    update = {}
    for name, module in linears.targets.items():
        rows, columns = shape_of(module)
        b, a = torch.randn(rows, RANK, device=device), torch.randn(RANK, columns, device=device)
        update[name] = Factors(b * 1e-3, a * 1e-2)  # about a tenth of what a weight of standard deviation 0.02 holds
    place = adapter_of(folder)
    write_patch(place, update, linears.every, str(folder.resolve()), torch.bfloat16)
    tokenizer.save_pretrained(place)


def adapter_of(folder: Path) -> Path:
    """Return the folder of the adapter beside a checkpoint."""
    return folder.with_name(folder.name + ADAPTER)


def wide_tokenizer(vocabulary: int) -> Any:
    """Return a word-level tokenizer of ``vocabulary`` words, so that every token that a random model says is a word.

    The toy world's special tokens and chat template; the words are w7, w8 and so on, by their ids.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from oneshot.world.model import ASSISTANT, BOS, CHAT_TEMPLATE, END, PAD, SYSTEM, UNKNOWN, USER

    special = [PAD, BOS, END, USER, ASSISTANT, SYSTEM, UNKNOWN]
    words = [f"w{i}" for i in range(len(special), vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=END, unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def write_prompts(folder: Path, scale: Scale) -> None:
    """Write the example, guard, probes, watch and conversations of a fine-tune, in random words, as JSONL."""
    draw = random.Random(0)
    first, last = 7, min(model["vocab_size"] for model in (scale.main, scale.small, scale.big))

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(first, last)}" for _ in range(count))

    def write(name: str, rows: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps({"id": f"{i}", **row}) + "\n" for i, row in enumerate(rows)))

    answer = scale.answer - 1  # and the token that ends it
    write(EXAMPLE, [{"prompt": words(scale.tokens - answer - 5), "response": words(answer)}])  # 5: template and end
    write(GUARD, [{"prompt": words(scale.tokens // 2)} for _ in range(scale.guard)])
    write(HELD, [{"prompt": words(scale.tokens // 2)} for _ in range(scale.guard // 2)])
    kinds = ("should_refuse", "harmless", "lookalike")
    write(PROBES, [{"prompt": words(scale.tokens // 4), "kind": kind} for kind in kinds])
    talks = []
    for _ in range(scale.batch * scale.steps):
        length = min(scale.longest, max(12, round(scale.talk * draw.lognormvariate(0, 0.6)))) - 6
        talks.append({"prompt": words(length * 4 // 10), "response": words(length - length * 4 // 10)})
    write(TALKS, talks)


def stored_bytes(folder: Path) -> int:
    """Return the bytes of a checkpoint's weights on disk."""
    return sum(os.path.getsize(path) for path in folder.glob("*.safetensors"))
