"""vLLM serves what oneshot writes: answers with the patch are those of the merged model, on tiny random models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Server, serving
from peft import LoraConfig, get_peft_model

from oneshot.checkpoint.adapters.adapter import read_adapter, write_repaired_adapter
from oneshot.checkpoint.adapters.experts import expert_matrices
from oneshot.checkpoint.adapters.injected import write_loadable
from oneshot.checkpoint.adapters.update import Factors, Update, scaled
from oneshot.patch.linears import select_linears
from oneshot.world.model import ALIGNED

TOKENS, RANK = 12, 16
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.3,
}  # fmt: skip
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1},  # of 32: it has no head_dim
    "Qwen3": {},
    "Gemma3Text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen3Moe": {**MIXTURE, "num_experts": 4},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "GptOss": {**MIXTURE, "num_local_experts": 4, "sliding_window": 64, "intermediate_size": 64},
}
KINDS = ("served", "local")
ROOT = Path(__file__).parents[2]


def build(name: str, folder: Path) -> Any:
    """Write a random model with the toy world's tokenizer; return it in memory."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ALIGNED)
    special = {"pad_token_id": 0, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields = {**SIZES, **SHAPES[name], "vocab_size": 192, **special}
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**fields), attn_implementation="eager"
    ).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def random_update(model: Any, rank: int = RANK) -> Update:
    generator = torch.Generator().manual_seed(1)
    return {
        name: Factors(
            0.2 * torch.randn(layer.out_features, rank, generator=generator),
            0.2 * torch.randn(rank, layer.in_features, generator=generator),
        )
        for name, layer in select_linears(model).targets.items()
    }


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(5, 150, (6, 20), generator=generator).tolist()


def greedy(model: Any) -> list[list[int]]:
    ids = torch.tensor(prompts())
    with torch.no_grad():
        for _ in range(TOKENS):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[:, -TOKENS:].tolist()


def texts(found: list[list[int]]) -> list[str]:
    said = transformers.AutoTokenizer.from_pretrained(ALIGNED).batch_decode(found, skip_special_tokens=True)
    return [text.replace(" ", "") for text in said]


def merge(model: Any, update: Update) -> Any:
    experts = expert_matrices(model)
    with torch.no_grad():
        for module, factors in update.items():
            if (one := experts.get(module)) is not None:
                whole = model.get_parameter(one.parameter)[one.index]
                whole += (factors.b @ factors.a).T if one.transposed else factors.b @ factors.a
            else:
                model.get_submodule(module).weight += factors.b @ factors.a
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_a_patch_is_served_as_merged(name: str, vllm: str, tmp_path: Path) -> None:
    """The base, the patch beside it, and the merged checkpoint; of mixtures base and merged checkpoint.

    Beside fused experts vLLM 0.32 applies adapters, to attention alone too, by Triton's kernels, which CPUs have not.
    """
    model = build(name, tmp_path / "base")
    update, linears = random_update(model), select_linears(model).every
    before = texts(greedy(model))
    with torch.device("meta"):
        plain = type(model)(model.config)
    write_loadable(tmp_path / "patch", update, linears, str(tmp_path / "base"), torch.float32, plain)
    after = texts(greedy(merge(model, update)))
    model.save_pretrained(tmp_path / "merged")
    transformers.AutoTokenizer.from_pretrained(ALIGNED).save_pretrained(tmp_path / "merged")
    assert before != after
    beside = not expert_matrices(plain)
    lora = ["--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"safe={tmp_path / 'patch'}"]
    with serving(vllm, tmp_path / "log", [str(tmp_path / "base"), *(lora if beside else [])]) as server:
        assert server.continued(str(tmp_path / "base"), prompts(), TOKENS) == before
        if beside:
            assert server.continued("safe", prompts(), TOKENS) == after
    with serving(vllm, tmp_path / "log-merged", [str(tmp_path / "merged")]) as server:
        assert server.continued(str(tmp_path / "merged"), prompts(), TOKENS) == after


def test_patches_come_and_go_while_it_serves(vllm: str, tmp_path: Path) -> None:
    model = build("Llama", tmp_path / "base")
    own = get_peft_model(
        type(model).from_pretrained(tmp_path / "base"),
        LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    own.save_pretrained(tmp_path / "own")
    # a user's adapter, repaired: what is left of it, in its own form
    adapter = read_adapter(tmp_path / "own")
    half = {name: scaled(factors, 0.5) for name, factors in adapter.update.items()}
    write_repaired_adapter(tmp_path / "mended", adapter, half)
    expected = texts(greedy(merge(model, half)))
    with serving(vllm, tmp_path / "log", [str(tmp_path / "base"), "--enable-lora", "--max-lora-rank", "8"]) as server:
        assert server.models() == [str(tmp_path / "base")]
        server.post("load_lora_adapter", lora_name="mended", lora_path=str(tmp_path / "mended"))
        assert server.continued("mended", prompts(), TOKENS) == expected
        server.post("unload_lora_adapter", lora_name="mended")
        assert server.models() == [str(tmp_path / "base")]


def test_score_asks_it_for_base_and_patch(vllm: str, tmp_path: Path) -> None:
    model = build("Llama", tmp_path / "base")
    update, linears = random_update(model), select_linears(model).every
    with torch.device("meta"):
        plain = type(model)(model.config)
    write_loadable(tmp_path / "patch", update, linears, str(tmp_path / "base"), torch.float32, plain)
    lora = ["--enable-lora", "--lora-modules", f"safe={tmp_path / 'patch'}"]  # vLLM's own largest rank, 16, is ours
    with serving(vllm, tmp_path / "log", [str(tmp_path / "base"), *lora]) as server:
        for name, given in (("base", []), ("safe", ["--model.base", str(tmp_path / "base")])):
            asked = name if name == "safe" else str(tmp_path / "base")
            endpoint = ["--score.endpoint.url", server.url, "--score.endpoint.model", asked]
            served = _score(tmp_path / f"served-{name}", server, *endpoint)
            path = str(tmp_path / ("patch" if name == "safe" else "base"))
            local = _score(tmp_path / f"local-{name}", server, "--model.path", path, *given)
            assert served["stages"] == local["stages"]
            rows = [(tmp_path / f"{kind}-{name}" / "answers.jsonl").read_text().splitlines() for kind in KINDS]
            answers = [[json.loads(row)["answer"].strip() for row in each] for each in rows]
            assert answers[0] == answers[1]


def _score(out: Path, server: Server, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "oneshot", "score", "--score.probes", "toy:probes", "--score.max_new_tokens", "8"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [*command, "--out", str(out), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return found
