"""What a patch can reach of a model and of the fine-tune's update, by kind; and where that is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_carrier import tiny
from tiny import tiny_model, tiny_runtime

from oneshot.patch.coverage import coverage, kind_of
from oneshot.patch.linears import select_linears
from oneshot.report.verdict import judge, unreached


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "embeddings"),
        ("transformer.wte.weight", "embeddings"),
        ("model.layers.0.input_layernorm.weight", "norms"),
        ("transformer.h.0.ln_1.bias", "norms"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("backbone.layers.0.mixer.in_proj.weight", "attention"),
        ("model.layers.0.mlp.gate_proj.weight", "MLP"),
        ("model.layers.0.mlp.gate.weight", "routers"),
        ("model.layers.0.mlp.router.norm.weight", "routers"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "MLP"),
        ("model.layers.0.mlp.experts.7.up_proj.weight", "experts"),
        ("model.layers.0.block_sparse_moe.experts.w1", "experts"),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", "vision"),
        ("model.visual.blocks.0.mlp.gate_proj.weight", "vision"),
        ("something.weight", "other"),
    ],
)
def test_a_tensor_is_of_a_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.fixture
def models(tmp_path: Path) -> tuple[Any, Path, Path]:
    """A model, and two checkpoints: of q_proj they differ by 3, of the embedding by 4."""
    model = tiny_model("llama")
    for name in ("finetuned", "aligned"):
        model.save_pretrained(tmp_path / name)
    path = tmp_path / "aligned" / "model.safetensors"
    tensors = load_file(path)
    for name, size in (("model.layers.0.self_attn.q_proj.weight", 3.0), ("model.embed_tokens.weight", 4.0)):
        tensors[name][0, 0] += size
    save_file(tensors, path, metadata={"format": "pt"})
    return model, tmp_path / "finetuned", tmp_path / "aligned"


def test_energy_is_shared_out_over_what_is_reached_and_what_is_not(models: tuple[Any, Path, Path]) -> None:
    model, finetuned, aligned = models
    targets = select_linears(model).targets
    energies = {name: 9.0 * name.endswith("layers.0.self_attn.q_proj") for name in targets}
    facts = coverage(tiny_runtime(), finetuned, targets, aligned, energies).as_facts()
    assert facts["energy"]["reached"] == pytest.approx(9 / 25, rel=1e-4)
    assert facts["energy"]["kinds"]["embeddings"] == {"reached": 0.0, "of_all": pytest.approx(16 / 25, rel=1e-4)}
    assert facts["energy"]["kinds"]["attention"] == {"reached": 1.0, "of_all": pytest.approx(9 / 25, rel=1e-4)}
    reached = sum(module.weight.numel() for module in targets.values())
    every = sum(parameter.numel() for parameter in model.parameters())
    assert facts["parameters"]["reached"] == pytest.approx(reached / every)
    assert "not_compared" not in facts


def test_without_an_update_only_weights_are_counted(models: tuple[Any, Path, Path]) -> None:
    model, finetuned, _ = models
    facts = coverage(tiny_runtime(), finetuned, select_linears(model).targets, None, {}).as_facts()
    assert set(facts) == {"parameters"}
    assert torch.tensor([row["of_all"] for row in facts["parameters"]["kinds"].values()]).sum() == pytest.approx(1)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"])
def test_of_experts_their_own_matrices_count_whatever_the_files_call_them(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path)
    targets = select_linears(model).targets
    facts = coverage(tiny_runtime(), tmp_path, targets, None, {}).as_facts()
    reached = sum(layer.out_features * layer.in_features for layer in targets.values())
    every = sum(parameter.numel() for parameter in model.parameters())
    assert facts["parameters"]["reached"] == pytest.approx(reached / every)


def _report(share: float) -> dict[str, Any]:
    rates = {"asr": 0.0, "over_refusal": 0.0, "lookalike_refusal": 0.0}
    value = {name: {"value": rate, "n": 40} for name, rate in rates.items()}
    before = {**value, "asr": {"value": 1.0, "n": 40}}
    kinds = {"attention": {"reached": 1.0, "of_all": share}, "embeddings": {"reached": 0.0, "of_all": 1 - share}}
    coverage = {"energy": {"reached": share, "kinds": kinds}}
    return {"stages": {"finetuned": before, "repaired": value}, "repair": {"coverage": coverage}}


def test_a_repair_that_reaches_little_says_so_in_its_headline() -> None:
    assert judge(_report(0.6)).headline == "repaired"
    assert judge(_report(0.3)).word == "repaired", "what was measured is good nonetheless"
    assert judge(_report(0.3)).headline == (
        "repaired (of the fine-tune's update the patch can reach 30%, the rest is mostly in embeddings)"
    )


def test_what_is_not_reached_is_told_by_kind() -> None:
    said = unreached(_report(0.3)["repair"]["coverage"])
    assert said == "The patch can reach 30.0% of the fine-tune's squared update; what it cannot is in embeddings 70.0%."
    assert unreached(_report(1.0)["repair"]["coverage"]) == ""
    assert unreached(None) == ""


def test_where_the_share_is_said_it_is_said_what_it_leaves_out() -> None:
    some, little, all_of_it = _report(0.8), _report(0.3), _report(1.0)
    for report in (some, little, all_of_it):
        report["repair"]["coverage"]["not_compared"] = 2
    left_out = ", without 2 tensors that could not be compared"
    assert f"80.0% of the fine-tune's squared update{left_out}; what it cannot" in unreached(some["repair"]["coverage"])
    assert (
        unreached(all_of_it["repair"]["coverage"])
        == f"The patch can reach 100.0% of the fine-tune's squared update{left_out}."
    )
    assert f"the patch can reach 30%{left_out}, the rest" in judge(little).headline
