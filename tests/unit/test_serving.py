"""The command by which a patch is served."""

from __future__ import annotations

import json

import pytest

from oneshot.report.serving import serve_command


def patch_of(folder, **config):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/model"} | config))
    return folder


@pytest.mark.parametrize(("rank", "flag"), [(4, ""), (16, ""), (17, "32"), (20, "32"), (64, "64"), (300, "320")])
def test_the_largest_rank_is_one_that_vllm_takes(rank, flag, tmp_path):
    said = serve_command(patch_of(tmp_path, r=rank), "run/patch")
    wide = f"--max-lora-rank {flag} " if flag else ""
    assert said == f"vllm serve org/model --enable-lora {wide}--lora-modules safe=run/patch"


def test_a_rank_that_vllm_does_not_take_has_no_command(tmp_path):
    assert serve_command(patch_of(tmp_path, r=513), "run/patch") == ""
    assert serve_command(tmp_path / "none", "run/patch") == ""


def test_names_are_quoted(tmp_path):
    assert "'safe=a b/patch'" in serve_command(patch_of(tmp_path, r=8), "a b/patch")


def test_the_rank_is_the_largest_of_all_modules(tmp_path):
    said = serve_command(patch_of(tmp_path, r=8, rank_pattern={"q_proj": 24}), "run/patch")
    assert "--max-lora-rank 32" in said


def test_a_commit_is_served(tmp_path):
    assert "vllm serve org/model --revision abc --enable-lora" in serve_command(
        patch_of(tmp_path, r=8, revision="abc"), "p"
    )


@pytest.mark.parametrize(("kind", "asks"), [("qwen2_moe", True), ("gpt_oss", False)])
def test_experts_held_together_are_said_where_vllm_takes_single_ones(kind, asks, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": kind}))
    experts = {"target_parameters": ["model.layers.0.mlp.experts.down_proj"], "target_modules": ["q_proj"]}
    patch = patch_of(tmp_path, r=8, base_model_name_or_path=str(tmp_path / "base"), **experts)
    said = serve_command(patch, "run/patch")
    assert ("--enable-mixed-moe-lora-format" in said) == asks
    assert ('"path": "run/patch", "is_3d_lora_weight": true' in said) == asks
    dense = {"target_parameters": ["model.layers.0.mlp.shared_expert.down_proj.weight"]}
    plain = patch_of(tmp_path, r=8, base_model_name_or_path=str(tmp_path / "base"), **dense)
    assert "mixed" not in serve_command(plain, "run/patch")


def test_llama_4s_experts_are_merged_and_not_served(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama4"}))
    experts = {"target_parameters": ["feed_forward.experts.down_proj"], "target_modules": ["q_proj"]}
    assert serve_command(patch_of(tmp_path, r=8, base_model_name_or_path=str(tmp_path / "base"), **experts), "p") == ""
    attention = {"target_modules": ["q_proj"], "base_model_name_or_path": str(tmp_path / "base")}
    assert serve_command(patch_of(tmp_path, r=8, **attention), "p").startswith("vllm serve")
