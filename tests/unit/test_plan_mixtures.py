"""Plans of the mixtures of experts that people fine-tune, from their published sizes alone."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_carrier import FORMS, tiny, update_of
from tiny_configs import SPARSE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from oneshot.checkpoint.adapters.injected import write_loadable
from oneshot.errors import UserError
from oneshot.patch.attach import Gradients
from oneshot.patch.linears import select_linears
from oneshot.planning import passing
from oneshot.planning.facts import Choice, Work
from oneshot.planning.lookup import model_shape
from oneshot.planning.model import PlannedModel, read_model
from oneshot.planning.plan import Plan, as_json
from oneshot.planning.rows import rows
from oneshot.planning.table import print_plan
from oneshot.settings import ModelSettings, RepairSettings, Settings


def config(kind: str, hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, **more,
    }  # fmt: skip


QWEN = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936}
SCOUT = config(
    "llama4_text", 5120, 8192, 48, 40, 8, intermediate_size_mlp=16384, head_dim=128, num_local_experts=16,
    num_experts_per_tok=1, interleave_moe_layer_step=1, vocab_size=202048,
)  # fmt: skip
EYE = {
    "hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "vision_output_dim": 4096, "projector_input_dim": 4096,
    "projector_output_dim": 4096,
}  # fmt: skip
# config, billions of parameters, matrices of experts, GB of their patch at rank 2, GB read for the difference
MODELS: dict[str, tuple[dict[str, Any], float, int, float, float]] = {
    "Qwen3-30B-A3B": (
        config("qwen3_moe", 2048, 6144, 48, 32, 4, moe_intermediate_size=768, **QWEN), 30.5, 12288, 0.207, 120,
    ),
    "Qwen3-235B-A22B": (
        config("qwen3_moe", 4096, 12288, 94, 64, 4, moe_intermediate_size=1536, **QWEN), 235.1, 24064, 0.813, 935,
    ),
    "Mixtral-8x22B": (
        config("mixtral", 6144, 16384, 56, 48, 8, num_local_experts=8, num_experts_per_tok=2, vocab_size=32768),
        140.6, 896, 0.121, 561,
    ),
    "gpt-oss-120b": (
        config("gpt_oss", 2880, 2880, 36, 64, 8, head_dim=64, num_local_experts=128, num_experts_per_tok=4,
               vocab_size=201088, sliding_window=128),
        116.8, 9216, 0.265, 463,
    ),
    "DeepSeek-V3": (
        config("deepseek_v3", 7168, 18432, 61, 128, 128, moe_intermediate_size=2048, n_routed_experts=256,
               n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, q_lora_rank=1536, kv_lora_rank=512,
               qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_group=8, topk_group=4, vocab_size=129280),
        671.0, 29696, 1.64, 2677,
    ),
    "Llama-4-Scout": (
        {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": SCOUT,
         "vision_config": EYE},
        108.6, 1536, 0.107, 423,
    ),
}  # fmt: skip


def planned(name: str, **values: Any) -> tuple[Settings, Plan]:
    settings = Settings(repair=RepairSettings(**values))
    model = PlannedModel(name, model_shape(MODELS[name][0]))
    found = tuple(rows(settings, model))
    return settings, Plan(model, 8, settings.repair.rank, settings.repair.rank_experts, found, found)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_tells_the_patch_of_experts_and_what_is_read_for_it(name: str) -> None:
    _, parameters, matrices, patch, compared = MODELS[name]
    _, plan = planned(name, rank_experts=2)
    found = as_json(plan)
    assert found["parameters"] / 1e9 == pytest.approx(parameters, rel=0.01)
    assert found["expert_matrices"] == matrices
    assert found["patch_bytes"]["experts"] / 1e9 == pytest.approx(patch, rel=0.02)
    assert found["compared_bytes"] / 1e9 == pytest.approx(compared, rel=0.02)
    assert sum(found["reach"].values()) == pytest.approx(1)
    reach = found["reach"]
    assert reach["linear layers"] + reach["experts"] > 0.95
    assert "experts out of reach" not in reach
    assert ("vision and other towers" in found["reach"]) == (name == "Llama-4-Scout")


def test_the_rank_of_experts_counts_in_every_repair_that_holds_factors() -> None:
    by_rank = {rank: {(r.method, r.sharding): r for r in planned("Qwen3-30B-A3B", rank_experts=rank)[1].rows}
               for rank in (1, 4)}  # fmt: skip
    for method in ("rollback", "lowrank"):
        one, four = (by_rank[rank][method, "zero3"] for rank in (1, 4))
        experts = 3 * 128 * 48 * (1536 + 2048 + 2048 + 768)
        assert four.result - one.result == 4 * (experts + 3 * 128 * 48 * 2048), "gate and up have an A each"
        assert four.memory.steady <= four.memory.step
        assert four.memory.step - one.memory.step >= 2 * 4 * experts


def test_the_gradients_of_experts_count_as_they_are_captured() -> None:
    torch.manual_seed(0)
    fields = config(
        "qwen3_moe", 16, 32, 2, 2, 1, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=16, head_dim=8,
        vocab_size=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_moe"].from_dict(fields)).requires_grad_(False)
    targets = select_linears(model).targets
    gradients, tokens = Gradients(targets), torch.arange(20)[None]
    with gradients.capturing(model):
        model(tokens).logits.float().logsumexp(-1).sum().backward()
    held = sum(side.nbytes for name in gradients.deltas for side in gradients.pair(name))
    shape, work = model_shape(fields), Work(1, 20, 20, total=20, rank_experts=1)
    choice = Choice("lowrank", "bf16", "none", item=4)
    assert sum(size * count for size, count in passing._pairs(shape, choice, work)) == held
    left = replace(work, rank_experts=0)
    layers = 20 * 4 * sum(sum(w.shape) * w.count for w in shape.patched)
    assert sum(size * count for size, count in passing._pairs(shape, choice, left)) == layers
    captured = [sum(size * count for size, count in passing._captured(shape, choice, each)) for each in (work, left)]
    assert captured[0] - captured[1] == held - layers


def test_the_table_says_what_a_patch_reaches() -> None:
    settings, plan = planned("Llama-4-Scout")
    assert "GB of them" in shown(settings, plan)
    assert "vision and other towers 0.8%" in shown(settings, plan)
    said = shown(*planned("Mixtral-8x22B", rank_experts=2))
    assert "896 matrices of experts at rank 2 0.12 GB" in said


def shown(settings: Settings, plan: Plan) -> str:
    file = io.StringIO()
    print_plan(settings.plan, plan, Console(file=file))
    return " ".join(file.getvalue().split())


@pytest.mark.parametrize("name", FORMS)
def test_the_patch_of_experts_is_as_large_as_the_one_that_is_written(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    linears = select_linears(model).every
    write_loadable(tmp_path, update_of(model, 4, 2), linears, "", torch.bfloat16, copy.deepcopy(model).to("meta"))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    written = sum(tensor.nbytes for key, tensor in stored.items() if ".experts." in key)
    shape = model_shape({"model_type": name, **SPARSE[name][0]})
    settings = Settings(repair=RepairSettings(rank=4, rank_experts=2))
    found = tuple(rows(settings, PlannedModel(name, shape)))
    assert Plan(PlannedModel(name, shape), 1, 4, 2, found, found).patch_bytes["experts"] == written


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("qwen3_moe", {"num_experts": -3}, "is of -3 experts"),
        ("mixtral", {"num_local_experts": 0}, "is of 0 experts"),
        ("mixtral", {"num_experts_per_tok": 0}, "sends a token to 0 of"),
        ("gpt_oss", {"num_experts_per_tok": 99}, r"sends a token to 99 of \d+ experts"),
    ],
)
def test_a_mixture_that_there_is_not_is_refused(kind: str, fields: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        model_shape({"model_type": kind, **SPARSE[kind][0], **fields})


def test_no_experts_are_a_dense_model_where_transformers_makes_one() -> None:
    shape = model_shape({"model_type": "qwen3_moe", **SPARSE["qwen3_moe"][0], "num_experts": 0})
    assert not shape.experts
    assert shape.of("linear")


@pytest.mark.parametrize(("name", "form", "size"), [("gpt-oss-120b", "mxfp4", 65.3), ("DeepSeek-V3", "fp8", 673)])
def test_files_in_fewer_bits_are_planned_as_they_are(name: str, form: str, size: float, tmp_path: Path) -> None:
    config = {**MODELS[name][0], "quantization_config": {"quant_method": form}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = Settings(model=ModelSettings(path=str(tmp_path / "config.json")))
    model = read_model(settings)
    found = tuple(rows(settings, model))
    plan = Plan(model, 8, 20, 1, found, found)
    assert plan.checkpoint_bytes / 1e9 == pytest.approx(size, rel=0.01)
    assert plan.compared < 1.1 * 2 * plan.checkpoint_bytes
    said = shown(settings, plan)
    assert f"files are in {form.upper()}" in said
    assert "served as an adapter" in said
    assert "files are in" not in shown(*planned(name))
