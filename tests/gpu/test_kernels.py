"""Weights on a GPU: 4-bit bytes and products, what is read, attention, memory against the plan."""

from __future__ import annotations

from pathlib import Path

import gpu_checks
import pytest


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one large model is written by the first test that asks for it."""
    return tmp_path_factory.mktemp("large") / "model"


@pytest.mark.parametrize("double", [False, True], ids=["scales", "scales quantized"])
def test_four_bit_weights_are_the_cpus(tmp_path: Path, double: bool) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    gpu_checks.four_bit_weights_are_the_cpus("cuda", tmp_path / "m", double=double)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_four_bit_layers_multiply(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    gpu_checks.four_bit_layers_multiply("cuda", tmp_path / "m", dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensors_arrive(tmp_path: Path, dtype: str) -> None:
    gpu_checks.tensors_arrive("cuda", tmp_path / "m", dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flash_attention_is_taken_and_gives_what_sdpa_gives(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    gpu_checks.attention_is_alike("cuda", tmp_path / "m", dtype, "flash_attention_2")


@pytest.mark.parametrize("method", ["lowrank", "lora"])
def test_memory_is_within_a_tenth_of_the_plan(large: Path, method: str) -> None:
    measured, planned = gpu_checks.memory_is_as_planned("cuda", large, gpu_checks.LARGE, method)
    assert abs(planned / measured - 1) < 0.1, f"measured {measured:,} bytes, planned {planned:,}"
