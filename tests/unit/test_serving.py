"""The command by which a patch is served."""

from __future__ import annotations

import json

import pytest

from oneshot.report.serving import serve_command


def patch_of(folder, **config):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/model", **config}))
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
