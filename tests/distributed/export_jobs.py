"""What ranks do in the export tests."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (imported once, where ranks are forked from)
import peft
import torch
import transformers

from oneshot.checkpoint.merging import merge
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.world.model import build_tokenizer

# the stages' modules: the package's own names are functions
export = importlib.import_module("oneshot.export")

CONFIG = {
    "vocab_size": 101, "hidden_size": 38, "intermediate_size": 130, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 18, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def make(folder: Path) -> None:
    """Write a random bf16 base in several shards, and two LoRAs on it."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    build_tokenizer().save_pretrained(folder / "base")
    for name, targets in (("a", ["q_proj", "down_proj"]), ("b", "all-linear")):
        base = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
        lora: Any = peft.get_peft_model(base, config)
        for key, parameter in lora.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.1)
        lora.save_pretrained(str(folder / name))


def run_all(runtime: Runtime, commands: list[list[str]]) -> dict[str, Any]:
    """Run commands of ``oneshot export`` one after another; says which tensors this rank wrote, or the refusals."""
    written: dict[str, list[str]] = {}
    refused: dict[str, str] = {}
    plain = merge._write_share

    def watched(runtime: Runtime, plan: Any, share: list[str], folder: Path) -> Any:
        written[folder.name] = share
        return plain(runtime, plan, share, folder)

    merge._write_share = watched
    for command in commands:
        try:
            export.run(command)
        except UserError as error:
            refused[command[-1]] = str(error)
    return {"written": written, "refused": refused}


def fail_on_one(runtime: Runtime, command: list[str], rank: int) -> str:
    """A merge in which one rank cannot write; returns the error that this rank sees."""
    plain = merge.write_range

    def failing(*arguments: Any) -> Any:
        if runtime.rank == rank:
            raise OSError(28, "No space left on device")
        return plain(*arguments)

    merge.write_range = failing
    try:
        export.run(command)
    except UserError as error:
        return str(error)
    return ""
