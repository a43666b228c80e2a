"""Fused experts in 4 bits at any number of ranks: the same bytes, logits and gradients, and each rank its share."""

from __future__ import annotations

import json
from typing import Any

import pytest
import quantized_jobs as jobs
import torch
import transformers
from ranks import start_ranks

pytestmark = pytest.mark.distributed
WORLDS = (0, 1, 2, 3)  # 0: one process without DeepSpeed
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
SIZES = {"hidden_size": 48, "intermediate_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[int, list[Any]]]:
    """The plain model, and what the ranks of every world found of it in 4 bits."""
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(11)
    config = transformers.MixtralConfig(**{**jobs.SHAPES, **SIZES, **EXPERTS})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="20KB")
    jobs.build_tokenizer().save_pretrained(folder)
    results = {}
    for world in WORLDS:
        where = tmp_path_factory.mktemp("ranks") / "run"
        arguments = {"folder": str(folder), "double": True}
        sharding = "zero3" if world else "none"
        results[world] = start_ranks(jobs.experts, max(world, 1), sharding, where, arguments).results()
    return model, results


def test_all_ranks_hold_the_bytes_of_the_whole_parameter(found: tuple[Any, dict[int, list[Any]]]) -> None:
    from bitsandbytes.functional import quantize_4bit

    model, results = found
    names = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
    wanted = {}
    for name in names:
        data, state = quantize_4bit(
            model.get_parameter(name).detach().reshape(-1), blocksize=64, quant_type="nf4", compress_statistics=True,
            quant_storage=torch.float32,
        )  # fmt: skip
        wanted[name] = [jobs.digest(data), jobs.digest(state.absmax)]
    for world, ranks in results.items():
        for each in ranks:
            assert each["packed"] == wanted, world


def test_logits_and_gradients_are_those_of_one_process(found: tuple[Any, dict[int, list[Any]]]) -> None:
    _, results = found
    (alone,) = results[0]
    for world, ranks in results.items():
        for each in ranks:
            assert {key: each[key] for key in ("logits", "again")} == {
                key: alone[key] for key in ("logits", "again")
            }, world


def test_a_rank_holds_its_share(found: tuple[Any, dict[int, list[Any]]]) -> None:
    model, results = found
    for world, ranks in results.items():
        for each in ranks:
            for name, nbytes in each["held"].items():
                elements = model.get_parameter(name).numel() // 8  # fp32 elements of eight packed weights
                assert nbytes == 4 * -(-elements // max(world, 1)), json.dumps([world, name])
