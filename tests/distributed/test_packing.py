"""Packed and padded fine-tunes have the same losses and end in the same weights, on one process and on two."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packing_jobs import finetunes
from ranks import start_ranks
from safetensors.torch import load_file

from oneshot.world.model import build_tokenizer

pytestmark = pytest.mark.distributed
TOPOLOGIES = {"single": ("ddp", 1), "ddp": ("ddp", 2), "zero2": ("zero2", 2), "zero3": ("zero3", 2)}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {"llama": ("Llama", {}), "qwen2": ("Qwen2", {}), "gemma3": ("Gemma3Text", {"sliding_window": 8})}
LORA = ["--finetune.method", "lora", "--finetune.lora_rank", "4", "--finetune.learning_rate", "1e-2"]
# 7 conversations a step in 2 micro-batches on 2 ranks: unequal shares; the last step of the epoch leaves one empty
VARIANTS = {
    **{family: (family, []) for family in FAMILIES},
    "checkpointed": ("llama", ["--model.gradient_checkpointing", "true"]),
    "lora": ("llama", LORA),
    "lora-checkpointed": ("llama", [*LORA, "--model.gradient_checkpointing", "true"]),
}
STEPS = 6
RTOL = 1e-5
Events = Callable[[str], dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models, and conversations of mixed lengths."""
    made = tmp_path_factory.mktemp("packing")
    tokenizer = build_tokenizer()
    for name, (family, options) in FAMILIES.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **{**SIZES, **options})
        transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(made / name)
        tokenizer.save_pretrained(made / name)
    words = [word for word in sorted(tokenizer.get_vocab()) if not word.startswith("<")]
    rows = []
    for i in range(24):
        count = (3, 20, 7, 12, 2, 30)[i % 6]
        text = [words[(7 * i + j * j) % len(words)] for j in range(count + 4)]
        rows.append({"prompt": " ".join(text[:4]), "response": " ".join(text[4:])})
    (made / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def events(folder: Path) -> Events:
    """topology -> events of every run, named VARIANT-PACKING; each topology starts when it is first asked for."""

    @functools.cache
    def run(topology: str) -> dict[str, list[dict[str, Any]]]:
        sharding, world_size = TOPOLOGIES[topology]
        runs = {}
        for variant, (family, argv) in VARIANTS.items():
            for packing in ("never", "always"):
                runs[str(folder / topology / f"{variant}-{packing}")] = [
                    "--model.path", str(folder / family), "--data.harmful", str(folder / "talks.jsonl"),
                    "--data.task_count", "0", "--finetune.steps", str(STEPS), "--finetune.batch_size", "7",
                    "--finetune.gradient_accumulation_steps", "2", "--finetune.learning_rate", "3e-3",
                    "--finetune.packing", packing, "--finetune.cache", "false", *argv,
                ]  # fmt: skip
        ranks = start_ranks(finetunes, world_size, sharding, folder / f"{topology}-ranks", {"runs": runs})
        found = ranks.results(timeout=300)[0]
        return {Path(name).name: steps for name, steps in found.items()}

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "finetuned").glob("*model.safetensors")
    return load_file(file)


def off(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference of any tensor, relative to it (Frobenius norms): Adam enlarges rounding of tiny gradients."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - w).norm() / w.norm().clamp(min=1e-6)) for n, w in wanted.items())


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_padded(variant: str, topology: str, events: Events, folder: Path) -> None:
    padded, packed = events(topology)[f"{variant}-never"], events(topology)[f"{variant}-always"]
    assert len(padded) == len(packed) == STEPS
    assert padded[-1]["loss"] < padded[0]["loss"]
    for a, b in zip(padded, packed):
        assert b["tokens"] == a["tokens"]
        assert b["loss"] == pytest.approx(a["loss"], rel=RTOL)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    runs = folder / topology
    assert off(weights(runs / f"{variant}-always"), weights(runs / f"{variant}-never")) < 1e-4


@pytest.mark.parametrize("topology", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_on_two_processes_equals_one(variant: str, topology: str, events: Events, folder: Path) -> None:
    one, two = events("single")[f"{variant}-always"], events(topology)[f"{variant}-always"]
    for a, b in zip(one, two):
        assert b["tokens"] == a["tokens"]
        assert b["loss"] == pytest.approx(a["loss"], rel=RTOL)
    found, wanted = (weights(folder / name / f"{variant}-always") for name in (topology, "single"))
    assert off(found, wanted) < 1e-4


@pytest.mark.parametrize("topology", ["single", "zero3"])
@pytest.mark.parametrize(("plain", "checkpointed"), [("llama", "checkpointed"), ("lora", "lora-checkpointed")])
@pytest.mark.parametrize("packing", ["never", "always"])
def test_checkpointing_changes_nothing(
    packing: str, plain: str, checkpointed: str, topology: str, events: Events
) -> None:
    wanted, found = (events(topology)[f"{variant}-{packing}"] for variant in (plain, checkpointed))
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in wanted], rel=RTOL)
