"""The command by which a patch is served."""

from __future__ import annotations

import json

import pytest

from oneshot.report.serving import largest_rank, serve_command


@pytest.mark.parametrize(("rank", "flag"), [(4, ""), (16, ""), (17, "32"), (20, "32"), (64, "64"), (300, "320")])
def test_the_largest_rank_is_one_that_vllm_takes(rank, flag):
    said = serve_command("org/model", "run/patch", rank)
    wide = f"--max-lora-rank {flag} " if flag else ""
    assert said == f"vllm serve org/model --enable-lora {wide}--lora-modules safe=run/patch"


def test_a_rank_that_vllm_does_not_take_has_no_command():
    assert serve_command("org/model", "run/patch", 513) == ""


def test_names_are_quoted():
    assert "'safe=a b/patch'" in serve_command("org/model", "a b/patch", 8)


@pytest.mark.parametrize(("config", "rank"), [({"r": 8}, 8), ({"r": 8, "rank_pattern": {"q_proj": 24}}, 24)])
def test_the_rank_is_the_largest_of_all_modules(config, rank, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert largest_rank(tmp_path) == rank
